"""Activation checkpointing: segments that are computed again in the backward pass."""

from __future__ import annotations

import pytest
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from tests.contracts.against_plain import check
from tests.hfopt.tools import mlp, randn

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
