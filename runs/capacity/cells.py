"""The six cells by their published names, and what their gates are called in hyperparameters."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from hfopt.recurrences import Definition, cells
from hfopt.recurrences.expression import relu, sigmoid, tanh


class Architecture(NamedTuple):
    """A cell as the study has it.

    Attributes:
        gates: columns of the cell, by the letter that ends the names of their hyperparameters. The letters of the LSTM
            are published; those of the others follow the source's equations.
        forget: letters of the gates that the forget bias is added in, with the end of its hyperparameter's name.
        nonlinearities: those to choose from.
    """

    gates: dict[str, str]
    forget: dict[str, str]
    nonlinearities: tuple[str, ...] = ("tanh", "relu")


ARCHITECTURES = {
    "rnn": Architecture({"h": "a"}, {}),
    "irnn": Architecture({"h": "a"}, {}, ("relu",)),
    "ugrnn": Architecture({"g": "g", "c": "c"}, {"g": ""}),
    "gru": Architecture({"r": "r", "u": "u", "c": "c"}, {"u": ""}),
    "lstm": Architecture({"g": "f", "i": "i", "c": "g", "o": "o"}, {"g": ""}),
    # In the source, y is rectified and h is a tanh in practice.
    "+rnn": Architecture({"y": "y", "h": "h", "gy": "gy", "gh": "gh"}, {"gy": "_y", "gh": "_h"}, ("tanh",)),
}
"""By published name."""


def architecture(name: str) -> Architecture:
    """An architecture by its published name.

    Raises:
        ValueError: there is none.
    """
    if name not in ARCHITECTURES:
        raise ValueError(f"there is no architecture {name!r}; choose from {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def cell_of(name: str, nonlinearity: str = "tanh") -> Definition:
    """The cell of an architecture, with s, the function of its candidate, tanh or relu.

    Raises:
        ValueError: an unknown architecture, or a function that it does not have.
    """
    known = architecture(name).nonlinearities
    if name in ("irnn", "+rnn"):
        return cells.relu_rnn if name == "irnn" else cells.intersection
    if nonlinearity not in known:
        raise ValueError(f"nonlinearity is {nonlinearity!r}; {name} has {' or '.join(known)}")
    if name == "rnn":
        return cells.tanh_rnn if nonlinearity == "tanh" else cells.relu_rnn
    plain = {"ugrnn": cells.ugrnn, "gru": cells.gru2014, "lstm": cells.lstm}
    return plain[name] if nonlinearity == "tanh" else _rectified(name)


@cache
def _rectified(name: str) -> Definition:
    """The gated cells with max(0, .) in place of the candidate's tanh."""

    def ugrnn(x: Any, h: Any, W: Any) -> Any:
        m = W(h)
        g = sigmoid(x.g + m.g)
        return g * h + (1 - g) * relu(x.c + m.c)

    def gru(x: Any, h: Any, W: Any) -> Any:
        r, u = sigmoid(x.r + W.r(h)), sigmoid(x.u + W.u(h))
        return u * h + (1 - u) * relu(x.c + W.c(r * h))

    def lstm(x: Any, h: Any, c: Any, W: Any) -> Any:
        m = W(h)
        i, f, o = sigmoid(x.i + m.i), sigmoid(x.f + m.f), sigmoid(x.o + m.o)
        c = f * c + i * relu(x.g + m.g)
        return o * tanh(c), c

    made: dict[str, tuple[Callable[..., Any], str, str]] = {
        "ugrnn": (ugrnn, "h", "g c"),
        "gru": (gru, "h", "r u c"),
        "lstm": (lstm, "h c", "i f g o"),
    }
    step, states, gates = made[name]
    return Definition(step, states=states, gates=gates, name=f"{name}_rectified", made_by=(_rectified, (name,)))
