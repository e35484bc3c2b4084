"""The recurrent highway network: several micro-steps within a step, each with matrices of its own."""

from __future__ import annotations

from functools import cache
from typing import Any

from hfopt.recurrences.definition import Definition
from hfopt.recurrences.expression import sigmoid, tanh


def rhn(depth: int, coupled: bool = True, dropout: bool = False) -> Definition:
    """s_l = h_l t_l + s_{l-1} c_l for l = 1..depth, with s_0 the state before the step and s_depth the one after.

    h_l = tanh, t_l = sigmoid of [l = 1] x_t W_x + s_{l-1} R_l + b_l; c_l = 1 - t_l if `coupled`, otherwise the sigmoid
    of a sum of its own. With `dropout` s_{l-1} R_l is (s_{l-1} mask) R_l, one mask for all steps and depths.

    Raises:
        ValueError: a depth below 1.

    Source: Zilly, Srivastava, Koutnik & Schmidhuber, "Recurrent highway networks", ICML 2017, eq. 6-9; dropout as in
    Gal & Ghahramani, "A theoretically grounded application of dropout in recurrent neural networks", NeurIPS 2016.
    """
    if depth < 1:
        raise ValueError(f"depth is {depth}; it is at least 1")
    return _rhn(depth, coupled, dropout)


@cache
def _rhn(depth: int, coupled: bool, dropout: bool) -> Definition:
    kinds = "ht" if coupled else "htc"

    def step(x: Any, s: Any, W: Any, p: Any = None) -> Any:
        for l in range(1, depth + 1):
            m = W(s * p.mask if dropout else s)
            sums = []
            for k in kinds:
                own = getattr(x, f"{k}1") if l == 1 else getattr(p, f"b_{k}{l}")
                sums.append(own + getattr(m, f"{k}{l}"))
            h, t = tanh(sums[0]), sigmoid(sums[1])
            s = h * t + s * (1 - t if coupled else sigmoid(sums[2]))
        return s

    gates = [f"{k}{l}" for l in range(1, depth + 1) for k in kinds]
    return Definition(
        step,
        states="s",
        gates=" ".join(gates),
        parameters=" ".join(f"b_{g}" for g in gates[len(kinds) :]),
        masks="mask" if dropout else "",
        name=f"rhn{depth}" + "_uncoupled" * (not coupled) + "_dropout" * dropout,
        made_by=(rhn, (depth, coupled, dropout)),
    )
