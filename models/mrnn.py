"""The multiplicative recurrent network, whose recurrent matrix depends on the input, with a linear readout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hfopt.recurrences import MULTIPLICATIVE, mrnn_layer
from hfopt.recurrences.arguments import ended
from models.recurrent import Recurrent, maker


class MRNN(Recurrent):
    """Multiplicative recurrent network: h_t = f([(v_t W_vf) (h_{t-1} W_hf)] W_fh + v_t W_vh + b_h), h_{-1} = h_init.

    The product of the two brackets is element by element, so the input chooses the recurrent matrix
    W_hf diag(v_t W_vf) W_fh; o_t = h_t W_ho + b_o. The whole sequence is one operator
    (`hfopt.recurrences.mrnn_layer`); an optimizer with structural damping finds the hidden units by itself.

    Args:
        inputs: V, number of inputs.
        hidden: h, number of hidden units.
        factors: F, number of factors (as many as hidden units in the source).
        outputs: O, number of outputs; None for no readout (the outputs are the hidden states then, O = h).
        nonlinearity: f, one of "tanh", "relu", "sigmoid".
        bounded_factors: whether tanh(v_t W_vf) + b_f takes the place of v_t W_vf, as in code that one of the authors
            released; it costs products with F more columns of inputs.
        biases: whether there are b_h and b_o.
        output: "all" for the outputs of all steps, "last" for those of each sequence's last step.
        batch_first: whether inputs and outputs are (B, T, .) instead of (T, B, .).
        device, dtype: of the parameters.

    Weights: h_init (h,), W_vf (V, F), W_hf (h, F), W_fh (F, h), W_vh (V, h), W_ho (h, O), b_h (h,), b_o (O,), and
    b_f (F,) for bounded factors. They start uniform within +-1/sqrt(h), h_init at 0, b_f at 1; see `sparse_init`.

    Raises:
        ValueError: a size below 1, or an unknown `nonlinearity` or `output`.

    Source: Sutskever, Martens & Hinton, "Generating text with recurrent neural networks", ICML 2011.
    """

    def __init__(
        self,
        inputs: int,
        hidden: int,
        factors: int,
        outputs: int | None,
        *,
        nonlinearity: str = "tanh",
        bounded_factors: bool = False,
        biases: bool = True,
        output: str = "all",
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(inputs, hidden, outputs, output, batch_first, factors=factors)
        if nonlinearity not in MULTIPLICATIVE:
            raise ValueError(f"nonlinearity is {nonlinearity!r}; it is one of {', '.join(map(repr, MULTIPLICATIVE))}")
        self.factors, self.nonlinearity = factors, nonlinearity
        parameter = maker(device, dtype)
        self.h_init = parameter(hidden)
        self.W_vf = parameter(inputs, factors)
        self.W_hf = parameter(hidden, factors)
        self.W_fh = parameter(factors, hidden)
        self.W_vh = parameter(inputs, hidden)
        self.W_ho = None if outputs is None else parameter(hidden, outputs)
        self.b_h = parameter(hidden) if biases else None
        self.b_o = parameter(outputs) if biases and outputs is not None else None
        self.b_f = parameter(factors) if bounded_factors else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights and biases uniformly within +-1/sqrt(h) from torch's generator; h_init = 0, b_f = 1."""
        super().reset_parameters()
        if self.b_f is not None:
            nn.init.ones_(self.b_f)

    def _weights(self) -> list[tuple[Tensor, bool]]:
        return [(self.W_vf, True), (self.W_hf, False), (self.W_fh, False), (self.W_vh, True)]

    def sparse_init(
        self,
        seed: int | torch.Generator,
        connections: int = 15,
        scale: float = 1.0,
        input_scale: float = 1.0,
    ) -> MRNN:
        """Sparse random weights: every unit and factor has `connections` random incoming weights of each kind.

        W_hf, W_fh, W_ho: N(0, scale^2 / connections). W_vf, W_vh: N(0, input_scale^2). h_init: N(0, 1), all of it. The
        other weights and the biases: 0, but b_f: 1. A matrix with fewer rows than `connections` is full and counts its
        rows instead.

        Args:
            seed: an int, or a CPU generator that the draws go on from.
            connections: incoming connections of each unit and factor, of each kind.
            scale: of recurrent and output weights.
            input_scale: of input weights.

        Returns:
            The network itself.

        Raises:
            ValueError: `connections` below 1, a negative or infinite scale, or a generator that is not on the CPU.

        Source: Sutskever, Martens & Hinton, ICML 2011 (15 connections); Sutskever, PhD thesis 2013, chapter 4.
        """
        self._start_sparse(seed, connections, scale, input_scale)
        if self.b_f is not None:
            nn.init.ones_(self.b_f)
        return self

    def _layer(
        self, inputs: Tensor, starts: Sequence[Tensor | None], lengths: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        start = self.h_init if starts[0] is None else starts[0]
        W_vf: Tensor = self.W_vf
        W_vh: Tensor = self.W_vh
        if self.b_f is not None:
            # The layer's factors are linear in its inputs: these ones are inputs of their own, and their own factors.
            inputs, _ = ended(inputs, lengths)
            bounded = torch.tanh(inputs @ W_vf) + self.b_f
            inputs = torch.cat((inputs, bounded.to(inputs.dtype)), -1)
            W_vf = torch.cat((torch.zeros_like(W_vf), torch.eye(self.factors, dtype=W_vf.dtype, device=W_vf.device)))
            W_vh = torch.cat((W_vh, W_vh.new_zeros(self.factors, self.hidden)))
        outputs, last = mrnn_layer(
            inputs, W_vf, self.W_hf, self.W_fh, W_vh, start, self.b_h, self.nonlinearity, lengths
        )
        return outputs, (last,)
