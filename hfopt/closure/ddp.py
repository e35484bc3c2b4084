"""``DistributedDataParallel`` inside a step: its own reductions, which know only one ``backward()``, are off."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist

from hfopt.closure.patch import Method, Patch, undone


def _share_alone(plain: Method) -> Method:
    """Run a ``forward`` that prepares no reduction: that would wait for hooks that ``autograd.grad`` never calls."""

    def forward(module: Any, *inputs: Any, **kwargs: Any) -> Any:
        asked = module.find_unused_parameters, module.static_graph, module.require_backward_grad_sync

        def restore() -> None:
            module.find_unused_parameters, module.static_graph, module.require_backward_grad_sync = asked

        with undone(restore):
            module.find_unused_parameters = module.static_graph = False
            with module.no_sync():
                return plain(module, *inputs, **kwargs)

    return forward


_patch = Patch(torch.nn.parallel.DistributedDataParallel, "forward", _share_alone)


def without_reductions() -> AbstractContextManager[None]:
    """Let modules wrapped in ``DistributedDataParallel`` compute only their own share inside the block."""
    return _patch.block() if dist.is_available() and dist.is_initialized() else nullcontext()
