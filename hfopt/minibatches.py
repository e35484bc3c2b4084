"""Training on minibatches: short solves that carry momentum, and a lambda that no single batch decides on.

On small batches the minimum of a batch's own quadratic is not what is wanted. A few iterations of conjugate gradients,
begun at the decayed solution of the last step, go from there towards it and no further: what earlier batches agreed on
stays in the start, as in the velocity of Nesterov's method, and each batch adds its correction, along its steepest and
most curved directions first. The gradient of the quadratic at the start is Nesterov's look-ahead gradient to first
order (Sutskever, Martens, Dahl & Hinton, "On the importance of initialization and momentum in deep learning", ICML
2013, section 5). As the loss of one batch says little, a step is taken as a whole unless it did great harm, and
lambda follows the average of the reduction ratio over many steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from hfopt.cg import CG
from hfopt.damping import LevenbergMarquardt
from hfopt.linesearch import LineSearch, LineSearchResult
from hfopt.optimizer import HessianFree


@dataclass
class FullStep(LineSearch):
    """The full step or none: none if the loss rises by much, or if this batch asks for a step out of all proportion.

    With ``s = |g'p|``, twice the decrease that the model promises or so, and its average m over the steps before::

        taken:   f(theta + p) <= f(theta) + rise |f(theta)|   and   s <= outlier m
        m <- 0.9 m + 0.1 min(s, outlier m)

    so that one batch with broken targets or inputs moves nothing, and a real change of scale is followed in some steps.

    Args:
        rise: how much the loss may rise, as a share of itself; as batches differ, some rise is no sign of a bad step.
        outlier: how many times the usual ``|g'p|`` is still believed.

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
        """1 or 0, without another evaluation; ``slope`` is ``g'p``."""
        size, usual = abs(slope), self._usual
        bound = math.inf if usual is None else self.outlier * usual
        taken = size <= bound and full <= f0 + self.rise * abs(f0) and math.isfinite(full)
        if math.isfinite(size) and (usual is not None or taken):
            self._usual = size if usual is None else 0.9 * usual + 0.1 * min(size, bound)
        return LineSearchResult(1.0, full, 1) if taken else LineSearchResult(0.0, f0, 1)

    def state_dict(self) -> dict[str, float | None]:
        """The usual ``|g'p|``."""
        return {"usual": self._usual}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        """Restore :meth:`state_dict`; that of another line search begins anew."""
        self._usual = state.get("usual")


@dataclass
class AverageRatio(LevenbergMarquardt):
    """Levenberg-Marquardt on the average of rho over steps: ``m <- s m + (1 - s) rho``, rho being cut to [-1, 2].

    lambda is multiplied by ``increase`` if ``m < low`` and by ``decrease`` if ``m > high``. A step that was not taken,
    or whose rho is not a number, counts as rho = -1: one bad batch moves lambda by no more than a few small factors.
    Several in a row are no matter of batches: from the second one on, each multiplies lambda by ``rejected``.
    The thresholds are lower than those for a rho of the batch that the step was made for, as they are meant for one of
    another batch: where the gradient's noise is as large as the gradient, half of a step is lost on other data.

    Args:
        smoothing: s, the weight of what was before: ``1 / (1 - s)`` steps decide.

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
        """See the class."""
        self._refused = 0.0 if accepted else self._refused + 1.0
        seen = min(max(rho, -1.0), 2.0) if accepted and math.isfinite(rho) else -1.0
        self._average = self.smoothing * self._average + (1 - self.smoothing) * seen
        super().update(self._average, self._refused < 2.0)

    def state_dict(self) -> dict[str, float | None]:
        """lambda, the reference of its bounds, the average, and how many steps in a row were not taken."""
        return {**super().state_dict(), "average": self._average, "refused": self._refused}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        """Restore :meth:`state_dict`; that of a rule without an average begins it anew."""
        super().load_state_dict(state)
        average, refused = state.get("average"), state.get("refused")
        self._average = 0.5 * (self.low + self.high) if average is None else average
        self._refused = refused or 0.0


@dataclass(frozen=True)
class RisingDecay:
    """A schedule for CG's start, ``1 - decay`` falling by the same factor at every step from ``first`` to ``last``.

        decay(t) = 1 - (1 - first) ((1 - last) / (1 - first))^min(t / steps, 1)

    Momentum is raised late in training, where fine structure is left to learn (Sutskever et al. 2013, sections 3 and
    5). It depends on the number of the step alone, so that there is no state to save.

    Raises:
        ValueError: unless ``0 <= first <= last < 1`` and ``steps >= 1``.
    """

    first: float = 0.5
    last: float = 0.95
    steps: int = 1000

    def __post_init__(self) -> None:
        if not (0 <= self.first <= self.last < 1 and self.steps >= 1):
            raise ValueError(
                f"need 0 <= first <= last < 1 and steps >= 1, but they are {self.first}, {self.last}, {self.steps}"
            )

    def __call__(self, t: int) -> float:
        """The decay after t steps."""
        share = min(t / self.steps, 1.0)
        return float(1 - (1 - self.first) * ((1 - self.last) / (1 - self.first)) ** share)


def for_minibatches(
    params: Iterable[Any],
    lr: float = 1.0,
    *,
    iterations: int = 10,
    decay: float | Callable[[int], float] = 0.5,
    **options: Any,
) -> HessianFree:
    """A :class:`hfopt.HessianFree` for minibatches: short solves with momentum, full steps, and a slow lambda.

    A second batch may judge its steps, ``step(closure, evaluation=closure_of_another_batch)``: it guards against bad
    batches and against fitting one batch too well, and costs progress where neither is a danger. docs/minibatches.md
    has sizes and measurements.

    Args:
        params, lr: as for :class:`hfopt.HessianFree`.
        iterations: of conjugate gradients in every step.
        decay: of the last solution, where a solve begins: what momentum is to other optimizers. A number, or a schedule
            such as :class:`RisingDecay`.
        options: any other argument of :class:`hfopt.HessianFree`, in place of what is chosen here: ``cg``,
            ``damping`` (:class:`AverageRatio`), ``line_search`` (:class:`FullStep`), ``backtracking`` (``"none"``).
    """
    chosen: dict[str, Any] = {
        "cg": CG(max_iterations=iterations, decay=decay, tolerance=0.0),
        "damping": AverageRatio(),
        "line_search": FullStep(),
        "backtracking": "none",
    }
    return HessianFree(params, lr, **(chosen | options))
