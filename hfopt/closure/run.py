"""One run of a closure: everything that is in force while it runs, and the record of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from hfopt.closure import loss_scaling
from hfopt.closure.differentiable import twice_differentiable
from hfopt.closure.frozen import Frozen
from hfopt.recurrences import segments


@dataclass(frozen=True)
class ClosureRun:
    """The record of a run: the scaling of its loss, and its recurrences over time."""

    scaling: loss_scaling.Scaling
    recurrences: segments.Run


@contextmanager
def closure_run(frozen: Frozen, *, again: bool = False, checkpoint: bool = False) -> Iterator[ClosureRun]:
    """Run a closure inside the block, as the function that a step minimises.

    Draws and buffers are those of the step's first run, and every operation can be differentiated twice.

    Args:
        frozen: the draws and buffers of the step.
        again: the run repeats one that has been traced: gradients are enabled, and nothing of it remains.
        checkpoint: keep of recurrences over time only the states at the borders of segments.
    """
    with (
        frozen.again() if again else frozen.run(),
        torch.set_grad_enabled(again or torch.is_grad_enabled()),
        twice_differentiable(),
        segments.checkpointing(checkpoint) as recurrences,
        loss_scaling.watching() as scaling,
    ):
        yield ClosureRun(scaling, recurrences)
