"""The intersection RNN (+RNN): one gated output in time, one in depth."""

from __future__ import annotations

from typing import Any

from hfopt.recurrences.definition import cell
from hfopt.recurrences.expression import relu, sigmoid, tanh


@cell(states="h", gates="y h gy gh", outputs="y")
def intersection(x: Any, h: Any, W: Any) -> Any:
    """h_t = g_h h_{t-1} + (1 - g_h) h_in, y_t = g_y x_t + (1 - g_y) y_in, of inputs x_t as wide as the state.

    y_in = relu, h_in = tanh, g_y, g_h = sigmoid of x_t W_x + h_{t-1} W_h; y_t is the next layer's input.

    Source: Collins, Sohl-Dickstein & Sussillo, "Capacity and trainability in recurrent neural networks", ICLR 2017,
    eq. 15-20, with the functions used there.
    """
    m = W(h)
    y_in, h_in = relu(x.y + m.y), tanh(x.h + m.h)
    g_y, g_h = sigmoid(x.gy + m.gy), sigmoid(x.gh + m.gh)
    return g_h * h + (1 - g_h) * h_in, g_y * x.raw + (1 - g_y) * y_in
