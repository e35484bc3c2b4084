"""Addition and multiplication against their definitions, written out step by step."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from math import ceil, floor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import pathological
from pathological import Batch
from tests.hfopt.tools import rounding

ANSWERS = {
    ("addition", "paper"): lambda a, b: (a + b) / 2,
    ("addition", "release"): lambda a, b: a + b,
    ("multiplication", "paper"): lambda a, b: a * b,
    ("multiplication", "release"): lambda a, b: a * b,
}
CASES = pytest.mark.parametrize(("name", "form"), sorted(ANSWERS))


def read_sequence(batch: Batch, b: int) -> tuple[int, list[int], list[int], float]:
    """Length, steps marked 1, steps marked -1 (from 0) and target of one sequence, read off in a loop."""
    scored = [t for t in range(batch.mask.shape[0]) if batch.mask[t, b]]
    assert len(scored) == 1
    length = scored[0] + 1
    assert length == int(batch.lengths[b])
    plus, minus = [], []
    for t in range(batch.inputs.shape[0]):
        value, marker = batch.inputs[t, b].tolist()
        if t >= length:
            assert value == 0.0
            assert marker == 0.0
        assert 0.0 <= value < 1.0
        assert marker in (-1.0, 0.0, 1.0)
        if marker == 1.0:
            plus.append(t)
        elif marker == -1.0:
            minus.append(t)
        if t != length - 1:
            assert batch.targets[t, b].tolist() == [0.0]
    return length, plus, minus, float(batch.targets[length - 1, b, 0])


def check_paper_windows(T: int, length: int, plus: list[int], minus: list[int]) -> None:
    first, second = (t + 1 for t in plus)
    tenth, half = Fraction(length, 10), Fraction(length, 2)
    assert T <= length <= Fraction(11 * T, 10)
    assert 1 <= first <= tenth <= second <= half
    assert minus == []


def check_release_windows(T: int, length: int, plus: list[int], minus: list[int]) -> None:
    f1, f10, f50, f100, f110 = (floor(Fraction(k * T, 100)) for k in (1, 10, 50, 100, 110))
    first, second = plus
    end = length - 1
    assert f100 <= end < f110
    assert max(1, f1) <= first < f10 <= second < f50
    assert minus == [0, end - 3]


@CASES
@settings(max_examples=15, deadline=None, derandomize=True)
@given(T=st.integers(20, 130), seed=st.integers(0, 2**40))
def test_every_sequence_keeps_to_the_definition(name: str, form: str, T: int, seed: int) -> None:
    problem = pathological.PROBLEMS[name](T, form=form, batch_size=12, seed=seed, dtype=torch.float64)
    batch = problem(0)
    steps = floor(Fraction(11 * T, 10)) if form == "paper" else floor(Fraction(110 * T, 100))
    assert tuple(batch.inputs.shape) == (steps, 12, 2) == (problem.steps, problem.batch_size, problem.V)
    assert tuple(batch.targets.shape) == (steps, 12, 1)
    for b in range(12):
        length, plus, minus, target = read_sequence(batch, b)
        assert len(plus) == 2
        (check_paper_windows if form == "paper" else check_release_windows)(T, length, plus, minus)
        u_first, u_second = (float(batch.inputs[t, b, 0]) for t in plus)
        assert target == pytest.approx(ANSWERS[name, form](u_first, u_second), abs=rounding())


@pytest.mark.parametrize("T", [29, 57, 58, 113, 114, 115, 116])
def test_release_lengths_are_exact_where_floating_point_percentages_are_not(T: int) -> None:
    assert int(T * (100 / 100.0)) == T
    lengths = pathological.addition(T, form="release", batch_size=2000, seed=1)(0).lengths - 1
    assert int(lengths.min()) == T
    assert int(lengths.max()) == 110 * T // 100 - 1


@pytest.mark.parametrize("T", [10, 11, 15, 19, 20])
def test_the_shortest_paper_problems(T: int) -> None:
    batch = pathological.multiplication(T, batch_size=300, seed=2)(0)
    for b in range(300):
        length, plus, minus, _ = read_sequence(batch, b)
        check_paper_windows(T, length, plus, minus)


def frequencies_fit(draws: list[int], low: int, high: int) -> bool:
    """Whether every integer of the window occurs, no other, and uniformly so (chi-square, p > 1e-4)."""
    counts = Counter(draws)
    assert set(counts) == set(range(low, high + 1))
    return bool(stats.chisquare([counts[k] for k in range(low, high + 1)]).pvalue > 1e-4)


def test_paper_positions_are_uniform_over_their_windows() -> None:
    T, B = 47, 40_000
    batch = pathological.addition(T, batch_size=B, seed=3)(0)
    lengths = batch.lengths.tolist()
    assert frequencies_fit(lengths, T, 51)
    marked = batch.inputs[:, :, 1].T.nonzero()[:, 1].reshape(B, 2) + 1
    for length in (49, 50):
        rows = [row for row, n in zip(marked.tolist(), lengths, strict=True) if n == length]
        assert frequencies_fit([i for i, _ in rows], 1, length // 10)
        # With I in the step that the windows share, J has the rest; else all of its window.
        for i in range(1, length // 10 + 1):
            low = max(ceil(length / 10), i + 1)
            assert frequencies_fit([j for first, j in rows if first == i], low, length // 2)


def test_release_positions_are_uniform_over_their_windows() -> None:
    T, B = 45, 20_000
    batch = pathological.addition(T, form="release", batch_size=B, seed=4)(0)
    marked = (batch.inputs[:, :, 1].T == 1.0).nonzero()[:, 1].reshape(B, 2)
    assert frequencies_fit(batch.lengths.tolist(), T + 1, 49)
    assert frequencies_fit(marked[:, 0].tolist(), 1, 3)
    assert frequencies_fit(marked[:, 1].tolist(), 4, 21)


def test_numbers_are_uniform_and_independent_of_time_and_of_marks() -> None:
    batch = pathological.addition(40, batch_size=3000, seed=5, dtype=torch.float64)(0)
    values, marker = batch.inputs[:, :, 0], batch.inputs[:, :, 1]
    assert stats.kstest(values[batch.valid].numpy(), "uniform").pvalue > 1e-4
    assert stats.kstest(values[marker == 1.0].numpy(), "uniform").pvalue > 1e-4
    neighbours = torch.corrcoef(torch.stack((values[:40].flatten()[:-1], values[:40].flatten()[1:])))
    assert abs(float(neighbours[0, 1])) < 4 / (40 * 3000) ** 0.5
    across = torch.corrcoef(torch.stack((values[:39].flatten(), values[1:40].flatten())))
    assert abs(float(across[0, 1])) < 4 / (39 * 3000) ** 0.5


@pytest.mark.parametrize(
    ("name", "form", "answer", "loss", "wrong"),
    [
        ("addition", "paper", 0.5, 1 / 48, 0.846),
        ("addition", "release", 1.0, 1 / 12, 0.922),
        ("multiplication", "paper", 0.25, 7 / 288, 0.889),
        ("multiplication", "release", 0.25, 7 / 288, 0.889),
        ("multiplication", "paper", 0.04, None, 0.718),
    ],
)
def test_chance_levels(name: str, form: str, answer: float, loss: float | None, wrong: float) -> None:
    B = 40_000
    problem = pathological.PROBLEMS[name](20, form=form, batch_size=B, seed=6, dtype=torch.float64)
    batch = problem(-1)
    outputs = torch.full((*batch.mask.shape, 1), answer, dtype=torch.float64)
    if loss is not None:
        assert float(problem.loss(outputs, batch)) == pytest.approx(loss, rel=0.02)
    assert int(problem.zero_one_loss(outputs, batch)) / B == pytest.approx(wrong, abs=0.006)


@CASES
def test_loss_and_errors_are_those_of_a_loop(name: str, form: str) -> None:
    problem = pathological.PROBLEMS[name](23, form=form, batch_size=50, seed=7, dtype=torch.float64)
    batch = problem(3)
    generator = torch.Generator().manual_seed(8)
    noise = torch.randn(*batch.mask.shape, 1, dtype=torch.float64, generator=generator)
    outputs = batch.targets + 0.05 * noise
    total, errors = 0.0, []
    for b in range(50):
        end = int(batch.lengths[b]) - 1
        difference = float(outputs[end, b, 0] - batch.targets[end, b, 0])
        total += 0.5 * difference**2
        errors.append(abs(difference) > 0.04)
    assert 0 < sum(errors) < 50
    assert float(problem.loss(outputs, batch)) == pytest.approx(total / 50, rel=rounding(50))
    assert problem.wrong(outputs, batch).tolist() == errors
    assert int(problem.zero_one_loss(outputs, batch)) == sum(errors)
    problem.tolerance = 0.2
    assert int(problem.zero_one_loss(outputs, batch)) < sum(errors)


def test_predictions_are_the_outputs() -> None:
    outputs = torch.linspace(-2, 2, 12).reshape(2, 6, 1)
    assert torch.equal(pathological.addition(20).predictions(outputs), outputs)
