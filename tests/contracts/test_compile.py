"""torch.compile'd modules: the steps are those of the module itself."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import hfopt
from tests.hfopt.tools import mlp, randn, theta

X, Y = randn(20, 3, seed=1), randn(20, 2, seed=2)


@pytest.mark.filterwarnings("ignore")  # the compiler's own about what it imports
@pytest.mark.parametrize("curvature", ["gauss-newton", "hessian"])
def test_a_compiled_module_takes_the_same_steps(curvature: str) -> None:
    model, twin = mlp(3, 4, 2, seed=3), mlp(3, 4, 2, seed=3)
    compiled = torch.compile(model, backend="eager")
    ours = hfopt.HessianFree(compiled.parameters(), curvature=curvature)
    plain = hfopt.HessianFree(twin.parameters(), curvature=curvature)
    for _ in range(3):
        ours.step(lambda: F.mse_loss(compiled(X), Y))
        plain.step(lambda: F.mse_loss(twin(X), Y))
    assert torch.allclose(theta(model), theta(twin), rtol=1e-7, atol=1e-9)
    assert ours.stats[-1].new_loss < 0.9 * ours.stats[0].loss
