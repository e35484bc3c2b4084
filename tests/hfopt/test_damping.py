"""Levenberg-Marquardt on hand-made ratios; rho and calibration of whole steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hfopt
from hfopt import CG, FixedDamping, LevenbergMarquardt
from tests.hfopt.tools import Point, dense_gauss_newton, dense_hessian, flat, mlp, randn, theta

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("rho", "accepted", "factor"),
    [
        (0.249, True, 1.5),
        (0.25, True, 1.0),
        (0.5, True, 1.0),
        (0.75, True, 1.0),
        (0.751, True, 2 / 3),
        (1.0, True, 2 / 3),
        (50.0, True, 2 / 3),
        (0.0, True, 1.5),
        (-3.0, True, 1.5),
        (NAN, True, 1.5),
        (-INF, True, 1.5),
        (1.0, False, 4.0),
        (0.5, False, 4.0),
        (-1.0, False, 4.0),
        (NAN, False, 4.0),
        (INF, False, 4.0),
    ],
)
def test_levenberg_marquardt(rho: float, accepted: bool, factor: float) -> None:
    rule = LevenbergMarquardt(8.0)
    rule.update(rho, accepted)
    assert rule.value == pytest.approx(8.0 * factor)
    custom = LevenbergMarquardt(8.0, increase=2.0, decrease=0.5, rejected=16.0)
    custom.update(rho, accepted)
    assert custom.value == pytest.approx(8.0 * {1.5: 2.0, 1.0: 1.0, 2 / 3: 0.5, 4.0: 16.0}[factor])


def test_an_infinite_ratio_does_not_relax() -> None:
    """f may fall where the model predicted nothing; that is no reason to trust the model more."""
    rule = LevenbergMarquardt(1.0)
    rule.update(INF, True)
    assert rule.value is not None
    assert rule.value >= 1.0


def test_clamps() -> None:
    rule = LevenbergMarquardt(1.0, minimum=0.5, maximum=2.0)
    for _ in range(9):
        rule.update(1.0, True)
    assert rule.value == 0.5
    for _ in range(9):
        rule.update(NAN, False)
    assert rule.value == 2.0
    free = LevenbergMarquardt(3.0)
    for _ in range(500):
        free.update(NAN, False)
    assert free.value == pytest.approx(3e10)
    for _ in range(500):
        free.update(1.0, True)
    assert free.value == pytest.approx(3e-10)


def test_calibration_sets_the_bounds() -> None:
    rule = LevenbergMarquardt()
    assert rule.calibrates
    rule.update(NAN, False)
    assert rule.value is None
    rule.start(1e-7)
    assert not rule.calibrates
    assert rule.bounds() == pytest.approx((1e-17, 1e3))


def test_state_round_trip() -> None:
    rule = LevenbergMarquardt()
    rule.start(5.0)
    rule.update(1.0, True)
    other = LevenbergMarquardt()
    other.load_state_dict(rule.state_dict())
    for r in (other, rule):
        for _ in range(100):
            r.update(0.0, True)
    assert other.value == rule.value


def test_fixed_damping() -> None:
    rule = FixedDamping(0.25)
    rule.update(NAN, False)
    rule.start(3.0)
    assert rule.value == 0.25
    assert not rule.calibrates


@pytest.mark.parametrize(
    "options",
    [
        {"initial": -1.0},
        {"initial": NAN},
        {"initial": INF},
        {"initial": 0.0},
        {"increase": 0.9},
        {"decrease": 1.1},
        {"decrease": 0.0},
        {"rejected": 0.5},
        {"low": 0.8, "high": 0.2},
        {"minimum": -1.0},
        {"maximum": NAN},
    ],
)
def test_bad_settings_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        LevenbergMarquardt(**options)


X = randn(40, 3, seed=1)
Y = X[:, :2] * X[:, 1:] + X[:, :2] + 0.1 * randn(40, 2, seed=2)


def criterion(z: Tensor) -> Tensor:
    return F.mse_loss(z, Y)


def ratio(model: nn.Module, before: Tensor, p: Tensor, matrix: Tensor, gradient: Tensor, decay: float) -> float:
    """rho by hand: ``[f(theta + p) - f(theta)] / (g'p + p'Gp/2)``, without lambda."""

    def f(vector: Tensor) -> float:
        nn.utils.vector_to_parameters(vector, model.parameters())
        return float(criterion(model(X)).detach()) + 0.5 * decay * float(vector @ vector)

    after = theta(model)
    q = gradient @ p + 0.5 * p @ matrix @ p
    change = f(before + p) - f(before)
    nn.utils.vector_to_parameters(after, model.parameters())
    return change / float(q)


@pytest.mark.parametrize("curvature", ["gauss-newton", "hessian"])
@pytest.mark.parametrize("decay", [0.0, 0.05])
@pytest.mark.parametrize("lr", [1.0, 0.6])
@pytest.mark.parametrize("damping", [None, 2.0])
def test_rho_is_that_of_the_undamped_model(curvature: str, decay: float, lr: float, damping: float | None) -> None:
    model = mlp(3, 4, 2, seed=3)
    optimizer = hfopt.HessianFree(
        model.parameters(), lr=lr, curvature=curvature, damping=damping, weight_decay=decay, line_search=None
    )
    for _ in range(4):
        before = theta(model)
        gradient = flat(torch.autograd.grad(criterion(model(X)), list(model.parameters()))) + decay * before
        if curvature == "hessian":
            matrix = dense_hessian(model, lambda m: criterion(m(X)))
        else:
            matrix = dense_gauss_newton(model, lambda m: m(X), criterion)
        matrix = matrix + decay * torch.eye(len(matrix), dtype=torch.float64)
        optimizer.step(lambda: criterion(model(X)))
        s = optimizer.stats[-1]
        assert s.accepted
        p = theta(model) - before
        assert s.rho == pytest.approx(ratio(model, before, p, matrix, gradient, decay), rel=1e-6)
        assert s.quadratic == pytest.approx(float(gradient @ p + 0.5 * p @ matrix @ p), rel=1e-6)
        assert s.gradient_norm == pytest.approx(float(gradient.norm()), rel=1e-10)
        assert s.update_norm == pytest.approx(float(p.norm()), rel=1e-8)


def test_rho_with_a_learning_rate_of_its_own_per_group() -> None:
    model = mlp(3, 4, 2, seed=4)
    groups = [{"params": model[0].parameters(), "lr": 0.3}, {"params": model[2].parameters(), "weight_decay": 0.1}]
    optimizer = hfopt.HessianFree(groups, line_search=None, damping=0.1)
    decay = 0.1 * (torch.arange(26) >= 16).double()
    before = theta(model)
    gradient = flat(torch.autograd.grad(criterion(model(X)), list(model.parameters()))) + decay * before
    matrix = dense_gauss_newton(model, lambda m: m(X), criterion) + decay.diag()
    optimizer.step(lambda: criterion(model(X)))
    p = theta(model) - before
    q = float(gradient @ p + 0.5 * p @ matrix @ p)
    s = optimizer.stats[-1]
    change = s.new_loss - s.loss + 0.5 * float(decay @ (theta(model).square() - before.square()))
    assert s.quadratic == pytest.approx(q, rel=1e-8)
    assert s.rho == pytest.approx(change / q, rel=1e-8)


def test_rho_is_one_on_a_quadratic() -> None:
    """Whatever lambda: the undamped model of a quadratic is exact."""
    model = Point(randn(5, seed=5))
    a, b = randn(9, 5, seed=6), randn(9, seed=7)
    for damping in (1e-6, 1.0, 1e3):
        optimizer = hfopt.HessianFree(model.parameters(), damping=FixedDamping(damping))
        for _ in range(3):
            optimizer.step(lambda: F.mse_loss(a @ model(), b))
            s = optimizer.stats[-1]
            # Where the decrease is a share e of the loss, rho is known to eps / e.
            assert s.rho == pytest.approx(1.0, abs=1e-9 + 1e-14 * s.loss / -s.quadratic)


def test_lambda_follows_rho() -> None:
    """Every recorded lambda is the rule's answer to the recorded ratio."""
    model = mlp(3, 6, 2, seed=8)
    optimizer = hfopt.HessianFree(model.parameters(), damping=30.0)
    for _ in range(15):
        optimizer.step(lambda: criterion(model(X)))
    for s, following in zip(optimizer.stats[:-1], optimizer.stats[1:], strict=True):
        factor = 4.0 if not s.accepted else 2 / 3 if s.rho > 0.75 else 1.0 if s.rho >= 0.25 else 1.5
        assert s.new_damping == pytest.approx(factor * s.damping)
        assert following.damping == s.new_damping
    assert len({s.damping for s in optimizer.stats}) > 3


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "mse": criterion,
    "cross_entropy": lambda z: F.cross_entropy(z, Y.argmax(1)),
    "own": lambda z: (z - Y).cosh().log().mean(),
}


