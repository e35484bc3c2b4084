"""XOR, temporal order, random permutation and memorization against their definitions, read in a loop."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from math import floor, log
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import pathological
from pathological import Batch

quick = settings(max_examples=12, deadline=None, derandomize=True)
SEEDS = st.integers(0, 2**40)
FORM = pytest.mark.parametrize("form", ["paper", "release"])


def f(T: int, k: int) -> int:
    return floor(Fraction(k * T, 100))


def symbols_of(batch: Batch, b: int) -> list[int]:
    """The symbols of one sequence, each step one-hot; nothing after its end."""
    symbols = []
    for t in range(batch.inputs.shape[0]):
        ones = [v for v, x in enumerate(batch.inputs[t, b].tolist()) if x == 1.0]
        zeros = [x for x in batch.inputs[t, b].tolist() if x == 0.0]
        assert len(ones) + len(zeros) == batch.inputs.shape[2]
        assert len(ones) == (1 if t < int(batch.lengths[b]) else 0)
        symbols += ones
    return symbols


def scored_steps(batch: Batch, b: int) -> list[int]:
    return [t for t in range(batch.mask.shape[0]) if batch.mask[t, b]]


def answer(batch: Batch, classes: int) -> Tensor:
    """Outputs ``(T, B, O)`` that give the right class at every scored step."""
    return 50.0 * torch.nn.functional.one_hot(batch.targets, classes).double()


@FORM
@quick
@given(T=st.integers(20, 120), seed=SEEDS)
def test_xor(form: str, T: int, seed: int) -> None:
    problem = pathological.xor(T, form=form, batch_size=10, seed=seed)
    batch = problem(0)
    assert batch.inputs.shape[0] == (T + T // 10 if form == "paper" else f(T, 55))
    for b in range(10):
        (end,) = scored_steps(batch, b)
        bits, marker = batch.inputs[: end + 1, b, 0].tolist(), batch.inputs[: end + 1, b, 1].tolist()
        assert set(bits) <= {0.0, 1.0}
        first, second = (t for t, m in enumerate(marker) if m == 1.0)
        minus = [t for t, m in enumerate(marker) if m == -1.0]
        if form == "paper":
            n = end + 1
            assert T <= n <= Fraction(11 * T, 10)
            assert 1 <= first + 1 <= Fraction(n, 10) <= second + 1 <= Fraction(n, 2)
            assert minus == []
        else:
            assert f(T, 50) <= end < f(T, 55)
            assert max(1, f(T, 1)) <= first < f(T, 10)
            assert f(T, 15) <= second < f(T, 25)
            assert minus == [0, end - 3]
        assert float(batch.targets[end, b, 0]) == (bits[first] + bits[second]) % 2


def test_xor_chance_and_sign() -> None:
    problem = pathological.xor(30, batch_size=4000, seed=1, dtype=torch.float64)
    batch = problem(0)
    zeros = torch.zeros(33, 4000, 1, dtype=torch.float64)
    assert float(problem.loss(zeros, batch)) == pytest.approx(log(2), rel=1e-12)
    ones = int(problem.zero_one_loss(zeros - 1, batch))
    assert abs(ones - 2000) < 4 * 4000**0.5 / 2
    assert int(problem.zero_one_loss(zeros + 1, batch)) == 4000 - ones
    assert int(problem.zero_one_loss(batch.targets - 0.5, batch)) == 0
    assert float(problem.predictions(torch.tensor([0.0]))) == 0.5


ORDER_WINDOWS = {
    ("temporal_order", "paper"): [(10, 20), (50, 60)],
    ("temporal_order", "release"): [(1, 10), (40, 50)],
    ("temporal_order_3bit", "paper"): [(10, 20), (30, 40), (60, 70)],
    ("temporal_order_3bit", "release"): [(1, 10), (30, 40), (50, 60)],
}


@pytest.mark.parametrize(("name", "form"), sorted(ORDER_WINDOWS))
@quick
@given(T=st.integers(10, 120), seed=SEEDS)
def test_temporal_order(name: str, form: str, T: int, seed: int) -> None:
    windows = ORDER_WINDOWS[name, form]
    batch = pathological.PROBLEMS[name](T, form=form, batch_size=16, seed=seed)(0)
    assert batch.inputs.shape[0] == (T + T // 10 if form == "paper" else f(T, 110))
    for b in range(16):
        (end,) = scored_steps(batch, b)
        symbols = symbols_of(batch, b)
        assert len(symbols) == end + 1
        specials = [(t, s) for t, s in enumerate(symbols) if s in (4, 5)]
        bits = [s - 4 for _, s in specials]
        assert len(specials) == len(windows)
        for (t, _), (low, high) in zip(specials, windows, strict=True):
            if form == "paper":
                assert Fraction(low * T, 100) <= t + 1 <= Fraction(high * T, 100)
            else:
                assert max(1, f(T, low)) <= t <= f(T, high)
        others = {t: s for t, s in enumerate(symbols) if s > 5}
        if form == "paper":
            assert T <= end + 1 <= Fraction(11 * T, 10)
            assert others == {}
            wanted = int("".join(map(str, bits)), 2)
        else:
            assert f(T, 100) <= end < f(T, 110)
            assert others == {0: 7, (end - 1 if len(bits) == 2 else end): 6}
            assert bits == [(b // 2**k) % 2 for k in range(len(bits))]
            a, c = bits[0], bits[-1]
            wanted = 2 * a + c if len(bits) == 2 else 4 * c + 2 * bits[1] + a
        assert int(batch.targets[end, b]) == wanted


@pytest.mark.parametrize(("name", "form"), sorted(ORDER_WINDOWS))
def test_temporal_order_fills_its_windows_and_has_even_classes(name: str, form: str) -> None:
    T, B = 60, 8000
    problem = pathological.PROBLEMS[name](T, form=form, batch_size=B, seed=2, dtype=torch.float64)
    batch = problem(-2)
    special = batch.inputs[:, :, 4:6].sum(2)
    found = set(special.sum(1).nonzero().squeeze(1).tolist())
    windows = ORDER_WINDOWS[name, form]
    if form == "paper":
        steps = {t for low, high in windows for t in range(low * T // 100 - 1, high * T // 100)}
    else:
        steps = {t for low, high in windows for t in range(max(1, f(T, low)), f(T, high) + 1)}
    assert found == steps
    fillers = batch.inputs[:, :, :4].sum((0, 1))
    assert float(fillers.max() / fillers.min()) < 1.03
    classes = Counter(batch.targets[batch.mask].tolist())
    assert set(classes) == set(range(problem.O))
    for count in classes.values():
        slack = 0 if form == "release" else 5 * (B / problem.O) ** 0.5
        assert abs(count - B / problem.O) <= slack
    outputs = torch.zeros(*batch.mask.shape, problem.O, dtype=torch.float64)
    assert float(problem.loss(outputs, batch)) == pytest.approx(log(problem.O), rel=1e-12)
    wrong = int(problem.zero_one_loss(outputs, batch)) / B
    assert wrong == pytest.approx(1 - 1 / problem.O, abs=0.02)
    assert int(problem.zero_one_loss(answer(batch, problem.O), batch)) == 0


@FORM
@quick
@given(T=st.integers(3, 40), seed=SEEDS)
def test_random_permutation(form: str, T: int, seed: int) -> None:
    batch = pathological.random_permutation(T, form=form, batch_size=6, seed=seed)(0)
    steps = T - 1 if form == "paper" else T
    assert tuple(batch.inputs.shape) == (steps, 6, 100)
    for b in range(6):
        symbols = symbols_of(batch, b)
        assert scored_steps(batch, b) == list(range(steps))
        assert symbols[0] == (b % 2 if form == "release" else symbols[0] % 2)
        assert all(2 <= s <= 99 for s in symbols[1:])
        assert batch.targets[:, b].tolist() == [*symbols[1:], symbols[0]]


def test_random_permutation_counts_last_steps_only() -> None:
    problem = pathological.random_permutation(12, batch_size=2000, seed=3, dtype=torch.float64)
    batch = problem(0)
    assert problem.size(batch) == 11 * 2000
    last, filler = batch.targets[-1], batch.targets[:-1]
    assert abs(int(last.sum()) - 1000) < 100
    assert set(filler.flatten().tolist()) == set(range(2, 100))
    guess = torch.full((11, 2000, 100), -1e3, dtype=torch.float64)
    guess[:-1, :, 2:] = 0.0
    guess[-1, :, :2] = 0.0
    expected = (10 * log(98) + log(2)) / 11
    assert float(problem.loss(guess, batch)) == pytest.approx(expected, rel=1e-12)
    right_at_the_end = guess.clone()
    right_at_the_end[-1] = answer(batch, 100)[-1]
    assert int(problem.zero_one_loss(right_at_the_end, batch)) == 0
    wrong_at_the_end = answer(batch, 100)
    wrong_at_the_end[-1] = guess[-1]
    assert int(problem.zero_one_loss(wrong_at_the_end, batch)) == int(last.sum())


MEMORIES = {"memorization_5bit": (5, 2), "memorization_20bit": (10, 5)}


@FORM
@pytest.mark.parametrize("name", sorted(MEMORIES))
@quick
@given(T=st.integers(21, 60), seed=SEEDS, only=st.booleans())
def test_memorization(name: str, form: str, T: int, seed: int, only: bool) -> None:
    n, k = MEMORIES[name]
    options: dict[str, Any] = {"form": form, "batch_size": 7, "seed": seed, "only_memory_bits": only}
    problem = pathological.PROBLEMS[name](T, **options)
    batch = problem(0)
    length = T + 2 * n if form == "paper" else T
    blank, trigger = (k, k + 1) if form == "paper" else (k - 1, k - 2)
    at = T + n if form == "paper" else T - n  # the trigger's step, counted from 1
    assert tuple(batch.inputs.shape) == (length, 7, k + 2 if form == "paper" else k)
    assert problem.O == problem.V
    for b in range(7):
        symbols = symbols_of(batch, b)
        data = symbols[:n]
        assert all(0 <= s < k for s in data)
        if name == "memorization_5bit" and form == "release":
            assert sum(2**i * s for i, s in enumerate(data)) == b
        waiting = [trigger if t + 1 == at else blank for t in range(n, length)]
        assert symbols[n:] == waiting
        assert batch.targets[:, b].tolist() == [blank] * (length - n) + data
        assert scored_steps(batch, b) == list(range(length - n if only else 0, length))


@pytest.mark.parametrize("name", sorted(MEMORIES))
def test_memorization_counts_a_sequence_once_however_many_steps_are_wrong(name: str) -> None:
    n, k = MEMORIES[name]
    problem = pathological.PROBLEMS[name](20, batch_size=3000, seed=4, dtype=torch.float64)
    batch = problem(0)
    strings = batch.targets[-n:]
    assert set(strings.flatten().tolist()) == set(range(k))
    frequency = torch.bincount(strings.flatten()).double() / strings.numel()
    assert float((frequency - 1 / k).abs().max()) < 0.02
    right = answer(batch, problem.O)
    assert int(problem.zero_one_loss(right, batch)) == 0
    for steps in ([3], [3, 4, -1], [-2]):
        broken = right.clone()
        for t in steps:
            broken[t, :100] = right[t, :100].roll(1, dims=1)
        assert problem.wrong(broken, batch).tolist() == [True] * 100 + [False] * 2900
    chance = right.clone()
    chance[-n:] = -1e3
    chance[-n:, :, :k] = 0.0
    expected = n * log(k) / (20 + 2 * n)
    assert float(problem.loss(chance, batch)) == pytest.approx(expected, rel=1e-9)


def test_state_of_the_other_scoring_is_refused() -> None:
    problem = pathological.memorization_5bit(20, only_memory_bits=True)
    with pytest.raises(ValueError, match="only_memory_bits = 0"):
        problem.load_state_dict(pathological.memorization_5bit(20).state_dict())


def test_class_probabilities() -> None:
    outputs = torch.tensor([[0.0, log(3.0), 0.0, 0.0]])
    probabilities = pathological.temporal_order(20).predictions(outputs)
    torch.testing.assert_close(probabilities, torch.tensor([[1 / 6, 0.5, 1 / 6, 1 / 6]]))
