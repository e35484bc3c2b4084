"""Gradient accumulation and several batches per step: the step is that of all the data at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hfopt
from tests.hfopt.tools import grads, mlp, randn, theta

X, Y = randn(12, 3, seed=1), randn(12, 2, seed=2)
# What one batch of four cases keeps: some hundreds of bytes.
ONE = 1600
Closure = Callable[[], Any]


def at_once(model: nn.Module, optimizer: torch.optim.Optimizer) -> Closure:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(model(X), Y)
        loss.backward()
        return loss

    return closure


def micro_batches(model: nn.Module, optimizer: torch.optim.Optimizer) -> Closure:
    """As in every training loop that accumulates: each batch's share, one backward() each."""

    def closure() -> float:
        optimizer.zero_grad()
        total = 0.0
        for x, y in zip(X.split(4), Y.split(4), strict=True):
            loss = F.mse_loss(model(x), y) / 3
            loss.backward()
            total += loss.item()
        return total

    return closure


def unequal(model: nn.Module, optimizer: torch.optim.Optimizer) -> Closure:
    """Batches of 1, 4 and 7 cases, weighted by their sizes, from a loader."""
    loader = [(X[:1], Y[:1]), (X[1:5], Y[1:5]), (X[5:], Y[5:])]

    def closure() -> Tensor:
        optimizer.zero_grad()
        total = torch.zeros((), dtype=X.dtype)
        for x, y in loader:
            loss = F.mse_loss(model(x), y) * (len(x) / len(X))
            loss.backward()
            total += loss.detach()
        return total

    return closure


def one_sum(model: nn.Module, optimizer: torch.optim.Optimizer) -> Closure:
    """Several batches, one backward()."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.stack([F.mse_loss(model(x), y) for x, y in zip(X.split(4), Y.split(4), strict=True)]).mean()
        loss.backward()
        return loss

    return closure


def no_backward(model: nn.Module, optimizer: torch.optim.Optimizer) -> Closure:
    return lambda: sum(F.mse_loss(model(x), y) for x, y in zip(X.split(3), Y.split(3), strict=True)) / 4


@pytest.mark.parametrize("way", [micro_batches, unequal, one_sum, no_backward])
@pytest.mark.parametrize(
    "options",
    [{}, {"curvature": "hessian"}, {"weight_decay": 0.1}, {"linearisation": "recompute"}],
    ids=lambda o: "-".join(map(str, o.values())) or "default",
)
def test_the_steps_are_those_of_one_batch(way: Callable[..., Closure], options: dict[str, Any]) -> None:
    one, two = mlp(3, 4, 2, seed=3), mlp(3, 4, 2, seed=3)
    cg = hfopt.CG(max_iterations=6)
    a = hfopt.HessianFree(one.parameters(), cg=cg, **options)
    b = hfopt.HessianFree(two.parameters(), cg=cg, **options)
    for _ in range(4):
        x, y = a.step(way(one, a)), b.step(at_once(two, b))
        assert float(x) == pytest.approx(float(y), rel=1e-9)
        assert torch.allclose(grads(one), grads(two), rtol=1e-7, atol=1e-10)
    assert torch.allclose(theta(one), theta(two), rtol=1e-6, atol=1e-8)
    assert [s.cg_iterations for s in a.stats] == [s.cg_iterations for s in b.stats]
    assert b.stats[-1].new_loss < 0.9 * b.stats[0].loss


@pytest.mark.parametrize("way", [micro_batches, unequal])
def test_the_gradient_is_what_torch_accumulates(way: Callable[..., Closure]) -> None:
    model, plain = mlp(3, 4, 2, seed=4), mlp(3, 4, 2, seed=4)
    optimizer, sgd = hfopt.HessianFree(model.parameters()), torch.optim.SGD(plain.parameters(), lr=0.0)
    optimizer.step(way(model, optimizer))
    sgd.step(way(plain, sgd))
    assert torch.allclose(grads(model), grads(plain), rtol=1e-10, atol=1e-14)


def test_batches_that_do_not_fit_together() -> None:
    """Under a budget for one of three, the other two are computed again: the same steps, and one warning."""
    one, other = mlp(3, 4, 2, seed=3), mlp(3, 4, 2, seed=3)
    cg = hfopt.CG(max_iterations=5)
    a = hfopt.HessianFree(one.parameters(), memory_budget=ONE, cg=cg, preconditioner="empirical-fisher")
    b = hfopt.HessianFree(other.parameters(), cg=cg, preconditioner="empirical-fisher")
    with pytest.warns(UserWarning, match="do not fit"):
        a.step(micro_batches(one, a))
    b.step(micro_batches(other, b))
    for _ in range(2):  # and nothing more is said
        a.step(micro_batches(one, a))
        b.step(micro_batches(other, b))
    assert torch.allclose(theta(one), theta(other), rtol=1e-6, atol=1e-8)
    assert {s.linearisation for s in a.stats} == {"partial"}
    assert a.chosen == ("partial", 24)


def test_accumulated_gradients_without_a_closure_are_refused_with_the_way_out() -> None:
    model = mlp(3, 2, seed=5)
    optimizer = hfopt.HessianFree(model.parameters())
    F.mse_loss(model(X), Y).backward()
    with pytest.raises(ValueError, match="needs a closure"):
        optimizer.step(None)  # type: ignore[arg-type]
