"""The network of gated recurrent units, in one piece with a learned start and a linear readout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hfopt.recurrences import gru_layer
from models.recurrent import Recurrent, check_conversion, maker, weight_of


class GRUParts(NamedTuple):
    """A network as torch's own modules: `readout(recurrent(inputs, initial.expand(1, B, h))[0])`."""

    recurrent: nn.GRU
    readout: nn.Linear | None
    initial: Tensor


class GRU(Recurrent):
    """Gated recurrent units: h_t = (1 - z) n + z h_{t-1}, n = tanh(a_n + r (h_{t-1} W_n + b_n)), o_t = h_t W_ho + b_o.

    a = v_t W_vh + b_h has three parts r, z, n, and so has W_hh, whose last is W_n; the gates r and z are the sigmoids
    of v_t W_vh + h_{t-1} W_hh + b_h. The whole sequence is one operator (`hfopt.recurrences.gru_layer`); an optimizer
    with structural damping finds the hidden states by itself.

    Args:
        inputs: V, number of inputs.
        hidden: h, number of hidden units.
        outputs: O, number of outputs; None for no readout (the outputs are the hidden states then, O = h).
        biases: whether there are b_h, b_n and b_o.
        output: "all" for the outputs of all steps, "last" for those of each sequence's last step.
        batch_first: whether inputs and outputs are (B, T, .) instead of (T, B, .).
        device, dtype: of the parameters.

    Weights: h_init (h,), W_vh (V, 3h), W_hh (h, 3h), W_ho (h, O), b_h (3h,), b_n (h,), b_o (O,). They start as those
    of `torch.nn.GRU` and `torch.nn.Linear` do (uniform within +-1/sqrt(h)), h_init at zero; see `sparse_init`.

    Raises:
        ValueError: a size below 1, or an unknown `output`.

    Source: Cho et al., "Learning phrase representations using RNN encoder-decoder for statistical machine translation",
    EMNLP 2014, with the reset gate behind the matrix, as in torch.
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
        self.W_vh = parameter(inputs, 3 * hidden)
        self.W_hh = parameter(hidden, 3 * hidden)
        self.W_ho = None if outputs is None else parameter(hidden, outputs)
        self.b_h = parameter(3 * hidden) if biases else None
        self.b_n = parameter(hidden) if biases else None
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
    ) -> GRU:
        """Sparse random weights: every gate of every unit has `connections` random incoming weights of each kind.

        W_hh, W_ho: N(0, scale^2 / connections). W_vh: N(0, input_scale^2). h_init: N(0, 1). The other weights and the
        biases: 0. A matrix with fewer rows than `connections` is full and counts its rows instead.

        Args:
            seed: an int, or a CPU generator that the draws go on from.
            connections: incoming connections of each gate, of each kind.
            scale: of recurrent and output weights.
            input_scale: of input weights.

        Returns:
            The network itself.

        Raises:
            ValueError: `connections` below 1, a negative or infinite scale, or a generator that is not on the CPU.

        Source: Martens & Sutskever, ICML 2011, section 4, for simple networks.
        """
        self._start_sparse(seed, connections, scale, input_scale)
        return self

    def _layer(
        self, inputs: Tensor, starts: Sequence[Tensor | None], lengths: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        start = self.h_init if starts[0] is None else starts[0]
        b_n = None if self.b_n is None else torch.cat((self.b_n.new_zeros(2 * self.hidden), self.b_n))
        outputs, last = gru_layer(inputs, self.W_vh.t(), self.W_hh.t(), self.b_h, b_n, start, lengths)
        return outputs, (last,)

    @classmethod
    def from_torch(cls, recurrent: nn.GRU, readout: nn.Linear | None = None, *, output: str = "all") -> GRU:
        """The network that computes what `readout(recurrent(inputs)[0])` does, with copies of their weights.

        Of the two biases of `torch.nn.GRU`, those of the gates r and z become one, their sum. The start is zero, as
        torch's is.

        Args:
            recurrent: one layer, one direction; `batch_first` is taken over.
            readout: linear layer from the hidden states; None for no readout.
            output: as in the constructor.

        Raises:
            TypeError: `recurrent` is no `torch.nn.GRU` or `readout` no `torch.nn.Linear`.
            ValueError: several layers, two directions, or a readout that does not fit.
        """
        check_conversion(recurrent, nn.GRU, readout)
        weight = weight_of(recurrent, "weight_hh_l0")
        hidden = recurrent.hidden_size
        model = cls(
            recurrent.input_size,
            hidden,
            None if readout is None else readout.out_features,
            output=output,
            batch_first=recurrent.batch_first,
            device=weight.device,
            dtype=weight.dtype,
        )
        with torch.no_grad():
            model.W_hh.copy_(weight.t())
            model.W_vh.copy_(weight_of(recurrent, "weight_ih_l0").t())
            if model.b_h is not None and model.b_n is not None and recurrent.bias:
                b = weight_of(recurrent, "bias_hh_l0")
                model.b_h.copy_(weight_of(recurrent, "bias_ih_l0"))
                model.b_h[: 2 * hidden] += b[: 2 * hidden]
                model.b_n.copy_(b[2 * hidden :])
            else:
                model.b_h = model.b_n = None
            model._take_readout(readout)
        return model

    def to_torch(self) -> GRUParts:
        """This network as `torch.nn.GRU`, `torch.nn.Linear` (None without readout) and start (1, 1, h), copied."""
        recurrent = nn.GRU(
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
            if self.b_h is not None and self.b_n is not None:
                weight_of(recurrent, "bias_ih_l0").copy_(self.b_h)
                weight_of(recurrent, "bias_hh_l0").zero_()[2 * self.hidden :] = self.b_n
            readout = self._give_readout()
        return GRUParts(recurrent, readout, self.h_init.detach().clone().view(1, 1, -1))
