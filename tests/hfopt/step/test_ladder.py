"""How lambda is chosen: plateaus, new data, and losses at their rounding error."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hfopt
from hfopt import FixedDamping, KrylovDamping, LevenbergMarquardt, LineSearch
from tests.hfopt.tools import mlp, randn, theta


def temperature(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits eight times too large, and classes drawn from them at temperature four."""
    draws = torch.Generator().manual_seed(0)
    z = torch.randn(500, 10, generator=draws, dtype=torch.float64) * 8
    y = (z / 4 - torch.rand(z.shape, generator=draws, dtype=torch.float64).log().neg().log()).argmax(1)
    return z.to(dtype), y


@pytest.mark.parametrize("options", [{}, {"solver": "cg"}, {"damping": LevenbergMarquardt()}], ids=["", "cg", "lm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("start", [0.0, 1.5, 2.5])
def test_a_log_temperature_does_not_end_on_the_plateau(start: float, dtype: torch.dtype, options: Any) -> None:
    z, y = temperature(dtype)
    s = nn.Parameter(torch.tensor(start, dtype=dtype))
    optimizer = hfopt.HessianFree([s], **options)
    for _ in range(25):
        optimizer.step(lambda: F.cross_entropy(z * s.exp(), y))
    grid = torch.linspace(-3, 1, 401, dtype=dtype)
    best = min(float(F.cross_entropy(z * g.exp(), y)) for g in grid)
    assert optimizer.stats[-1].new_loss == pytest.approx(best, rel=1e-3)


def test_a_unit_does_not_saturate_for_good() -> None:
    """A sigmoid of scale and shift, begun where it is saturated on most of the data: two parameters."""
    x = torch.linspace(-3, 3, 200, dtype=torch.float64)
    y = (0.7 * x - 0.3).sigmoid()
    p = nn.Parameter(torch.tensor([4.0, 6.0], dtype=torch.float64))
    optimizer = hfopt.HessianFree([p])
    for _ in range(40):
        optimizer.step(lambda: F.mse_loss((p[0] * x + p[1]).sigmoid(), y))
    assert p.tolist() == pytest.approx([0.7, -0.3], abs=1e-4)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
@pytest.mark.parametrize("options", [{}, {"solver": "cg"}, {"preconditioner": None}], ids=["dense", "kfac", "cg"])
def test_a_loss_in_any_unit_of_single_precision(scale: float, options: Any) -> None:
    losses = []
    for s in (1.0, scale):
        model = mlp(3, 4, 2, seed=3, dtype=torch.float32)
        x, y = randn(20, 3, seed=1).float(), randn(20, 2, seed=2).float()
        optimizer = hfopt.HessianFree(model.parameters(), **options)
        for _ in range(4):
            optimizer.step(lambda model=model, x=x, y=y, s=s: s * F.mse_loss(model(x), y))  # type: ignore[misc]
        assert all(step.accepted for step in optimizer.stats)
        losses.append([step.new_loss / s for step in optimizer.stats])
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


def test_at_the_minimum_steps_end_as_converged_and_lambda_stays() -> None:
    """In single precision, near the minimum, a choice by the loss would be one by its last digits."""
    x, y = randn(200, 8, seed=4).float(), randn(200, 1, seed=5).float()
    model = nn.Linear(8, 1)
    optimizer = hfopt.HessianFree(model.parameters(), solver="cg")
    for _ in range(25):
        optimizer.step(lambda: F.mse_loss(model(x), y))
    last = optimizer.stats[-5:]
    assert {s.cg_reason for s in last} == {"converged"}
    assert len({s.new_damping for s in last}) == 1
    assert all(s.evaluations <= 1 and not s.accepted for s in last)
    before = last[-1].new_loss
    optimizer.step(lambda: F.mse_loss(model(x), y + 1))  # and goes on where the data change
    assert optimizer.stats[-1].accepted
    assert optimizer.stats[-1].new_loss < optimizer.stats[-1].loss
    assert math.isfinite(before)


def test_on_new_data_lambda_follows_rho() -> None:
    model = mlp(3, 8, 1, seed=6)
    optimizer = hfopt.HessianFree(model.parameters(), solver="cg")
    draws = torch.Generator().manual_seed(7)
    for _ in range(12):
        x = torch.randn(30, 3, generator=draws, dtype=torch.float64)
        y = torch.randn(30, 1, generator=draws, dtype=torch.float64)
        optimizer.step(lambda x=x, y=y: F.mse_loss(model(x), y))  # type: ignore[misc]
    for s in optimizer.stats[1:]:
        factor = 4.0 if not s.accepted else 2 / 3 if s.rho > 0.75 else 1.0 if s.rho >= 0.25 else 1.5
        assert s.new_damping == pytest.approx(factor * s.damping)


def closure_of(model: nn.Module) -> Callable[[], Tensor]:
    x, y = randn(20, 3, seed=8), randn(20, 2, seed=9)
    return lambda: F.mse_loss(model(x), y)


@pytest.mark.parametrize("rule", [KrylovDamping(), LevenbergMarquardt(), hfopt.damping.AverageRatio()], ids=str)
def test_a_rule_given_twice_hands_nothing_on(rule: Any) -> None:
    ends = []
    for _ in range(2):
        model = mlp(3, 4, 2, seed=10)
        optimizer = hfopt.HessianFree(model.parameters(), damping=rule)
        for _ in range(3):
            optimizer.step(closure_of(model))
        ends.append(theta(model))
    assert rule.value is None
    assert torch.equal(ends[0], ends[1])


def test_a_line_search_is_an_optimizers_own() -> None:
    given = hfopt.FullStep()
    one, other = (hfopt.HessianFree(mlp(3, 4, 2).parameters(), line_search=given) for _ in range(2))
    assert len({id(given), id(one.line_search), id(other.line_search)}) == 3
    plain = [hfopt.HessianFree(mlp(3, 4, 2).parameters()).line_search for _ in range(2)]
    assert plain[0] is not plain[1]
    assert isinstance(plain[0], LineSearch)


def test_a_fixed_lambda_stays_the_one_that_was_asked_for() -> None:
    model = mlp(3, 4, 2, seed=11)
    saved = hfopt.HessianFree(model.parameters(), damping=FixedDamping(0.5))
    saved.step(closure_of(model))
    state = copy.deepcopy(saved.state_dict())
    other = hfopt.HessianFree(model.parameters(), damping=FixedDamping(2.0))
    with pytest.warns(UserWarning, match=r"lambda 0\.5, but this optimizer has FixedDamping\(2\.0\)"):
        other.load_state_dict(state)
    assert other.damping.value == 2.0
    same = hfopt.HessianFree(model.parameters(), damping=FixedDamping(0.5))
    state["hessian_free"]["damping"]["value"] = 0.25  # set by hand
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same.load_state_dict(state)
    assert same.damping.value == 0.25


def test_small_networks_are_solved_densely_and_exactly() -> None:
    """A quadratic takes one step; settings of conjugate gradients ask for these, whose rule may ask for more."""
    target = randn(30, seed=12)
    for options, reason in (
        ({}, "dense"),
        ({"solver": "cg"}, "residual"),
        ({"cg": hfopt.CG(tolerance=5e-4)}, "progress"),
    ):
        p = nn.Parameter(torch.zeros(30, dtype=torch.float64))
        scales = torch.logspace(0, 2, 30, dtype=torch.float64)
        optimizer = hfopt.HessianFree([p], damping=0, **options)
        optimizer.step(lambda p=p, scales=scales: F.mse_loss(scales * p, scales * target))  # type: ignore[misc]
        s = optimizer.stats[0]
        assert s.cg_reason == reason
        assert (s.new_loss < 1e-16 * s.loss) == (reason != "progress")


def test_dense_steps_with_structural_damping_groups_and_decay() -> None:
    """The same candidates as conjugate gradients that go on to the end."""
    ends = []
    for options in ({"solver": "dense"}, {"cg": hfopt.CG(tolerance=0.0, decay=0.0, max_iterations=60)}):
        model = mlp(3, 4, 2, seed=13)
        groups = [{"params": model[0].parameters(), "lr": 0.5}, {"params": model[2].parameters()}]
        optimizer = hfopt.HessianFree(groups, weight_decay=0.01, damping=0.1, backtracking="none", **options)
        for _ in range(3):
            optimizer.step(closure_of(model))
        ends.append(theta(model))
    assert torch.allclose(ends[0], ends[1], rtol=1e-6, atol=1e-8)
