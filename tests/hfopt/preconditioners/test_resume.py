"""Optimizers with every preconditioner go on to the very same bits after their state was saved and restored."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import hfopt
from hfopt.preconditioners import KFAC, LBFGS, Nystrom
from tests.hfopt.tools import mlp, randn, theta

CASES: dict[str, dict[str, Any]] = {
    "empirical-fisher": {"preconditioner": "empirical-fisher"},
    "hutchinson": {"preconditioner": "hutchinson"},
    "nystrom": {"preconditioner": Nystrom(rank=5, every=4)},
    "kfac": {"preconditioner": KFAC(every=4), "weight_decay": 0.01},
    "averaged kfac": {"preconditioner": KFAC(average=0.95), "weight_decay": 0.01},
    "lbfgs": {"preconditioner": LBFGS(pairs=5)},
}


def train(model: Any, optimizer: hfopt.HessianFree, steps: int, dtype: torch.dtype) -> list[Any]:
    x, y = randn(30, 3, seed=1, dtype=dtype), randn(30, 2, seed=2, dtype=dtype)
    for _ in range(steps):
        optimizer.step(lambda: F.mse_loss(model(x), y))
    return [(s.step, s.loss, s.rho, s.damping, s.cg_iterations) for s in optimizer.stats[-steps:]]


@pytest.mark.quick(where=lambda name, dtype: dtype == torch.float32)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_further_steps_are_the_same_bits(name: str, dtype: torch.dtype) -> None:
    """Through torch.save and the safe loader, into an optimizer that was used for something else before."""
    model = mlp(3, 5, 2, seed=3, dtype=dtype)
    optimizer = hfopt.HessianFree(model.parameters(), **copy.deepcopy(CASES[name]))
    train(model, optimizer, 3, dtype)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    record = train(model, optimizer, 6, dtype)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = mlp(3, 5, 2, seed=4, dtype=dtype)
    resumed = hfopt.HessianFree(other.parameters(), **copy.deepcopy(CASES[name]))
    train(other, resumed, 2, dtype)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert train(other, resumed, 6, dtype) == record
    assert torch.equal(theta(other), theta(model))


@pytest.mark.parametrize("name", CASES)
def test_training_with_it(name: str) -> None:
    model = mlp(3, 8, 2, seed=5)
    optimizer = hfopt.HessianFree(model.parameters(), **copy.deepcopy(CASES[name]))
    train(model, optimizer, 12, torch.float64)
    assert optimizer.stats[-1].new_loss < 0.6 * optimizer.stats[0].loss


def test_a_copy_of_the_optimizer_goes_on_alike() -> None:
    model = mlp(3, 5, 2, seed=3)
    optimizer = hfopt.HessianFree(model.parameters(), preconditioner="lbfgs")
    train(model, optimizer, 3, torch.float64)
    both = copy.deepcopy({"model": model, "optimizer": optimizer})
    assert train(model, optimizer, 4, torch.float64) == train(both["model"], both["optimizer"], 4, torch.float64)
