"""Recurrent networks of cells that are defined once: UGRNN, the GRU of 2014, +RNN and RHN."""

from __future__ import annotations

from typing import Any

from hfopt.recurrences import cells
from models.stacked import Stack


class UGRNN(Stack):
    """Layers of the update gate RNN: h_t = g h_{t-1} + (1 - g) c, g = sigmoid, c = tanh of v_t W_vh + h_{t-1} W_hh + b.

    Args:
        inputs, hidden, outputs: as of `models.Stack`.
        depth: number of layers.
        forget_bias: where the bias of g starts.
        options: others of `models.Stack`.

    Source: Collins, Sohl-Dickstein & Sussillo, "Capacity and trainability in recurrent neural networks", ICLR 2017.
    """

    def __init__(
        self, inputs: int, hidden: int, outputs: int | None, *, depth: int = 1, forget_bias: float = 1.0, **options: Any
    ) -> None:
        super().__init__(cells.ugrnn, depth, inputs, hidden, outputs, gate_bias={"g": forget_bias}, **options)


class GRU2014(Stack):
    """Layers of gated recurrent units with the reset gate before the matrix: c = tanh(v_t W + (r h_{t-1}) W_hh_2 + b).

    h_t = u h_{t-1} + (1 - u) c; r and u are sigmoids of v_t W_vh + h_{t-1} W_hh_1 + b. `models.GRU` is torch's.

    Args:
        inputs, hidden, outputs: as of `models.Stack`.
        depth: number of layers.
        forget_bias: where the bias of u starts.
        options: others of `models.Stack`.

    Source: Cho et al., "Learning phrase representations using RNN encoder-decoder", EMNLP 2014.
    """

    def __init__(
        self, inputs: int, hidden: int, outputs: int | None, *, depth: int = 1, forget_bias: float = 0.0, **options: Any
    ) -> None:
        super().__init__(cells.gru2014, depth, inputs, hidden, outputs, gate_bias={"u": forget_bias}, **options)


class IntersectionRNN(Stack):
    """Layers of the intersection RNN (+RNN): a gated state h_t in time, and a gated output y_t in depth.

    h_t = g_h h_{t-1} + (1 - g_h) h_in, y_t = g_y v_t + (1 - g_y) y_in; y_in = relu, h_in = tanh, g_y and g_h sigmoids
    of v_t W_vh + h_{t-1} W_hh + b. Each layer takes the y_t of the one below, and the last y_t are read out.

    Args:
        inputs, hidden, outputs: as of `models.Stack`.
        depth: number of layers.
        forget_bias: where the biases of both gates start.
        options: others of `models.Stack`.

    Source: Collins, Sohl-Dickstein & Sussillo, "Capacity and trainability in recurrent neural networks", ICLR 2017; the
    projection of the inputs as in TensorFlow's IntersectionRNNCell.
    """

    def __init__(
        self, inputs: int, hidden: int, outputs: int | None, *, depth: int = 1, forget_bias: float = 1.0, **options: Any
    ) -> None:
        bias = {"gy": forget_bias, "gh": forget_bias}
        super().__init__(cells.intersection, depth, inputs, hidden, outputs, gate_bias=bias, **options)


class RHN(Stack):
    """Recurrent highway network: `depth` micro-steps s_l = h_l t_l + s_{l-1} (1 - t_l) within a step.

    h_l = tanh and t_l = sigmoid of [l = 1] v_t W_vh + s_{l-1} W_hh_l + b_l.

    Args:
        inputs, hidden, outputs: as of `models.Stack`.
        depth: micro-steps within a step, each with weights of its own.
        layers: networks of this kind on top of each other.
        coupled: whether the carry gate is 1 - t_l; otherwise it has weights of its own.
        transform_bias: where the biases of t_l start.
        hidden_dropout: variational dropout of s_{l-1} inside the products, one mask for all steps and micro-steps.
        options: others of `models.Stack`.

    Source: Zilly, Srivastava, Koutnik & Schmidhuber, "Recurrent highway networks", ICML 2017.
    """

    def __init__(
        self,
        inputs: int,
        hidden: int,
        outputs: int | None,
        *,
        depth: int = 5,
        layers: int = 1,
        coupled: bool = True,
        transform_bias: float = -2.0,
        hidden_dropout: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(
            cells.rhn(depth, coupled, dropout=hidden_dropout > 0),
            layers,
            inputs,
            hidden,
            outputs,
            gate_bias={f"t{l}": transform_bias for l in range(1, depth + 1)},
            hidden_dropout=hidden_dropout,
            **options,
        )
