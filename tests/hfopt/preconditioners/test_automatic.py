"""The preconditioner that is taken where none is named: K-FAC for linear and convolution layers, or none."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hfopt
from hfopt.linalg.operators import Operator
from hfopt.preconditioners import KFAC, Automatic
from models import RNN
from tests.hfopt.tools import theta

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
    [(mlp, True), (convolutional, True), (tied, True), (two_losses, True), (wide, False), (recurrent, False)],
)
def test_what_is_chosen(build: Callable[[], tuple[nn.Module, Closure]], chosen: bool) -> None:
    model, loss = build()
    optimizer = hfopt.HessianFree(model.parameters(), solver="cg")
    optimizer.step(loss)
    assert isinstance(optimizer.preconditioner, Automatic)
    assert optimizer.preconditioner.chosen is chosen
    assert optimizer.preconditioner.active is chosen


def train(build: Callable[[], tuple[nn.Module, Closure]], **options: Any) -> tuple[Tensor, list[hfopt.StepStats]]:
    model, loss = build()
    optimizer = hfopt.HessianFree(model.parameters(), solver="cg", **options)
    for _ in range(4):
        optimizer.step(loss)
    return theta(model), [replace(s, seconds=0.0) for s in optimizer.stats]


class Fixed(KFAC):
    """K-FAC with the same draws in every step, and damped by lambda alone."""

    def refresh(self, op: Operator, step: int) -> None:
        super().refresh(op, 0)


def test_a_closure_that_cannot_be_looked_at_takes_none_and_is_looked_at_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(op: Operator, batch_dim: int) -> bool:
        raise RuntimeError("no memory")

    model, loss = mlp()
    optimizer = hfopt.HessianFree(model.parameters(), solver="cg")
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "hfopt"):
        patch.setattr("hfopt.preconditioners.automatic.pays", fails)
        optimizer.step(loss)
    assert "takes no preconditioner: no memory" in caplog.text
    assert optimizer.stats[-1].accepted
    optimizer.step(loss)
    assert isinstance(optimizer.preconditioner, Automatic)
    assert optimizer.preconditioner.active


@pytest.mark.parametrize("build", [mlp, convolutional])
def test_steps_are_those_of_kfac(build: Callable[[], tuple[nn.Module, Closure]]) -> None:
    ours, stats = train(build)
    theirs, others = train(build, preconditioner=Fixed())
    assert torch.equal(ours, theirs)
    assert [replace(s, gradients=2) for s in stats] == others


def test_steps_without_it_are_those_of_none() -> None:
    ours, stats = train(recurrent)
    theirs, others = train(recurrent, preconditioner=None)
    assert torch.equal(ours, theirs)
    assert [replace(s, gradients=1) for s in stats] == others


@pytest.mark.parametrize("named", [False, True])
def test_the_record_counts_every_run_of_the_closure(named: bool) -> None:
    model, loss = mlp()
    options: dict[str, Any] = {"preconditioner": KFAC(every=2)} if named else {}
    optimizer, calls = hfopt.HessianFree(model.parameters(), solver="cg", **options), [0]

    def closure() -> Tensor:
        calls[0] += 1
        return loss()

    for _ in range(3):
        calls[0] = 0
        optimizer.step(closure)
        s = optimizer.stats[-1]
        assert s.gradients + s.evaluations + (s.step == 1) == calls[0]  # the first step looks twice at theta
        assert s.gradients == ((2, 1, 2)[s.step - 1] if named else 3 if s.step == 1 else 2)


def test_a_penalty_outside_is_one_inside() -> None:
    def penalised() -> tuple[nn.Module, Closure]:
        model, loss = mlp()
        return model, lambda: loss() + sum(0.05 * p.square().sum() for p in model.parameters())

    ours, _ = train(mlp, weight_decay=0.1)
    theirs, _ = train(penalised)
    assert torch.allclose(ours, theirs, rtol=1e-7, atol=1e-9)


def test_a_loss_of_ones_own_is_drawn_from_like_the_criterion() -> None:
    def own() -> tuple[nn.Module, Closure]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        x, y = torch.randn(40, 4, dtype=torch.float64), torch.randn(40, 3, dtype=torch.float64)

        def loss() -> tuple[Tensor, Tensor]:
            outputs = model(x)
            return outputs, ((outputs - y) ** 2).mean()

        return model, loss

    ours, stats = train(mlp)
    theirs, others = train(own)
    assert torch.allclose(ours, theirs, rtol=1e-7, atol=1e-9)
    assert [s.cg_iterations for s in stats] == [s.cg_iterations for s in others]
    assert others[-1].gradients == 2


def test_curvature_that_is_not_diagonal_takes_none() -> None:
    model, _ = mlp()
    x = torch.randn(40, 4, dtype=torch.float64)
    own = lambda z: z.logsumexp(1).mean() + 0.5 * z.square().mean()  # noqa: E731
    optimizer = hfopt.HessianFree(model.parameters(), loss=own, solver="cg")
    with pytest.warns(UserWarning, match=r"no targets can be drawn from the loss.*preconditioner='kfac'"):
        optimizer.step(lambda: model(x))
    optimizer.step(lambda: model(x))  # says so once
    assert isinstance(optimizer.preconditioner, Automatic)
    assert optimizer.preconditioner.chosen is False


def test_a_closure_that_cannot_be_watched_takes_none(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(self: KFAC, op: Operator, step: int) -> None:
        raise RuntimeError("no memory")

    model, loss = mlp()
    optimizer = hfopt.HessianFree(model.parameters(), solver="cg")
    monkeypatch.setattr(KFAC, "refresh", fails)
    with caplog.at_level(logging.WARNING, "hfopt"):
        optimizer.step(loss)
    assert "takes no preconditioner: no memory" in caplog.text
    assert optimizer.stats[-1].accepted


def test_other_dampings_and_names_take_what_they_ask_for() -> None:
    model, _ = mlp()
    assert hfopt.HessianFree(model.parameters(), damping=0.1).preconditioner is None
    assert hfopt.HessianFree(model.parameters(), preconditioner=None).preconditioner is None
    assert hfopt.HessianFree(model.parameters(), preconditioner="none").preconditioner is None
    assert isinstance(hfopt.HessianFree(model.parameters(), preconditioner="kfac").preconditioner, KFAC)


def test_a_hessian_and_outputs_without_cases_take_none() -> None:
    model, loss = mlp()
    optimizer = hfopt.HessianFree(model.parameters(), curvature="hessian")
    optimizer.step(loss)
    assert isinstance(optimizer.preconditioner, Automatic)
    assert not optimizer.preconditioner.active
    p = nn.Parameter(torch.tensor(3.0))
    optimizer = hfopt.HessianFree([p])
    for _ in range(5):
        optimizer.step(lambda: F.mse_loss(p * 2, torch.tensor(1.0)))
    assert float(p.detach()) == pytest.approx(0.5, abs=0.01)


def test_a_resumed_run_keeps_the_choice_and_the_bits(caplog: pytest.LogCaptureFixture) -> None:
    model, loss = mlp()
    optimizer = hfopt.HessianFree(model.parameters(), solver="cg")
    with caplog.at_level(logging.DEBUG, "hfopt"):
        for _ in range(2):
            optimizer.step(loss)
    assert sum("preconditioned by K-FAC" in r.message for r in caplog.records) == 1
    other, other_loss = mlp()
    other.load_state_dict(model.state_dict())
    second = hfopt.HessianFree(other.parameters(), solver="cg")
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert isinstance(second.preconditioner, Automatic)
    assert second.preconditioner.chosen is True
    for _ in range(3):
        assert torch.equal(optimizer.step(loss).detach(), second.step(other_loss).detach())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
