"""How much of an answer's gradient reaches the hidden states of earlier steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from hfopt.experiment.hooks import Experiment
from hfopt.experiment.recorders.base import Recorder
from hfopt.experiment.recorders.sequences import batch_dim, can_unroll, first_sequences, unrolled
from hfopt.experiment.store.recorded import Frame


class GradientByLag(Recorder):
    """The norm of the loss's gradient in the hidden states, by how long before the last answer they occur.

    With ``L_b`` the summed loss of sequence b, whose last scored step is ``e_b``, a frame has

        norm(k) = sqrt( mean over b of |dL_b / dh_t|^2 ),    t = e_b - k,

    with h_t all states after step t (those of all layers, cells of an LSTM included). Where it falls by orders of
    magnitude as k rises, gradients vanish. Arrays: `lag` (T,) and `norm` (T,), nan where no sequence is so long.

    Args:
        every: a frame is taken before every so many updates.
        sequences: the mean is over so many of the first test batch.
        name: of the frames in `run.recorded`.

    Raises:
        ValueError: when the experiment is built: the model has no states that can be had one step after the other.

    Source: Hochreiter, diploma thesis, TU München 1991; Bengio, Simard & Frasconi, IEEE Trans. Neural Networks 1994.
    """

    name = "gradient_by_lag"

    def __init__(self, every: int = 10, sequences: int = 32, name: str | None = None) -> None:
        super().__init__(every, name)
        if sequences < 1:
            raise ValueError(f"GradientByLag: sequences={sequences} must be at least 1")
        self.sequences = sequences

    def attach(self, hf: Experiment) -> None:
        """Refuse a model that cannot be unrolled."""
        if not can_unroll(hf.model):
            raise ValueError(
                f"GradientByLag: {type(hf.model).__name__} has neither a method unrolled(inputs), which returns its "
                "outputs and a list of its states (B, n) after each step, nor a recurrent layer of torch in one "
                "direction; leave it out of record="
            )

    def record(self, hf: Experiment) -> Frame:
        """The norms now."""
        batch = first_sequences(hf.problem(hf.problem.test_batches[0]), self.sequences, batch_dim(hf.model))
        with torch.enable_grad():
            outputs, nodes = unrolled(hf, batch)
            # The sum over scored outputs: a sequence's gradient does not depend on how many others there are.
            loss = hf.problem.loss(outputs, batch) * hf.problem.size(batch)
            gradients = torch.autograd.grad(loss, nodes, allow_unused=True)
        squares = torch.stack([self._squares(g, node) for g, node in zip(gradients, nodes, strict=True)])
        by_time = squares.double().cpu().numpy()  # (T, B)
        T, B = by_time.shape
        lags = np.arange(T)
        times = self._last(batch, T, B, batch_dim(hf.model)) - lags[:, None]
        found = np.where(times >= 0, by_time[times.clip(0), np.arange(B)], np.nan)
        known = (times >= 0).any(1)
        norm = np.full(T, np.nan)
        norm[known] = np.sqrt(np.nanmean(found[known], axis=1))
        return {"lag": lags.astype(np.int64), "norm": norm}

    @staticmethod
    def _squares(gradient: Tensor | None, node: Tensor) -> Tensor:
        """Squared norms (B,) of a node's gradient; nodes are (B, n), those of torch's layers (parts, layers, B, h)."""
        if gradient is None:
            gradient = torch.zeros_like(node)
        return gradient.square().sum(1) if gradient.dim() == 2 else gradient.square().sum((0, 1, 3))

    @staticmethod
    def _last(batch: Any, T: int, B: int, dim: int) -> Any:
        """The last scored step (B,) of each sequence; its last step if the batch does not tell."""
        mask = getattr(batch, "mask", None)
        if isinstance(mask, Tensor) and mask.dim() == 2:
            scored = (mask if dim == 1 else mask.t()).cpu().numpy().astype(bool)
            if scored.shape == (T, B) and scored.any(0).all():
                return T - 1 - scored[::-1].argmax(0)
        lengths = getattr(batch, "lengths", None)
        return np.full(B, T - 1) if lengths is None else lengths.cpu().numpy() - 1

    def about(self, hf: Experiment) -> dict[str, Any]:
        """Axes and units."""
        return {
            "title": "gradient by lag",
            "sequences": self.sequences,
            "arrays": {
                "lag": {"label": "steps before the last answer", "unit": "steps", "axes": ["lag"]},
                "norm": {"label": "norm of the gradient in the hidden states", "unit": "", "axes": ["lag"]},
            },
        }
