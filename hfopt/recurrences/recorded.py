"""A record of the recurrences that a closure has run: what each was given and what it gave."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from torch import Tensor

Maybe = Tensor | None


@dataclass(frozen=True)
class Recorded:
    """One run of a cell (or of the simple recurrence, as "simple_" and its nonlinearity) over a whole sequence.

    Attributes:
        cell: its name.
        arguments: as the cell takes them, in the graph.
        outputs: what it gave, in the graph.
        results: its outputs and what it stored besides, outside of the graph.
    """

    cell: str
    arguments: tuple[Maybe, ...]
    outputs: tuple[Tensor, ...]
    results: tuple[Tensor, ...]


_recorded: ContextVar[list[Recorded] | None] = ContextVar("hfopt_recorded_recurrences", default=None)


@contextmanager
def recording() -> Iterator[list[Recorded]]:
    """Record every recurrence that is run inside the block."""
    found: list[Recorded] = []
    token = _recorded.set(found)
    try:
        yield found
    finally:
        _recorded.reset(token)


def record(cell: str, arguments: Sequence[Maybe], results: Sequence[Tensor], outputs: int) -> tuple[Tensor, ...]:
    """The first ``outputs`` of the results, recorded if anybody looks."""
    found, shown = _recorded.get(), tuple(results[:outputs])
    if found is None:
        return shown
    found.append(Recorded(cell, tuple(arguments), shown, tuple(r.detach() for r in results)))
    return tuple(y.clone() for y in shown)  # what follows may be in place
