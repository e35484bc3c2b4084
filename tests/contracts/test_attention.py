"""Attention: products work without the user choosing a backend."""

from __future__ import annotations

import pytest
from torch import Tensor, nn
from torch.nn import functional as F

from tests.contracts.against_plain import check
from tests.hfopt.tools import randn

X, Y = randn(3, 5, 4, seed=1), randn(3, 5, 4, seed=2)


class Attention(nn.Module):
    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.qkv, self.out, self.causal = nn.Linear(4, 12).double(), nn.Linear(4, 4).double(), causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4).unbind()
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        z: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return z


@pytest.mark.parametrize("causal", [False, True])
def test_scaled_dot_product_attention(causal: bool) -> None:
    check(Attention(causal), lambda m: m(X), lambda z: F.mse_loss(z, Y))


def test_multihead_attention() -> None:
    model = nn.MultiheadAttention(4, 2, batch_first=True, dtype=X.dtype)
    check(model, lambda m: m(X, X, X)[0], lambda z: F.mse_loss(z, Y))


def test_a_decoder_layer() -> None:
    model = nn.TransformerDecoderLayer(4, 2, 6, dropout=0.0, batch_first=True, dtype=X.dtype)
    check(model, lambda m: m(X, Y.roll(1, 0)), lambda z: F.huber_loss(z, Y))
