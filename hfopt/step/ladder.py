"""Walk over the candidates for lambda of one solve, by the loss and by how well the model predicted it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol, TypeVar

from hfopt.damping import KrylovDamping

# Another lambda is better if the loss falls by so much more, as a share of the decrease.
_CLEAR = 1e-2
# A candidate below this ratio gives way to any above it: it has landed where the model knows nothing, on a plateau
# perhaps, from which no gradient leads back.
_TRUSTED = 0.1
# Upwards, the walk goes on over candidates below this ratio even if the loss does not fall: a plateau is flat.
_FAR = 0.25


class Judged(Protocol):
    """A candidate: the loss there, the reduction ratio, and the lambda that it belongs to."""

    @property
    def value(self) -> float:
        """The loss."""

    @property
    def rho(self) -> float:
        """The reduction ratio; NaN if there is none."""

    @property
    def damping(self) -> float | None:
        """The lambda that it belongs to."""


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
    """Return the best candidate on the ladders of lambda about the given one.

    Where lambda is far below all curvatures, it changes nothing: such candidates are passed over upwards, and not gone
    to downwards, as each has to be better by a hundredth of the decrease.

    Args:
        rule: has the ladders.
        given: the candidate of the last step's lambda.
        judge: makes a candidate of a lambda, with one evaluation of the loss.
        f0: the loss before the step.
        least: the smallest curvature of the path.
        everything: try all lambdas, not only as long as the loss falls.
        rounding: differences of the loss that say nothing.
    """
    first, best = given.damping or 0.0, given
    upwards = not best.rho > 0.5
    for up in (upwards, not upwards):
        for damping in rule.ladder(max(first, least / rule.ratio) if up else first, up):
            candidate = judge(damping)
            if _better(candidate, best, f0, rounding):
                best = candidate
                continue
            far = up and (candidate.rho < _FAR or best.rho < _TRUSTED)
            if best.value < f0 and not everything and not far:
                break
        if not everything and (best is not given or (up and not best.value < f0)):
            break
    return best


def _better(candidate: Judged, best: Judged, f0: float, rounding: float) -> bool:
    """Whether a candidate takes the place of the best one so far."""
    if not math.isfinite(best.value):
        return math.isfinite(candidate.value)
    gains, gained = candidate.value < f0 - rounding, best.value < f0 - rounding
    if gains != gained:
        return gains
    if gains and (candidate.rho >= _TRUSTED) != (best.rho >= _TRUSTED):
        return candidate.rho >= _TRUSTED
    return candidate.value < best.value - max(_CLEAR * max(f0 - best.value, 0.0), rounding)
