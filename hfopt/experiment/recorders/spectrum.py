"""Eigenvalues of the recurrent matrix over training."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from torch import Tensor, nn

from hfopt.experiment.hooks import Experiment
from hfopt.experiment.recorders.base import Recorder
from hfopt.experiment.store.recorded import Frame

_RECURRENT = re.compile(r"(^|\.)(W_hh|weight_hh|W_)\w*$")


class Spectrum(Recorder):
    """Eigenvalues of a square matrix of the model: arrays `real` (n,) and `imag` (n,), largest modulus first.

    A hidden unit's memory over k steps goes with the kth power of a modulus, as far as units are linear: about 1, it is
    kept.

    Args:
        every: a frame is taken before every so many updates.
        matrix: name of the parameter, as in `model.named_parameters()`; by default the first square one that is called
            W_hh... or weight_hh....
        name: of the frames in `run.recorded`.

    Raises:
        ValueError: when the experiment is built: there is no such matrix, or it is not square.
    """

    name = "spectrum"

    def __init__(self, every: int = 50, matrix: str | None = None, name: str | None = None) -> None:
        super().__init__(every, name)
        self.matrix = matrix

    def attach(self, hf: Experiment) -> None:
        """Find the matrix."""
        square = [name for name, p in hf.model.named_parameters() if p.dim() == 2 and p.shape[0] == p.shape[1]]
        found = [name for name in square if self.matrix == name or (self.matrix is None and _RECURRENT.search(name))]
        if not found:
            what = "no recurrent matrix that is square" if self.matrix is None else f"no square matrix {self.matrix!r}"
            there = ", ".join(square) or "none"
            raise ValueError(f"Spectrum: the model has {what}; give matrix=, one of its square ones: {there}")
        self._found = found[0]

    def record(self, hf: Experiment) -> Frame:
        """The eigenvalues now."""
        values = np.linalg.eigvals(_parameter(hf.tested, self._found).detach().double().cpu().numpy())
        # In an order that rounding does not change between conjugates.
        order = np.lexsort((values.imag, values.real, -np.round(np.abs(values), 12)))
        return {"real": values.real[order].copy(), "imag": values.imag[order].astype(np.float64)}

    def about(self, hf: Experiment) -> dict[str, Any]:
        """Axes and units."""
        return {
            "title": f"eigenvalues of {self._found}",
            "matrix": self._found,
            "arrays": {
                "real": {"label": "real part", "unit": "", "axes": ["eigenvalue"]},
                "imag": {"label": "imaginary part", "unit": "", "axes": ["eigenvalue"]},
            },
        }


def _parameter(model: nn.Module, name: str) -> Tensor:
    return model.get_parameter(name)
