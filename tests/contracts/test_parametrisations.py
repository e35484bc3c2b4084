"""Parametrisations: weight_norm, spectral_norm and orthogonal ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hfopt
from tests.contracts.against_plain import check
from tests.hfopt.tools import mlp, randn, theta

X, Y = randn(16, 3, seed=1), randn(16, 2, seed=2)


def net(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = mlp(3, 5, 2, seed=3)
    for layer in (model[0], model[2]):  # type: ignore[index]
        if kind == "weight_norm":
            nn.utils.parametrizations.weight_norm(layer)
        elif kind == "spectral_norm":
            nn.utils.parametrizations.spectral_norm(layer)
        else:
            nn.utils.parametrizations.orthogonal(layer, orthogonal_map="cayley")
    return model


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of the reference by torch.func
@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "orthogonal"])
def test_products_and_steps_in_evaluation_mode(kind: str) -> None:
    check(net(kind).eval(), lambda m: m(X), lambda z: F.mse_loss(z, Y))


def test_power_iterations_of_spectral_norm_are_made_once_a_step() -> None:
    """In training mode every forward pass changes the vectors u and v; a step does as one plain pass does."""
    model = net("spectral_norm")
    optimizer = hfopt.HessianFree(model.parameters())
    for _ in range(4):
        twin = net("spectral_norm")
        twin.load_state_dict(model.state_dict())
        twin(X)
        expected = dict(twin.named_buffers())
        before = theta(model)
        optimizer.step(lambda: F.mse_loss(model(X), Y))
        assert not torch.equal(theta(model), before)
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer, expected[name]), name
    assert optimizer.stats[-1].new_loss < optimizer.stats[0].loss
