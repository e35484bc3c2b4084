"""One function per step: every run of a closure inside a step sees the same random draws and the same buffers.

Dropout draws, noise, teacher forcing, and the running statistics of normalisation layers would make each evaluation
another function. :class:`Frozen` remembers the states of the random generators that the first run draws from and the
buffers of every module as it was first called, and puts both back around each further run, so that a step draws once
and updates running statistics once. Generators: those of torch, Python's ``random`` and numpy, and objects of the
closure's own, where a torch function is called with one or a closure or module refers to it.
"""

from __future__ import annotations

import functools
import random
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hfopt.closure.patch import undone
from hfopt.draws.repeated import Draws
from hfopt.errors import warn

GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)

# Bytes up to which a buffer on a device is put back without a look whether it has changed: the host would have to wait
# for the answer, and running statistics are small.
_SMALL = 1 << 20

# Containers with more entries than this hold data, in which nobody looks for a generator.
_FEW = 20


def _put_back_unseen(tensor: Tensor) -> bool:
    return tensor.device.type != "cpu" and tensor.numel() * tensor.element_size() <= _SMALL


@dataclass(eq=False)
class _Buffer:
    module: nn.Module
    name: str
    tensor: Tensor
    version: int
    before: Tensor

    def changed(self) -> bool:
        """Return whether the buffer may hold another value than before the first run."""
        if (
            _put_back_unseen(self.tensor)
            or self.module._buffers.get(self.name) is not self.tensor
            or self.tensor._version != self.version
        ):
            return True
        # Batch normalisation updates its statistics without a new version.
        return not torch.equal(self.tensor, self.before)

    def value(self) -> tuple[Tensor | None, Tensor]:
        current = self.module._buffers.get(self.name)
        return current, (self.tensor if current is None else current).detach().clone()

    def set(self, tensor: Tensor | None, value: Tensor) -> None:
        self.module._buffers[self.name] = tensor
        if tensor is not None:
            tensor.data.copy_(value)


@contextmanager
def _own_casts() -> Iterator[None]:
    """Keeps no cast of a parameter from or for another run: in a step under ``torch.autocast`` they would outlive a
    move of the parameters.
    """
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()


class Frozen:
    """The random draws and the module buffers that belong to one step."""

    def __init__(self, device: torch.device, closures: Iterable[Callable[..., Any] | None] = ()) -> None:
        """``device``: where the parameters are; a CUDA device's generator is frozen with the CPU's.

        ``closures``: what is going to be run; generator objects that they refer to are frozen as well.
        """
        self._draws = Draws(device, warn)
        self._buffers: dict[tuple[int, str], _Buffer] = {}
        self._modules: dict[int, nn.Module] = {}
        self._started = False
        for closure in closures:
            for generator in referred(closure):
                self._draws.add(generator)

    @property
    def drew(self) -> bool:
        """Whether any run so far has drawn random numbers."""
        return self._draws.drew

    def run(self) -> AbstractContextManager[None]:
        """Return the context of the next run of a closure: :meth:`first`, and :meth:`again` for all later runs."""
        return self.again() if self._started else self.first()

    def put_back(self) -> None:
        """Set the buffers to what they were before the first run, for a step that changes nothing."""
        for b in self._buffers.values():
            if b.changed():
                b.set(b.tensor, b.before)

    def _see(self, module: nn.Module) -> None:
        if torch.compiler.is_compiling():
            return  # what is inside was seen with the compiled module itself
        for inner in module.modules() if hasattr(module, "_orig_mod") else (module,):
            self._note(inner)

    def _note(self, module: nn.Module) -> None:
        if id(module) in self._modules:
            return
        self._modules[id(module)] = module
        for name, buffer in module._buffers.items():
            if buffer is not None:
                self._buffers[id(module), name] = _Buffer(
                    module, name, buffer, buffer._version, buffer.detach().clone()
                )
        for value in vars(module).values():
            if isinstance(value, GENERATORS):
                self._draws.add(value)

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """See the modules that this thread calls; those that others call meanwhile are none of the closure's."""
        thread, hooks = threading.get_ident(), nn.modules.module._global_forward_pre_hooks
        handle = RemovableHandle(hooks)

        def see(module: nn.Module, _args: Any) -> None:
            if threading.get_ident() == thread:
                self._see(module)

        with undone(handle.remove):
            hooks[handle.id] = see
            yield

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Run the block, and put back the buffers of the modules that it calls."""
        with undone(self.put_back), self._watching():
            yield

    @contextmanager
    def first(self) -> Iterator[None]:
        """Run the block and keep its draws and buffer updates."""
        self._started = True
        run = self._draws.new(first=True)
        with undone(lambda: self._draws.end(run)), self._draws.watch(run), _own_casts(), self._watching():
            self._draws.begin(run)
            yield

    @contextmanager
    def again(self, watch: bool = True) -> Iterator[None]:
        """Run the block from the state before the first run, and restore everything afterwards.

        ``watch=False`` for runs of a traced graph, whose constants are no buffers of the model: among them are the
        parameters.
        """
        run = self._draws.new(first=False)
        known = [b for b in self._buffers.values() if b.changed()]
        now = [b.value() for b in known]

        def restore() -> None:
            self._draws.end(run)
            for b in set(self._buffers.values()).difference(known):
                if b.changed():
                    b.set(b.tensor, b.before)
            for b, (tensor, value) in zip(known, now, strict=True):
                b.set(tensor, value)

        with undone(restore), self._draws.watch(run), _own_casts():
            self._draws.begin(run)
            for b in known:
                b.set(b.tensor, b.before)
            with self._watching() if watch else nullcontext():
                yield


def referred(closure: Any, depth: int = 4) -> Iterator[Any]:
    """The generator objects that a function refers to: in its cells, defaults, globals and object,
    and in those of what it calls."""
    if isinstance(closure, GENERATORS):
        yield closure
    elif depth == 0 or closure is None:
        return
    elif isinstance(getattr(closure, "__self__", None), GENERATORS):
        yield closure.__self__
    elif isinstance(closure, (list, tuple, dict)):
        values = list(closure.values() if isinstance(closure, dict) else closure)
        for value in values if len(values) <= _FEW else ():
            yield from referred(value, depth - 1)
    elif isinstance(closure, functools.partial):
        for value in (closure.func, *closure.args, *closure.keywords.values()):
            yield from referred(value, depth - 1)
    elif isinstance(closure, types.MethodType):
        yield from referred(closure.__func__, depth)
        yield from referred(closure.__self__, depth - 1)
    elif isinstance(closure, types.FunctionType):
        scope = closure.__globals__
        names = [scope[name] for name in closure.__code__.co_names if name in scope]
        for value in (*_contents(closure), *(closure.__defaults__ or ()), *names):
            yield from referred(value, depth - 1)
    elif not isinstance(closure, (types.ModuleType, type, nn.Module, Tensor)):
        # Modules of a network are looked at as they are called.
        for value in list(getattr(closure, "__dict__", {}).values()):
            if isinstance(value, GENERATORS):
                yield value


def _contents(function: types.FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # of a name that has no value yet
            yield cell.cell_contents
