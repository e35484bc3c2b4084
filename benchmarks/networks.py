"""The plain PyTorch models that are measured, written as one would write them."""

from __future__ import annotations

from abc import ABC, abstractmethod
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


class TorchRecurrent(nn.Module):
    """`torch.nn.RNN`, `LSTM` or `GRU` of one layer, with learned initial states and a linear readout of every step."""

    def __init__(self, recurrent: nn.RNN | nn.LSTM | nn.GRU, outputs: int) -> None:
        super().__init__()
        hidden = recurrent.hidden_size
        self.recurrent, self.readout = recurrent, nn.Linear(hidden, outputs)
        self.initial = nn.Parameter(torch.randn(1, 1, hidden) * 0.1)
        self.cell = nn.Parameter(torch.randn(1, 1, hidden) * 0.1) if isinstance(recurrent, nn.LSTM) else None

    def forward(self, inputs: Tensor) -> Tensor:
        start = self.initial.expand(1, inputs.shape[1], -1).contiguous()
        states = start if self.cell is None else (start, self.cell.expand(1, inputs.shape[1], -1).contiguous())
        return cast(Tensor, self.readout(self.recurrent(inputs, states)[0]))


class PerStep(nn.CrossEntropyLoss):
    """Cross-entropy of outputs (T, B, O) for symbols (T, B), averaged over both."""

    def forward(self, outputs: Tensor, symbols: Tensor) -> Tensor:
        return super().forward(outputs.flatten(0, 1), symbols.flatten())


class Loop(nn.Module, ABC):
    """A recurrent network as a Python loop over unbound steps: inputs are projected before it, outputs after it."""

    def __init__(self, hidden: int, outputs: int, **weights: tuple[int, ...]) -> None:
        super().__init__()
        sizes = {"h_init": (hidden,), **weights, "W_ho": (hidden, outputs), "b_o": (outputs,)}
        for name, shape in sizes.items():
            bound = 0.0 if name == "h_init" else hidden**-0.5
            self.register_parameter(name, nn.Parameter(torch.empty(shape).uniform_(-bound, bound)))

    @abstractmethod
    def loop(self, inputs: Tensor, h: Tensor) -> list[Tensor]:
        """The hidden states (B, h) of every step, from h_{-1}."""

    def forward(self, inputs: Tensor) -> Tensor:
        W_ho, b_o, h_init = cast(Tensor, self.W_ho), cast(Tensor, self.b_o), cast(Tensor, self.h_init)
        states = self.loop(inputs, h_init.expand(inputs.shape[1], -1))
        return F.linear(torch.stack(states), W_ho.t(), b_o)


class LoopRNN(Loop):
    """The tanh RNN, with the parameters of `models.RNN`."""

    W_vh: Tensor
    W_hh: Tensor
    b_h: Tensor

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__(hidden, outputs, W_vh=(inputs, hidden), W_hh=(hidden, hidden), b_h=(hidden,))

    def loop(self, inputs: Tensor, h: Tensor) -> list[Tensor]:
        states = []
        for p in F.linear(inputs, self.W_vh.t(), self.b_h).unbind():
            h = torch.addmm(p, h, self.W_hh).tanh()
            states.append(h)
        return states


class LoopMRNN(Loop):
    """The multiplicative RNN with tanh, with the parameters of `models.MRNN`."""

    W_vf: Tensor
    W_hf: Tensor
    W_fh: Tensor
    W_vh: Tensor
    b_h: Tensor

    def __init__(self, inputs: int, hidden: int, factors: int, outputs: int) -> None:
        into, back = {"W_vf": (inputs, factors), "W_hf": (hidden, factors)}, {"W_fh": (factors, hidden)}
        super().__init__(hidden, outputs, **into, **back, W_vh=(inputs, hidden), b_h=(hidden,))

    def loop(self, inputs: Tensor, h: Tensor) -> list[Tensor]:
        states = []
        factors, projected = inputs @ self.W_vf, F.linear(inputs, self.W_vh.t(), self.b_h)
        for e, p in zip(factors.unbind(), projected.unbind(), strict=True):
            h = torch.addmm(p, e * (h @ self.W_hf), self.W_fh).tanh()
            states.append(h)
        return states


class LoopLSTM(Loop):
    """The LSTM, with the parameters of `models.LSTM`; gates in the order i, f, g, o."""

    W_vh: Tensor
    W_hh: Tensor
    b_h: Tensor
    c_init: Tensor

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        gates = 4 * hidden
        super().__init__(hidden, outputs, c_init=(hidden,), W_vh=(inputs, gates), W_hh=(hidden, gates), b_h=(gates,))

    def loop(self, inputs: Tensor, h: Tensor) -> list[Tensor]:
        states, c = [], self.c_init.expand(inputs.shape[1], -1)
        for p in F.linear(inputs, self.W_vh.t(), self.b_h).unbind():
            i, f, g, o = torch.addmm(p, h, self.W_hh).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            states.append(h)
        return states


class LoopGRU(Loop):
    """The GRU, with the parameters of `models.GRU`; gates in the order r, z, n."""

    W_vh: Tensor
    W_hh: Tensor
    b_h: Tensor
    b_n: Tensor

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        gates = 3 * hidden
        super().__init__(hidden, outputs, W_vh=(inputs, gates), W_hh=(hidden, gates), b_h=(gates,), b_n=(hidden,))

    def loop(self, inputs: Tensor, h: Tensor) -> list[Tensor]:
        states, hidden = [], h.shape[1]
        for p in F.linear(inputs, self.W_vh.t(), self.b_h).unbind():
            moved = h @ self.W_hh
            r, z = (p[:, : 2 * hidden] + moved[:, : 2 * hidden]).sigmoid().chunk(2, 1)
            n = (p[:, 2 * hidden :] + r * (moved[:, 2 * hidden :] + self.b_n)).tanh()
            h = n + z * (h - n)
            states.append(h)
        return states


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
