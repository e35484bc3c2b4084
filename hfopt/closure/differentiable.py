"""Run a closure with every operation in a form that can be differentiated twice.

- Attention: of the forms of scaled dot-product attention, only the plain one has second derivatives.
- What ``torch.compile`` has compiled runs as it was written: what the default backend makes of it has first derivatives
  only, rounds otherwise, and draws other numbers for dropout.
- Activation checkpointing with ``use_reentrant=True`` is done as with False: the former knows ``backward()`` alone, and
  to every other derivative its parameters seem unused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn

from hfopt.closure.patch import Patch


def differentiable_attention() -> Any:
    """Only the plain form of scaled dot-product attention can be differentiated twice."""
    return nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH)


def _not_reentrant(plain: Any) -> Any:
    """What stands in for torch's ``CheckpointFunction``, of which only ``apply`` is called."""

    class NotReentrant:
        @staticmethod
        def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
            return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve)

    return NotReentrant


_checkpoints = Patch(torch.utils.checkpoint, "CheckpointFunction", _not_reentrant)


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """See the module's docstring."""
    # Who has compiled something has imported the compiler, which takes seconds.
    compiler = "torch._dynamo" in sys.modules
    eager = torch.compiler.set_stance("force_eager") if compiler else nullcontext()
    with differentiable_attention(), eager, _checkpoints.block():
        yield
