"""One function per step: every run of a closure inside a step sees the same random draws and the same buffers.

Dropout draws, noise, and the running statistics of normalisation layers would make each evaluation another function.
:class:`Frozen` remembers the random state before the first run and the buffers of every module as it was first called,
and puts both back around each further run, so that a step draws once and updates running statistics once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Bytes up to which a buffer on a device is put back without a look whether it has changed: the host would have to wait
# for the answer, and running statistics are small.
_SMALL = 1 << 20


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
    """The random state and the module buffers that belong to one step."""

    def __init__(self, device: torch.device) -> None:
        """``device``: where the parameters are; a CUDA device's generator is frozen with the CPU's."""
        self._device = device
        self._random = self._random_state()
        self._buffers: dict[tuple[int, str], _Buffer] = {}
        self._modules: dict[int, nn.Module] = {}
        self._started = False
        self.drew = False  # whether any run so far has drawn random numbers

    def run(self) -> AbstractContextManager[None]:
        """Return the context of the next run of a closure: :meth:`first`, and :meth:`again` for all later runs."""
        return self.again() if self._started else self.first()

    def _random_state(self) -> tuple[Tensor, Tensor | None]:
        cuda = torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None
        return torch.get_rng_state(), cuda

    def _set_random_state(self, state: tuple[Tensor, Tensor | None]) -> None:
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], self._device)

    def _see(self, module: nn.Module, _args: Any) -> None:
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

    def _note_draws(self) -> None:
        cpu, cuda = self._random_state()
        before, cuda_before = self._random
        self.drew |= not torch.equal(cpu, before)
        self.drew |= cuda is not None and cuda_before is not None and not torch.equal(cuda, cuda_before)

    @contextmanager
    def _watching(self) -> Iterator[None]:
        handle = nn.modules.module.register_module_forward_pre_hook(self._see)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def first(self) -> Iterator[None]:
        """Run the block and keep its draws and buffer updates."""
        self._started = True
        with _own_casts(), self._watching():
            yield
        self._note_draws()

    @contextmanager
    def again(self, watch: bool = True) -> Iterator[None]:
        """Run the block from the state before the first run, and restore everything afterwards.

        ``watch=False`` for runs of a traced graph, whose constants are no buffers of the model: among them are the
        parameters.
        """
        random = self._random_state()
        known = [b for b in self._buffers.values() if b.changed()]
        now = [b.value() for b in known]
        self._set_random_state(self._random)
        for b in known:
            b.set(b.tensor, b.before)
        try:
            with _own_casts(), self._watching() if watch else nullcontext():
                yield
        finally:
            self._note_draws()
            self._set_random_state(random)
            for b in set(self._buffers.values()).difference(known):
                if b.changed():
                    b.set(b.tensor, b.before)
            for b, (tensor, value) in zip(known, now, strict=True):
                b.set(tensor, value)
