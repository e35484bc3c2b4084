"""An interrupt (Ctrl-C) at any moment of a step: nothing of hfopt's is left behind, and training can go on."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hfopt
from tests.hfopt.tools import mlp, randn, theta

X, Y = randn(8, 3, seed=1), randn(8, 2, seed=2)
HERE = str(Path(hfopt.__file__).parent)


class Interruption:
    """Raises KeyboardInterrupt at the n-th line or return of hfopt's, or of contextlib's for it, inside."""

    def __init__(self, at: int) -> None:
        self.at, self.seen = at, 0

    def _trace(self, frame: FrameType, event: str, _arg: Any) -> Any:
        name = frame.f_code.co_filename
        if name.endswith("contextlib.py") and frame.f_back is not None:
            name = frame.f_back.f_code.co_filename
        if not name.startswith(HERE):
            return None
        if event in ("line", "return"):
            self.seen += 1
            if self.seen == self.at:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._trace

    def __enter__(self) -> Interruption:
        self._before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)


def entered() -> list[Any]:
    """All that a step enters and must leave."""
    apply = torch.autograd.Function.__dict__["apply"]
    return [
        F.scaled_dot_product_attention,
        apply,
        "apply" in vars(torch.utils.checkpoint.CheckpointFunction),
        torch.utils.checkpoint._checkpoint_without_reentrant_generator,
        torch.amp.GradScaler.scale,
        dict(nn.modules.module._global_forward_pre_hooks),
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
        torch._C._functorch.get_dynamic_layer_stack_depth(),
        torch.is_grad_enabled(),
        hfopt.structural.wanted(),
        sys.getprofile(),
    ]


def small(kind: str) -> nn.Module:
    # torch's forward mode allows no change of running statistics, and traces no dropout.
    drop = nn.Dropout(0.0 if kind == "linearize" else 0.2)
    return nn.Sequential(mlp(3, 3, seed=5), nn.BatchNorm1d(3, dtype=X.dtype), drop, mlp(3, 2, seed=6))


def built(model: nn.Module, kind: str) -> hfopt.HessianFree:
    options: dict[str, Any] = {"linearisation": "linearize"} if kind == "linearize" else {}
    if kind == "hessian":
        options["curvature"] = "hessian"
    return hfopt.HessianFree(model.parameters(), damping=0.3, cg=hfopt.CG(max_iterations=2), **options)


def run(kind: str, at: int) -> tuple[int, bool]:
    """A step that is interrupted at one place; how many places there are, and whether it was."""
    torch.manual_seed(0)
    model = small(kind)
    optimizer = built(model, kind)

    def closure() -> Tensor:
        return F.mse_loss(model(X), Y)

    before, start, interrupted = entered(), theta(model), None
    counter = Interruption(at)
    try:
        with counter:
            optimizer.step(closure)
    except KeyboardInterrupt as error:
        interrupted = error  # held, with all frames in its traceback, as a debugger or a notebook does
    assert entered() == before
    if interrupted is not None:
        there = theta(model)
        # At the start, or where the same step ends if nobody interrupts it: never between.
        assert torch.equal(there, start) or torch.equal(there, ends(kind))
        after = [b.clone() for b in model.buffers()]
        del interrupted  # closes what was broken off, which must change nothing any more
        assert torch.equal(theta(model), there)
        assert all(torch.equal(a, b) for a, b in zip(after, model.buffers(), strict=True))
        assert int(model[1].num_batches_tracked) <= 1  # type: ignore[index]
        optimizer.step(closure)  # training goes on
        assert optimizer.stats[-1].new_loss <= optimizer.stats[-1].loss
        return counter.seen, True
    return counter.seen, False


_ENDS: dict[str, Tensor] = {}


def ends(kind: str) -> Tensor:
    if kind not in _ENDS:
        torch.manual_seed(0)
        model = small(kind)
        optimizer = built(model, kind)
        optimizer.step(lambda: F.mse_loss(model(X), Y))
        _ENDS[kind] = theta(model)
    return _ENDS[kind]


@pytest.mark.parametrize("kind", ["double-backward", "linearize", "hessian"])
def test_a_step_that_is_interrupted_anywhere_leaves_nothing_behind(kind: str) -> None:
    """At some of a step's places, spread over all of it."""
    ends(kind)
    places, _ = run(kind, 0)
    assert places > 1000
    stride = places // (4 if kind == "linearize" else 20)  # whose tracing takes a second each
    tried = [run(kind, at)[1] for at in range(3, places, stride)]
    assert sum(tried) >= len(tried) - 2


def test_and_densely_where_blocks_are_entered_one_upon_another() -> None:
    """At the beginning, in which the first run of the closure is."""
    assert all(run("double-backward", at)[1] for at in range(5, 1000, 50))
