"""Line search: the last net under a step."""

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
        c: share of the predicted decrease that is asked for; 0: any decrease.
        shrink: s is multiplied by this until the condition holds.
        max_tries: give up after so many evaluations; 1: the full step or none.
    """

    c: float = 1e-2
    shrink: float = 0.8
    max_tries: int = 60

    def __post_init__(self) -> None:
        if not (0 <= self.c < 1 and 0 < self.shrink < 1 and self.max_tries >= 1):
            raise ValueError(
                f"need 0 <= c < 1, 0 < shrink < 1 and max_tries >= 1, but they are {self.c}, {self.shrink}, "
                f"{self.max_tries}"
            )

    def search(self, f: Callable[[float], float], f0: float, slope: float, full: float) -> LineSearchResult:
        """The first s of 1, shrink, shrink^2, ... that meets the condition, else 0.

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
        """All that the next search depends on: nothing here, as other rules may have."""
        return {}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        """Restore :meth:`state_dict`."""
