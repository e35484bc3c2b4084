"""Passes over time compiled from C with the machine's own compiler; without one, torch's operators do the work."""

from __future__ import annotations

from functools import cache

from hfopt.recurrences.generated import Generated
from hfopt.recurrences.native.generated import Compiled
from hfopt.recurrences.readout import Read
from hfopt.recurrences.registry import CELLS, Passes

__all__ = ["cell"]


@cache
def cell(name: str) -> Passes | None:
    """The passes of the registered cell of this name, compiled; None if there are none."""
    found = CELLS[name]
    return Compiled(found) if isinstance(found, (Generated, Read)) else None
