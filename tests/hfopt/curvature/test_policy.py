"""What "auto" chooses, what it says of it, and when it thinks again."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import hfopt
import models
from hfopt.curvature.linearisation import Cost
from hfopt.curvature.policy import still_holds
from hfopt.recurrences import simple_rnn
from hfopt.recurrences.segments import Found, Given, over_time
from tests.hfopt.tools import DENSE, dense_gauss_newton, matrix, mlp, randn, relative, rounding

X, Y = randn(6, 3, seed=1), randn(6, 2, seed=2)
STEPS = 100


def recurrent(steps: int = STEPS, sequences: int = 4) -> tuple[nn.Module, Callable[[], Tensor]]:
    """Ten hidden units: 32 kB of states at a hundred steps of four sequences, three of ten borders' worth each."""
    torch.manual_seed(0)
    model = models.RNN(1, 10, 1, output="last", dtype=torch.float64)
    inputs, targets = randn(steps, sequences, 1, seed=3), randn(sequences, 1, seed=4)
    return model, lambda: F.mse_loss(model(inputs), targets)


def test_checkpointing_comes_before_recomputation() -> None:
    model, closure = recurrent()
    whole = hfopt.GaussNewton(closure, model.parameters())
    v = randn(whole.shape[0], seed=5)
    for budget, name in ((200_000, "double-backward"), (30_000, "checkpoint"), (1000, "recompute")):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            op = hfopt.GaussNewton(closure, model.parameters(), memory_budget=budget)
        assert op.linearisation.name == name
        assert op.linearisation.cost is not None
        assert op.linearisation.cost.kept <= budget == op.linearisation.cost.budget
        told = [w for w in told if w.category is UserWarning]
        assert len(told) == (name != "double-backward")
        if told:
            message = str(told[0].message)
            assert f"products use '{name}'" in message
            assert "over the budget" in message
            assert "memory_budget" in message
            assert told[0].filename == __file__
        assert relative(op @ v, whole @ v) < rounding(10 * STEPS)


def test_what_is_kept_is_measured() -> None:
    """Under double backward: what both linear layers and tanh save in the forward pass and in the backward pass."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 20)).double()
    x, y = randn(50, 30, seed=5), randn(50, 20, seed=6)
    op = hfopt.GaussNewton(lambda: F.mse_loss(model(x), y), model.parameters())
    assert op.linearisation.cost is not None
    kept = 50 * 8 * (30 + 40 + 20 + 40)  # x, tanh(a), u, and the gradient that tanh's backward pass gets
    assert op.linearisation.cost.kept == pytest.approx(kept, rel=0.05)


def test_the_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    model = mlp(3, 4, 2, seed=7)
    optimizer = hfopt.HessianFree(model.parameters())
    with caplog.at_level(logging.INFO, logger="hfopt"):
        for _ in range(3):
            optimizer.step(lambda: F.mse_loss(model(X), Y))
    (message,) = [r.getMessage() for r in caplog.records]
    for part in ("'double-backward'", "keeps", "of a budget of", "set-up", "product", "gradients"):
        assert part in message
    op = hfopt.GaussNewton(lambda: F.mse_loss(model(X), Y), model.parameters())
    assert repr(op).startswith("GaussNewton(P=26, linearisation='double-backward', keeps ")
    assert str(op.linearisation.cost) in repr(op)
    asked = hfopt.GaussNewton(lambda: F.mse_loss(model(X), Y), model.parameters(), linearisation="recompute")
    assert repr(asked) == "GaussNewton(P=26, linearisation='recompute')"


def test_cost_is_told_in_gradients() -> None:
    cost = Cost(kept=3 << 20, budget=5 << 30, gradient=0.2, setup=0.1, product=0.3)
    assert str(cost) == (
        "keeps 3.0 MiB of a budget of 5.0 GiB; set-up 0.50 gradients, product 1.50 gradients (300 ms), "
        "each measured once"
    )


@pytest.mark.parametrize(
    ("name", "outputs", "holds"),
    [
        ("double-backward", 100, True),
        ("double-backward", 101, False),
        ("linearize", 10, True),
        ("recompute", 100, True),
        ("recompute", 1000, True),
        ("checkpoint", 80, True),
        ("checkpoint", 79, False),
        ("partial", 10, False),
    ],
)
def test_how_long_a_choice_holds(name: str, outputs: int, holds: bool) -> None:
    assert still_holds((name, 100), outputs) is holds
    assert not still_holds(None, outputs)


@pytest.mark.parametrize(("budget", "forced"), [(30_000, "checkpoint"), (4500, "recompute")])
def test_smaller_batches_are_a_reason_to_think_again(
    budget: int, forced: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="hfopt")
    model, _ = recurrent()
    optimizer = hfopt.HessianFree(model.parameters(), memory_budget=budget, cg=hfopt.CG(max_iterations=3))

    def step(sequences: int, steps: int = 100) -> str:
        inputs, targets = randn(steps, sequences, 1, seed=3), randn(sequences, 1, seed=4)
        optimizer.step(lambda: F.mse_loss(model(inputs), targets))
        return optimizer.stats[-1].linearisation

    with pytest.warns(UserWarning, match="over the budget"):
        assert step(10) == forced
    assert optimizer.chosen == (forced, 10)
    caplog.clear()
    assert [step(10), step(9), step(12)] == [forced] * 3
    assert not caplog.records
    assert step(7) == forced  # looks again, in vain, and says nothing new
    assert caplog.records
    assert optimizer.chosen == (forced, 7)
    caplog.clear()
    assert step(7) == forced
    assert not caplog.records
    assert step(2, steps=2) == "double-backward"
    assert optimizer.chosen == ("double-backward", 2)
    state = optimizer.state_dict()
    assert state["hessian_free"]["chosen"] == ["double-backward", 2]


class OneWay(torch.autograd.Function):
    """sin, with a forward mode, whose backward pass cannot be differentiated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0].cos()

    @staticmethod
    def jvp(ctx: Any, t: Tensor) -> Tensor:
        return t * ctx.saved_tensors[0].cos()


