"""The update gate RNN."""

from __future__ import annotations

from typing import Any

from hfopt.recurrences.definition import cell
from hfopt.recurrences.expression import sigmoid, tanh


@cell(states="h", gates="g c")
def ugrnn(x: Any, h: Any, W: Any) -> Any:
    """h_t = g h_{t-1} + (1 - g) c; g = sigmoid, c = tanh of x_t W_x + h_{t-1} W_h.

    Source: Collins, Sohl-Dickstein & Sussillo, "Capacity and trainability in recurrent neural networks", ICLR 2017.
    """
    m = W(h)
    g, c = sigmoid(x.g + m.g), tanh(x.c + m.c)
    return g * h + (1 - g) * c
