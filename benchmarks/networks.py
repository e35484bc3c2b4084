"""The plain PyTorch models that are measured, written as one would write them."""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def autoencoder(sizes: tuple[int, ...]) -> nn.Sequential:
    """Linear layers of ``sizes`` and back, with tanh between them; the code and the output are linear."""
    layers: list[nn.Module] = []
    there_and_back = (*sizes, *sizes[-2::-1])
    for n, m in pairwise(there_and_back):
        layers.append(nn.Linear(n, m))
        if m not in (sizes[-1], there_and_back[-1]):
            layers.append(nn.Tanh())
    return nn.Sequential(*layers)


class LoopRNN(nn.Module):
    """The tanh RNN as a Python loop over unbound steps, with the parameters of `models.RNN`."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.h_init = nn.Parameter(torch.zeros(hidden))
        self.W_vh = nn.Parameter(torch.empty(inputs, hidden))
        self.W_hh = nn.Parameter(torch.empty(hidden, hidden))
        self.W_ho = nn.Parameter(torch.empty(hidden, outputs))
        self.b_h = nn.Parameter(torch.empty(hidden))
        self.b_o = nn.Parameter(torch.empty(outputs))

    def forward(self, inputs: Tensor) -> Tensor:
        projected = F.linear(inputs, self.W_vh.t(), self.b_h)
        h = self.h_init.expand(inputs.shape[1], -1)
        states = []
        for p in projected.unbind():
            h = torch.addmm(p, h, self.W_hh).tanh()
            states.append(h)
        return F.linear(torch.stack(states), self.W_ho.t(), self.b_o)


class TorchRNN(nn.Module):
    """`torch.nn.RNN` with a learned start and a linear readout."""

    def __init__(self, recurrent: nn.RNN, readout: nn.Linear, initial: Tensor) -> None:
        super().__init__()
        self.recurrent, self.readout, self.initial = recurrent, readout, nn.Parameter(initial)

    def forward(self, inputs: Tensor) -> Tensor:
        start = self.initial.expand(1, inputs.shape[1], -1).contiguous()
        return cast(Tensor, self.readout(self.recurrent(inputs, start)[0]))


class TorchLSTM(nn.Module):
    """`torch.nn.LSTM`, one layer, with a linear readout at every step: (T, B, V) -> (T B, O)."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.recurrent, self.readout = nn.LSTM(inputs, hidden), nn.Linear(hidden, outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        return cast(Tensor, self.readout(self.recurrent(inputs)[0])).flatten(0, 1)


def cnn(channels: int, classes: int, side: int) -> nn.Sequential:
    """Three convolutions of 3 x 3, two poolings, one linear layer: (B, 3, side, side) -> (B, classes)."""
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, 2 * channels, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(2 * channels, 2 * channels, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * channels * (side // 4) ** 2, classes),
    )


class Encoder(nn.Module):
    """Transformer encoder with a classifier at every place: symbols (B, L) -> (B L, symbols)."""

    def __init__(self, symbols: int, width: int, heads: int, layers: int, length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, width)
        self.position = nn.Parameter(torch.randn(length, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.readout = nn.Linear(width, symbols)

    def forward(self, symbols: Tensor) -> Tensor:
        hidden = self.layers(self.embedding(symbols) + self.position)
        return cast(Tensor, self.readout(hidden)).flatten(0, 1)
