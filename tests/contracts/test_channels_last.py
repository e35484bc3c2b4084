"""Channels-last: convolutions and parameters in that memory format keep it."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tests.contracts.against_plain import check
from tests.hfopt.tools import randn

X, Y = randn(4, 3, 6, 6, seed=1), torch.arange(4) % 3


def net(channels_last: bool) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 2, 3), nn.Flatten(), nn.Linear(8, 3)]
    model = nn.Sequential(*layers).double()
    return model.to(memory_format=torch.channels_last) if channels_last else model


def test_channels_last_is_another_layout_of_the_same() -> None:
    model = net(True)
    before = [(p.stride(), p.data_ptr()) for p in model.parameters()]
    x = X.to(memory_format=torch.channels_last)
    check(model, lambda m: m(x), lambda z: F.cross_entropy(z, Y), reference=net(False))
    assert [(p.stride(), p.data_ptr()) for p in model.parameters()] == before
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
