"""Closures with several backward() calls whose linearisations do not fit into memory together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hfopt
from benchmarks.memory import allocated
from hfopt.recurrences import simple_rnn_layer
from tests.hfopt.tools import DENSE, SUMS, dense_gauss_newton, matrix, mlp, randn, relative

X, Y = randn(12, 3, seed=1), randn(12, 2, seed=2)
CPU = torch.device("cpu")
# What one batch of four cases keeps under double backward, with the two layers of `net`: some hundreds of bytes.
SMALL, ONE, TWO = 100, 1600, 3000


def net(seed: int = 3) -> nn.Module:
    model: nn.Module = mlp(3, 4, 2, seed=seed)
    return model


def in_batches(model: nn.Module, penalty: float = 0.0) -> Callable[[], float]:
    def closure() -> float:
        model.zero_grad()
        for x, y in zip(X.split(4), Y.split(4), strict=True):
            (F.mse_loss(model(x), y) / 3).backward()
        if penalty:
            sum((penalty * p.pow(4).sum() for p in model.parameters()), start=torch.zeros(())).backward()
        return 0.0

    return closure


def quietly(build: Callable[[], Any], name: str) -> Any:
    if name == "double-backward":
        return build()
    with pytest.warns(UserWarning, match=r"do not fit into the budget.*\d+ of \d+ batches are kept.*memory_budget"):
        return build()


BUDGETS = pytest.mark.parametrize(
    ("budget", "kept", "name"),
    [(SMALL, 0, "recompute"), (ONE, 1, "partial"), (TWO, 2, "partial"), (10**9, 1, "double-backward")],
)


@BUDGETS
def test_the_sum_is_that_of_one_batch(budget: int, kept: int, name: str) -> None:
    model = net()
    op = quietly(lambda: hfopt.GaussNewton(in_batches(model), model.parameters(), memory_budget=budget), name)
    assert op.linearisation.name == name
    assert sum(part.linearisation is not None for part in op.parts) == kept
    assert len(op.parts) == (1 if name == "double-backward" else 3)
    dense = dense_gauss_newton(model, lambda m: m(X), lambda z: F.mse_loss(z, Y))
    assert relative(matrix(op), dense) < DENSE
    assert relative(op.to_dense(), dense) < DENSE
    plain = torch.autograd.grad(F.mse_loss(model(X), Y), list(model.parameters()))
    assert relative(op.gradient, torch.cat([g.reshape(-1) for g in plain])) < SUMS
    assert op.loss.item() == pytest.approx(F.mse_loss(model(X), Y).item(), rel=SUMS)
    assert op.outputs == 24
    assert relative(op.pull(op.cotangents), op.gradient) < SUMS


@pytest.mark.parametrize("budget", [SMALL, ONE])
def test_a_regulariser_with_a_backward_of_its_own(budget: int) -> None:
    model = net()
    closure = in_batches(model, penalty=0.1)
    op = quietly(lambda: hfopt.GaussNewton(closure, model.parameters(), memory_budget=budget), "partial")
    whole = hfopt.GaussNewton(closure, model.parameters())
    assert whole.linearisation.name == "double-backward"
    assert relative(matrix(op), matrix(whole)) < SUMS
    assert relative(op.to_dense(), matrix(whole)) < SUMS
    assert relative(op.gradient, whole.gradient) < SUMS


@pytest.mark.parametrize("kind", ["sampled", "empirical"])
def test_fisher_matrices_are_summed(kind: str) -> None:
    model = net()

    def build(budget: int | None) -> hfopt.Fisher:
        draws = torch.Generator().manual_seed(5)
        return hfopt.Fisher(in_batches(model), model.parameters(), kind=kind, generator=draws, memory_budget=budget)

    whole, part = build(None), quietly(lambda: build(ONE), "partial")
    assert relative(matrix(part), matrix(whole)) < SUMS
    assert relative(part.to_dense(), matrix(whole)) < SUMS


@pytest.mark.parametrize("budget", [SMALL, 6000])
def test_structural_damping_is_summed(budget: int) -> None:
    Ws = [randn(*shape, seed=i).requires_grad_() for i, shape in enumerate([(3, 3), (3, 3), (3,)])]
    inputs, targets = randn(5, 6, 3, seed=7), randn(5, 6, 3, seed=8)

    def closure() -> None:
        for x, y in zip(inputs.split(2, 1), targets.split(2, 1), strict=True):
            F.mse_loss(simple_rnn_layer(x, *Ws), y).backward()

    whole = hfopt.GaussNewton(closure, Ws, structural=True)
    op = quietly(lambda: hfopt.GaussNewton(closure, Ws, structural=True, memory_budget=budget), "partial")
    assert len(op.parts) == 3
    expected = matrix(whole.damped(0.3, 0.5))
    assert relative(matrix(op.damped(0.3, 0.5)), expected) < SUMS
    assert relative(op.damped(0.3, 0.5).to_dense(), expected) < SUMS
    v = randn(op.shape[0], seed=9)
    assert op.structural_quadratic(v) == pytest.approx(whole.structural_quadratic(v), rel=SUMS)


def test_losses_first_and_backward_calls_after() -> None:
    """Both graphs are there at the first backward(): every criterion goes to the call that its value enters."""
    model = net()

    def closure() -> None:
        losses = [F.mse_loss(model(x), y) for x, y in zip(X.split(4), Y.split(4), strict=True)]
        for loss in reversed(losses):
            loss.backward()

    op = quietly(lambda: hfopt.GaussNewton(closure, model.parameters(), memory_budget=ONE), "partial")
    whole = hfopt.GaussNewton(closure, model.parameters())
    assert relative(matrix(op), matrix(whole)) < SUMS
    assert relative(op.gradient, whole.gradient) < SUMS


def test_a_graph_that_two_batches_share() -> None:
    model, head = net(), mlp(2, 2, seed=4)
    params = [*model.parameters(), *head.parameters()]

    def closure() -> None:
        shared = model(X).tanh()
        for rows in torch.arange(12).split(6):
            F.mse_loss(head(shared[rows]), Y[rows]).backward(retain_graph=True)

    op = quietly(lambda: hfopt.GaussNewton(closure, params, memory_budget=SMALL), "partial")
    assert relative(matrix(op), matrix(hfopt.GaussNewton(closure, params))) < SUMS


def test_batches_that_cannot_be_taken_apart() -> None:
    """A criterion's value in two backward() calls: one by one if that is seen too late, together otherwise."""
    model = net()

    def closure(order: int = 0) -> None:
        x, y = X.split(4), Y.split(4)
        first = F.mse_loss(model(x[0]), y[0])
        if order:
            F.mse_loss(model(x[1]), y[1]).backward()
        first.backward(retain_graph=True)
        (F.mse_loss(model(x[2]), y[2]) + first).backward()

    with pytest.warns(UserWarning, match="over the budget"):
        op = hfopt.GaussNewton(closure, model.parameters(), memory_budget=SMALL)
    assert op.linearisation.name == "recompute"
    assert relative(matrix(op), matrix(hfopt.GaussNewton(closure, model.parameters()))) < SUMS
    with pytest.raises(hfopt.ClosureError, match=r"cannot be taken one by one.*two backward\(\) calls.*memory_budget"):
        hfopt.GaussNewton(lambda: closure(1), model.parameters(), memory_budget=SMALL)


