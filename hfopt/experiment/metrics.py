"""Metrics: what tests report besides the loss, under a name, with a unit, and averaged over cases."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

from hfopt.errors import logger

if TYPE_CHECKING:
    from torch import Tensor

ERROR_RATE = "error_rate"
"""The column of the default metric: the share of wrong cases, or the mean of the errors that the problem measures."""
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9 _./%()-]{0,39}")


@dataclass(frozen=True)
class Metric:
    """A number that a test reports: ``finish(sum over cases / number of cases)``, over all test batches together.

    The average is a micro-average: sums and counts of the batches are added up before they are divided, so that a
    batch of two cases weighs twice a batch of one. Perplexity, for example, is
    ``Metric("perplexity", nats, finish=math.exp)`` with the cross-entropy of every symbol as ``nats``.

    Args:
        name: what the metric is called; the name of its column in run.h5.
        measure: a function of (outputs, batch): the values of the cases ``(N,)``, or a pair (sum, count).
        unit: ``"%"`` for shares, which are shown times 100; otherwise what stands behind the number, such as "nats".
        better: whether "lower" or "higher" values are better.
        finish: applied to the average; default none.
        column: of the tables in run.h5 and of `SavedRun.steps`; default the name.

    Raises:
        ValueError: a name that cannot name a column, or another direction.
    """

    name: str
    measure: Callable[[Tensor, Any], Any] | None = field(default=None, compare=False, repr=False)
    unit: str = ""
    better: Literal["lower", "higher"] = "lower"
    finish: Callable[[float], float] | None = field(default=None, compare=False, repr=False)
    column: str = ""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(
                f"a metric is called {self.name!r}; its name begins with a letter and has at most 40 letters, digits, "
                "spaces or _./%()-"
            )
        if self.better not in ("lower", "higher"):
            raise ValueError(f"better={self.better!r} of the metric {self.name!r}: choose 'lower' or 'higher'")
        if not self.column:
            object.__setattr__(self, "column", self.name)

    def describe(self) -> dict[str, str]:
        """What the run's file says about it."""
        return {"name": self.name, "unit": self.unit, "better": self.better, "column": self.column}

    # -- values -----------------------------------------------------------------------------------------

    def parts(self, outputs: Tensor, batch: Any) -> tuple[float, float]:
        """The sum over the cases of one batch, and their number.

        Raises TypeError if `measure` returned neither values of cases nor a pair.
        """
        assert self.measure is not None
        found = self.measure(outputs, batch)
        if _of_cases(found):
            return float(found.double().sum()), float(found.numel())
        if isinstance(found, tuple) and len(found) == 2:
            return float(found[0]), float(found[1])
        raise TypeError(
            f"the metric {self.name!r} measured {type(found).__name__}; return the values of the cases, a tensor of "
            "shape (N,), or a pair (sum, count)"
        )

    def value(self, total: float, count: float) -> float:
        """The metric of a whole test; nan if it had no case."""
        if count == 0:
            return math.nan
        average = total / count
        return average if self.finish is None else float(self.finish(average))

    def reaches(self, value: float, threshold: float) -> bool:
        """Whether a value is better than a threshold; nan never is."""
        return value > threshold if self.better == "higher" else value < threshold

    def rank(self, value: float) -> float:
        """A number that is lower for better values, and last for nan."""
        return math.inf if math.isnan(value) else -value if self.better == "higher" else value

    # -- words ------------------------------------------------------------------------------------------

    @property
    def counted(self) -> bool:
        """Whether this is the share of wrong cases."""
        return self.column == ERROR_RATE and self.unit == "%"

    @property
    def title(self) -> str:
        """For columns and axes."""
        if self.counted:
            return "wrong %"
        return f"{self.name} {self.unit}" if self.unit else self.name

    @property
    def factor(self) -> float:
        """What a value is multiplied by where `title` stands over it."""
        return 100.0 if self.unit == "%" else 1.0

    def number(self, value: float) -> str:
        """A value below `title`; empty if it is absent."""
        if math.isnan(value):
            return ""
        return f"{100 * value:.2f}" if self.unit == "%" else f"{value:.4g}"

    def quantity(self, value: float, digits: int = 2) -> str:
        """A value by itself: with its unit, if it has one."""
        if self.unit == "%":
            return f"{100 * value:.{digits}f}%"
        return f"{value:.{digits + 2}g}{' ' * bool(self.unit)}{self.unit}"

    def sentence(self, value: float) -> str:
        """What the last test said."""
        if self.counted:
            return f"{self.quantity(value)} of the test cases are wrong"
        per_case = " per test case" if self.column == ERROR_RATE else ""
        return f"{self.name} {self.quantity(value)}{per_case}"

    def bound(self, threshold: float) -> str:
        """What a run has to get below, or above."""
        if self.counted:
            return f"{100 * threshold:g}% wrong"
        number = f"{100 * threshold:g}%" if self.unit == "%" else f"{threshold:g}{' ' * bool(self.unit)}{self.unit}"
        return f"{self.name} {number}"


