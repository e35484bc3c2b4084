"""Several processes that train one model together, each on data of its own.

If ``F_w`` is the loss that the closure computes in process w, the total loss is their mean ``F = (1/W) sum_w F_w``, as
for gradients under ``DistributedDataParallel``. Gradient and products with G (or H, or a Fisher matrix) are means as
well, so each process computes its own share, and one all-reduce makes the result the same in all of them, bit for
bit:

    g = (1/W) sum_w g_w,     G v = (1/W) sum_w G_w v.

Every process computes the rest of a step, from conjugate gradients to lambda, from these in the same way. The model
may be plain or wrapped in ``DistributedDataParallel``, whose own reductions know only one ``backward()`` and are
switched off inside a step.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Processes:
    """The ``size`` processes of a group; vectors are reduced on ``device``, by whatever backend the group has."""

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device) -> None:
        """``group``: None is the default group."""
        self._group, self._device = group, device
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)

    def mean_(self, t: Tensor) -> Tensor:
        """Average over processes, in place; ``t`` is contiguous and has the same shape in all of them."""
        dist.all_reduce(t, group=self._group)
        return t.div_(self.size)

    def mean(self, value: float) -> float:
        """Return the mean over processes of a number."""
        return float(self.mean_(torch.tensor([value], dtype=torch.float64, device=self._device)))

    def agree(self, **numbers: float) -> None:
        """Check that every process has the same numbers.

        Raises:
            RuntimeError: in all processes, with the names of those that differ.
        """
        # The largest of x and of -x, in one reduction. NaN compares with nothing, so it is given a number.
        own = [x if math.isfinite(x) else 1e300 for x in numbers.values()]
        both = torch.tensor([*own, *(-x for x in own)], dtype=torch.float64, device=self._device)
        dist.all_reduce(both, dist.ReduceOp.MAX, group=self._group)
        largest, least = both[: len(own)].tolist(), (-both[len(own) :]).tolist()
        bad = [
            f"{name} (from {low!r} to {high!r})"
            for name, low, high in zip(numbers, least, largest, strict=True)
            if low != high
        ]
        if bad:
            raise RuntimeError(
                f"the {self.size} processes do not hold the same model: found different {', '.join(bad)}. Seed them "
                "alike or broadcast the parameters (DistributedDataParallel does), load one state_dict in all, and do "
                "not shard them (FSDP); for models that have nothing to do with each other, pass process_group=None"
            )


def processes_of(group: Any, device: torch.device) -> Processes | None:
    """Return the processes for the optimizer's ``process_group``; None if there is only this one.

    Raises:
        ValueError: neither ``"auto"``, None nor a group that this process belongs to.
    """
    if group is None or not dist.is_available():
        return None
    if isinstance(group, str):
        if group != "auto":
            raise ValueError(f"process_group is {group!r}, but must be 'auto', None or a torch.distributed group")
        if not dist.is_initialized():
            return None
        group = None
    elif not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            f"process_group is a {type(group).__name__}, but must be 'auto', None or a torch.distributed group that "
            "this process belongs to"
        )
    found = Processes(group, device)
    return found if found.size > 1 else None
