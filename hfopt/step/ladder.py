"""Walk over the candidates for lambda of one solve, by the loss and by how well the model predicted it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from hfopt.damping import KrylovDamping

_ENV = lambda n, d: float(os.environ.get(n, d))
# Another lambda is better if the loss falls by so much more, as a share of the decrease.
_CLEAR = 1e-2
# A larger lambda than the last step's must be better by this share, as long as the model predicts well.
_SHORTER = _ENV("SHORTER", 0.01)
_GOOD = _ENV("GOOD", 0.25)
_LEAST = 0.1


class Judged(Protocol):
    @property
    def value(self) -> float: ...
    @property
    def rho(self) -> float: ...
    @property
    def damping(self) -> float | None: ...


C = TypeVar("C", bound=Judged)


def walk(
    rule: KrylovDamping,
    given: C,
    judge: Callable[[float], C],
    f0: float,
    *,
    least: float,
    everything: bool,
    rounding: float,
) -> C:
    first = given.damping or 0.0
    best = given
    upwards = not best.rho > 0.5

    def better(c: C, up: bool) -> bool:
        if not math.isfinite(best.value):
            return math.isfinite(c.value)
        if c.value >= f0 - rounding:
            return c.value < best.value - rounding and not best.value < f0
        trusted, before = c.rho >= _LEAST, best.rho >= _LEAST
        if trusted != before:
            return trusted
        share = _SHORTER if up and best is given and given.rho >= _GOOD else _CLEAR
        return c.value < best.value - max(share * max(f0 - best.value, 0.0), rounding)

    for up in (upwards, not upwards):
        start = max(first, least / rule.ratio) if up else first
        for damping in rule.ladder(start, up):
            c = judge(damping)
            if better(c, up):
                best = c
                continue
            far = up and c.rho < 0.25
            if best.value < f0 and not everything and not far and (best.rho >= _LEAST or not up):
                break
        if not everything and (best is not given or (up and not best.value < f0)):
            break
    return best
