"""The simple recurrent network, in one piece with a learned start and a linear readout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hfopt.recurrences import NONLINEARITIES, segments, simple_rnn_layer, simple_rnn_readout
from models import fnn
from models.recurrent import Recurrent, check_conversion, maker, weight_of


class TorchParts(NamedTuple):
    """A network as torch's own modules: `readout(recurrent(inputs, initial.expand(1, B, h))[0])`."""

    recurrent: nn.RNN
    readout: nn.Linear | None
    initial: Tensor


class RNN(Recurrent):
    """Simple recurrent network: h_t = f(h_{t-1} W_hh + v_t W_vh + b_h), o_t = h_t W_ho + b_o, h_{-1} = h_init.

    The whole sequence is one operator (`hfopt.recurrences.simple_rnn_layer`); an optimizer with structural damping
    finds the hidden units by itself.

    Args:
        inputs: V, number of inputs.
        hidden: h, number of hidden units.
        outputs: O, number of outputs; None for no readout (the outputs are the hidden states then, O = h).
        nonlinearity: f, one of "tanh", "relu", "sigmoid", "identity".
        biases: whether there are b_h and b_o.
        output: "all" for the outputs of all steps, "last" for those of each sequence's last step.
        batch_first: whether inputs and outputs are (B, T, .) instead of (T, B, .).
        device, dtype: of the parameters.

    Weights: h_init (h,), W_vh (V, h), W_hh (h, h), W_ho (h, O), b_h (h,), b_o (O,). They start as those of
    `torch.nn.RNN` and `torch.nn.Linear` do (uniform within +-1/sqrt(h)), h_init at zero; see `sparse_init`.

    Raises:
        ValueError: a size below 1, or an unknown `nonlinearity` or `output`.

    Source: Martens & Sutskever, "Learning recurrent neural networks with Hessian-free optimization", ICML 2011.
    """

    def __init__(
        self,
        inputs: int,
        hidden: int,
        outputs: int | None,
        *,
        nonlinearity: str = "tanh",
        biases: bool = True,
        output: str = "all",
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(inputs, hidden, outputs, output, batch_first)
        if nonlinearity not in NONLINEARITIES:
            raise ValueError(f"nonlinearity is {nonlinearity!r}; it is one of {', '.join(map(repr, NONLINEARITIES))}")
        self.nonlinearity = nonlinearity
        parameter = maker(device, dtype)
        self.h_init = parameter(hidden)
        self.W_vh = parameter(inputs, hidden)
        self.W_hh = parameter(hidden, hidden)
        self.W_ho = None if outputs is None else parameter(hidden, outputs)
        self.b_h = parameter(hidden) if biases else None
        self.b_o = parameter(outputs) if biases and outputs is not None else None
        self.reset_parameters()

    def _weights(self) -> list[tuple[Tensor, bool]]:
        return [(self.W_vh, True), (self.W_hh, False)]

    def sparse_init(
        self,
        seed: int | torch.Generator,
        connections: int = 15,
        scale: float = 1.0,
        input_scale: float = 1.0,
    ) -> RNN:
        """Sparse random weights: every unit has `connections` random incoming weights of each kind, the others are 0.

        W_hh, W_ho: N(0, scale^2 / connections). W_vh: N(0, input_scale^2). h_init: N(0, 1), all of it. Biases: 0.
        A matrix with fewer rows than `connections` is full and counts its rows instead. With scale 1 the spectral
        radius of W_hh is about 1.06 at 100 units. This is the convention of the recurrent nets of 2011; the deep nets
        of 2010 have N(0, 1) throughout, which is scale = sqrt(connections).

        Args:
            seed: an int, or a CPU generator that the draws go on from.
            connections: incoming connections of each unit, of each kind.
            scale: of recurrent and output weights.
            input_scale: of input weights; problems with real-valued inputs want it small (0.25), but not too small.

        Returns:
            The network itself.

        Raises:
            ValueError: `connections` below 1, a negative or infinite scale, or a generator that is not on the CPU.

        Source: Martens & Sutskever, ICML 2011, section 4; Sutskever, PhD thesis 2013, chapter 4.
        """
        self._start_sparse(seed, connections, scale, input_scale)
        return self

    def unrolled(self, inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Outputs as of `forward`, one step after the other, and the hidden states (B, h) after each step."""
        nonlinearity = fnn.NONLINEARITIES[self.nonlinearity]
        given = F.linear(self._checked(inputs), self.W_vh.t(), self.b_h)
        h, nodes = self.h_init.expand(given.shape[1], -1), []
        for a in given.unbind():  # torch's operators: for one step, those of whole sequences cost several times as much
            h = nonlinearity(torch.addmm(a, h, self.W_hh))
            nodes.append(h)
        return self._readout(h if self.output == "last" else torch.stack(nodes)), nodes

    def _outputs(self, inputs: Tensor, starts: Sequence[Tensor | None], lengths: Tensor | None) -> Tensor:
        inputs = self._checked(inputs)
        reached = self._ends(inputs, lengths)
        start = self.h_init if starts[0] is None else starts[0]
        mask, last = (None, None) if reached is None else reached
        if segments.wanted():
            return self._in_segments(inputs, start, mask, last)
        # A readout of all steps inside the recurrence costs less than taking its hidden states through memory.
        inside = self.W_ho is not None and (self.output == "all" or self.W_ho.shape[1] <= self.hidden // 2)
        found = self._read(inputs, start, mask) if inside else self._hidden(inputs, start, mask)
        if self.output == "last":
            found = found[-1] if last is None else found[last, torch.arange(found.shape[1], device=found.device)]
        if not inside:
            return self._readout(found)
        return found.transpose(0, 1) if self.batch_first and self.output == "all" else found

    def _in_segments(self, inputs: Tensor, start: Tensor, mask: Tensor | None, last: Tensor | None) -> Tensor:
        """The same in segments, each with its part of the readout: the hidden states are never there all at once."""
        every, batch = self.output == "all", inputs.shape[1]
        final = None
        if last is not None and not every:
            final = torch.arange(len(inputs), device=inputs.device).unsqueeze(1) == last
        weights = (self.W_vh, self.W_hh, self.b_h, self.W_ho, self.b_o)

        def part(xs: segments.Given, states: segments.Given, Ws: segments.Given) -> segments.Found:
            x, valid, now = xs
            W_vh, W_hh, b_h, W_ho, b_o = Ws
            hidden = simple_rnn_layer(x, W_vh, W_hh, states[0], b_h, self.nonlinearity, valid)
            if every:
                return [hidden if W_ho is None else F.linear(hidden, W_ho.t(), b_o)], [hidden[-1]]
            if now is None:
                return [], [hidden[-1]]
            chosen = torch.where(now.unsqueeze(-1), hidden, torch.zeros_like(hidden)).sum(0)
            return [], [hidden[-1], states[1] + chosen]

        states = [start.expand(batch, -1)]
        if final is not None:
            states.append(torch.zeros_like(states[0]))
        outputs, after = segments.over_time(part, (inputs, mask, final), states, weights)
        if every:
            return outputs[0].transpose(0, 1) if self.batch_first else outputs[0]
        return self._readout(after[-1])

    def _layer(
        self, inputs: Tensor, starts: Sequence[Tensor | None], lengths: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        reached = self._ends(inputs, lengths)
        start = self.h_init if starts[0] is None else starts[0]
        hidden = self._hidden(inputs, start, None if reached is None else reached.mask)
        return hidden, (hidden[-1] if reached is None else reached.final(hidden),)

    def _hidden(self, inputs: Tensor, start: Tensor, mask: Tensor | None) -> Tensor:
        return simple_rnn_layer(inputs, self.W_vh, self.W_hh, start, self.b_h, self.nonlinearity, mask)

    def _read(self, inputs: Tensor, start: Tensor, mask: Tensor | None) -> Tensor:
        assert self.W_ho is not None
        weights = self.W_vh, self.W_hh, start, self.b_h, self.W_ho, self.b_o
        return simple_rnn_readout(inputs, *weights, self.nonlinearity, mask)

    @classmethod
    def from_torch(cls, recurrent: nn.RNN, readout: nn.Linear | None = None, *, output: str = "all") -> RNN:
        """The network that computes what `readout(recurrent(inputs)[0])` does, with copies of their weights.

        The two biases of `torch.nn.RNN` become one, their sum. h_init starts at zero, as torch's state does.

        Args:
            recurrent: one layer, one direction, tanh or relu; `batch_first` is taken over.
            readout: linear layer from the hidden states; None for no readout.
            output: as in the constructor.

        Raises:
            TypeError: `recurrent` is no `torch.nn.RNN` or `readout` no `torch.nn.Linear`.
            ValueError: several layers, two directions, or a readout that does not fit.
        """
        check_conversion(recurrent, nn.RNN, readout)
        weight = weight_of(recurrent, "weight_hh_l0")
        model = cls(
            recurrent.input_size,
            recurrent.hidden_size,
            None if readout is None else readout.out_features,
            nonlinearity=recurrent.nonlinearity,
            output=output,
            batch_first=recurrent.batch_first,
            device=weight.device,
            dtype=weight.dtype,
        )
        with torch.no_grad():
            model.W_hh.copy_(weight.t())
            model.W_vh.copy_(weight_of(recurrent, "weight_ih_l0").t())
            if model.b_h is not None and recurrent.bias:
                model.b_h.copy_(weight_of(recurrent, "bias_ih_l0") + weight_of(recurrent, "bias_hh_l0"))
            else:
                model.b_h = None
            model._take_readout(readout)
        return model

    def to_torch(self) -> TorchParts:
        """This network as `torch.nn.RNN`, `torch.nn.Linear` (None without readout) and initial state (1, 1, h), copied.

        Raises:
            ValueError: `nonlinearity` is neither "tanh" nor "relu": `torch.nn.RNN` has no other.
        """
        if self.nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"nonlinearity is {self.nonlinearity!r}; torch.nn.RNN has 'tanh' and 'relu' alone")
        options = {"device": self.W_hh.device, "dtype": self.W_hh.dtype}
        recurrent = nn.RNN(
            self.inputs,
            self.hidden,
            nonlinearity=self.nonlinearity,
            bias=self.b_h is not None,
            batch_first=self.batch_first,
            **options,
        )
        with torch.no_grad():
            weight_of(recurrent, "weight_hh_l0").copy_(self.W_hh.t())
            weight_of(recurrent, "weight_ih_l0").copy_(self.W_vh.t())
            if self.b_h is not None:
                weight_of(recurrent, "bias_ih_l0").copy_(self.b_h)
                weight_of(recurrent, "bias_hh_l0").zero_()
            readout = self._give_readout()
        return TorchParts(recurrent, readout, self.h_init.detach().clone().view(1, 1, -1))
