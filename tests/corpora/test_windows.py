"""Windows score what they say, once, and see the past that they should."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpora.windows import column_starts, column_tiles, random_starts, scored, take, tiles


def test_random_windows_lie_inside_their_part_and_reach_both_ends() -> None:
    generator = np.random.default_rng(0)
    starts = random_starts(10, 20, 6, 500, generator)
    windows = take(np.arange(100), starts, 7)
    assert windows.shape == (7, 500)
    assert (windows[1:] - windows[:-1] == 1).all()
    assert (windows.min(), windows.max()) == (10, 19)
    assert set(starts) == {10, 11, 12, 13}
    with pytest.raises(ValueError, match="a window of 10 steps takes 11 symbols, but the text's part has 10"):
        random_starts(10, 20, 10, 1, generator)


def test_columns_are_contiguous_and_equally_long() -> None:
    starts, windows = column_starts(100, 131, 3, 4)
    assert (starts.tolist(), windows) == ([100, 110, 120], 2)
    with pytest.raises(ValueError, match="3 columns of 31 symbols have 10 steps each, less than a window of 11"):
        column_starts(100, 131, 3, 11)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 30), st.integers(1, 60), st.integers(1, 12), st.integers(0, 11))
def test_tiles_score_every_target_once_after_the_warm_up(begin: int, length: int, window: int, warm_up: int) -> None:
    end, warm_up = begin + length, min(warm_up, window - 1)
    if end <= max(begin, 1):
        return
    found = tiles(begin, end, window, warm_up)
    mask = scored(found.starts, found.window, found.first, found.last)
    targets = found.starts + 1 + np.arange(found.window)[:, None]
    assert sorted(targets[mask]) == list(range(max(begin, 1), end))
    assert targets.max() < end
    steps = np.broadcast_to(np.arange(found.window)[:, None], mask.shape)
    # Every scored step has the whole warm-up before it, unless the stream begins there.
    assert ((steps >= warm_up) | (found.starts == 0))[mask].all()


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 30), st.integers(1, 60), st.integers(1, 9), st.integers(0, 11))
def test_columns_to_run_through_score_every_target_once(begin: int, length: int, count: int, warm_up: int) -> None:
    end = begin + length
    if end <= max(begin, 1):
        return
    found = column_tiles(begin, end, count, warm_up)
    assert len(found.starts) == min(count, end - max(begin, 1))
    mask = scored(found.starts, found.window, found.first, found.last)
    targets = found.starts + 1 + np.arange(found.window)[:, None]
    assert sorted(targets[mask]) == list(range(max(begin, 1), end))
    assert (found.starts == np.maximum(found.first - 1 - warm_up, 0)).all()


def test_behind_the_end_of_a_stream_its_last_symbol_is_repeated() -> None:
    stream = np.array([[1, 2], [3, 4], [5, 6]])
    assert take(stream, np.array([0, 1]), 3).tolist() == [[[1, 2], [3, 4]], [[3, 4], [5, 6]], [[5, 6], [5, 6]]]


def test_a_part_without_targets_is_refused() -> None:
    with pytest.raises(ValueError, match="no symbol to predict"):
        tiles(0, 1, 4, 0)
    with pytest.raises(ValueError, match="no symbol to predict"):
        column_tiles(5, 5, 4, 0)
