"""Line search: the last safeguard of a step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class LineSearchResult:
    """``length`` 0 means that no step was found; ``value`` is f there; ``tries`` counts evaluations of f."""

    length: float
    value: float
    tries: int


@dataclass
class LineSearch:
    """Backtracking with Armijo's condition ``f(theta + s p) <= f(theta) + c s g'p`` (Martens & Sutskever 2012, section
    8.8).

    Args:
        c: share of the decrease along the slope that is asked for; 0: any decrease. 1e-2, as Martens and Sutskever have
            it, takes steps onto plateaus, a hundred times too long, for good.
        shrink: s is multiplied by this until the condition holds.
        max_tries: give up after so many evaluations; 1: the full step or none.
    """

    c: float = 0.05
    shrink: float = 0.8
    max_tries: int = 60

    def __post_init__(self) -> None:
        if not (0 <= self.c < 1 and 0 < self.shrink < 1 and self.max_tries >= 1):
            raise ValueError(
                f"need 0 <= c < 1, 0 < shrink < 1 and max_tries >= 1, but they are {self.c}, {self.shrink}, "
                f"{self.max_tries}"
            )

    def search(self, f: Callable[[float], float], f0: float, slope: float, full: float) -> LineSearchResult:
        """Return the first s of 1, shrink, shrink^2, ... that meets the condition, else 0.

        Args:
            f: the loss at ``theta + s p`` (may be NaN or infinite).
            f0: the loss at theta.
            slope: ``g'p``; a positive one (p not a descent direction of this data) asks for any decrease.
            full: ``f(1)``, already known.
        """
        slope = min(slope, 0.0) if math.isfinite(slope) else 0.0
        s, value = 1.0, full
        for tries in range(1, self.max_tries + 1):
            if math.isfinite(value) and value < f0 and value <= f0 + self.c * s * slope:
                return LineSearchResult(s, value, tries)
            if tries < self.max_tries:
                s *= self.shrink
                value = f(s)
        return LineSearchResult(0.0, f0, self.max_tries)

    def state_dict(self) -> dict[str, float | None]:
        """Return everything that the next search depends on: nothing for this rule."""
        return {}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        """Restore :meth:`state_dict`."""


def as_line_search(line_search: LineSearch | str | None) -> LineSearch:
    """A rule from what a user gives: ``"armijo"``, a rule, or None for the full step or none.

    Raises:
        ValueError: another name.
    """
    if line_search is None:
        return LineSearch(max_tries=1)
    if isinstance(line_search, LineSearch):
        return line_search
    if line_search != "armijo":
        raise ValueError(f"line_search is {line_search!r}, but must be 'armijo', None or a LineSearch")
    return LineSearch()


@dataclass
class FullStep(LineSearch):
    """The full step or none: none if the loss rises by much, or if the step is far larger than usual.

    With ``s = |g'p|``, about twice the predicted decrease, and its average m over the previous steps::

        taken:   f(theta + p) <= f(theta) + rise |f(theta)|   and   s <= outlier m
        m <- 0.9 m + 0.1 min(s, outlier m)

    so that one batch with broken targets or inputs changes nothing, and a real change of scale takes a few steps.

    Args:
        rise: allowed increase of the loss, relative to it; since batches differ, an increase need not be a bad step.
        outlier: largest accepted multiple of the usual ``|g'p|``.

    Raises:
        ValueError: a negative ``rise``, or an ``outlier`` that is not above 1.
    """

    rise: float = 0.2
    outlier: float = 30.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.rise >= 0 and self.outlier > 1):
            raise ValueError(
                f"rise must not be negative and outlier must be above 1, but they are {self.rise}, {self.outlier}"
            )
        self._usual: float | None = None

    def search(self, f: Callable[[float], float], f0: float, slope: float, full: float) -> LineSearchResult:
        """Return 1 or 0, without another evaluation; ``slope`` is ``g'p``."""
        size, usual = abs(slope), self._usual
        bound = math.inf if usual is None else self.outlier * usual
        taken = size <= bound and full <= f0 + self.rise * abs(f0) and math.isfinite(full)
        if math.isfinite(size) and (usual is not None or taken):
            self._usual = size if usual is None else 0.9 * usual + 0.1 * min(size, bound)
        return LineSearchResult(1.0, full, 1) if taken else LineSearchResult(0.0, f0, 1)

    def state_dict(self) -> dict[str, float | None]:
        """Return the usual ``|g'p|``."""
        return {"usual": self._usual}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        """Restore :meth:`state_dict`; start again from that of another line search."""
        self._usual = state.get("usual")
