"""Simple recurrences: one product and one function of the sum."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from hfopt.recurrences.definition import Definition, cell
from hfopt.recurrences.expression import absolute, relu, sigmoid, sign, tanh


def distance_tanh(h: Tensor) -> Tensor:
    """D'' in a: of the cross-entropy between the probabilities (1 + h) / 2 = sigma(2a)."""
    return 1 - h * h


def distance_sigmoid(h: Tensor) -> Tensor:
    """D'' in a: of the cross-entropy between the probabilities h = sigma(a)."""
    return h * (1 - h)


def distance_relu(h: Tensor) -> Tensor:
    """D'' in a: of half the squared distance of h, in its Gauss-Newton form f'(a)^2."""
    return (h > 0).to(h.dtype)


@cell(states="h", gates="a", name="tanh", distance=distance_tanh)
def tanh_rnn(x: Any, h: Any, W: Any) -> Any:
    """h_t = tanh(x_t W_x + h_{t-1} W_h).

    Source: Elman, "Finding structure in time", Cognitive Science 1990.
    """
    return tanh(x.a + W.a(h))


@cell(states="h", gates="a", name="relu", distance=distance_relu)
def relu_rnn(x: Any, h: Any, W: Any) -> Any:
    """h_t = max(0, x_t W_x + h_{t-1} W_h); with W_h starting as the identity, the IRNN.

    Source: Le, Jaitly & Hinton, "A simple way to initialize recurrent networks of rectified linear units", 2015.
    """
    return relu(x.a + W.a(h))


@cell(states="h", gates="a", name="sigmoid", distance=distance_sigmoid)
def sigmoid_rnn(x: Any, h: Any, W: Any) -> Any:
    """h_t = sigmoid(x_t W_x + h_{t-1} W_h)."""
    return sigmoid(x.a + W.a(h))


@cell(states="h", gates="a", name="identity", distance=torch.ones_like)
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


# The simple recurrences by the names of their nonlinearities.
NONLINEARITIES: Mapping[str, Definition] = MappingProxyType(
    {d.name: d for d in (tanh_rnn, sigmoid_rnn, relu_rnn, identity_rnn)}
)
