"""Beside other threads: they draw, train, and call what a step has changed for itself, as if it were not there."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hfopt
from hfopt.closure.differentiable import twice_differentiable
from tests.hfopt.tools import mlp, randn

X, Y = randn(16, 3, seed=1), randn(16, 2, seed=2)

DRAWS: dict[str, Callable[[], Any]] = {
    "torch": lambda: tuple(torch.randperm(1000)[:8].tolist()),
    "random": lambda: tuple(random.random() for _ in range(4)),
    "numpy": lambda: tuple(np.random.rand(4).tolist()),  # noqa: NPY002 - numpy's global generator is the matter
}


@contextmanager
def another_thread(work: Callable[[], None]) -> Iterator[None]:
    """Another thread that does something again and again as long as the block runs."""
    stop, failed = threading.Event(), []

    def go() -> None:
        try:
            while not stop.is_set():
                work()
                time.sleep(2e-4)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=go)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    assert not failed


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "check": {"check": True},
    "linearize": {"linearisation": "linearize"},
    "recompute": {"linearisation": "recompute"},
    "hessian": {"curvature": "hessian"},
}


@pytest.mark.quick(where=lambda draw, options: draw == "torch" or options == "default")
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("draw", DRAWS)
def test_draws_of_another_thread_are_not_repeated(draw: str, options: str) -> None:
    model, drawn = mlp(3, 5, 2, seed=3), []
    optimizer = hfopt.HessianFree(model.parameters(), **OPTIONS[options])
    with another_thread(lambda: drawn.append(DRAWS[draw]())):
        for _ in range(3):
            optimizer.step(lambda: F.mse_loss(model(X), Y))
    assert len(drawn) > 20
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize("linearisation", ["checkpoint", "double-backward"])
def test_nor_beside_checkpointed_recurrences(linearisation: str) -> None:
    W = nn.Parameter(0.3 * randn(4, 4, seed=5))
    P, target, drawn = randn(20, 6, 4, seed=6), randn(20, 6, 4, seed=7), []
    optimizer = hfopt.HessianFree([W], linearisation=linearisation)

    def closure() -> Tensor:
        return F.mse_loss(hfopt.recurrences.simple_rnn(P, W, P.new_zeros(4)), target)

    with another_thread(lambda: drawn.append(DRAWS["torch"]())):
        for _ in range(3):
            optimizer.step(closure)
    assert len(set(drawn)) == len(drawn)


def teacher(source: str) -> Callable[[], float]:
    own = {"torch": torch.Generator(), "random": random.Random(3), "numpy": np.random.default_rng(3)}
    return {
        "torch": lambda: float(torch.rand(())),
        "random": random.random,
        "numpy": lambda: float(np.random.rand()),  # noqa: NPY002
        "numpy normal": lambda: float(np.random.randn()),  # noqa: NPY002 - one of each two is kept for later
        "own torch": lambda: float(torch.rand((), generator=own["torch"])),
        "own random": own["random"].random,
        "own numpy": lambda: float(own["numpy"].random()),
    }[source]


SOURCES = ["torch", "random", "numpy", "numpy normal", "own torch", "own random", "own numpy"]


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside another thread"])
@pytest.mark.parametrize("source", SOURCES)
def test_the_closures_own_draws_are_the_same_throughout_a_step(source: str, beside: bool) -> None:
    """Also where another thread is there, which draws from its own generator."""
    model, draw, seen = mlp(3, 4, 2, seed=3), teacher(source), []
    optimizer = hfopt.HessianFree(model.parameters(), solver="cg", linearisation="recompute")

    def closure() -> Tensor:
        seen.append(draw())
        return F.mse_loss(model(X * (1 + seen[-1])), Y)

    own, steps = np.random.default_rng(0), []
    with another_thread(own.random) if beside else another_thread(lambda: None):
        for _ in range(4):
            seen.clear()
            optimizer.step(closure)
            assert len(seen) > 3
            assert len(set(seen)) == 1
            steps.append(seen[0])
    assert len(set(steps)) == 4  # each step another, and each number once


@pytest.mark.parametrize("checkpointed", [False, True])
def test_both_draw_from_torchs_generator(checkpointed: bool) -> None:
    """A mask of dropout is the same throughout a step, and no draw of the other thread is repeated."""
    inner, drop, outer, seen, drawn = mlp(3, 8, seed=3), nn.Dropout(0.4), mlp(8, 2, seed=4), [], []
    optimizer = hfopt.HessianFree([*inner.parameters(), *outer.parameters()], check=True, linearisation="recompute")

    def hidden(x: Tensor) -> Tensor:
        h: Tensor = drop(inner(x).tanh()) + 0.01 * torch.randn(16, 8, dtype=x.dtype)
        seen.append(h.detach().eq(0).double() + torch.rand((), dtype=x.dtype))
        time.sleep(1e-4)
        return h

    def closure() -> Tensor:
        h = torch.utils.checkpoint.checkpoint(hidden, X, use_reentrant=False) if checkpointed else hidden(X)
        return F.mse_loss(outer(h), Y)

    with another_thread(lambda: drawn.append(DRAWS["random"]()) if checkpointed else drawn.append(DRAWS["torch"]())):
        for _ in range(3):
            optimizer.step(closure)
            assert len(seen) > 3
            assert all(torch.equal(s, seen[0]) for s in seen)
            seen.clear()
    assert len(set(drawn)) == len(drawn)


def test_a_thread_that_draws_nothing_changes_no_draw() -> None:
    """The generator ends where it ends without that thread."""
    ends = []
    for beside in (False, True):
        torch.manual_seed(3)
        model = nn.Sequential(mlp(3, 4, seed=3), nn.Dropout(0.3), mlp(4, 2, seed=4))
        optimizer = hfopt.HessianFree(model.parameters(), damping=0.3)
        stop = threading.Event()
        thread = threading.Thread(target=stop.wait)
        if beside:
            thread.start()
        for _ in range(2):
            optimizer.step(lambda model=model: F.mse_loss(model(X), Y))
        stop.set()
        ends.append((torch.get_rng_state(), torch.cat([p.detach().reshape(-1) for p in model.parameters()])))
    assert torch.equal(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1], ends[1][1])


def test_another_threads_running_statistics_count_every_call() -> None:
    model, other = mlp(3, 5, 2, seed=3), nn.BatchNorm1d(3, dtype=X.dtype)
    optimizer, calls = hfopt.HessianFree(model.parameters(), solver="cg", linearisation="recompute"), [0]

    def work() -> None:
        other(X)
        calls[0] += 1

    with another_thread(work):
        for _ in range(5):
            optimizer.step(lambda: F.mse_loss(model(X), Y))
    assert calls[0] > 5
    assert int(other.num_batches_tracked) == calls[0]  # type: ignore[arg-type]


def switches() -> list[Any]:
    cuda = torch.backends.cuda
    return [
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        torch.backends.cudnn.enabled,
        torch.is_grad_enabled(),
        F.scaled_dot_product_attention,
        torch.autograd.Function.__dict__["apply"],
        "apply" in vars(torch.utils.checkpoint.CheckpointFunction),
        len(nn.modules.module._global_forward_pre_hooks),
    ]


def test_two_optimizers_in_two_threads_leave_torch_as_it_was() -> None:
    """And each trains as if it were alone."""

    def train(found: list[Tensor]) -> None:
        model = nn.TransformerEncoderLayer(4, 1, 8, dropout=0.0, batch_first=True, dtype=torch.float64)
        with torch.no_grad():
            for i, p in enumerate(model.parameters()):
                p.copy_(0.4 * randn(*p.shape, seed=i))
        x, y = randn(2, 3, 4, seed=50), randn(2, 3, 4, seed=51)
        optimizer = hfopt.HessianFree(model.parameters(), damping=0.1)
        for _ in range(3):
            optimizer.step(lambda: F.mse_loss(model(x), y))
        found.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))

    before, alone, both = switches(), [], []
    train(alone)
    threads = [threading.Thread(target=train, args=(both,)) for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(both) == 2
    assert all(torch.allclose(found, alone[0], rtol=1e-9, atol=1e-12) for found in both)
    assert switches() == before


def test_what_is_changed_is_changed_for_one_thread() -> None:
    """Attention, compiled functions and reentrant checkpointing of another thread stay its own."""
    compiled = torch.compile(lambda x: x.sin() + x.cos(), backend="eager")
    x = randn(1, 2, 4, 4, seed=8).requires_grad_()
    compiled(x)
    frames = torch._dynamo.utils.counters["stats"]

    def look() -> list[Any]:
        attended = F.scaled_dot_product_attention(x, x, x)
        checkpointed = torch.utils.checkpoint.checkpoint(torch.sin, x, use_reentrant=True)
        callback = torch._dynamo.eval_frame._callback_from_stance(len)
        return [attended.grad_fn.name(), checkpointed.grad_fn.name(), callback]  # type: ignore[union-attr]

    plain, inside, outside = look(), [], []
    with twice_differentiable():
        inside.extend(look())
        thread = threading.Thread(target=lambda: outside.extend(look()))
        thread.start()
        thread.join()
    assert outside == plain == look()
    assert all(a != b for a, b in zip(inside, plain, strict=True))
    assert frames == torch._dynamo.utils.counters["stats"]
    # The other thread leaving first, or last, changes nothing.
    entered, leave = threading.Event(), threading.Event()

    def stay() -> None:
        with twice_differentiable():
            entered.set()
            leave.wait(30)

    thread = threading.Thread(target=stay)
    thread.start()
    entered.wait(30)
    with twice_differentiable():
        pass
    assert look() == plain
    leave.set()
    thread.join()
    assert look() == plain
    assert torch.compiler.set_stance is not None
    assert compiled(x).shape == x.shape
