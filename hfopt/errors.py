"""Messages to the user apart from results: errors, warnings at the user's own line, and a log."""

from __future__ import annotations

import logging
import sys
import warnings
from types import FrameType

logger = logging.getLogger("hfopt")

# Frames of these packages are no user's: the optimizer's methods are wrapped by torch's.
_OURS = ("hfopt", "torch", "contextlib")


class HfoptError(Exception):
    """Base class of the package's own errors."""


class ClosureError(HfoptError):
    """The closure could not be understood; the message gives the reason and the keyword that solves it."""


class NotDifferentiable(HfoptError):
    """The model could not be linearised; the message lists all attempts and their errors."""


class CheckFailed(HfoptError):
    """A self-check (``check=True``) failed; the message describes the problem and what to do."""


def warn(message: str) -> None:
    """Warn at the line outside this package (and torch) that led here."""
    frame: FrameType | None = sys._getframe()
    level = 0
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _OURS:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level + 1)


def size(count: int) -> str:
    """Format a number of bytes, as in "3.2 MiB"."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"