def test_dropout_draws_are_those_of_the_step() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 2)).double()
    state = torch.get_rng_state()
    op = quietly(lambda: hfopt.GaussNewton(in_batches(model), model.parameters(), memory_budget=ONE), "partial")
    torch.set_rng_state(state)
    whole = hfopt.GaussNewton(in_batches(model), model.parameters())
    assert relative(matrix(op), matrix(whole)) < SUMS


def test_asked_for_recomputation_takes_batches_one_by_one() -> None:
    model = net()
    op = hfopt.GaussNewton(in_batches(model), model.parameters(), linearisation="recompute")
    assert [part.linearisation for part in op.parts] == [None] * 3
    assert op.linearisation.name == "recompute"


@pytest.mark.parametrize("columns", [0, 2])
def test_memory_is_that_of_the_kept_and_of_one_more(columns: int) -> None:
    """Eight batches: nothing in a product, or in what is kept, grows with those that are not kept."""
    model = nn.Sequential(nn.Linear(20, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 1))
    one = 4 * 100 * (20 + 50 + 50 + 50 + 50)  # the inputs of the linear layers and the outputs of tanh

    def measure(batches: int, budget: int) -> tuple[int, int]:
        data = [(torch.randn(100, 20), torch.randn(100, 1)) for _ in range(batches)]

        def closure() -> None:
            for x, y in data:
                F.mse_loss(model(x), y).backward()

        def build() -> hfopt.GaussNewton:
            return hfopt.GaussNewton(closure, model.parameters(), memory_budget=budget)

        op = quietly(build, "double-backward" if budget > 10**8 else "partial")
        v = torch.randn(op.shape[0], columns) if columns else torch.randn(op.shape[0])
        kept = op.linearisation.kept_bytes()
        assert kept <= budget
        return allocated(lambda: op @ v, CPU)[0], kept

    few, many = measure(3, one), measure(8, one)
    assert many[0] < 1.3 * few[0]
    assert many[1] == few[1] == 0
    whole = measure(8, 10**9)
    assert many[0] < whole[1] / 2
    some = measure(8, 6 * one)
    assert 0 < some[1] <= 6 * one
    assert some[0] < 1.5 * many[0]


def test_a_loss_that_is_kept_alive_by_the_closure_is_no_graph() -> None:
    """What a closure returns, the sum of its losses, is no way back into the networks' graphs."""
    model = net()

    def closure() -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for x, y in zip(X.split(4), Y.split(4), strict=True):
            loss = F.mse_loss(model(x), y)
            loss.backward()
            total = total + loss.detach()
        return total

    op = quietly(lambda: hfopt.GaussNewton(closure, model.parameters(), memory_budget=SMALL), "partial")
    assert op.result.item() == pytest.approx(op.loss.item(), rel=SUMS)
