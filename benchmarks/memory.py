"""Bytes that a piece of work allocates at most, and keeps."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def allocated(work: Callable[[], Any], device: torch.device) -> tuple[int, int]:
    """(peak, kept) bytes of tensors above what was there before; `kept` is measured while the result is alive.

    On the CPU from the profiler's record of every allocation, on CUDA from the caching allocator. What an operation
    takes beside torch's allocator (workspaces of BLAS and oneDNN) is not seen.
    """
    gc.collect()
    return _on_cuda(work, device) if device.type == "cuda" else _on_cpu(work)


def _on_cuda(work: Callable[[], Any], device: torch.device) -> tuple[int, int]:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = work()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    gc.collect()
    kept = torch.cuda.memory_allocated(device)
    del result
    return peak - before, kept - before


def _on_cpu(work: Callable[[], Any]) -> tuple[int, int]:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = work()
        gc.collect()
    del result
    level = peak = 0
    assert record.profiler is not None
    assert record.profiler.kineto_results is not None
    changes = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(changes, key=lambda e: e.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak, level
