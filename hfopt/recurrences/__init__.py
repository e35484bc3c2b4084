"""Recurrences over a whole sequence as single differentiable operators."""

from __future__ import annotations

from hfopt.recurrences.nonlinearities import NONLINEARITIES
from hfopt.recurrences.simple import simple_rnn, simple_rnn_layer

__all__ = ["NONLINEARITIES", "simple_rnn", "simple_rnn_layer"]
