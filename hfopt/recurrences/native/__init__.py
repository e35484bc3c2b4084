"""Passes over time compiled from C with the machine's own compiler; without one, torch's operators do the work."""

from __future__ import annotations

from hfopt.recurrences.native.cells import cell

__all__ = ["cell"]
