"""The preconditioner that chooses itself: K-FAC for linear and convolution layers where it pays, otherwise none."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hfopt
from hfopt.preconditioners import Automatic
from models import RNN

Closure = Callable[[], Tensor]


def mlp(cases: int = 40, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Closure]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    x, y = torch.randn(cases, 4, dtype=dtype), torch.randn(cases, 3, dtype=dtype)
    return model, lambda: F.mse_loss(model(x), y)


def convolutional() -> tuple[nn.Module, Closure]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 16, 3))
    x, y = torch.randn(100, 1, 6, 6), torch.randint(3, (100,))
    return model, lambda: F.cross_entropy(model(x), y)


def wide() -> tuple[nn.Module, Closure]:
    """Factors of 500 x 500 for two cases: their inverses cost more than the whole step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(500, 500), nn.Tanh(), nn.Linear(500, 1))
    x, y = torch.randn(2, 500), torch.randn(2, 1)
    return model, lambda: F.mse_loss(model(x), y)


def recurrent() -> tuple[nn.Module, Closure]:
    torch.manual_seed(0)
    model = RNN(2, 10, 1, output="last").sparse_init(0)
    x, y = torch.randn(5, 12, 2), torch.randn(12, 1)
    return model, lambda: F.mse_loss(model(x), y)


def tied() -> tuple[nn.Module, Closure]:
    torch.manual_seed(0)
    layer = nn.Linear(5, 5)
    x, y = torch.randn(30, 5), torch.randn(30, 5)
    return layer, lambda: F.mse_loss(layer(torch.tanh(layer(x))), y)


def two_losses() -> tuple[nn.Module, Closure]:
    model, first = mlp()
    x = torch.randn(20, 4, dtype=torch.float64)
    return model, lambda: first() + F.mse_loss(model(x), torch.zeros(20, 3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("build", "chosen"),
    [(mlp, True), (convolutional, True), (wide, False), (recurrent, False), (tied, False), (two_losses, False)],
)
def test_what_is_chosen(build: Callable[[], tuple[nn.Module, Closure]], chosen: bool) -> None:
    model, loss = build()
    optimizer = hfopt.HessianFree(model.parameters(), preconditioner="auto")
    optimizer.step(loss)
    assert isinstance(optimizer.preconditioner, Automatic)
    assert optimizer.preconditioner.chosen is chosen
    assert optimizer.preconditioner.active is chosen


@pytest.mark.parametrize(
    ("build", "name"), [(mlp, "kfac"), (convolutional, "kfac"), (recurrent, None), (two_losses, None)]
)
def test_steps_are_those_of_the_one_that_is_chosen(
    build: Callable[[], tuple[nn.Module, Closure]], name: str | None
) -> None:
    def train(preconditioner: str | None) -> tuple[nn.Module, list[hfopt.StepStats]]:
        model, loss = build()
        optimizer = hfopt.HessianFree(model.parameters(), preconditioner=preconditioner)
        for _ in range(4):
            optimizer.step(loss)
        return model, [replace(s, seconds=0.0) for s in optimizer.stats]

    ours, stats = train("auto")
    other, others = train(name)
    assert stats == others
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), other.parameters(), strict=True))


def test_a_hessian_and_outputs_without_cases_take_none() -> None:
    model, loss = mlp()
    optimizer = hfopt.HessianFree(model.parameters(), curvature="hessian", preconditioner="auto")
    optimizer.step(loss)
    assert isinstance(optimizer.preconditioner, Automatic)
    assert not optimizer.preconditioner.active
    p = nn.Parameter(torch.tensor(3.0))
    optimizer = hfopt.HessianFree([p], preconditioner="auto")
    for _ in range(5):
        optimizer.step(lambda: F.mse_loss(p * 2, torch.tensor(1.0)))
    assert float(p.detach()) == pytest.approx(0.5, abs=0.01)


def test_a_resumed_run_keeps_the_choice_and_the_bits(caplog: pytest.LogCaptureFixture) -> None:
    model, loss = mlp()
    optimizer = hfopt.HessianFree(model.parameters(), preconditioner="auto")
    with caplog.at_level(logging.INFO, "hfopt"):
        for _ in range(2):
            optimizer.step(loss)
    assert sum("preconditioned by K-FAC" in r.message for r in caplog.records) == 1
    other, other_loss = mlp()
    other.load_state_dict(model.state_dict())
    second = hfopt.HessianFree(other.parameters(), preconditioner="auto")
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert isinstance(second.preconditioner, Automatic)
    assert second.preconditioner.chosen is True
    for _ in range(3):
        assert torch.equal(optimizer.step(loss).detach(), second.step(other_loss).detach())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
