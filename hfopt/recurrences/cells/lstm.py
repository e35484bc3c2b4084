"""Long short-term memory."""

from __future__ import annotations

from typing import Any

from hfopt.recurrences.definition import cell
from hfopt.recurrences.expression import sigmoid, tanh


@cell(states="h c", gates="i f g o")
def lstm(x: Any, h: Any, c: Any, W: Any) -> Any:
    """c_t = f c_{t-1} + i g, h_t = o tanh(c_t); i, f, o = sigmoid, g = tanh of x_t W_x + h_{t-1} W_h.

    Sources: Hochreiter & Schmidhuber, "Long short-term memory", Neural Computation 1997; Gers, Schmidhuber & Cummins,
    "Learning to forget", Neural Computation 2000.
    """
    m = W(h)
    i, f, o = sigmoid(x.i + m.i), sigmoid(x.f + m.f), sigmoid(x.o + m.o)
    c = f * c + i * tanh(x.g + m.g)
    return o * tanh(c), c