def trajectory(loss: Callable[[Tensor], Tensor], scale: float, **options: Any) -> tuple[list[Tensor], list[Any]]:
    model = mlp(3, 2, 2, seed=9)
    optimizer = hfopt.HessianFree(model.parameters(), **options)
    points = []

    def closure() -> tuple[Tensor, Tensor]:
        z = model(X)
        return z, scale * loss(z)

    for _ in range(8):
        optimizer.step(closure)
        points.append(theta(model))
    return points, optimizer.stats


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("power", [-20, 20, 60, -60])
def test_a_power_of_two_before_the_loss_changes_not_a_bit(name: str, power: int) -> None:
    """Scaling by a power of two is exact in floating point, so nothing may depend on the loss's unit at all."""
    points, stats = trajectory(LOSSES[name], 1.0)
    scaled, scaled_stats = trajectory(LOSSES[name], 2.0**power)
    for a, b in zip(points, scaled, strict=True):
        assert torch.equal(a, b)
    for s, t in zip(stats, scaled_stats, strict=True):
        assert (t.rho, t.damping, t.cg_iterations) == (s.rho, s.damping * 2.0**power, s.cg_iterations)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("curvature", ["gauss-newton", "hessian"])
def test_the_scale_of_the_loss_does_not_matter(name: str, scale: float, curvature: str) -> None:
    cg = CG(max_iterations=5)  # long solves let rounding grow until the choice of an iterate turns on it
    points, stats = trajectory(LOSSES[name], 1.0, curvature=curvature, cg=cg)
    scaled, scaled_stats = trajectory(LOSSES[name], scale, curvature=curvature, cg=cg)
    for a, b in zip(points, scaled, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)
    assert [t.damping / scale for t in scaled_stats] == pytest.approx([s.damping for s in stats], rel=1e-5)
    assert stats[-1].new_loss < 0.8 * stats[0].loss


def test_calibration_finds_a_lambda_that_predicts() -> None:
    for seed in range(5):
        model = mlp(3, 6, 2, seed=10 + seed)
        optimizer = hfopt.HessianFree(model.parameters())
        optimizer.step(lambda: criterion(model(X)))  # noqa: B023 - used at once
        s = optimizer.stats[0]
        assert s.accepted
        assert s.rho >= 0.25
        assert s.new_loss < 0.9 * s.loss
