"""Memory that runs out over a linearisation, although the budget would have allowed it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hfopt
import models
from hfopt.curvature.linearisation import DoubleBackward
from tests.hfopt.tools import mlp, randn, relative, rounding, theta

X, Y = randn(6, 3, seed=1), randn(6, 2, seed=2)
DEVICE = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
HOST = RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory")
ERRORS = pytest.mark.parametrize("error", [DEVICE, HOST], ids=["device", "host"])


def feed_forward() -> tuple[nn.Module, Callable[[], Tensor]]:
    model = mlp(3, 4, 2, seed=3)
    return model, lambda: F.mse_loss(model(X), Y)


def recurrent() -> tuple[nn.Module, Callable[[], Tensor]]:
    torch.manual_seed(0)
    model = models.RNN(1, 5, 1, output="last", dtype=torch.float64)
    inputs, targets = randn(40, 4, 1, seed=3), randn(4, 1, seed=4)
    return model, lambda: F.mse_loss(model(inputs), targets)


def short(monkeypatch: pytest.MonkeyPatch, error: Exception, where: str, times: int = 1000) -> list[str]:
    """Let double backward run out of memory, when it is built or in its first product."""
    calls: list[str] = []
    plain: Any = getattr(DoubleBackward, where)

    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        if type(self) is DoubleBackward and len(calls) < times:
            calls.append(where)
            raise error
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(DoubleBackward, where, failing)
    return calls


@ERRORS
@pytest.mark.parametrize("where", ["__init__", "jvp"])
@pytest.mark.parametrize(("build", "name"), [(feed_forward, "recompute"), (recurrent, "checkpoint")])
def test_the_next_cheaper_policy_is_taken_with_a_warning(
    build: Any, name: str, where: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, closure = build()
    v = randn(sum(p.numel() for p in model.parameters()), seed=5)
    expected = hfopt.GaussNewton(closure, model.parameters()) @ v
    calls = short(monkeypatch, error, where, times=1)
    with pytest.warns(UserWarning, match=f"products use '{name}', since memory ran out.*memory_budget below"):
        op = hfopt.GaussNewton(closure, model.parameters())
    assert calls == [where]
    assert op.linearisation.name == name
    assert relative(op @ v, expected) < rounding(5 * 40)


def test_training_goes_on_and_says_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory runs out in the third step; from there on nothing is kept, and the steps are the same."""
    model, closure = feed_forward()
    twin, other = feed_forward()
    ours, plain = hfopt.HessianFree(model.parameters()), hfopt.HessianFree(twin.parameters())
    for _ in range(5):
        plain.step(other)
    for _ in range(2):
        ours.step(closure)
    with monkeypatch.context() as patch:
        short(patch, DEVICE, "__init__", times=1)
        with pytest.warns(UserWarning, match="products use 'recompute', since memory ran out"):
            ours.step(closure)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            ours.step(closure)
    assert [s.linearisation for s in ours.stats] == ["double-backward"] * 2 + ["recompute"] * 3
    assert torch.allclose(theta(model), theta(twin), rtol=1e-7, atol=1e-9)


@ERRORS
def test_a_policy_that_was_asked_for_is_not_left(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    model, closure = feed_forward()
    short(monkeypatch, error, "__init__")
    with pytest.raises(RuntimeError, match="memory"):
        hfopt.GaussNewton(closure, model.parameters(), linearisation="double-backward")
