"""The tasks of capacity, against plain programs that read one sequence at a time."""

from __future__ import annotations

import math
import re
import time
from typing import Any

import numpy as np
import pytest
import torch

from pathological.capacity import TASKS, arithmetic, mem_thru, mutual_information, parens_counting, per_cap, rcf
from pathological.capacity.functions import RandomContinuousFunction

SMALL: dict[str, dict[str, Any]] = {"per_cap": {"samples": 1000}, "rcf": {"samples": 2000}}


@pytest.mark.parametrize("name", sorted(TASKS))
def test_draws_follow_from_seed_part_and_pass(name: str) -> None:
    first, again, other = (TASKS[name](batch_size=20, seed=s, **SMALL.get(name, {})) for s in (3, 3, 4))
    assert torch.equal(first(0).inputs, again(0).inputs)
    assert torch.equal(first(0).targets, again(0).targets)
    assert not torch.equal(first(0).inputs, other(0).inputs)
    assert first(0).inputs.shape == (first.steps, 20, first.V)
    before = first(0).inputs
    for _ in range(2 * len(first.train_batches)):  # the driver forgets before its first step, too
        first.forget()
    assert not torch.equal(first(0).inputs, before)
    again.load_state_dict(first.state_dict())
    assert torch.equal(first(0).inputs, again(0).inputs)
    with pytest.raises(ValueError, match="the state has"):
        TASKS[name](batch_size=21, seed=3, **SMALL.get(name, {})).load_state_dict(first.state_dict())
    held_out, tests = first.evaluated_on("test"), first(-1).inputs
    assert torch.equal(held_out(-1).inputs, tests) == (name == "per_cap")  # one set for all
    assert torch.equal(first(-1).inputs, tests)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_shapes_that_do_not_fit_are_named(name: str) -> None:
    task = TASKS[name](batch_size=4, **SMALL.get(name, {}))
    with pytest.raises(ValueError, match="outputs have shape"):
        task.loss(torch.zeros(3, 3, 3), task(0))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TASKS))
def test_a_thousand_sequences_are_drawn_in_20_ms(name: str) -> None:
    options = {"per_cap": {"samples": 5000}}.get(name, {})
    task = TASKS[name](batch_size=1000, **options)
    task(0)
    seconds = []
    for _ in range(15):
        task.forget()
        started = time.thread_time()  # of this thread alone: others are at work on a machine, too
        task(0)
        seconds.append(time.thread_time() - started)
    assert min(seconds) < 0.02


def test_mutual_information_in_bits() -> None:
    assert mutual_information(100, 1.0) == 100
    assert mutual_information(100, 0.5) == 0
    assert mutual_information(100, 0.0) == 100
    p = 0.9  # by the table of a binary symmetric channel
    joint = np.array([[p, 1 - p], [1 - p, p]]) / 2
    expected = (joint * np.log2(joint / 0.25)).sum()
    assert mutual_information(40, p) == pytest.approx(40 * expected, rel=1e-12)


def test_per_cap_shows_one_fixed_set_and_counts_right_labels() -> None:
    task = per_cap(samples=50, inputs=8, batch_size=20, seed=1)
    assert len(task.train_batches) == 3
    seen = torch.cat([task(i).inputs[0] for i in task.train_batches])
    tests = torch.cat([task(i).inputs[0] for i in task.test_batches])
    assert sorted(seen.tolist()) == sorted(tests.tolist())
    assert set(seen.unique().tolist()) == {0.0, 1.0}
    batch = task(-1)
    assert torch.equal(batch.inputs[0], batch.inputs[9])
    assert not per_cap(samples=50, present="first")(0).inputs[1:].any()
    right = (2 * batch.targets - 1).expand(10, -1).unsqueeze(2).clone()
    right[-1, :5] *= -1
    metric = task.metrics[0]
    assert metric.parts(right, batch) == (len(batch.targets) - 5, len(batch.targets))
    assert metric.value(45, 50) == mutual_information(50, 0.9)
    right[-1] = math.nan
    assert metric.parts(right, batch)[0] == 0
    outputs = torch.randn(10, len(batch.targets), 1)
    outputs[:5] = 1e9  # the warm-up
    log_p = torch.nn.functional.logsigmoid(outputs[5:, :, 0])
    log_q = torch.nn.functional.logsigmoid(-outputs[5:, :, 0])
    expected = -(batch.targets * log_p + (1 - batch.targets) * log_q).mean()
    torch.testing.assert_close(task.loss(outputs, batch), expected)


def test_mem_thru_has_variance_one_and_is_seen_once() -> None:
    task = mem_thru(batch_size=1000)
    batch = task(0)
    assert not batch.inputs[1:].any()
    assert torch.equal(batch.inputs[0], batch.targets)
    assert abs(batch.targets.var().item() - 1) < 0.02
    assert batch.targets.abs().max() <= math.sqrt(3)
    zero = torch.zeros_like(batch.targets)
    torch.testing.assert_close(task.loss(zero, batch), batch.targets.square().mean())
    torch.testing.assert_close(task.errors(zero, batch), batch.targets.square().mean(1))


