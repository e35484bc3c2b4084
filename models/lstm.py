"""The long short-term memory network, in one piece with learned starts and a linear readout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hfopt.recurrences import lstm_layer
from models.recurrent import Recurrent, check_conversion, maker, weight_of


class LSTMParts(NamedTuple):
    """A network as torch's own modules: `readout(recurrent(inputs, (h, c))[0])` with the starts expanded to B."""

    recurrent: nn.LSTM
    readout: nn.Linear | None
    initial: tuple[Tensor, Tensor]


class LSTM(Recurrent):
    """Long short-term memory: c_t = f c_{t-1} + i g, h_t = o tanh(c_t), o_t = h_t W_ho + b_o, from h_init, c_init.

    i, f, o are the sigmoids and g the tanh of the four parts of v_t W_vh + h_{t-1} W_hh + b_h, in the order i, f, g, o.
    The whole sequence is one operator (`hfopt.recurrences.lstm_layer`); an optimizer with structural damping finds the
    hidden states by itself.

    Args:
        inputs: V, number of inputs.
        hidden: h, number of hidden units.
        outputs: O, number of outputs; None for no readout (the outputs are the hidden states then, O = h).
        biases: whether there are b_h and b_o.
        output: "all" for the outputs of all steps, "last" for those of each sequence's last step.
        batch_first: whether inputs and outputs are (B, T, .) instead of (T, B, .).
        device, dtype: of the parameters.

    Weights: h_init (h,), c_init (h,), W_vh (V, 4h), W_hh (h, 4h), W_ho (h, O), b_h (4h,), b_o (O,). They start as
    those of `torch.nn.LSTM` and `torch.nn.Linear` do (uniform within +-1/sqrt(h)), h_init and c_init at zero; see
    `sparse_init`.

    Raises:
        ValueError: a size below 1, or an unknown `output`.

    Source: Hochreiter & Schmidhuber, "Long short-term memory", Neural Computation 1997; Gers, Schmidhuber & Cummins,
    "Learning to forget", Neural Computation 2000.
    """

    def __init__(
        self,
        inputs: int,
        hidden: int,
        outputs: int | None,
        *,
        biases: bool = True,
        output: str = "all",
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(inputs, hidden, outputs, output, batch_first)
        parameter = maker(device, dtype)
        self.h_init = parameter(hidden)
        self.c_init = parameter(hidden)
        self.W_vh = parameter(inputs, 4 * hidden)
        self.W_hh = parameter(hidden, 4 * hidden)
        self.W_ho = None if outputs is None else parameter(hidden, outputs)
        self.b_h = parameter(4 * hidden) if biases else None
        self.b_o = parameter(outputs) if biases and outputs is not None else None
        self.reset_parameters()

    def _starts(self) -> list[Tensor]:
        return [self.h_init, self.c_init]

    def _weights(self) -> list[tuple[Tensor, bool]]:
        return [(self.W_vh, True), (self.W_hh, False)]

    def sparse_init(
        self,
        seed: int | torch.Generator,
        connections: int = 15,
        scale: float = 1.0,
        input_scale: float = 1.0,
        forget_bias: float = 0.0,
    ) -> LSTM:
        """Sparse random weights: every gate of every unit has `connections` random incoming weights of each kind.

        W_hh, W_ho: N(0, scale^2 / connections). W_vh: N(0, input_scale^2). h_init, c_init: N(0, 1). The other weights
        and the biases: 0, but for those of the forget gates. A matrix with fewer rows than `connections` is full and
        counts its rows instead.

        Args:
            seed: an int, or a CPU generator that the draws go on from.
            connections: incoming connections of each gate, of each kind.
            scale: of recurrent and output weights.
            input_scale: of input weights.
            forget_bias: what the biases of the forget gates start at; 1 or more keeps the memory at first.

        Returns:
            The network itself.

        Raises:
            ValueError: `connections` below 1, a negative or infinite scale, a generator that is not on the CPU, or a
                `forget_bias` for a network without biases.

        Source: Martens & Sutskever, ICML 2011, section 4, for simple networks; Jozefowicz, Zaremba & Sutskever, "An
        empirical exploration of recurrent network architectures", ICML 2015, for the forget gates.
        """
        if forget_bias and self.b_h is None:
            raise ValueError(f"forget_bias is {forget_bias}, but the network has no biases")
        self._start_sparse(seed, connections, scale, input_scale)
        if self.b_h is not None:
            with torch.no_grad():
                self.b_h[self.hidden : 2 * self.hidden] = forget_bias
        return self

    def forward(
        self, inputs: Tensor, h0: Tensor | None = None, lengths: Tensor | None = None, *, c0: Tensor | None = None
    ) -> Tensor:
        """Outputs (T, B, O), or (B, O) of the last steps if `output` is "last".

        Args:
            inputs: v (T, B, V), or (B, T, V) if `batch_first`.
            h0: (B, h) or (h,), the state to start from instead of h_init.
            lengths: (B,) integers from 1 to T: how many steps of each sequence count. Outputs of later steps are
                there but mean nothing, and those steps take no part in structural damping.
            c0: (B, h) or (h,), the memory to start from instead of c_init.

        Raises:
            ValueError: a wrong shape or length; the message names the argument.
            TypeError: a wrong dtype.
        """
        return self._outputs(inputs, [h0, c0], lengths)

    def _layer(
        self, inputs: Tensor, starts: Sequence[Tensor | None], lengths: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        h, c = (own if s is None else s for s, own in zip((*starts, None)[:2], self._starts(), strict=True))
        return lstm_layer(inputs, self.W_vh.t(), self.W_hh.t(), self.b_h, None, h, c, lengths)

    @classmethod
    def from_torch(cls, recurrent: nn.LSTM, readout: nn.Linear | None = None, *, output: str = "all") -> LSTM:
        """The network that computes what `readout(recurrent(inputs)[0])` does, with copies of their weights.

        The two biases of `torch.nn.LSTM` become one, their sum. The starts are zero, as torch's are.

        Args:
            recurrent: one layer, one direction, no projection; `batch_first` is taken over.
            readout: linear layer from the hidden states; None for no readout.
            output: as in the constructor.

        Raises:
            TypeError: `recurrent` is no `torch.nn.LSTM` or `readout` no `torch.nn.Linear`.
            ValueError: several layers, two directions, a projection, or a readout that does not fit.
        """
        check_conversion(recurrent, nn.LSTM, readout)
        weight = weight_of(recurrent, "weight_hh_l0")
        model = cls(
            recurrent.input_size,
            recurrent.hidden_size,
            None if readout is None else readout.out_features,
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

    def to_torch(self) -> LSTMParts:
        """This network as `torch.nn.LSTM`, `torch.nn.Linear` (None without readout) and starts (1, 1, h), copied."""
        recurrent = nn.LSTM(
            self.inputs,
            self.hidden,
            bias=self.b_h is not None,
            batch_first=self.batch_first,
            device=self.W_hh.device,
            dtype=self.W_hh.dtype,
        )
        with torch.no_grad():
            weight_of(recurrent, "weight_hh_l0").copy_(self.W_hh.t())
            weight_of(recurrent, "weight_ih_l0").copy_(self.W_vh.t())
            if self.b_h is not None:
                weight_of(recurrent, "bias_ih_l0").copy_(self.b_h)
                weight_of(recurrent, "bias_hh_l0").zero_()
            readout = self._give_readout()
        h, c = (start.detach().clone().view(1, 1, -1) for start in self._starts())
        return LSTMParts(recurrent, readout, (h, c))
