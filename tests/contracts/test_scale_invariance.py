"""No default depends on the scale of the loss or of the data."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hfopt
from tests.hfopt.tools import mlp, randn, theta

X, Y = randn(20, 3, seed=1), randn(20, 2, seed=2)


def trained(scale: float, dtype: torch.dtype, steps: int = 5) -> tuple[Tensor, list[float], list[float]]:
    model = mlp(3, 4, 2, seed=3, dtype=dtype)
    optimizer = hfopt.HessianFree(model.parameters())
    x, y = X.to(dtype), Y.to(dtype)
    for _ in range(steps):
        optimizer.step(lambda: scale * F.mse_loss(model(x), y))
    return theta(model), [s.loss / scale for s in optimizer.stats], [s.damping / scale for s in optimizer.stats]


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-6), (torch.float32, 1e-2)])
def test_a_loss_in_another_unit(scale: float, dtype: torch.dtype, rtol: float) -> None:
    """The same trajectory up to rounding; lambda goes with the loss."""
    end, losses, dampings = trained(1.0, dtype)
    other, other_losses, other_dampings = trained(scale, dtype)
    assert losses[-1] < 0.9 * losses[0]
    assert other_losses == pytest.approx(losses, rel=rtol)
    assert other_dampings == pytest.approx(dampings, rel=max(rtol, 1e-5))
    assert torch.allclose(other, end, rtol=100 * rtol, atol=100 * rtol)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_targets_in_another_unit(scale: float) -> None:
    """Outputs times s by a fixed factor behind the network: the loss has s squared, parameters take the same way."""
    ends = []
    for s in (1.0, scale):
        model = mlp(3, 4, 2, seed=4)
        optimizer = hfopt.HessianFree(model.parameters())
        for _ in range(5):
            optimizer.step(lambda model=model, s=s: F.mse_loss(s * model(X), s * Y))
        ends.append(theta(model))
    assert torch.allclose(ends[0], ends[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_inputs_and_targets_in_another_unit(scale: float) -> None:
    """A linear model of s X and s Y: the loss and its curvature have s squared, the weights are the same."""
    ends = []
    for s in (1.0, scale):
        model = nn.Linear(3, 2, bias=False, dtype=torch.float64)
        with torch.no_grad():
            model.weight.copy_(randn(2, 3, seed=5))
        optimizer = hfopt.HessianFree(model.parameters())
        for _ in range(4):
            optimizer.step(lambda model=model, s=s: F.mse_loss(model(s * X), s * Y))
        ends.append(theta(model))
    assert torch.allclose(ends[0], ends[1], rtol=1e-6, atol=1e-8)
