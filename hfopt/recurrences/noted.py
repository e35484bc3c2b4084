"""Which recurrences a closure has run, for whoever wants to look into them: what each was given and what it gave."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from torch import Tensor

Maybe = Tensor | None


@dataclass(frozen=True)
class Noted:
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


_noted: ContextVar[list[Noted] | None] = ContextVar("hfopt_noted_recurrences", default=None)


@contextmanager
def noting() -> Iterator[list[Noted]]:
    """Note every recurrence that is run inside the block."""
    found: list[Noted] = []
    token = _noted.set(found)
    try:
        yield found
    finally:
        _noted.reset(token)


def note(cell: str, arguments: Sequence[Maybe], results: Sequence[Tensor], outputs: int) -> tuple[Tensor, ...]:
    """The first ``outputs`` of the results, noted if anybody looks."""
    found, shown = _noted.get(), tuple(results[:outputs])
    if found is None:
        return shown
    found.append(Noted(cell, tuple(arguments), shown, tuple(r.detach() for r in results)))
    return tuple(y.clone() for y in shown)  # what follows may be in place
