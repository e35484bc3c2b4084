"""RNN-NADE: a recurrent net gives the biases of a distribution over whole frames, with exact likelihoods."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.piano_roll import primed, write
from models.regularised import Layers, WeightNoise, sparse_linear


class RNNNADE(WeightNoise):
    """The notes of each frame, one after the other, given the lower notes of the frame and all frames before it.

    With the state u of a recurrent net after the frames before, and the notes v_1 .. v_88 of a frame,

        b = B u + b_0,   c = C u + c_0,   h_i = sigmoid(c + sum_{j < i} W_j v_j),
        log P(v | past) = sum_i log Bernoulli(v_i; sigmoid(b_i + V_i h_i)).

    `forward` returns the logits `b_i + V_i h_i`, so that `binary_cross_entropy_with_logits` is the exact negative
    log-likelihood, and its Gauss-Newton matrix is exact too. h_i changes only after a note that sounds: a frame of k
    notes needs k + 1 hidden layers, not 88, and the logits of all notes follow from one matrix product.

    Args:
        cell: of the recurrent net: "rnn" (tanh), "lstm" or "gru".
        hidden: number of its hidden units.
        units: number of hidden units of the NADE.
        depth: number of recurrent layers.
        pitches: notes of a frame.
        dropout, input_dropout: see :class:`models.regularised.Layers`.
        weight_noise: standard deviation of the noise on all weights in training.

    Raises:
        ValueError: an argument out of its range.

    Source: Larochelle & Murray, "The neural autoregressive distribution estimator", AISTATS 2011;
    Boulanger-Lewandowski, Bengio & Vincent, ICML 2012.
    """

    def __init__(
        self,
        cell: str = "rnn",
        hidden: int = 150,
        units: int = 100,
        depth: int = 1,
        *,
        pitches: int = 88,
        dropout: float = 0.0,
        input_dropout: float = 0.0,
        weight_noise: float = 0.0,
    ) -> None:
        super().__init__(weight_noise)
        if units < 1:
            raise ValueError(f"units is {units}; it is at least 1")
        self.pitches = pitches
        layers = Layers(cell, pitches, hidden, depth, dropout=dropout, input_dropout=input_dropout)
        self.net = _Conditionals(layers, hidden, units, pitches)

    def sparse_init(
        self,
        seed: int,
        connections: int = 15,
        scale: float = 1.0,
        input_scale: float = 1.0,
        rates: Tensor | None = None,
    ) -> RNNNADE:
        """Sparse random weights, see `RNN.sparse_init`; biases b_0 at the logits of the notes' `rates (pitches,)`."""
        generator = torch.Generator().manual_seed(seed)
        net = self.net
        net.layers.sparse_init(generator, connections, scale, input_scale)
        for linear in (net.visible, net.context, net.notes, net.readout):
            sparse_linear(linear, generator, connections, scale)
        if rates is not None:
            with torch.no_grad():
                net.visible.bias.copy_(torch.logit(rates))
        return self

    def forward(
        self, inputs: Tensor, frames: Tensor, lengths: Tensor | None = None, scored: Tensor | None = None
    ) -> Tensor:
        """Logits of the notes of `frames (T, B, pitches)`, whose predecessors are `inputs (T, B, pitches)`.

        Args:
            inputs: the frames before each one.
            frames: of zeros and ones.
            lengths: (B,) steps of each sequence that count.
            scored: (N,) where the wanted steps are in `frames.flatten(0, 1)`; None for all.

        Returns:
            `(T, B, pitches)`, or `(N, pitches)` of the wanted steps.
        """
        outputs = self.noisy(self.net, inputs, frames, lengths, scored)
        assert isinstance(outputs, Tensor)
        return outputs

    @torch.no_grad()
    def sample(self, steps: int, generator: torch.Generator, prime: Tensor | None = None, count: int = 1) -> Tensor:
        """Pieces `(count, steps, pitches)` drawn from the model, frame by frame, each after the frames of `prime`."""
        net = self.net

        def draw(states: Tensor) -> Tensor:
            b, a = net.visible(states), net.context(states)
            frame = torch.zeros_like(b)
            for i in range(self.pitches):
                p = (b[:, i] + a.sigmoid() @ net.readout.weight[i]).sigmoid()
                frame[:, i] = torch.bernoulli(p, generator=generator)
                a = torch.addcmul(a, frame[:, i : i + 1], net.notes.weight[:, i])
            return frame

        return write(net.layers, steps, primed(prime, count, net.readout.weight, self.pitches), draw)


class _Conditionals(nn.Module):
    """The part with weights."""

    def __init__(self, layers: Layers, hidden: int, units: int, pitches: int) -> None:
        super().__init__()
        self.layers = layers
        self.visible, self.context = nn.Linear(hidden, pitches), nn.Linear(hidden, units)
        self.notes, self.readout = nn.Linear(pitches, units, bias=False), nn.Linear(units, pitches, bias=False)

    def forward(self, inputs: Tensor, frames: Tensor, lengths: Tensor | None, scored: Tensor | None) -> Tensor:
        states = self.layers(inputs, lengths)[0]
        u, v = states.flatten(0, 1), frames.flatten(0, 1)
        if scored is None:
            return self._logits(u, v).view_as(frames)
        return self._logits(u.index_select(0, scored), v.index_select(0, scored))

    def _logits(self, u: Tensor, v: Tensor) -> Tensor:
        on = v > 0.5
        lower = on.cumsum(1) - on.long()  # notes that sound below each note, (N, 88)
        layers = on.sum(1) + 1  # hidden layers of each frame
        first = layers.cumsum(0) - layers  # where those of each frame begin
        frame = torch.repeat_interleave(torch.arange(len(v), device=v.device), layers)
        below = torch.arange(len(frame), device=v.device) - first[frame]  # notes that each hidden layer has seen
        seen = (on[frame] & (lower[frame] < below.unsqueeze(1))).to(v.dtype)
        hidden = (self.context(u).index_select(0, frame) + self.notes(seen)).sigmoid()
        logits: Tensor = self.readout(hidden).gather(0, first.unsqueeze(1) + lower) + self.visible(u)
        return logits
