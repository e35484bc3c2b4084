"""Gated recurrent units: torch's, and those of 2014."""

from __future__ import annotations

from typing import Any

from hfopt.recurrences.definition import cell
from hfopt.recurrences.expression import sigmoid, tanh


@cell(states="h", gates="r z n", parameters="b")
def gru(x: Any, h: Any, W: Any, p: Any) -> Any:
    """h_t = (1 - z) n + z h_{t-1}, n = tanh(x_t W_xn + r (h_{t-1} W_hn + b)); r, z = sigmoid(x_t W_x + h_{t-1} W_h).

    The reset gate r is behind the matrix, as in `torch.nn.GRU`.
    """
    m = W(h)
    r, z = sigmoid(x.r + m.r), sigmoid(x.z + m.z)
    n = tanh(x.n + r * (m.n + p.b))
    return n + z * (h - n)


@cell(states="h", gates="r u c")
def gru2014(x: Any, h: Any, W: Any) -> Any:
    """h_t = u h_{t-1} + (1 - u) c, c = tanh(x_t W_xc + (r h_{t-1}) W_hc); r, u = sigmoid(x_t W_x + h_{t-1} W_h).

    The reset gate r is before the matrix; u is a carry gate, as torch's z is.

    Sources: Cho et al., "Learning phrase representations using RNN encoder-decoder", EMNLP 2014; written as in Collins,
    Sohl-Dickstein & Sussillo, "Capacity and trainability in recurrent neural networks", ICLR 2017, eq. 9-12.
    """
    r, u = sigmoid(x.r + W.r(h)), sigmoid(x.u + W.u(h))
    c = tanh(x.c + W.c(r * h))
    return u * h + (1 - u) * c
