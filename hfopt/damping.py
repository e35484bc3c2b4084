"""Damping: trust in the quadratic model.

``A = G + lambda I`` (+ structural terms). A rule holds ``lambda`` and changes it by the reduction ratio

    rho = [f(theta + p) - f(theta)] / q(p),     q(p) = g'p + p'Gp/2  without the damping terms.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from hfopt.errors import warn

_ROOM = 1 << 30


class Damping(ABC):
    """A rule for lambda. ``value`` is None until the first step has set it."""

    value: float | None = None

    @abstractmethod
    def start(self, value: float) -> None:
        """Set lambda to the value from the calibration of the first step."""

    @abstractmethod
    def update(self, rho: float, accepted: bool) -> None:
        """Change lambda after a step with ratio ``rho`` (NaN and infinities are allowed)."""

    @property
    def calibrates(self) -> bool:
        """Whether the first step is to choose lambda."""
        return self.value is None

    def state_dict(self) -> dict[str, float | None]:
        """Return everything that the next update depends on."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        """Restore :meth:`state_dict`."""
        self.value = state["value"]


@dataclass
class FixedDamping(Damping):
    """The same lambda at every step.

    The constant is a setting, as CG's are: a state that was saved with another one does not change it, and a warning
    says so. With the same constant, a ``value`` that was set by hand comes back.
    """

    constant: float

    def __post_init__(self) -> None:
        _check(constant=self.constant)
        self.value = self.constant

    def start(self, value: float) -> None:
        """Do nothing."""

    def update(self, rho: float, accepted: bool) -> None:
        """Do nothing."""

    def state_dict(self) -> dict[str, float | None]:
        """lambda, and the constant that it was made with."""
        return {"value": self.value, "constant": self.constant}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        """Restore :meth:`state_dict`, if it was saved with the same constant."""
        saved = state.get("constant", state["value"])
        if saved == self.constant:
            self.value = state["value"]
            return
        self.value = self.constant
        warn(
            f"the state was saved with lambda {saved}, but this optimizer has FixedDamping({self.constant}), which "
            f"stays; give it FixedDamping({saved}) to go on as before"
        )


@dataclass
class LevenbergMarquardt(Damping):
    """``lambda *= 3/2`` if ``rho < 1/4`` or NaN, ``lambda *= 2/3`` if ``rho > 3/4`` (Martens 2010, section 4.1).

    Args:
        initial: lambda of the first step; None: the first step finds it, starting from the curvature along the
            gradient, so that you need not choose it and it scales with the loss.
        increase, decrease: the two factors.
        low, high: the two thresholds of rho.
        rejected: the factor after a rejected step. It exceeds ``increase``, so that a wrong start or one bad
            batch costs few steps.
        minimum, maximum: bounds of lambda; None: 1e-10 and 1e10 times the first step's.
    """

    initial: float | None = None
    increase: float = 1.5
    decrease: float = 2 / 3
    low: float = 0.25
    high: float = 0.75
    rejected: float = 4.0
    minimum: float | None = None
    maximum: float | None = None

    def __post_init__(self) -> None:
        _check(initial=self.initial, minimum=self.minimum, maximum=self.maximum)
        if self.initial == 0:
            raise ValueError("initial is 0, which no factor changes; use FixedDamping(0) for no damping")
        if not (0 < self.decrease <= 1 <= self.increase and self.rejected >= 1 and self.low <= self.high):
            raise ValueError(
                "need 0 < decrease <= 1 <= increase, rejected >= 1 and low <= high, but they are "
                f"{self.decrease}, {self.increase}, {self.rejected}, {self.low}, {self.high}"
            )
        self.value = self.initial
        self._reference = self.initial

    def start(self, value: float) -> None:
        """Begin at ``value``, which also sets the bounds that were left open."""
        self._reference = value
        self.value = self._clamped(value)

    def bounds(self) -> tuple[float, float]:
        """Return the smallest and the largest lambda."""
        reference = 1.0 if self._reference is None else self._reference
        low = 1e-10 * reference if self.minimum is None else self.minimum
        high = 1e10 * reference if self.maximum is None else self.maximum
        return low, max(low, high)

    def _clamped(self, value: float) -> float:
        low, high = self.bounds()
        return min(max(value, low), high)

    def update(self, rho: float, accepted: bool) -> None:
        """Follow rho as the class describes; a rejected step counts as bad whatever its rho."""
        if self.value is None:
            return
        factor = 1.0
        if not accepted:
            factor = self.rejected
        elif not rho >= self.low:  # true for NaN as well
            factor = self.increase
        elif rho > self.high and math.isfinite(rho):
            factor = self.decrease
        self.value = self._clamped(self.value * factor)

    def state_dict(self) -> dict[str, float | None]:
        """Return lambda and the reference of its bounds."""
        return {"value": self.value, "reference": self._reference}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        """Restore :meth:`state_dict`; that of a rule without bounds begins them at its lambda."""
        self.value = state["value"]
        self._reference = state.get("reference", self.value)


@dataclass
class KrylovDamping(LevenbergMarquardt):
    """Choose lambda by the loss at every step, with all candidates from one solve.

    The candidates lie on a :class:`hfopt.linalg.krylov.DampingPath`.

    The rule evaluates the loss at ``p(lambda)`` for the lambda of the previous step, then for ``ratio^k`` times it:
    downwards if rho was above 1/2 and upwards otherwise, as long as the loss falls, and in the other direction if it
    did not fall. The best one is the lambda of this step and the first candidate of the next. ``backtracking`` selects
    the candidates: ``"walk"`` as described, ``"smallest"`` all of them, ``"none"`` only the first, with lambda
    following rho as in :class:`LevenbergMarquardt`. Earlier iterates of CG are not evaluated. The weight of structural
    damping belongs to the first lambda. In the first step, the candidates start at the curvature along the gradient.

    Args:
        ratio: factor between neighbouring candidates.
        most: maximum number of candidates on either side.
        directions: number of CG directions to keep, with two vectors (P,) each; longer solves keep these and the
            solution. None: 64, or as many as fit into 1 GiB, but at least 8.

    The other arguments are those of :class:`LevenbergMarquardt`.
    """

    ratio: float = 4.0
    most: int = 8
    directions: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        few = self.directions is not None and self.directions < 1
        if not (self.ratio > 1 and math.isfinite(self.ratio) and self.most >= 1) or few:
            raise ValueError(
                f"need ratio > 1, most >= 1 and directions >= 1, but they are {self.ratio}, {self.most}, "
                f"{self.directions}"
            )

    _expected: float | None = field(default=None, init=False, repr=False)
    _gain: float | None = field(default=None, init=False, repr=False)

    def kept(self, size: int) -> int:
        """Return the number of directions, for vectors of ``size`` bytes."""
        return max(8, min(64, _ROOM // (2 * size))) if self.directions is None else self.directions

    def choose(self, value: float) -> None:
        """Continue with the lambda that the loss chose."""
        self.value = self._clamped(value)

    def data_have_changed(self, loss: float, rounding: float) -> bool:
        """Whether ``loss``, before a step, is another than that after the step before, up to its rounding error.

        A thousandth of what that step gained makes no difference to how it was judged.
        """
        if self._expected is None or self._gain is None:
            return False
        return abs(loss - self._expected) > 1e-3 * self._gain + 16 * rounding

    def state_dict(self) -> dict[str, float | None]:
        """lambda, the reference of its bounds, and the loss that the last step began and ended with."""
        return {**super().state_dict(), "expected": self._expected, "gain": self._gain}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        """Restore :meth:`state_dict`."""
        super().load_state_dict(state)
        self._expected, self._gain = state.get("expected"), state.get("gain")

    def saw(self, before: float, after: float) -> None:
        """Remember the loss that a step began and ended with."""
        self._expected, self._gain = after, abs(before - after)

    def ladder(self, value: float, up: bool) -> list[float]:
        """Return the candidates above or below ``value`` within the bounds, the nearest first."""
        factor = self.ratio if up else 1 / self.ratio
        found = [value * factor**k for k in range(1, self.most + 1)]
        if self._reference is not None:
            low, high = self.bounds()
            found = [v for v in found if low <= v <= high]
        return [v for v in found if 0 < v < math.inf]


def _check(**numbers: float | None) -> None:
    for name, number in numbers.items():
        if number is not None and not (number >= 0 and math.isfinite(number)):
            raise ValueError(f"{name} is {number}, but must be a finite number that is not negative")


def as_damping(damping: float | Damping | None) -> Damping:
    """Return the rule for the ``damping`` argument of the optimizer.

    None: lambda is chosen by the loss; a number: lambda of the first step, which then follows rho; or a rule.
    """
    if isinstance(damping, Damping):
        return damping
    if damping == 0:
        return FixedDamping(0.0)
    return KrylovDamping() if damping is None else LevenbergMarquardt(damping)


@dataclass
class AverageRatio(LevenbergMarquardt):
    """Levenberg-Marquardt on the average of rho over steps: ``m <- s m + (1 - s) rho``, rho being cut to [-1, 2].

    lambda is multiplied by ``increase`` if ``m < low`` and by ``decrease`` if ``m > high``. A rejected step, or one
    whose rho is NaN, counts as rho = -1, so one bad batch changes lambda only by a few small factors. Several in a row
    are not due to bad batches: from the second one on, each multiplies lambda by ``rejected``.
    The thresholds are lower than for a rho measured on the step's own batch, because they are meant for another batch:
    if the noise of the gradient is as large as the gradient, half of a step is lost on other data.

    Args:
        smoothing: s, the weight of earlier steps; the average extends over ``1 / (1 - s)`` steps.

    The other arguments are those of :class:`hfopt.LevenbergMarquardt`.

    Raises:
        ValueError: a ``smoothing`` outside [0, 1).
    """

    increase: float = 1.1
    decrease: float = 1 / 1.1
    low: float = 0.0
    high: float = 0.3
    smoothing: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing is {self.smoothing}, but must be at least 0 and below 1")
        self._average, self._refused = 0.5 * (self.low + self.high), 0.0

    def update(self, rho: float, accepted: bool) -> None:
        """Follow the average of rho as the class describes."""
        self._refused = 0.0 if accepted else self._refused + 1.0
        seen = min(max(rho, -1.0), 2.0) if accepted and math.isfinite(rho) else -1.0
        self._average = self.smoothing * self._average + (1 - self.smoothing) * seen
        super().update(self._average, self._refused < 2.0)

    def state_dict(self) -> dict[str, float | None]:
        """Return lambda, the reference of its bounds, the average, and the number of consecutive rejected steps."""
        return {**super().state_dict(), "average": self._average, "refused": self._refused}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        """Restore :meth:`state_dict`; the average starts again if the saved rule had none."""
        super().load_state_dict(state)
        average, refused = state.get("average"), state.get("refused")
        self._average = 0.5 * (self.low + self.high) if average is None else average
        self._refused = refused or 0.0
