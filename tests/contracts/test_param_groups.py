"""Parameter groups: their own weight decay, and lr as weights of a step that always leads downhill."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import hfopt
from hfopt import CG, FixedDamping
from tests.hfopt.tools import dense_gauss_newton, flat, mlp, randn, theta

X, Y = randn(20, 3, seed=1), randn(20, 2, seed=2)
FIRST = 16  # numbers in the first of the two layers, of 26
EXACT: dict[str, Any] = {"cg": CG(tolerance=0.0, residual=1e-13), "backtracking": "none", "line_search": None}


def loss(model: Any) -> Tensor:
    return F.mse_loss(model(X), Y)


def derivatives(model: Any) -> tuple[Tensor, Tensor]:
    """Gradient and Gauss-Newton matrix by other routes."""
    g = flat(torch.autograd.grad(loss(model), list(model.parameters())))
    return g, dense_gauss_newton(model, lambda m: m(X), lambda z: F.mse_loss(z, Y))


def grouped(model: Any, first: dict[str, Any], second: dict[str, Any], **options: Any) -> hfopt.HessianFree:
    groups = [{"params": model[0].parameters(), **first}, {"params": model[2].parameters(), **second}]
    return hfopt.HessianFree(groups, **options)


def per_parameter(first: float, second: float) -> Tensor:
    return torch.where(torch.arange(26) < FIRST, first, second).double()


@pytest.mark.parametrize("rates", [(0.5, 0.05), (1e-3, 0.7)])
@pytest.mark.parametrize("preconditioner", [None, "empirical-fisher"])
def test_groups_of_unequal_lr_solve_in_scaled_coordinates(
    rates: tuple[float, float], preconditioner: str | None
) -> None:
    """By hand: y = theta / sqrt(sigma), in which the damped system is the usual one."""
    model = mlp(3, 4, 2, seed=3)
    decay = per_parameter(0.1, 0.0)
    before, (g, G) = theta(model), derivatives(model)
    g, G = g + decay * before, G + decay.diag()
    root = (per_parameter(*rates) / max(rates)).sqrt()
    y = torch.linalg.solve(root[:, None] * G * root + 0.2 * torch.eye(26, dtype=torch.float64), -root * g)
    optimizer = grouped(
        model,
        {"lr": rates[0], "weight_decay": 0.1},
        {"lr": rates[1]},
        damping=FixedDamping(0.2),
        preconditioner=preconditioner,
        **EXACT,
    )
    optimizer.step(lambda: loss(model))
    p = max(rates) * root * y
    s = optimizer.stats[0]
    assert torch.allclose(theta(model) - before, p, rtol=1e-6, atol=1e-9)
    assert s.quadratic == pytest.approx(float(g @ p + 0.5 * p @ G @ p), rel=1e-6)
    assert s.step_length == max(rates)


@pytest.mark.parametrize("damping", [1e-6, 1e-2, 1e3])
def test_the_step_leads_downhill_whatever_the_rates(damping: float) -> None:
    """An ill-conditioned coupling of two parameters, for which steps that are scaled afterwards lead uphill."""
    rows = torch.tensor([[1.0, 0.99], [0.0, 0.14]], dtype=torch.float64)
    target = torch.tensor([1.0, -0.3], dtype=torch.float64)
    uphill = 0
    for rates in ((1.0, 0.01), (0.01, 1.0)):
        params = [torch.nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2)]

        def value(params: list[torch.nn.Parameter] = params) -> Tensor:
            return F.mse_loss(rows @ torch.cat(list(params)), target)

        g = flat(torch.autograd.grad(value(), params))
        naive = -torch.tensor(rates) * torch.linalg.solve(rows.T @ rows + 1e-9 * torch.eye(2), g)
        uphill += int(float(g @ naive) > 0)
        groups = [{"params": [p], "lr": r} for p, r in zip(params, rates, strict=True)]
        optimizer = hfopt.HessianFree(groups, damping=FixedDamping(damping), **EXACT)
        optimizer.step(value)
        assert optimizer.stats[0].accepted
        assert float(g @ flat(params)) < 0
        assert optimizer.stats[0].new_loss < optimizer.stats[0].loss
    assert uphill  # or this test would tell nothing


def test_a_large_lambda_goes_along_the_gradient_as_sgd_does() -> None:
    ours, theirs = mlp(3, 4, 2, seed=4), mlp(3, 4, 2, seed=4)
    optimizer = grouped(ours, {"lr": 0.3}, {"lr": 0.02}, damping=FixedDamping(1e5), **EXACT)
    sgd = torch.optim.SGD(
        [{"params": theirs[0].parameters(), "lr": 0.3e-5}, {"params": theirs[2].parameters(), "lr": 0.02e-5}]
    )
    start = theta(ours)
    optimizer.step(lambda: loss(ours))
    loss(theirs).backward()
    sgd.step()
    assert torch.allclose(theta(ours) - start, theta(theirs) - start, rtol=1e-3, atol=1e-12)


def test_equal_rates_are_one_group() -> None:
    one, two = mlp(3, 4, 2, seed=5), mlp(3, 4, 2, seed=5)
    a = hfopt.HessianFree(one.parameters(), lr=0.4, weight_decay=0.01)
    b = grouped(two, {}, {}, lr=0.4, weight_decay=0.01)
    for _ in range(4):
        a.step(lambda: loss(one))
        b.step(lambda: loss(two))
        assert torch.equal(theta(one), theta(two))


def test_training_with_unequal_rates_from_defaults() -> None:
    model = mlp(3, 4, 2, seed=6)
    optimizer = grouped(model, {"lr": 0.01}, {"lr": 1.0})
    for _ in range(15):
        optimizer.step(lambda: loss(model))
    values = [s.loss for s in optimizer.stats]
    assert values == sorted(values, reverse=True)
    assert values[-1] < 0.75 * values[0]
