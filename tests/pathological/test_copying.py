"""The copy and adding problems of unitary networks: what stands where, what is scored, and the baselines."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from pathological import adding_problem, copying


def copy_of(T: int = 6, **options: Any) -> copying:
    return copying(T, **{"c_length": 3, "batch_size": 50, "train_batches": 1, "test_batches": 1, **options})


def test_what_stands_where() -> None:
    """c symbols, T - 1 blanks, the marker, c blanks; T + c blanks are to be answered, then the symbols."""
    problem = copy_of()
    batch = problem(0)
    x, y = batch.inputs[:, :, 0], batch.targets
    assert tuple(batch.inputs.shape) == (12, 50, 1)
    assert (problem.V, problem.O, problem.steps) == (1, 9, 12)
    assert x[:3].unique().tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert (x[3:8] == 0).all()
    assert (x[8] == 9).all()
    assert (x[9:] == 0).all()
    assert (y[:9] == 0).all()
    assert torch.equal(y[9:], x[:3].long())
    assert batch.mask.all()
    problem.forget()
    assert not torch.equal(problem(0).inputs, batch.inputs)


@pytest.mark.parametrize(("form", "marked"), [("tcn", [8, 9, 10, 11]), ("exprnn", [9])])
def test_other_forms(form: str, marked: list[int]) -> None:
    problem = copy_of(form=form)
    x = problem(0).inputs[:, 0, 0]
    assert (x == 9).nonzero().flatten().tolist() == marked
    assert (x[3 : marked[0]] == 0).all()


def test_labels_one_hot_and_variable_lengths() -> None:
    """The released program draws eight labels whatever is asked for."""
    problem = copy_of(labels=3, one_hot=True, variable=True)
    batch = problem(0)
    assert (problem.V, problem.O) == (5, 4)
    assert set(batch.lengths.tolist()) == set(range(7, 13))
    assert torch.equal(batch.inputs.sum(2), batch.valid.to(batch.inputs.dtype))
    assert torch.equal(batch.mask, batch.valid)
    x = batch.inputs.argmax(2)
    for b, length in enumerate(batch.lengths.tolist()):
        assert x[length - 4, b] == 4
        assert torch.equal(batch.targets[length - 3 : length, b], x[:3, b])
        assert set(x[:3, b].tolist()) <= {1, 2, 3}


def test_the_loss_without_memory_is_the_baseline() -> None:
    """Blanks until the marker, then all symbols with the same probability."""
    problem = copy_of(T=20, batch_size=8)
    batch = problem(0)
    outputs = torch.full((26, 8, 9), -50.0)
    outputs[:23, :, 0] = 50.0
    outputs[23:, :, 1:] = 0.0
    assert float(problem.loss(outputs, batch)) == pytest.approx(3 * math.log(8) / 26, rel=1e-5)
    assert problem.baseline == pytest.approx(3 * math.log(8) / 26)
    assert copying(200).baseline == pytest.approx(0.0945, abs=5e-5)
    assert copying(1000).baseline == pytest.approx(0.0204, abs=5e-5)


def test_only_the_last_answers_are_counted() -> None:
    problem = copy_of(variable=True)
    batch = problem(0)
    outputs = F.one_hot(batch.targets, 9).float()
    assert not problem.zero_one_loss(outputs, batch).any()
    (metric,) = problem.metrics
    assert metric.parts(outputs, batch) == (150.0, 150.0)
    outputs[0] = 0.0  # a step before the marker
    assert int(problem.zero_one_loss(outputs, batch)) == 0
    length = int(batch.lengths[7])
    outputs[length - 1, 7] = F.one_hot((batch.targets[length - 1, 7] + 1) % 9, 9).float()
    outputs[length - 2, 8] = math.nan
    assert int(problem.zero_one_loss(outputs, batch)) >= 1
    assert bool(problem.wrong(outputs, batch)[7])
    assert metric.parts(outputs, batch)[0] < 150


@pytest.mark.parametrize(("values", "baseline"), [("uniform", 1 / 6), ("normal", 2.0)])
def test_the_adding_problem(values: str, baseline: float) -> None:
    problem = adding_problem(11, values=values, batch_size=20_000, train_batches=1, test_batches=1)
    batch = problem(0)
    u, marker = batch.inputs.double().unbind(2)
    assert (marker[:5].sum(0) == 1).all()
    assert (marker[5:].sum(0) == 1).all()
    assert torch.allclose((u * marker).sum(0), batch.targets[-1, :, 0].double(), atol=1e-5)
    constant = torch.full((11, 20_000, 1), 1.0 if values == "uniform" else 0.0)
    assert float(problem.loss(constant, batch)) == pytest.approx(baseline, rel=0.05)
    assert problem.baseline == baseline
    assert problem.size(batch) == 20_000


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="T is 0"):
        copying(0)
    with pytest.raises(ValueError, match="labels is 1"):
        copying(5, labels=1)
    with pytest.raises(ValueError, match="c_length is 0"):
        copying(5, c_length=0)
    with pytest.raises(ValueError, match="form is 'x'"):
        copying(5, form="x")
    with pytest.raises(ValueError, match="values is 'x'"):
        adding_problem(5, values="x")
    with pytest.raises(ValueError, match="c_length"):
        copy_of().load_state_dict({**copy_of().state_dict(), "c_length": 4})
