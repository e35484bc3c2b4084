"""Problems whose least loss is zero: lambda stays within its bounds, and the loss goes down to rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import hfopt
from tests.hfopt.tools import Point, mlp, randn

X = randn(30, 3, seed=1)


def teacher(x: Tensor) -> Tensor:
    with torch.no_grad():
        y: Tensor = mlp(3, 3, 2, seed=2)(x)
    return y


def rosenbrock(point: Any) -> tuple[Tensor, Tensor]:
    x = point()
    z = torch.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]])
    return z, torch.zeros(2, dtype=torch.float64)


def closure_of(name: str, model: Any) -> Any:
    if name == "rosenbrock":
        return lambda: F.mse_loss(*rosenbrock(model))
    targets = teacher(X)
    return lambda: F.mse_loss(model(X), targets)


@pytest.mark.parametrize("name", ["teacher", "rosenbrock", "linear"])
def test_lambda_stays_within_its_bounds_and_the_loss_reaches_rounding(name: str) -> None:
    model: Any = Point([-1.2, 1.0]) if name == "rosenbrock" else mlp(3, 3, 2, seed=3)
    closure = closure_of(name, model)
    if name == "linear":
        model = mlp(3, 2, seed=4)
        targets = mlp(3, 2, seed=5)(X).detach()
        closure = lambda: F.mse_loss(model(X), targets)  # noqa: E731
    optimizer = hfopt.HessianFree(model.parameters(), cg=hfopt.CG(tolerance=0.0))
    for _ in range(80):
        optimizer.step(closure)
        damping = optimizer.damping
        assert isinstance(damping, hfopt.LevenbergMarquardt)
        low, high = damping.bounds()
        assert low <= optimizer.stats[-1].new_damping <= high < 1e12
        if optimizer.stats[-1].new_loss < 1e-25:
            break
    assert optimizer.stats[-1].new_loss < 1e-25


def test_steps_at_the_minimum_do_no_harm() -> None:
    """Long after the loss has reached rounding, lambda has not run away and the parameters stay finite."""
    model = mlp(3, 2, seed=6)
    targets = mlp(3, 2, seed=7)(X).detach()
    optimizer = hfopt.HessianFree(model.parameters())
    for _ in range(30):
        optimizer.step(lambda: F.mse_loss(model(X), targets))
    values = [s.new_damping for s in optimizer.stats]
    assert max(values) < 1e3
    assert optimizer.stats[-1].new_loss < 1e-25
    # Training goes on at once where the data change.
    optimizer.step(lambda: F.mse_loss(model(X), targets + 1))
    optimizer.step(lambda: F.mse_loss(model(X), targets + 1))
    assert optimizer.stats[-1].new_loss < 0.2
