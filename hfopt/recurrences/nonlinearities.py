"""Hidden nonlinearities f, with all that a recurrence needs said as functions of h = f(a), never of a."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_tanh_backward = torch.ops.aten.tanh_backward.grad_input
_sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input
_threshold_backward = torch.ops.aten.threshold_backward.grad_input


@dataclass(frozen=True)
class Nonlinearity:
    """A hidden nonlinearity h = f(a) and its derivatives, all as functions of h.

    Attributes:
        apply_: a <- f(a), in place.
        scale: (g, h, out): out <- f'(a) g in one pass over memory; `out` may be `g`; g is (..., *h.shape).
        slope_rate: d f'(a) / dh; None where it is zero (almost) everywhere.
        distance: D'' of structural damping, the exact curvature in a of the distance between two hidden states.
    """

    name: str
    apply_: Callable[[Tensor], object]
    scale: Callable[[Tensor, Tensor, Tensor], object]
    slope_rate: Callable[[Tensor], Tensor] | None
    distance: Callable[[Tensor], Tensor]


def _tanh_scale(g: Tensor, h: Tensor, out: Tensor) -> None:
    _tanh_backward(g, h, grad_input=out)


def _sigmoid_scale(g: Tensor, h: Tensor, out: Tensor) -> None:
    _sigmoid_backward(g, h, grad_input=out)


def _relu_scale(g: Tensor, h: Tensor, out: Tensor) -> None:
    _threshold_backward(g, h, 0, grad_input=out)


def _identity_scale(g: Tensor, h: Tensor, out: Tensor) -> None:
    if out is not g:
        out.copy_(g)


def _step(h: Tensor) -> Tensor:
    return (h > 0).to(h.dtype)


NONLINEARITIES: dict[str, Nonlinearity] = {
    f.name: f
    for f in (
        # Distance: cross-entropy between the probabilities (1 + h) / 2 = sigma(2a).
        Nonlinearity("tanh", Tensor.tanh_, _tanh_scale, lambda h: -2 * h, lambda h: 1 - h * h),
        # Distance: cross-entropy between the probabilities h = sigma(a).
        Nonlinearity("sigmoid", Tensor.sigmoid_, _sigmoid_scale, lambda h: 1 - 2 * h, lambda h: h * (1 - h)),
        # Distance: half the squared distance of h, in its Gauss-Newton form f'(a)^2.
        Nonlinearity("relu", Tensor.relu_, _relu_scale, None, _step),
        # Distance: half the squared distance of h = a.
        Nonlinearity("identity", lambda a: a, _identity_scale, None, torch.ones_like),
    )
}
