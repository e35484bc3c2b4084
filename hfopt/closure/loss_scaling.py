"""Losses scaled by a ``torch.amp.GradScaler``: seen while a closure runs, and taken out of all that a step computes.

Scaling by s keeps small gradients of half precision from vanishing on their way back. So the closure's own loss stays
as it is, ``s F``, all the way through the network; what arrives at the parameters, ``s g`` and ``s G v``, is divided by
s in the precision of the flat vectors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch.amp import GradScaler

from hfopt.closure.patch import Method, Patch


@dataclass
class Scaling:
    """Record of a scaler: ``scaler`` is None and ``factor`` is 1 if ``scale()`` was not called."""

    scaler: GradScaler | None = None
    factor: float = 1.0

    @property
    def unit(self) -> float:
        """``1/s``."""
        return 1.0 / self.factor


_seen: ContextVar[Scaling | None] = ContextVar("hfopt_scaling", default=None)


def _noting(plain: Method) -> Method:
    def scale(self: GradScaler, outputs: Any) -> Any:
        seen, result = _seen.get(), plain(self, outputs)
        if seen is not None and self.is_enabled():
            seen.scaler, seen.factor = self, float(self.get_scale())
        return result

    return scale


_patch = Patch(GradScaler, "scale", _noting)


@contextmanager
def watching() -> Iterator[Scaling]:
    """Record, in the returned :class:`Scaling`, how the closures run inside the block scale their losses."""
    token = _seen.set(seen := Scaling())
    try:
        with _patch.block():
            yield seen
    finally:
        _seen.reset(token)
