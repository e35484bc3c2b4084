"""A small model with dropout, and steps on it with their record; shared by the contracts on saved and copied state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hfopt
from hfopt.preconditioners import KFAC, Nystrom
from tests.hfopt.tools import mlp, randn

X, Y = randn(30, 3, seed=1), randn(30, 2, seed=2)


def model_of(seed: int, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(seed)
    return nn.Sequential(
        mlp(3, 5, seed=seed, dtype=dtype), nn.Tanh(), nn.Dropout(0.2), mlp(5, 2, seed=seed, dtype=dtype)
    )


def train(model: nn.Module, optimizer: hfopt.HessianFree, steps: int) -> list[Any]:
    dtype = next(model.parameters()).dtype
    x, y = X.to(dtype), Y.to(dtype)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    return [(s.step, s.loss, s.new_loss, s.rho, s.damping, s.cg_iterations) for s in optimizer.stats[-steps:]]


OPTIONS: list[dict[str, Any]] = [
    {},
    {"preconditioner": "empirical-fisher", "weight_decay": 0.01},
    {"preconditioner": "hutchinson"},
    {"preconditioner": Nystrom(rank=5, every=4)},
    {"preconditioner": KFAC(every=4), "weight_decay": 0.01},
    {"preconditioner": "lbfgs"},
    {"curvature": "fisher"},
    {"curvature": "hessian", "damping": 0.5},
    {"damping": hfopt.FixedDamping(0.2), "lr": 0.7},
]
