"""Bad batches and rejected steps: parameters and damping stay, and training goes on as if nothing had been."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hfopt
from tests.hfopt.tools import mlp, randn, theta

X, Y = randn(20, 3, seed=1), randn(20, 2, seed=2)


def mse(model: nn.Module, x: Tensor = X, y: Tensor = Y) -> Callable[[], Tensor]:
    return lambda: F.mse_loss(model(x), y)


class Liar(nn.Module):
    """The loss falls along the tangent but in truth rises wherever one goes."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.tensor([0.1, -0.7, 1e-3], dtype=torch.float64))
        self.start = self.x.detach().clone()
        self.cliff = 10.0

    def forward(self) -> Tensor:
        away = (self.x.detach() - self.start).abs().max() > 0
        return self.x + (self.cliff if away else 0.0)


@pytest.mark.parametrize("cliff", [10.0, math.nan, math.inf])
@pytest.mark.parametrize("backtracking", ["walk", "smallest", "none"])
def test_a_rejected_step_leaves_every_bit(cliff: float, backtracking: str) -> None:
    model = Liar()
    model.cliff = cliff
    optimizer = hfopt.HessianFree(model.parameters(), damping=1.0, backtracking=backtracking)
    before = model.x.detach().clone()
    for step in range(3):
        version = model.x._version
        optimizer.step(lambda: F.mse_loss(model(), torch.ones(3, dtype=torch.float64)))
        s = optimizer.stats[-1]
        assert torch.equal(model.x, before)
        assert model.x._version == version
        assert (s.accepted, s.step_length, s.update_norm) == (False, 0.0, 0.0)
        assert s.new_loss == s.loss
        assert s.damping == 4.0**step
        assert s.new_damping == 4.0 ** (step + 1)
    assert not optimizer.state[model.x]  # the next solve starts from zero


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("damping", [None, 0.3])
def test_a_loss_that_is_not_finite_is_passed_over(bad: float, damping: float | None) -> None:
    """With a warning; parameters and damping stay, and training goes on with the next batch."""
    model = mlp(3, 4, 2, seed=8)
    optimizer = hfopt.HessianFree(model.parameters(), damping=damping)
    optimizer.step(mse(model))
    before, value = theta(model), optimizer.damping.value
    broken = X.clone()
    broken[3, 1] = bad
    with pytest.warns(UserWarning, match=r"not finite before the step.*skipped"):
        result = optimizer.step(mse(model, broken))
    assert not math.isfinite(float(result) + float(optimizer.stats[-1].gradient_norm))
    assert torch.equal(theta(model), before)
    s = optimizer.stats[-1]
    assert (s.accepted, s.cg_iterations, s.damping) == (False, 0, value)
    optimizer.step(mse(model))
    assert optimizer.stats[-1].accepted
    assert optimizer.stats[-1].damping == value


def test_a_bad_batch_at_the_first_step() -> None:
    model = mlp(3, 4, 2, seed=9)
    optimizer = hfopt.HessianFree(model.parameters())
    with pytest.warns(UserWarning, match="not finite"):
        optimizer.step(mse(model, X * math.nan))
    optimizer.step(mse(model))
    assert optimizer.stats[-1].accepted


@pytest.mark.parametrize(
    ("criterion", "curvature"),
    [
        (lambda z: F.nll_loss(z, torch.zeros(len(z), dtype=torch.long)), "gauss-newton"),
        (lambda z: F.kl_div(z, Y.softmax(1), reduction="batchmean"), "gauss-newton"),
        (lambda z: F.cross_entropy(z, Y.softmax(1)), "fisher"),
    ],
)
def test_bad_data_are_passed_over_behind_every_criterion(criterion: Callable[[Tensor], Tensor], curvature: str) -> None:
    model = nn.Sequential(mlp(3, 4, 2, seed=9), nn.LogSoftmax(1))
    optimizer = hfopt.HessianFree(model.parameters(), curvature=curvature)
    before = theta(model)
    broken = X.clone()
    broken[3, 1] = math.nan
    with pytest.warns(UserWarning, match="not finite before the step"):
        optimizer.step(lambda: criterion(model(broken)))
    assert torch.equal(theta(model), before)
    optimizer.step(lambda: criterion(model(X)))
    assert optimizer.stats[-1].accepted


def normalised(seed: int = 7) -> nn.Sequential:
    return nn.Sequential(mlp(3, 6, seed=seed), nn.BatchNorm1d(6, dtype=X.dtype), nn.Tanh(), mlp(6, 2, seed=8))


class Averages(nn.Module):
    """A running average of inputs in a buffer that is replaced at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = mlp(3, 2, seed=11)
        self.register_buffer("average", torch.zeros(3, dtype=X.dtype))

    def forward(self, x: Tensor) -> Tensor:
        self.average = 0.9 * self.average + 0.1 * x.mean(0)  # type: ignore[operator, has-type]
        z: Tensor = self.linear(x)
        return z


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("make", [normalised, Averages])
def test_a_bad_batch_leaves_running_statistics_alone(make: Callable[[], nn.Module], first: bool, bad: float) -> None:
    """Otherwise they would be NaN for ever after, and so would every output in evaluation mode."""
    model, broken = make(), X.clone()
    broken[3, 1] = bad
    optimizer = hfopt.HessianFree(model.parameters())
    if not first:
        optimizer.step(mse(model))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.warns(UserWarning, match="not finite before the step"):
        optimizer.step(mse(model, broken))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    optimizer.step(mse(model))
    assert optimizer.stats[-1].accepted
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert model.eval()(X).isfinite().all()


def test_a_bad_evaluation_batch_leaves_running_statistics_alone() -> None:
    model = normalised()
    optimizer = hfopt.HessianFree(model.parameters())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.warns(UserWarning, match="not finite before the step"):
        optimizer.step(mse(model), evaluation=mse(model, X * math.nan))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
