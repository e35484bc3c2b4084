"""Simple recurrences: one product and one function of the sum."""

from __future__ import annotations

from typing import Any

from hfopt.recurrences.definition import cell
from hfopt.recurrences.expression import absolute, relu, sigmoid, sign, tanh


@cell(states="h", gates="a", name="tanh")
def tanh_rnn(x: Any, h: Any, W: Any) -> Any:
    """h_t = tanh(x_t W_x + h_{t-1} W_h).

    Source: Elman, "Finding structure in time", Cognitive Science 1990.
    """
    return tanh(x.a + W.a(h))


@cell(states="h", gates="a", name="relu")
def relu_rnn(x: Any, h: Any, W: Any) -> Any:
    """h_t = max(0, x_t W_x + h_{t-1} W_h); with W_h starting as the identity, the IRNN.

    Source: Le, Jaitly & Hinton, "A simple way to initialize recurrent networks of rectified linear units", 2015.
    """
    return relu(x.a + W.a(h))


@cell(states="h", gates="a", name="sigmoid")
def sigmoid_rnn(x: Any, h: Any, W: Any) -> Any:
    """h_t = sigmoid(x_t W_x + h_{t-1} W_h)."""
    return sigmoid(x.a + W.a(h))


@cell(states="h", gates="a", name="identity")
def identity_rnn(x: Any, h: Any, W: Any) -> Any:
    """h_t = x_t W_x + h_{t-1} W_h."""
    return x.a + W.a(h)


@cell(states="h", gates="a", parameters="b")
def modrelu(x: Any, h: Any, W: Any, p: Any) -> Any:
    """h_t = sign(a_t) max(0, |a_t| + b), a_t = x_t W_x + h_{t-1} W_h; one b for each unit.

    Source: Arjovsky, Shah & Bengio, "Unitary evolution recurrent neural networks", ICML 2016; real as in Kerg, Goyette
    et al., "Non-normal recurrent neural network (nnRNN)", NeurIPS 2019.
    """
    a = x.a + W.a(h)
    return sign(a) * relu(absolute(a) + p.b)
