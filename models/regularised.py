"""Recurrent layers with what regularises them in training: dropout, hidden inputs, and noise on the weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.gru import GRU
from models.initialisation import sparse_
from models.lstm import LSTM
from models.recurrent import Recurrent
from models.rnn import RNN

CELLS: dict[str, type[RNN] | type[LSTM] | type[GRU]] = {"rnn": RNN, "lstm": LSTM, "gru": GRU}

States = list[tuple[Tensor, ...]]
"""The states of each layer after the last step, each `(B, h)`."""


class Layers(nn.Module):
    """Recurrent layers with learned starts on top of each other, with dropout and noise in training.

    Args:
        cell: "rnn" (tanh), "lstm" or "gru".
        inputs: V, number of inputs.
        hidden: h, number of hidden units of every layer.
        depth: number of layers.
        dropout: share of each layer's outputs that are zero in training, the rest scaled up.
        input_dropout: share of the inputs that are zero in training; the rest is not scaled up, since a note sounds
            or it does not.

    Raises:
        ValueError: an unknown cell, a size below 1, or a share that is not from 0 to 1.
    """

    def __init__(
        self, cell: str, inputs: int, hidden: int, depth: int = 1, *, dropout: float = 0.0, input_dropout: float = 0.0
    ) -> None:
        super().__init__()
        if cell not in CELLS:
            raise ValueError(f"cell is {cell!r}; choose {', '.join(map(repr, CELLS))}")
        if depth < 1:
            raise ValueError(f"depth is {depth}; it is at least 1")
        for name, share in {"dropout": dropout, "input_dropout": input_dropout}.items():
            if not 0 <= share < 1:
                raise ValueError(f"{name} is {share}; it is a share, at least 0 and less than 1")
        self.dropout, self.input_dropout = dropout, input_dropout
        self.layers = nn.ModuleList(CELLS[cell](hidden if k else inputs, hidden, None) for k in range(depth))

    def forward(
        self, inputs: Tensor, lengths: Tensor | None = None, states: Sequence[Sequence[Tensor]] | None = None
    ) -> tuple[Tensor, States]:
        """The last layer's hidden states `(T, B, h)` of inputs `(T, B, V)`, and all layers' states to go on from."""
        x, final = inputs, []
        if self.training and self.input_dropout:
            x = x * (torch.rand_like(x) >= self.input_dropout)
        for k, layer in enumerate(self.layers):
            assert isinstance(layer, Recurrent)
            starts = [None] * len(layer._starts()) if states is None else list(states[k])
            x, last = layer._layer(x, starts, lengths)
            final.append(last)
            x = F.dropout(x, self.dropout, self.training)
        return x, final

    def sparse_init(self, seed: int | torch.Generator, connections: int, scale: float, input_scale: float) -> None:
        """Sparse random weights, as in each layer's own `sparse_init`; one generator for all."""
        generator = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
        for layer in self.layers:
            assert isinstance(layer, (RNN, LSTM, GRU))
            layer.sparse_init(generator, connections=connections, scale=scale, input_scale=input_scale)


class WeightNoise(nn.Module):
    """A base for modules whose weights get noise in training: N(0, sigma^2), new at each call.

    Args:
        sigma: the standard deviation; 0 for none.

    Source: Graves, "Practical variational inference for neural networks", NeurIPS 2011, for recurrent nets.
    """

    def __init__(self, sigma: float) -> None:
        super().__init__()
        if not 0 <= sigma < float("inf"):
            raise ValueError(f"weight_noise is {sigma}; it is a finite standard deviation, at least 0")
        self.weight_noise = sigma

    def noisy(self, module: nn.Module, *arguments: object) -> object:
        """What a module returns with noise on its weights in training, and without otherwise."""
        if not (self.training and self.weight_noise):
            return module(*arguments)
        noisy = {n: p + self.weight_noise * torch.randn_like(p) for n, p in module.named_parameters()}
        return torch.func.functional_call(module, noisy, arguments)


@torch.no_grad()
def sparse_linear(linear: nn.Linear, generator: torch.Generator, connections: int, scale: float) -> None:
    """Sparse weights N(0, scale^2 / connections) of a linear layer, `connections` into each output, and zero biases."""
    deviation = scale / min(connections, linear.in_features) ** 0.5
    linear.weight.copy_(sparse_(torch.empty_like(linear.weight.t()), connections, deviation, generator).t())
    if linear.bias is not None:
        linear.bias.zero_()
