"""Recurrent cells, each from one definition: a step of a few lines, whose passes over time are generated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from hfopt.recurrences.cells.gru import gru, gru2014
from hfopt.recurrences.cells.intersection import intersection
from hfopt.recurrences.cells.lstm import lstm
from hfopt.recurrences.cells.mrnn import mrnn
from hfopt.recurrences.cells.rhn import rhn
from hfopt.recurrences.cells.simple import identity_rnn, modrelu, relu_rnn, sigmoid_rnn, tanh_rnn
from hfopt.recurrences.cells.ugrnn import ugrnn
from hfopt.recurrences.definition import Definition

# One of each kind that is here, by name: what tests and benchmarks go through.
EXAMPLES: Mapping[str, Callable[[], Definition]] = MappingProxyType(
    {
        "tanh": lambda: tanh_rnn,
        "relu": lambda: relu_rnn,
        "sigmoid": lambda: sigmoid_rnn,
        "identity": lambda: identity_rnn,
        "modrelu": lambda: modrelu,
        "lstm": lambda: lstm,
        "gru": lambda: gru,
        "gru2014": lambda: gru2014,
        "ugrnn": lambda: ugrnn,
        "intersection": lambda: intersection,
        "mrnn": mrnn,
        "rhn": lambda: rhn(3),
        "rhn_uncoupled_dropout": lambda: rhn(2, coupled=False, dropout=True),
    }
)

__all__ = [
    "EXAMPLES",
    "gru",
    "gru2014",
    "identity_rnn",
    "intersection",
    "lstm",
    "modrelu",
    "mrnn",
    "relu_rnn",
    "rhn",
    "sigmoid_rnn",
    "tanh_rnn",
    "ugrnn",
]
