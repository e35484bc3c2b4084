"""How buffers are put back between the runs of a closure."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hfopt
from tests.hfopt.tools import mlp, randn

X, Y = randn(16, 3, seed=1), randn(16, 2, seed=2)


def normal() -> nn.Sequential:
    return nn.Sequential(mlp(3, 6, seed=7), nn.BatchNorm1d(6, dtype=X.dtype), nn.Tanh(), mlp(6, 2, seed=8))


@pytest.mark.parametrize("policy", ["auto", "linearize", "recompute", "hessian"])
def test_buffers_that_are_put_back_unseen(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small buffers of a device are put back without a comparison: to the same values as with one."""
    states = []
    for unseen in (False, True):
        monkeypatch.setattr(hfopt.closure.frozen, "_put_back_unseen", lambda tensor, unseen=unseen: unseen)
        model = normal()
        options = {"curvature": policy} if policy == "hessian" else {"linearisation": policy}
        optimizer = hfopt.HessianFree(model.parameters(), **options)  # type: ignore[arg-type]
        for _ in range(3):
            optimizer.step(lambda model=model: F.mse_loss(model(X), Y))
        states.append(model.state_dict())
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
    assert int(states[1]["1.num_batches_tracked"]) == 3


def test_only_small_buffers_of_a_device_are_put_back_unseen() -> None:
    unseen = hfopt.closure.frozen._put_back_unseen
    assert not unseen(torch.zeros(3))
    assert unseen(torch.zeros(3, device="meta"))
    assert not unseen(torch.zeros(1 << 20, device="meta"))
