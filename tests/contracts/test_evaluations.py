"""Evaluation closures that cannot judge a step are told, and the record of steps does not grow without end."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import hfopt
from tests.hfopt.tools import mlp, randn, theta

X, Y = randn(20, 3, seed=1), randn(20, 2, seed=2)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_an_evaluation_that_does_not_depend_on_the_parameters_warns(decay: float) -> None:
    model, other = mlp(3, 4, 2, seed=3), mlp(3, 4, 2, seed=4)
    stale = other(X).detach()
    optimizer = hfopt.HessianFree(model.parameters(), weight_decay=decay)
    for evaluation in (lambda: F.mse_loss(stale, Y), lambda: F.mse_loss(other(X), Y)):
        with pytest.warns(UserWarning, match="the same, to the bit") as seen:
            optimizer.step(lambda: F.mse_loss(model(X), Y), evaluation=evaluation)
        assert seen[0].filename == __file__


def test_rejected_steps_and_minima_are_no_reason_to_warn() -> None:
    model = mlp(3, 4, 2, seed=5)
    optimizer = hfopt.HessianFree(model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            optimizer.step(lambda: F.mse_loss(model(X), Y))
        stay = model(X).detach()
        optimizer.step(lambda: F.mse_loss(model(X), Y), evaluation=lambda: F.mse_loss(model(X), stay))
        assert not optimizer.stats[-1].accepted
        still = theta(model)
        for _ in range(3):
            optimizer.step(lambda: F.mse_loss(model(X), model(X).detach()))
    assert torch.equal(theta(model), still)


@pytest.mark.parametrize(("history", "kept"), [(3, 3), (None, 7), (10_000, 7)])
def test_the_record_is_bounded(history: int | None, kept: int) -> None:
    model = mlp(3, 2, seed=6)
    options: dict[str, Any] = {"history": history}
    optimizer = hfopt.HessianFree(model.parameters(), **options)
    record = optimizer.stats

    def closure() -> Tensor:
        return F.mse_loss(model(X), Y)

    for _ in range(7):
        optimizer.step(closure)
    assert optimizer.stats is record
    assert [s.step for s in record] == list(range(8 - kept, 8))
    with pytest.raises(ValueError, match="history"):
        hfopt.HessianFree(model.parameters(), history=0)
