"""Stopping rules of conjugate gradients, and which iterates to store: the same wherever iterations run.

Martens, "Deep learning via Hessian-free optimization", ICML 2010: relative progress in section 4.4, iterates for
backtracking in section 4.6.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

# |alpha A d| / |r| above which a step along a direction that is nearly flat leads nowhere: the residual grows.
GROWTH = 2.0
# Share of a residual of one window of the progress rule before, below which a solve of an exact system goes on.
FAST = 0.5


@dataclass
class StoppingRules:
    """Settings of a solve's length: see :class:`hfopt.CG`, which has them as its own."""

    max_iterations: int = 250
    min_iterations: int = 1
    tolerance: float | None = None
    overhead: float = 10.0
    residual: float = 1e-10
    growth: float = 1.3
    check_every: int = 10
    repair_every: int = 0

    def __post_init__(self) -> None:
        if self.max_iterations < 1 or self.min_iterations < 1 or self.min_iterations > self.max_iterations:
            raise ValueError(
                f"iterations must satisfy 1 <= min_iterations <= max_iterations, but are {self.min_iterations} and "
                f"{self.max_iterations}"
            )
        tolerance = 0.0 if self.tolerance is None else self.tolerance
        if not (tolerance >= 0 and self.residual >= 0 and self.growth > 1):
            raise ValueError(
                f"tolerance and residual must be >= 0 and growth > 1, but are {self.tolerance}, {self.residual}, "
                f"{self.growth}"
            )
        if not (self.overhead >= 0 and math.isfinite(self.overhead)):
            raise ValueError(f"overhead is {self.overhead}, but must be a finite number of products, 0 or more")
        if self.check_every < 1 or self.repair_every < 0:
            raise ValueError(
                f"check_every must be positive and repair_every not negative, but are {self.check_every}, "
                f"{self.repair_every}"
            )

    def stored_iterations(self) -> set[int]:
        """Return ``ceil(5 growth^j)`` up to the largest number of iterations."""
        kept, value = set(), 5.0
        while math.ceil(value) <= self.max_iterations:
            kept.add(math.ceil(value))
            value *= self.growth
        return kept

    def window(self, i: int) -> int | None:
        """Return ``k`` of the progress rule after ``i`` iterations; None if the rule does not apply."""
        k = max(5 if self.tolerance is None else 10, math.ceil(0.1 * i))
        return None if self.tolerance == 0 or i <= k or i < self.min_iterations else k

    def least_share(self, i: int) -> float:
        """Return ``k eps`` of the progress rule after ``i`` iterations; minus infinity if the rule does not apply."""
        k = self.window(i)
        if k is None:
            return -math.inf
        return k / (self.overhead + i) if self.tolerance is None else k * self.tolerance

    def progress_is_little(self, history: list[float], residuals: list[float] | None = None) -> bool:
        """Apply the progress rule to ``phi_0, ..., phi_i``.

        With ``residuals``, ``|r_0|, ..., |r_{i-1}|``, the rule waits while the latest is at most half of what it was k
        iterations before.
        """
        i = len(history) - 1
        k = self.window(i)
        if k is None:
            return False
        now, then = history[i], history[i - k]
        if not (now < 0 and (now - then) / now < self.least_share(i)):
            return False
        return residuals is None or residuals[i - 1] > FAST * residuals[i - 1 - k]


def before_product(rz: float, residual: float, bound: float) -> str | None:
    """Return why an iteration makes no product, given ``r'z``, ``|r|`` and the bound on it; None to go on."""
    if not (math.isfinite(rz) and math.isfinite(residual)):
        return "not finite"
    return "residual" if residual <= bound or rz == 0 else None


def shallow(dtype: torch.dtype) -> float:
    """Return the share of the largest curvature below which a direction may be one of A's null space."""
    return float(torch.finfo(dtype).eps ** (2 / 3))


def lost(dtype: torch.dtype) -> float:
    """Return the share of :func:`shallow` below which a curvature is a rounding error of the product."""
    return 4 * torch.finfo(dtype).eps / shallow(dtype)


def after_product(curvature: float, least: float) -> str | None:
    """Return why an iteration makes no move along d, given ``d'A d`` and the least one that a move may divide by.

    None to go on. Where b is not in the range of a singular A, the residual keeps its part in the null space, and CG's
    directions turn into it: steps get longer without bound, and residuals grow. So a direction is ``"singular"`` if its
    curvature is a tiny share of the largest one and the step would multiply the residual, ``|alpha A d| > 2 |r|``, or
    if its curvature is a product's rounding error.
    """
    if not math.isfinite(curvature):
        return "not finite"
    if curvature <= 0:
        return "negative curvature"
    return "singular" if curvature <= least else None
