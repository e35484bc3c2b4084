"""One compiled pass on several threads, each with sequences of its own."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from hfopt.recurrences.native.build import library

# Below this many floating-point operations, waking another thread takes longer than it saves.
_WORTH_A_THREAD = 2e6

Call = tuple[Sequence[int], Sequence[Tensor | None]]

_pool: ThreadPoolExecutor | None = None
_workers = 0


class _Job(ctypes.Structure):
    """`job` of team.h."""

    _fields_ = (
        ("function", ctypes.c_void_p),
        ("calls", ctypes.c_long),
        ("sizes_each", ctypes.c_long),
        ("pointers_each", ctypes.c_long),
        ("sizes", ctypes.POINTER(ctypes.c_long)),
        ("pointers", ctypes.POINTER(ctypes.c_void_p)),
        ("number", ctypes.c_void_p),
        ("members", ctypes.c_void_p),
        ("failed", ctypes.c_long),
    )


def _address(function: object) -> int | None:
    return ctypes.cast(function, ctypes.c_void_p).value  # type: ignore[arg-type]


@cache
def _openmp() -> tuple[int | None, ...] | None:
    """Addresses in torch's own OpenMP runtime (GNU's); None if torch has another one."""
    try:
        loaded = ctypes.CDLL(None)
        return tuple(_address(loaded[name]) for name in ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads"))
    except (OSError, AttributeError):
        return None


def _executor(workers: int) -> ThreadPoolExecutor:
    global _pool, _workers
    if _pool is None or _workers < workers:
        _pool, _workers = ThreadPoolExecutor(workers, thread_name_prefix="hfopt"), workers
    return _pool


def _forget() -> None:
    """In a forked child there are no threads: the pool is rebuilt."""
    global _pool, _workers
    _pool, _workers = None, 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def parts(batch: int, flops: float) -> list[tuple[int, int]]:
    """Ranges [first, last) of sequences, one for each of torch's threads that is worth waking."""
    count = int(max(1, min(torch.get_num_threads(), batch, flops // _WORTH_A_THREAD)))
    edges = [batch * i // count for i in range(count + 1)]
    return list(pairwise(edges))


def _in_team(compiled: ctypes.CDLL, name: str, calls: Sequence[Call], openmp: tuple[int | None, ...]) -> int:
    """The number of calls that failed."""
    main = library()
    assert main is not None
    sizes = [size for numbers, _ in calls for size in numbers]
    pointers = [None if t is None else t.data_ptr() for _, tensors in calls for t in tensors]
    parallel, number, members = openmp
    job = _Job(
        _address(compiled[name]),
        len(calls),
        len(calls[0][0]),
        len(calls[0][1]),
        (ctypes.c_long * len(sizes))(*sizes),
        (ctypes.c_void_p * len(pointers))(*pointers),
        number,
        members,
    )
    return int(main.run_in_team(ctypes.byref(job), ctypes.c_void_p(parallel)))


def _alone(compiled: ctypes.CDLL, name: str, sizes: Sequence[int], tensors: Sequence[Tensor | None]) -> int:
    numbers = (ctypes.c_long * len(sizes))(*sizes)
    pointers = (ctypes.c_void_p * len(tensors))(*(None if t is None else t.data_ptr() for t in tensors))
    return int(compiled[name](numbers, pointers))


def run(name: str, calls: Sequence[Call], compiled: ctypes.CDLL | None = None) -> None:
    """Call the compiled function `name` with (sizes, pointers) once for each of `calls`, at the same time.

    It is one of `compiled`, a cell's own library, or of the package's.

    On threads of torch's own OpenMP runtime where that can be found, otherwise on Python's: ctypes lets go of the
    interpreter while a call runs.

    Raises:
        MemoryError: a call found no memory for its workspace.
    """
    compiled = library() if compiled is None else compiled
    assert compiled is not None
    openmp = _openmp() if len(calls) > 1 else None
    if openmp is not None:
        failed = _in_team(compiled, name, calls, openmp)
    else:
        first, *others = calls
        waiting = [_executor(len(others)).submit(_alone, compiled, name, *other) for other in others]
        failed = _alone(compiled, name, *first) + sum(future.result() for future in waiting)
    if failed:
        raise MemoryError("no memory for the workspace of a pass over time")
