"""The line search on functions of one variable."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from hfopt import LineSearch


def search(f: Callable[[float], float], slope: float, **options: float) -> tuple[float, float, int, list[float]]:
    tried: list[float] = [1.0]

    def counted(s: float) -> float:
        tried.append(s)
        return f(s)

    found = LineSearch(**options).search(counted, f(0.0), slope, f(1.0))  # type: ignore[arg-type]
    return found.length, found.value, found.tries, tried


def test_the_full_step_costs_no_evaluation() -> None:
    assert search(lambda s: (s - 1) ** 2, -2.0) == (1.0, 0.0, 1, [1.0])


def test_the_first_length_that_meets_armijo() -> None:
    """f falls only below s = 0.2: the first 0.8^j with enough decrease."""

    def f(s: float) -> float:
        return -s + 5 * s * s

    c, expected = 1e-2, 1.0
    while f(expected) > c * expected * -1.0:
        expected *= 0.8
    length, value, tries, tried = search(f, -1.0)
    assert length == pytest.approx(expected)
    assert value == f(length)
    assert tried == pytest.approx([0.8**j for j in range(tries)])
    assert length * 0.8**-1 > 0.19


def test_a_little_decrease_is_not_enough() -> None:
    """At the full step f falls by a thousandth of what the slope predicts."""

    def f(s: float) -> float:
        return -s + s * s * (1 - 1e-3)

    assert search(f, -1.0)[0] == 0.8
    assert search(f, -1.0, c=0.0)[0] == 1.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_are_passed_over(bad: float) -> None:
    length, value, _, _ = search(lambda s: bad if s > 0.5 else -s, -1.0)
    assert length == pytest.approx(0.8**4)
    assert value == -length


def test_minus_infinity_is_no_success() -> None:
    assert search(lambda s: -math.inf if s > 0 else 0.0, -1.0, max_tries=5)[0] == 0.0


def test_giving_up() -> None:
    length, value, tries, tried = search(lambda s: 3.0 + s, -1.0, max_tries=7)
    assert (length, value, tries) == (0.0, 3.0, 7)
    assert len(tried) == 7


def test_equal_values_are_no_decrease() -> None:
    assert search(lambda s: 1.0, 0.0, max_tries=3)[0] == 0.0


def test_an_uphill_slope_asks_for_any_decrease() -> None:
    assert search(lambda s: -1e-9 * s, 5.0)[0] == 1.0
    assert search(lambda s: -1e-9 * s, math.nan)[0] == 1.0


@pytest.mark.parametrize("options", [{"c": -0.1}, {"c": 1.0}, {"shrink": 0.0}, {"shrink": 1.0}, {"max_tries": 0}])
def test_bad_settings_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        LineSearch(**options)  # type: ignore[arg-type]
