"""Recurrences over a whole sequence as single differentiable operators."""

from __future__ import annotations

from hfopt.recurrences.cells.mrnn import MULTIPLICATIVE
from hfopt.recurrences.cells.simple import NONLINEARITIES
from hfopt.recurrences.definition import Definition, cell
from hfopt.recurrences.layers import Sequences, cell_layer, cell_readout
from hfopt.recurrences.named import (
    gru_layer,
    lstm_layer,
    mrnn_layer,
    simple_rnn,
    simple_rnn_layer,
    simple_rnn_readout,
)
from hfopt.recurrences.unrolled import State, Unrolled

__all__ = [
    "MULTIPLICATIVE",
    "NONLINEARITIES",
    "Definition",
    "Sequences",
    "State",
    "Unrolled",
    "cell",
    "cell_layer",
    "cell_readout",
    "gru_layer",
    "lstm_layer",
    "mrnn_layer",
    "simple_rnn",
    "simple_rnn_layer",
    "simple_rnn_readout",
]