def test_rcf_takes_fixed_unit_vectors_by_their_weights() -> None:
    task = rcf(samples=40, inputs=5, steps=3, tau=10, batch_size=20_000, seed=2)
    vectors, numbers, sums = task._function
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)
    batch = task(0)
    assert torch.equal(batch.inputs[0], batch.inputs[2])
    which = {row.tobytes(): i for i, row in enumerate(vectors)}
    drawn = np.array([which[row.tobytes()] for row in batch.inputs[0].numpy()])
    np.testing.assert_array_equal(batch.targets[:, 0], numbers[drawn])
    beta = 1 / (np.arange(1, 41) + 10)
    beta /= beta.sum()
    np.testing.assert_allclose(sums, np.cumsum(beta), rtol=1e-12)
    share = np.bincount(drawn, minlength=40) / 20_000
    assert np.abs(share - beta).max() < 5 * math.sqrt(beta.max() / 20_000)
    # Over all draws the loss is sum_i beta_i (yhat_i - y_i)^2, here of yhat = 0.
    expected = (beta * numbers**2).sum()
    assert task.loss(torch.zeros(20_000, 1), batch).item() == pytest.approx(expected, rel=0.1)
    assert isinstance(task, RandomContinuousFunction)


def test_parentheses_are_counted() -> None:
    task = parens_counting(batch_size=60, seed=5)
    batch = task(0)
    assert batch.inputs.shape == (175, 60, 300)
    symbols = batch.inputs.unflatten(2, (10, 30)).argmax(3)
    assert torch.equal(symbols, batch.symbols.long())
    assert (batch.inputs.sum(2) == 10).all()
    for b in range(60):
        for k in range(10):
            count = 0
            for symbol in symbols[:, b, k].tolist():
                count = min(count + 1, 9) if symbol == 2 * k else max(count - 1, 0) if symbol == 2 * k + 1 else count
            assert batch.targets[b, k] == count
    assert abs((symbols < 20).float().mean().item() - 0.5) < 0.01
    shares = symbols.flatten().bincount(minlength=30) / symbols.numel()
    assert (shares[:20] - 1 / 40).abs().max() < 0.003
    assert (shares[20:] - 1 / 20).abs().max() < 0.004


def test_counts_of_parentheses_saturate() -> None:
    batch = parens_counting(kinds=1, noise=1, steps=400, most=3, batch_size=50)(0)
    assert batch.targets.max() == 3
    assert batch.targets.min() == 0


def test_parentheses_are_scored_at_the_last_step() -> None:
    task = parens_counting(batch_size=6, steps=20)
    batch = task(0)
    outputs = torch.randn(6, 100)
    log_p = outputs.unflatten(1, (10, 10)).log_softmax(2)
    expected = -log_p.gather(2, batch.targets.unsqueeze(2)).sum() / 6
    torch.testing.assert_close(task.loss(outputs, batch), expected)
    right = torch.nn.functional.one_hot(batch.targets, 10).float().flatten(1)
    assert task.zero_one_loss(right, batch).tolist() == [False] * 6
    right[2] = -right[2]
    right[4, 0] = math.nan
    assert task.zero_one_loss(right, batch).tolist() == [False, False, True, False, True, False]


@pytest.mark.parametrize("compute", [1, 6])
def test_sums_are_right(compute: int) -> None:
    task = arithmetic(batch_size=500, compute_steps=compute)
    batch = task(0)
    assert task.steps == 36
    for b in range(500):
        problem, answer = task.text(batch, b)
        first, sign, second = re.fullmatch(r" *(-?\d+)([+-])(\d+)= +", problem).groups()  # type: ignore[union-attr]
        assert answer.rstrip() == str(int(first) + int(sign + second))
        assert len(answer) == task.slots == 9
        assert problem.index("=") == 36 - 9 - compute - 1
        assert problem.strip() == problem.strip(" ").replace(" ", "")
    assert (batch.inputs.sum(2) == 1).all()


def test_sums_of_few_digits_meet_their_edges() -> None:
    task = arithmetic(largest=1, batch_size=200, steps=None)
    texts = {task.text(task(0), b) for b in range(200)}
    signed = {("-1-1=", "-2"), ("-1+1=", "0"), ("0+0=", "0"), ("1+1=", "2"), ("0-1=", "-1"), ("-1+0=", "-1")}
    assert signed <= {(problem.strip(), answer.strip()) for problem, answer in texts}
    assert len(texts) == 9
    big = arithmetic(largest=10, batch_size=2000)
    found = {big.text(big(0), b)[0].strip() for b in range(2000)}
    assert {"-10-10=", "10+10=", "-10+10="} <= found


def test_answers_are_scored_by_character_and_counted_whole() -> None:
    task = arithmetic(batch_size=4)
    batch = task(0)
    outputs = torch.randn(36, 4, 14)
    log_p = outputs[-9:].log_softmax(2)
    torch.testing.assert_close(task.loss(outputs, batch), -log_p.gather(2, batch.targets.unsqueeze(2)).mean())
    outputs[-9:] = torch.nn.functional.one_hot(batch.targets, 14).float()
    outputs[-1, 2] = 0
    outputs[-1, 2, (int(batch.targets[-1, 2]) + 1) % 14] = 1
    assert task.zero_one_loss(outputs, batch).tolist() == [False, False, True, False]
    assert (task.size(batch), task.cases(batch)) == (36, 4)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: arithmetic(steps=20), "steps is 20"),
        (lambda: arithmetic(compute_steps=0), "compute_steps is 0"),
        (lambda: per_cap(steps=5), "warm_up is 5"),
        (lambda: per_cap(present="last"), "present is 'last'"),
        (lambda: rcf(tau=-1), "tau is -1"),
        (lambda: mem_thru(evaluate_on="train"), "evaluate_on is 'train'"),
        (lambda: mem_thru(dtype=torch.int64), "dtype is torch.int64"),
        (lambda: parens_counting(kinds=100), "kinds=100"),
    ],
)
def test_arguments_out_of_range_are_named(make: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()
