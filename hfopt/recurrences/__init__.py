"""Recurrences over a whole sequence as single differentiable operators."""

from __future__ import annotations

from hfopt.recurrences.gru import gru_layer
from hfopt.recurrences.lstm import lstm_layer
from hfopt.recurrences.mrnn import MULTIPLICATIVE, mrnn_layer
from hfopt.recurrences.nonlinearities import NONLINEARITIES
from hfopt.recurrences.simple import simple_rnn, simple_rnn_layer

__all__ = [
    "MULTIPLICATIVE",
    "NONLINEARITIES",
    "gru_layer",
    "lstm_layer",
    "mrnn_layer",
    "simple_rnn",
    "simple_rnn_layer",
]
