"""A linear system's operator, and the records of a solve."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import Tensor


class LinearMap(Protocol):
    """Anything with a product: ``multiply(v, out)`` writes ``A v`` to ``out`` and returns it."""

    def multiply(self, v: Tensor, out: Tensor | None = None) -> Tensor:
        """Write ``A v`` to ``out`` and return it."""


@runtime_checkable
class Nested(Protocol):
    """A system that is made from another one, ``base``."""

    base: LinearMap


@runtime_checkable
class Recordable(Protocol):
    """A system that knows whether its products can be recorded as a CUDA graph."""

    def unrecordable(self) -> str | None:
        """Return why products cannot be recorded on the current stream, as far as known beforehand."""


@dataclass(frozen=True)
class CGCheck:
    """One line of the table of checks.

    Attributes:
        iteration: number of CG iterations done.
        model: ``phi`` there, damping included.
        residual: ``|b - A x|``, as the recurrence has it.
        norm: ``|x|``.
        evaluation: change of the loss on the evaluation data at this iterate, where backtracking has looked; else None.
    """

    iteration: int
    model: float
    residual: float
    norm: float
    evaluation: float | None = None


@dataclass(frozen=True)
class Iterate:
    """A stored iterate ``x (P,)`` after ``iteration`` iterations, with its ``phi``."""

    iteration: int
    x: Tensor
    phi: float


@dataclass
class Solution:
    """Result of a solve.

    Attributes:
        x: the last iterate, (P,).
        iterates: those kept for backtracking, the last one always among them.
        reason: ``"progress"``, ``"residual"``, ``"iterations"``, ``"negative curvature"``, ``"singular"`` (a curvature
            that is rounding error, as where b is not in the range of A), ``"not finite"`` or ``"stopped"``.
        iterations: number of CG iterations.
        products: number of products with A, on a CUDA device those included that were made before a check showed that
            the solve had ended.
        checks: one row every ``check_every`` iterations and for the last.
        pairs: if directions were asked for, ``S`` and ``A S``, both (m, P): a start that is not zero, the first
            directions, and the last iterate if there were more.
    """

    x: Tensor
    iterates: list[Iterate]
    reason: str
    iterations: int
    products: int
    checks: list[CGCheck] = field(default_factory=list)
    pairs: tuple[Tensor, Tensor] | None = None