def default_metric(problem: Any) -> Metric | None:
    """The metric of a problem's `errors`, else of its `zero_one_loss`; None if it has neither."""
    if hasattr(problem, "errors"):
        return Metric(
            str(getattr(problem, "error_name", "error")), lambda z, b: problem.errors(z, b).flatten(), column=ERROR_RATE
        )
    if not hasattr(problem, "zero_one_loss"):
        return None
    told: list[bool] = []
    cases: Callable[[Any], int] = getattr(problem, "cases", problem.size)

    def wrong(outputs: Tensor, batch: Any) -> Tensor | tuple[float, float]:
        found: Any = problem.zero_one_loss(outputs, batch)
        if _of_cases(found):  # which cases are wrong
            return found
        count, of = float(found), float(cases(batch))
        if count > of:
            if not told:
                logger.warning(
                    "zero_one_loss counts %g wrong cases in a batch that has %g by %s(batch), so all are taken for "
                    "wrong; let the data object's cases(batch) return how many there are",
                    count,
                    of,
                    "cases" if hasattr(problem, "cases") else "size",
                )
                told.append(True)
            of = count
        return count, of

    return Metric("error rate", wrong, unit="%", column=ERROR_RATE)


def metrics_of(problem: Any, more: Iterable[Metric] = ()) -> list[Metric]:
    """All metrics of an experiment: the default one, the problem's own, those given; the first judges the run.

    Raises ValueError for two metrics of one name, and if there is none at all.
    """
    first = default_metric(problem)
    found = [*([] if first is None else [first]), *getattr(problem, "metrics", ()), *more]
    columns = [metric.column for metric in found]
    twice = sorted({column for column in columns if columns.count(column) > 1})
    if twice:
        raise ValueError(f"two metrics are called {' and '.join(map(repr, twice))}; give them different names")
    if not found:
        raise ValueError("no metric is there: give the data object zero_one_loss, errors or metrics, or HF metrics=")
    return found


def metrics_in(configuration: Mapping[str, Any]) -> list[Metric]:
    """The metrics of a recorded run, without their functions."""
    recorded = configuration.get("metrics")
    if recorded:
        return [Metric(m["name"], unit=m["unit"], better=m["better"], column=m["column"]) for m in recorded]
    # Format 1 had a single one, and named it only where it was measured.
    name = configuration.get("problem", {}).get("error_name")
    return [Metric("error rate", unit="%", column=ERROR_RATE) if name is None else Metric(str(name), column=ERROR_RATE)]


def _of_cases(found: Any) -> TypeGuard[Tensor]:
    """Whether it is a tensor of a value per case; lists of runs are shown without waiting for torch."""
    from torch import Tensor

    return isinstance(found, Tensor) and found.dim() == 1
