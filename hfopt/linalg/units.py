"""A linear system in another unit, for right-hand sides whose squares leave the range of single precision.

Conjugate gradients multiply A, of the size of b or so, with directions of the size of b: in float32 that overflows from
1e19 on, and vanishes below 1e-22. With u a power of two, ``(A / u) x = b / u`` has the same x, and directions of the
size of one; no bit changes where nothing overflows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from hfopt.linalg.solution import Iterate, LinearMap, Solution

# Right-hand sides between 2^-40 and 2^40 are left alone: their squares have room enough.
_ROOM = 40


def unit_of(size: float, dtype: torch.dtype) -> float:
    """A power of two near ``size``; 1 where that, squared, is well within the range of ``dtype``."""
    if not (0 < size < math.inf) or dtype == torch.float64:
        return 1.0
    exponent = round(math.log2(size))
    return 2.0**exponent if abs(exponent) > _ROOM else 1.0


class InUnit:
    """``A / u``."""

    def __init__(self, base: LinearMap, unit: float) -> None:
        self.base, self.factor = base, 1 / unit

    def multiply(self, v: Tensor, out: Tensor | None = None) -> Tensor:
        """``A v / u``."""
        return self.base.multiply(v, out).mul_(self.factor)


def preconditioner_in_unit(m: Callable[[Tensor], Tensor] | None, unit: float) -> Callable[[Tensor], Tensor] | None:
    """``u M^-1``, the inverse of ``M / u``."""
    return None if m is None else lambda r: m(r) * unit


def from_unit(solution: Solution, unit: float) -> Solution:
    """The solution of ``(A / u) x = b / u`` as that of ``A x = b``."""
    return replace(
        solution,
        iterates=[Iterate(i.iteration, i.x, i.phi * unit) for i in solution.iterates],
        checks=[replace(c, model=c.model * unit, residual=c.residual * unit) for c in solution.checks],
        pairs=None if solution.pairs is None else (solution.pairs[0], solution.pairs[1] * unit),
    )
