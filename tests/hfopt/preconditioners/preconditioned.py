"""Models and dense references for the tests of preconditioners."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import hfopt
from hfopt.preconditioners import Preconditioner
from models import GRU, LSTM, RNN
from tests.hfopt.tools import flat, mlp

N = 6


def per_case(params: Sequence[Tensor], losses: Sequence[Tensor]) -> Tensor:
    """The gradients of single cases' losses (N, P), one after the other."""
    rows = []
    for loss in losses:
        found = torch.autograd.grad(loss, list(params), retain_graph=True, allow_unused=True)
        rows.append(flat(torch.zeros_like(p) if g is None else g for p, g in zip(params, found, strict=True)))
    return torch.stack(rows)


def dense(m: Preconditioner, size: int) -> Tensor:
    """``M^-1 (P, P)``, column by column."""
    return torch.stack([m.apply(e) for e in torch.eye(size, dtype=torch.float64)], 1)


def convolutional() -> nn.Module:
    """Two convolutions with stride, dilation and padding, and a linear readout, for inputs (N, 2, 7, 6)."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1, stride=2),
        nn.Tanh(),
        nn.Conv2d(3, 4, (2, 3), padding=(0, 1), dilation=(1, 1), bias=False),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(36, 2),
    ).double()


class Tied(nn.Module):
    """A matrix that is used twice, on sequences (N, T, 3), and summed over their steps."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = mlp(3, 3, seed=1), mlp(3, 2, seed=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.inner(self.inner(x).tanh()).tanh()).sum(1)  # type: ignore[no-any-return]


def recurrent(kind: str) -> nn.Module:
    torch.manual_seed(1)
    net: Any = {"rnn": RNN, "lstm": LSTM, "gru": GRU}[kind](2, 3, 1, output="last")
    return net.double()  # type: ignore[no-any-return]


def gauss_newton(model: nn.Module, loss: Callable[[nn.Module], Tensor], **options: Any) -> hfopt.GaussNewton:
    return hfopt.GaussNewton(lambda: loss(model), model.parameters(), **options)
