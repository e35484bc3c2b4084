"""Activation checkpointing: segments that are computed again in the backward pass."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import hfopt
from hfopt.linalg import graph
from tests.contracts.against_plain import check
from tests.hfopt.tools import mlp, randn, theta

X, Y = randn(16, 3, seed=1), randn(16, 2, seed=2)


class Segments(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.body, self.way = mlp(3, 5, 5, 2, seed=3), way

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "none":
            z: Tensor = self.body(x)
        elif self.way == "sequential":
            z = checkpoint_sequential(self.body, 2, x, use_reentrant=False)
        else:
            z = checkpoint(self.body, x, use_reentrant=False)
        return z


@pytest.mark.parametrize("way", ["whole", "sequential"])
@pytest.mark.parametrize("linearisation", ["auto", "recompute"])
def test_checkpointed_models_are_those_without(way: str, linearisation: str) -> None:
    check(
        Segments(way),
        lambda m: m(X),
        lambda z: F.mse_loss(z, Y),
        reference=Segments("none"),
        linearisation=linearisation,
    )


@pytest.mark.parametrize("linearisation", ["auto", "recompute"])
@pytest.mark.parametrize("sequential", [False, True])
def test_reentrant_checkpoints_are_no_frozen_parts(sequential: bool, linearisation: str) -> None:
    """They know backward() alone: to every other derivative, the parameters inside seem unused."""
    model, twin = mlp(3, 5, 5, 2, seed=4), mlp(3, 5, 5, 2, seed=4)
    ours = hfopt.HessianFree(model.parameters(), linearisation=linearisation)
    plain = hfopt.HessianFree(twin.parameters(), linearisation=linearisation)

    def outputs() -> Tensor:
        x = X.clone().requires_grad_()
        if sequential:
            z: Tensor = checkpoint_sequential(model, 2, x, use_reentrant=True)
        else:
            z = model[2:](checkpoint(model[:2], x, use_reentrant=True))
        return z

    for _ in range(4):
        ours.step(lambda: F.mse_loss(outputs(), Y))
        plain.step(lambda: F.mse_loss(twin(X), Y))
    assert torch.allclose(theta(model), theta(twin), rtol=1e-8, atol=1e-10)
    F.mse_loss(outputs(), Y).backward()  # torch's own again
    assert "CheckpointFunctionBackward" in {node.name() for node in graph.nodes([outputs()])}


def test_dropout_inside_a_checkpoint_is_one_function_within_a_step() -> None:
    model = nn.Sequential(nn.Linear(3, 6), nn.Dropout(0.4), nn.Tanh(), nn.Linear(6, 2)).double()
    twin = copy.deepcopy(model)
    ours, plain = hfopt.HessianFree(model.parameters()), hfopt.HessianFree(twin.parameters())
    for step in range(3):
        torch.manual_seed(step)
        ours.step(lambda: F.mse_loss(checkpoint(model, X, use_reentrant=False), Y))
        torch.manual_seed(step)
        plain.step(lambda: F.mse_loss(twin(X), Y))
    assert torch.allclose(theta(model), theta(twin), rtol=1e-8, atol=1e-10)
