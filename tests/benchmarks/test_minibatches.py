"""The measurements on minibatches: every problem runs, and the table says who got there."""

from __future__ import annotations

import math

import pytest

from benchmarks.minibatches import METHODS, PROBLEMS, Curve, entry, table, train


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_problem_runs(name: str) -> None:
    found = train(PROBLEMS[name](), "minibatches-evaluation", 1.0, 0, 0.01, size=20)
    assert found.steps >= 1
    assert found.points
    assert all(math.isfinite(loss) for _, loss in found.points)
    assert found.damping is not None


def test_an_entry_is_the_best_rate_that_every_seed_got_there_with() -> None:
    def curve(rate: float, seed: int, *points: tuple[float, float]) -> Curve:
        return Curve("adam", rate, seed, list(points), 10, None)

    curves = [
        curve(0.1, 0, (1.0, 0.9), (2.0, 0.4)),
        curve(0.1, 1, (1.0, 0.4), (2.0, 0.5)),
        curve(0.2, 0, (0.5, 0.1)),
        curve(0.2, 1, (0.5, 0.9)),
    ]
    assert entry(curves, 0.5) == "1.50"
    assert entry(curves, 0.2) == "-"
    text = table(PROBLEMS["cnn"](), curves)
    assert METHODS["adam"].about in text
    assert METHODS["sgd"].about not in text
