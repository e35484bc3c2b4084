"""Recurrences over a whole sequence as single differentiable operators."""

from __future__ import annotations

from hfopt.recurrences.definition import Definition, cell
from hfopt.recurrences.gru import gru_layer
from hfopt.recurrences.layers import Sequences, cell_layer
from hfopt.recurrences.lstm import lstm_layer
from hfopt.recurrences.mrnn import MULTIPLICATIVE, mrnn_layer
from hfopt.recurrences.nonlinearities import NONLINEARITIES
from hfopt.recurrences.readout import simple_rnn_readout
from hfopt.recurrences.simple import simple_rnn, simple_rnn_layer
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
    "gru_layer",
    "lstm_layer",
    "mrnn_layer",
    "simple_rnn",
    "simple_rnn_layer",
    "simple_rnn_readout",
]
