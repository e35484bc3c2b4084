"""Texts over training: samples of a generative model, or answers to the first test sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hfopt.experiment.carried import outputs_of
from hfopt.experiment.hooks import Experiment
from hfopt.experiment.recorders.base import Recorder
from hfopt.experiment.recorders.sequences import as_array, batch_dim, first_sequences, predictions
from hfopt.experiment.store.recorded import Frame

Draw = Callable[[Experiment, torch.Generator], str]


class Samples(Recorder):
    """A text per frame, as the array `text` (bytes,) of UTF-8 that ends with zeros.

    :func:`hfopt.experiment.recorders.text_of` reads it.

    Args:
        every: a frame is taken before every so many updates.
        draw: makes the text from the experiment and a generator that is seeded by `hf.step`, on the CPU:
            ``draw=lambda hf, generator: sample(hf.model, generator)``. By default targets and answers of the first test
            sequences.
        count: how many sequences that is.
        longest: bytes of the longest text; what is beyond is cut off.
        name: of the frames in `run.recorded`.

    Raises:
        ValueError: when the experiment is built: without `draw`, the test batches have no targets.
    """

    name = "samples"

    def __init__(
        self, every: int = 20, draw: Draw | None = None, count: int = 5, longest: int = 2000, name: str | None = None
    ) -> None:
        super().__init__(every, name)
        if count < 1 or longest < 1:
            raise ValueError(f"Samples: count={count} and longest={longest} must be at least 1")
        self._draw, self.count, self.longest = draw, count, longest

    def attach(self, hf: Experiment) -> None:
        """Refuse a problem without targets if there is nothing to draw."""
        if self._draw is None and not hasattr(hf.problem(hf.problem.test_batches[0]), "targets"):
            raise ValueError("Samples: the test batches have no targets; give draw=, which makes a text")

    def record(self, hf: Experiment) -> Frame:
        """The text now."""
        with torch.no_grad():
            text = (
                _answers(hf, self.count)
                if self._draw is None
                else self._draw(hf, torch.Generator().manual_seed(hf.step))
            )
        data = text.encode("utf-8")[: self.longest].decode("utf-8", "ignore").encode("utf-8")
        return {"text": np.frombuffer(data.ljust(self.longest, b"\0"), np.uint8)}

    def about(self, hf: Experiment) -> dict[str, Any]:
        """What it is."""
        title = "answers to test sequences" if self._draw is None else "samples"
        return {
            "title": title,
            "arrays": {"text": {"label": "UTF-8, then zeros", "unit": "bytes", "axes": ["byte"]}},
        }


def text_of(frame: Frame) -> str:
    """The text of a frame of samples."""
    return bytes(frame["text"]).rstrip(b"\0").decode("utf-8", "replace")


def _answers(hf: Experiment, count: int) -> str:
    """A line per sequence: what it should be and what the model says, at the scored steps."""
    dim = batch_dim(hf.model)
    batch = first_sequences(hf.problem(hf.problem.test_batches[0]), count, dim)
    outputs: Tensor = predictions(hf, outputs_of(hf.forward(hf.tested, batch)))
    said = as_array(outputs, dim if outputs.dim() > 2 else 0)
    targets, mask = as_array(batch.targets, dim), getattr(batch, "mask", None)
    scored = None if mask is None else as_array(mask, dim).astype(bool)
    lines = []
    for b in range(min(count, said.shape[-1])):
        rows, wanted = said[..., b], targets[..., b]
        if scored is not None and scored[..., b].shape == rows.shape[:1]:
            rows = rows[scored[..., b]]
            wanted = wanted[scored[..., b]] if wanted.shape[:1] == scored.shape[:1] else wanted
        if wanted.dtype.kind in "iu" and rows.ndim == wanted.ndim + 1:
            rows = rows.argmax(-1)
        lines.append(f"{_words(wanted)} -> {_words(rows)}")
    return "\n".join(lines)


def _words(values: Any) -> str:
    return " ".join(f"{v:.3f}" if values.dtype.kind == "f" else str(v) for v in np.ravel(values).tolist())
