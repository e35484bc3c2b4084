"""Recording and repetition as a CUDA graph does them, on the CPU: the operations, on the tensors that they had."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from hfopt.linalg.cg_device import DeviceCG

# What would make the host wait for a device.
READS = re.compile(r"_local_scalar_dense|aten\.(item|is_nonzero|equal|nonzero|masked_select|unique|allclose)\b")


class Reading(AssertionError):
    """A number was read where nothing may be."""


class NoReads(TorchDispatchMode):
    """Raises where a value goes from a tensor to the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if READS.search(str(func)):
            raise Reading(str(func))
        return func(*args, **(kwargs or {}))


class Tape(NoReads):
    """Notes every operation with its very arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.operations.append((func, args, kwargs or {}, result))
        return result

    def repeat(self) -> None:
        """The same operations on the same memory; no line of Python that called them is run again."""
        with torch.no_grad():
            for func, args, kwargs, result in self.operations:
                again = tree_flatten(func(*args, **kwargs))[0]
                for old, new in zip(tree_flatten(result)[0], again, strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.detach().copy_(new)

    def fresh(self, numel: int) -> list[str]:
        """The operations that put results of ``numel`` elements into new memory."""
        found: list[str] = []
        for func, args, kwargs, result in self.operations:
            known = {t.untyped_storage().data_ptr() for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)}
            made = [t for t in tree_flatten(result)[0] if isinstance(t, Tensor) and t.numel() == numel]
            found += [str(func) for t in made if t.untyped_storage().data_ptr() not in known]
        return found


class Recorder:
    """Records with a :class:`Tape`; like a graph's, its recording leaves everything as it was."""

    def __init__(self, proven: bool = False) -> None:
        self.proven, self.watched, self.repeated = proven, 0, 0
        self.tape: Tape | None = None
        self.refused: str | None = None
        self.run: DeviceCG | None = None

    def prove(self) -> None:
        self.proven = True

    def watch(self, work: Callable[[], None]) -> None:
        self.watched += 1
        work()

    def record(self, work: Callable[[], None]) -> Callable[[], None] | None:
        assert self.run is not None
        self.tape = Tape()
        with put_back(self.run), self.tape:
            work()
        return self.repeat

    def repeat(self) -> None:
        assert self.tape is not None
        self.repeated += 1
        self.tape.repeat()

    def refuse(self, reason: str) -> None:
        self.refused = reason


@contextmanager
def put_back(run: DeviceCG) -> Iterator[None]:
    """Let the block leave no trace in the tensors of a solve."""
    tensors = [t for t in tree_flatten(vars(run))[0] if isinstance(t, Tensor)]
    saved = [t.clone() for t in tensors]
    try:
        yield
    finally:
        for t, value in zip(tensors, saved, strict=True):
            t.copy_(value)
