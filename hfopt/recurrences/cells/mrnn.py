"""The multiplicative recurrence in factored form."""

from __future__ import annotations

from typing import Any

from hfopt.recurrences.cells.simple import NONLINEARITIES
from hfopt.recurrences.definition import Definition
from hfopt.recurrences.expression import relu, sigmoid, tanh

_FUNCTIONS = {"tanh": tanh, "relu": relu, "sigmoid": sigmoid}
MULTIPLICATIVE = tuple(_FUNCTIONS)


def mrnn(nonlinearity: str = "tanh") -> Definition:
    """h_t = f([(x_t W_xf) (h_{t-1} W_hf)] W_fh + x_t W_xh), of `factors` products element by element.

    Source: Sutskever, Martens & Hinton, "Generating text with recurrent neural networks", ICML 2011, section 3.
    """
    return _MADE[nonlinearity]


def _made(nonlinearity: str) -> Definition:
    f = _FUNCTIONS[nonlinearity]

    def step(x: Any, h: Any, W: Any) -> Any:
        return f(x.h + W.h(x.f * W.f(h)))

    return Definition(
        step,
        states="h",
        gates="f:factors h",
        name=f"mrnn_{nonlinearity}",
        distance=NONLINEARITIES[nonlinearity].distance,
        made_by=(mrnn, (nonlinearity,)),
    )


# Made once, not on demand: a compiler would look through a cache.
_MADE = {nonlinearity: _made(nonlinearity) for nonlinearity in MULTIPLICATIVE}