def test_a_model_that_can_be_linearised_in_one_way_gets_it_whatever_the_budget() -> None:
    inner, outer = mlp(3, 4, seed=3), mlp(4, 2, seed=4)
    params = [*inner.parameters(), *outer.parameters()]

    def closure(function: Callable[[Tensor], Tensor] = OneWay.apply) -> Tensor:
        return F.mse_loss(outer(function(inner(X))), Y)

    with pytest.warns(UserWarning, match=r"'linearize', whatever memory it takes.*once_differentiable"):
        op = hfopt.GaussNewton(closure, params, memory_budget=10)
    twin = hfopt.GaussNewton(lambda: closure(torch.sin), params)
    assert relative(matrix(op), matrix(twin)) < DENSE


def test_a_recurrence_of_the_users_own_is_checkpointed() -> None:
    weights = [(0.5 * randn(*shape, seed=i)).requires_grad_() for i, shape in enumerate([(1, 10), (10, 10), (10, 1)])]
    inputs, targets = randn(STEPS, 4, 1, seed=3), randn(STEPS, 4, 1, seed=4)

    def part(xs: Given, states: Given, Ws: Given) -> Found:
        H = simple_rnn(xs[0] @ Ws[0], Ws[1], states[0])
        return (H @ Ws[2],), (H[-1],)

    def closure() -> Tensor:
        (z,), _ = over_time(part, (inputs,), (inputs.new_zeros(4, 10),), weights)
        return F.mse_loss(z, targets)

    with pytest.warns(UserWarning, match="'checkpoint'"):
        op = hfopt.GaussNewton(closure, weights, memory_budget=40_000)
    assert op.linearisation.name == "checkpoint"
    v = randn(op.shape[0], seed=4)
    assert relative(op @ v, hfopt.GaussNewton(closure, weights) @ v) < rounding(10 * STEPS)


def test_checkpointing_without_a_recurrence_says_so() -> None:
    model = mlp(3, 4, 2, seed=8)
    with pytest.warns(UserWarning, match=r"needs a recurrence of hfopt.*as under 'recompute'") as told:
        op = hfopt.GaussNewton(lambda: F.mse_loss(model(X), Y), model.parameters(), linearisation="checkpoint")
    assert told[0].filename == __file__
    assert op.linearisation.name == "recompute"
    assert relative(matrix(op), dense_gauss_newton(model, lambda m: m(X), lambda z: F.mse_loss(z, Y))) < DENSE


def test_warnings_point_at_the_users_line() -> None:
    model = mlp(3, 4, 2, seed=9)
    optimizer = hfopt.HessianFree(model.parameters(), memory_budget=100)
    with pytest.warns(UserWarning, match="over the budget") as told:
        optimizer.step(lambda: F.mse_loss(model(X), Y))
    assert [w.filename for w in told] == [__file__]
    bad = torch.full_like(X, float("nan"))
    with pytest.warns(UserWarning, match="not finite") as told:
        hfopt.HessianFree(model.parameters()).step(lambda: F.mse_loss(model(bad), Y))
    assert [w.filename for w in told] == [__file__]
