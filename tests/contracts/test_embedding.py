"""nn.Embedding, with dense gradients and with sparse ones."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

import hfopt
from tests.contracts.against_plain import check
from tests.hfopt.tools import mlp, randn, theta


def test_dense_embeddings() -> None:
    words, classes = torch.arange(30) % 7, torch.arange(30) % 3
    model = nn.Sequential(
        nn.Embedding(9, 3, _weight=randn(9, 3, seed=21), padding_idx=8), nn.Tanh(), mlp(3, 3, seed=23)
    )
    unused = model[0].weight[7:].clone()
    check(model, lambda m: m(words), lambda z: F.cross_entropy(z, classes))
    assert torch.equal(model[0].weight[7:], unused)


def test_embeddings_with_sparse_gradients() -> None:
    words, classes = torch.arange(30) % 7, torch.arange(30) % 3
    ends = []
    for sparse in (False, True):
        embedding = nn.Embedding(7, 4, sparse=sparse, _weight=randn(7, 4, seed=22))
        model = nn.Sequential(embedding, nn.Tanh(), mlp(4, 3, seed=23))
        optimizer = hfopt.HessianFree(model.parameters())
        for curvature in (None, lambda net=model: F.cross_entropy(net(words), classes)):
            optimizer.step(lambda net=model: F.cross_entropy(net(words), classes), curvature=curvature)
        assert optimizer.stats[-1].accepted
        ends.append(theta(model))
    assert torch.allclose(ends[0], ends[1], rtol=1e-12)
