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


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recurrent_layer_inside_is_replaced_in_every_computation(reentrant: bool) -> None:
    """What is computed again has to save what the forward run saved."""
    torch.manual_seed(0)
    lstm, readout = nn.LSTM(2, 8), nn.Linear(8, 1)
    x, y = torch.randn(40, 4, 2), torch.randn(40, 4, 1)
    params = [*lstm.parameters(), *readout.parameters()]

    def closure(checkpointed: bool) -> Tensor:
        given = x.clone().requires_grad_() if reentrant else x
        run = lambda t: lstm(t)[0]  # noqa: E731
        states = checkpoint(run, given, use_reentrant=reentrant) if checkpointed else run(given)
        return F.mse_loss(readout(states), y)

    v = torch.randn(sum(p.numel() for p in params))
    a, b = (hfopt.GaussNewton(lambda c=c: closure(c), params) @ v for c in (True, False))
    assert float((a - b).norm() / b.norm()) < 1e-5
    optimizer = hfopt.HessianFree(params)
    first = float(optimizer.step(lambda: closure(True)))
    assert float(closure(False).detach()) < first


def test_running_statistics_inside_are_updated_once_a_step() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1))
    twin = copy.deepcopy(model)
    x, y = torch.randn(20, 3), torch.randn(20, 1)
    optimizer, other = (hfopt.HessianFree(m.parameters()) for m in (model, twin))
    for _ in range(2):
        optimizer.step(lambda: F.mse_loss(checkpoint(model, x, use_reentrant=False), y))
        other.step(lambda: F.mse_loss(twin(x), y))
    assert int(model[1].num_batches_tracked) == int(twin[1].num_batches_tracked) == 2
    assert torch.allclose(model[1].running_mean, twin[1].running_mean, rtol=1e-4, atol=1e-6)
