"""The density of the Gauss-Newton matrix's eigenvalues over training."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from hfopt.curvature.gauss_newton import GaussNewton
from hfopt.experiment.hooks import Experiment
from hfopt.experiment.recorders.base import Recorder
from hfopt.experiment.recorders.sequences import batch_dim, first_sequences
from hfopt.experiment.store.recorded import Array, Frame
from hfopt.linalg.lanczos import lanczos

_POINTS, _DECADES, _WIDTH = 200, 10.0, 0.15
"""Points of the grid, how many decades it reaches below the largest eigenvalue, and the smoothing in decades."""


class CurvatureDensity(Recorder):
    """The density of the eigenvalues of the Gauss-Newton matrix on some test cases, by stochastic Lanczos quadrature.

    Arrays: `grid` (200,), eigenvalues on a logarithmic scale up to beyond the largest; `density` (200,), the share of
    all eigenvalues per decade around each, smoothed by a Gaussian of 0.15 decades; `values` and `weights` (m,), the
    nodes of the quadrature that it is made of, where an estimate of the largest eigenvalue comes first; `below`, the
    share of eigenvalues too small for the grid, zeros among them.

    Args:
        every: a frame is taken before every so many updates.
        iterations: m, products per frame; so many vectors of the size of the parameters are held meanwhile.
        cases: the matrix is that of so many cases of the first test batch.
        name: of the frames in `run.recorded`.

    Source: Lin, Saad & Yang, "Approximating spectral densities of large matrices", SIAM Review 2016; Ghorbani,
    Krishnan & Xiao, "An investigation into neural net optimization via Hessian eigenvalue density", ICML 2019.
    """

    name = "curvature_density"

    def __init__(self, every: int = 50, iterations: int = 24, cases: int = 200, name: str | None = None) -> None:
        super().__init__(every, name)
        if iterations < 1 or cases < 1:
            raise ValueError(f"CurvatureDensity: iterations={iterations} and cases={cases} must be at least 1")
        self.iterations, self.cases = iterations, cases

    def record(self, hf: Experiment) -> Frame:
        """The density now."""
        dim = batch_dim(hf.model)
        whole = hf.problem(hf.problem.test_batches[0])
        batch = first_sequences(whole, self.cases, dim if whole.inputs.dim() > 2 else 0)

        def closure() -> Any:
            return hf.problem.loss(hf.forward(hf.model, batch), batch)

        told: dict[str, Any] = {key: getattr(hf.optimizer, key, None) for key in ("loss", "outputs")}
        with torch.enable_grad():
            op = GaussNewton(closure, hf.model.parameters(), verify=False, **told)
        # Random signs, the same at all steps: frames differ by the matrix alone.
        signs = torch.randint(2, (op.vector.size,), generator=torch.Generator().manual_seed(0))
        start = (2 * signs - 1).to(op.device, op.dtype)
        nodes, weights = lanczos(lambda v: op @ v, start, self.iterations)
        values, shares = np.zeros(self.iterations), np.zeros(self.iterations)
        values[: len(nodes)], shares[: len(nodes)] = nodes.flip(0).numpy(), weights.flip(0).numpy()
        return smoothed(values, shares)

    def about(self, hf: Experiment) -> dict[str, Any]:
        """Axes and units."""
        return {
            "title": "eigenvalues of the Gauss-Newton matrix",
            "cases": self.cases,
            "arrays": {
                "grid": {"label": "eigenvalue", "unit": "", "axes": ["point"]},
                "density": {"label": "share of all eigenvalues", "unit": "per decade", "axes": ["point"]},
                "values": {"label": "node of the quadrature", "unit": "", "axes": ["node"]},
                "weights": {"label": "its weight", "unit": "", "axes": ["node"]},
                "below": {"label": "share below the grid", "unit": "", "axes": []},
            },
        }


def smoothed(values: Array, weights: Array) -> Frame:
    """The arrays of a frame from nodes and weights, the largest node first."""
    top = float(values[0])
    if not 0 < top < math.inf:
        nan = np.full(_POINTS, np.nan)
        return {"grid": nan, "density": nan, "values": values, "weights": weights, "below": np.array(1.0)}
    logs = np.log10(top) + np.linspace(-_DECADES, 4 * _WIDTH, _POINTS)
    counted = values > top * 10.0**-_DECADES
    distance = (logs[:, None] - np.log10(values[counted])[None, :]) / _WIDTH
    bumps = np.exp(-0.5 * distance**2) / (_WIDTH * math.sqrt(2 * math.pi))
    below = np.array(max(0.0, 1.0 - weights[counted].sum()))
    return {
        "grid": 10.0**logs,
        "density": bumps @ weights[counted],
        "values": values,
        "weights": weights,
        "below": below,
    }
