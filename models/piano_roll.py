"""Recurrent nets that predict the next frame of a piano roll, note by note independently, and write music."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.regularised import Layers, WeightNoise, sparse_linear


class PianoRoll(WeightNoise):
    """Logits of the notes of each frame from the frames before it: sigmoid outputs over a recurrent net.

    `log P(v_t | v_1 .. v_{t-1}) = sum_i log Bernoulli(v_ti; sigmoid(o_ti))`, `o_t = h_t W + b`.

    Args:
        cell: "rnn" (tanh), "lstm" or "gru".
        hidden: number of hidden units of every layer.
        depth: number of layers.
        pitches: notes of a frame.
        dropout, input_dropout: see :class:`Layers`.
        weight_noise: standard deviation of the noise on all weights in training.

    Raises:
        ValueError: an argument out of its range.

    Source: Boulanger-Lewandowski, Bengio & Vincent, "Modeling temporal dependencies in high-dimensional sequences",
    ICML 2012.
    """

    def __init__(
        self,
        cell: str = "rnn",
        hidden: int = 150,
        depth: int = 1,
        *,
        pitches: int = 88,
        dropout: float = 0.0,
        input_dropout: float = 0.0,
        weight_noise: float = 0.0,
    ) -> None:
        super().__init__(weight_noise)
        self.pitches = pitches
        self.net = _Readout(
            Layers(cell, pitches, hidden, depth, dropout=dropout, input_dropout=input_dropout), hidden, pitches
        )

    def sparse_init(
        self,
        seed: int,
        connections: int = 15,
        scale: float = 1.0,
        input_scale: float = 1.0,
        rates: Tensor | None = None,
    ) -> PianoRoll:
        """Sparse random weights, see `RNN.sparse_init`; output biases at the logits of `rates (pitches,)`."""
        generator = torch.Generator().manual_seed(seed)
        self.net.layers.sparse_init(generator, connections, scale, input_scale)
        sparse_linear(self.net.readout, generator, connections, scale)
        if rates is not None:
            with torch.no_grad():
                self.net.readout.bias.copy_(torch.logit(rates))
        return self

    def forward(self, inputs: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits `(T, B, pitches)` of the frames whose predecessors are `inputs (T, B, pitches)`."""
        outputs = self.noisy(self.net, inputs, lengths)
        assert isinstance(outputs, Tensor)
        return outputs

    @torch.no_grad()
    def sample(self, steps: int, generator: torch.Generator, prime: Tensor | None = None, count: int = 1) -> Tensor:
        """Pieces `(count, steps, pitches)` drawn from the model, frame by frame, each after the frames of `prime`."""

        def draw(hidden: Tensor) -> Tensor:
            return torch.bernoulli(self.net.readout(hidden).sigmoid(), generator=generator)

        return write(self.net.layers, steps, primed(prime, count, self.net.readout.weight, self.pitches), draw)


class _Readout(nn.Module):
    """The part with weights."""

    def __init__(self, layers: Layers, hidden: int, outputs: int) -> None:
        super().__init__()
        self.layers, self.readout = layers, nn.Linear(hidden, outputs)

    def forward(self, inputs: Tensor, lengths: Tensor | None) -> Tensor:
        outputs: Tensor = self.readout(self.layers(inputs, lengths)[0])
        return outputs


def primed(prime: Tensor | None, count: int, like: Tensor, pitches: int) -> Tensor:
    """Frames `(t, pitches)`, or none, as `(t + 1, count, pitches)` with silence before them."""
    frames = like.new_zeros(0, pitches) if prime is None else prime.to(like)
    return torch.cat([like.new_zeros(1, pitches), frames]).unsqueeze(1).repeat(1, count, 1)


def write(layers: Layers, steps: int, seen: Tensor, draw: Callable[[Tensor], Tensor]) -> Tensor:
    """Pieces `(B, steps, V)`, each frame drawn from the last layer's state `(B, h)` and then seen by the net.

    Args:
        layers: in evaluation mode.
        steps: number of frames.
        seen: frames `(t, B, V)` before the first ones that are drawn; t is at least 1.
        draw: frames `(B, V)` from the states.
    """
    frames, states = [], None
    for _ in range(steps):
        hidden, states = layers(seen, None, states)
        frames.append(draw(hidden[-1]))
        seen = frames[-1].unsqueeze(0)
    return torch.stack(frames, 1)
