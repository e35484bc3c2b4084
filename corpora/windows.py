"""Windows into a long stream: at random pointers with a warm-up, as contiguous columns, and so that all is scored once.

Step t of a window that starts at s has the input ``stream[s + t]`` and the target ``stream[s + t + 1]``. Steps whose
targets are not scored are the warm-up: they give the hidden state a past.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


def random_starts(begin: int, end: int, window: int, count: int, generator: np.random.Generator) -> Ints:
    """Draw the starts of windows within ``stream[begin:end]``, targets included: uniformly, with replacement.

    Args:
        begin, end: the part of the stream.
        window: T, steps of a window; it takes T + 1 symbols.
        count: B, how many.
        generator: to draw from.

    Returns:
        (B,).

    Raises:
        ValueError: the part has fewer than T + 1 symbols.
    """
    if end - begin <= window:
        raise ValueError(
            f"a window of {window} steps takes {window + 1} symbols, but the text's part has {end - begin}"
        )
    return generator.integers(begin, end - window, size=count)


def column_starts(begin: int, end: int, count: int, window: int) -> tuple[Ints, int]:
    """Cut ``stream[begin:end]`` into contiguous columns of equal length, each of whole windows; the tail is left out.

    Args:
        begin, end: the part of the stream.
        count: C, the number of columns.
        window: T, steps of a window.

    Returns:
        The starts (C,) of the columns, and the number of windows in each. Window k of a column is at ``start + kT``.

    Raises:
        ValueError: a column has less than one window.
    """
    length = (end - begin - 1) // count
    if length < window:
        raise ValueError(
            f"{count} columns of {end - begin} symbols have {max(0, length)} steps each, less than a window of "
            f"{window}: take fewer columns (a smaller batch_size) or a shorter window"
        )
    return begin + length * np.arange(count), length // window


class Tiles(NamedTuple):
    """Windows that together score every target of a part once.

    Attributes:
        starts: (K,), where each window starts.
        first: (K,), the first target, as a place in the stream, that the window scores.
        last: (K,), the place behind the last one.
        window: T, the steps of every window.
    """

    starts: Ints
    first: Ints
    last: Ints
    window: int


def tiles(begin: int, end: int, window: int, warm_up: int) -> Tiles:
    """Lay overlapping windows so that each target in ``stream[begin:end]`` is scored once, after its warm-up.

    The past that the first windows see is what precedes the part in the stream. Only at the very beginning of the
    stream is it shorter; its first symbol has none at all and is not scored.

    Args:
        begin, end: the part of the stream.
        window: T, steps of a window, fewer at the beginning of a short stream.
        warm_up: steps that are not scored, less than T.

    Raises:
        ValueError: there is no target.
    """
    begin = max(1, begin)
    if end <= begin:
        raise ValueError(f"the text's part has no symbol to predict: it goes from {begin} to {end}")
    first = np.arange(begin, end, window - warm_up)
    last = np.minimum(first + window - warm_up, end)
    # A window that would begin before the stream or run over the part's end is moved: its past changes, not its score.
    window = min(window, end - 1)
    starts = np.clip(first - 1 - warm_up, 0, end - 1 - window)
    return Tiles(starts, first, last, window)


def column_tiles(begin: int, end: int, count: int, warm_up: int) -> Tiles:
    """Cut the targets in ``stream[begin:end]`` into columns to be run through with the state carried, each scored once.

    Each column starts `warm_up` steps before its first target, so that this has a past.

    Args:
        begin, end: the part of the stream.
        count: C, the number of columns at most.
        warm_up: steps before the first scored one.

    Returns:
        The columns, all of the same length (the last steps of some are scored by the next column or lie behind the
        stream: `take` repeats its last symbol).

    Raises:
        ValueError: there is no target.
    """
    begin = max(1, begin)
    if end <= begin:
        raise ValueError(f"the text's part has no symbol to predict: it goes from {begin} to {end}")
    count = min(count, end - begin)
    bounds = begin + np.arange(count + 1) * (end - begin) // count
    starts = np.maximum(bounds[:-1] - 1 - warm_up, 0)
    return Tiles(starts, bounds[:-1], bounds[1:], int((bounds[1:] - 1 - starts).max()))


def take(stream: npt.NDArray[Any], starts: Ints, steps: int) -> npt.NDArray[Any]:
    """The symbols of windows: ``stream[s + t]`` of shape (steps, B, ..); behind the stream's end its last one."""
    places = starts + np.arange(steps)[:, None]
    return np.asarray(stream[np.minimum(places, len(stream) - 1)])


def scored(starts: Ints, steps: int, first: Ints, last: Ints) -> npt.NDArray[np.bool_]:
    """Which steps of windows have a target from `first` up to `last`, (steps, B)."""
    targets = starts + 1 + np.arange(steps)[:, None]
    return (first <= targets) & (targets < last)
