"""Derivatives against finite differences, at step lengths and tolerances that follow from the numbers themselves.

Along a direction d, quotients of differences are taken at lengths h that fall by factors of four about ``eps^(1/3)``,
where truncation and rounding of a central difference balance. How far a quotient can be trusted is seen from the next
one: with ``q(h)`` the central quotient less what the derivative predicts, and ``j(h)`` the forward less the backward
quotient,

    error = |q(h) - q(h/4)| + |4 j(h/4) - j(h)| / 3 + rounding.

The first is truncation, which falls as h^2; the second vanishes with h where the function is smooth, and is the change
of slope where it has a kink at the point itself, at which autograd's derivative is one of many. A derivative is wrong
if it misses by five times that, and undecided if the error is not small.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from hfopt.linalg.vector import ParameterVector, dot, norm

_RATIO = 4.0
_LENGTHS = (8.0, 2.0, 0.5, 0.125)


@dataclass(frozen=True)
class Rung:
    """Differences at one length: ``quotient`` found, ``predicted`` by the derivative, ``jump``, a bound of rounding."""

    quotient: float
    predicted: float
    jump: float
    rounding: float


@dataclass(frozen=True)
class Verdict:
    """Differences against a derivative: ``quotient`` and ``predicted`` at the length where ``error`` is least."""

    quotient: float
    predicted: float
    error: float
    tolerance: float

    @property
    def wrong(self) -> bool:
        """The derivative is beyond any doubt another."""
        return abs(self.quotient - self.predicted) > 5 * self.error + self.tolerance

    @property
    def right(self) -> bool:
        """It agrees, and differences were exact enough to tell."""
        return not self.wrong and self.error <= 0.1 * max(abs(self.quotient), abs(self.predicted))


def lengths(eps: float) -> list[float]:
    """The lengths h, falling, for arithmetic of precision ``eps``."""
    return [eps ** (1 / 3) * x for x in _LENGTHS]


def judge(rungs: Sequence[Rung], eps: float) -> Verdict:
    """The verdict of a ladder of differences."""
    best = Verdict(math.nan, math.nan, math.inf, 0.0)
    for wide, narrow in pairwise(rungs):
        truncation = abs((wide.quotient - wide.predicted) - (narrow.quotient - narrow.predicted))
        kink = abs(_RATIO * narrow.jump - wide.jump) / (_RATIO - 1)
        error = truncation + kink + narrow.rounding
        if error < best.error:  # not for NaN
            scale = max(abs(narrow.quotient), abs(narrow.predicted))
            best = Verdict(narrow.quotient, narrow.predicted, error, max(1e-3, 8 * eps) * scale)
    return best


class Directions:
    """Random directions (P,), the same in all processes and runs.

    Every tensor is moved by about its own size, so that h is a relative change. Coordinates without a gradient are left
    where they are: among them is the row of an embedding's ``padding_idx``, whose gradient is zero by definition.
    """

    def __init__(self, vector: ParameterVector, theta: Tensor, gradient: Tensor, seed: int) -> None:
        self._vector, self._theta, self._gradient = vector, theta, gradient
        self._draws = torch.Generator().manual_seed(seed)
        pieces = vector.views(theta)
        whole = norm(theta) / max(1, vector.size) ** 0.5 or 1.0
        sizes = [(norm(p.reshape(-1)) / p.numel() ** 0.5 if p.numel() else 0.0) or whole for p in pieces]
        self._scale = torch.cat([torch.full_like(p, s).reshape(-1) for p, s in zip(pieces, sizes, strict=True)])

    def _drawn(self) -> Tensor:
        draws = torch.randn(self._vector.size, generator=self._draws, dtype=torch.float64)
        return draws.to(self._scale) * self._scale

    def random(self) -> Tensor:
        """All coordinates that have a gradient."""
        return self._drawn().masked_fill_(self._gradient == 0, 0.0)

    def aligned(self) -> Tensor:
        """Uphill in every coordinate, so that the change stands out from rounding as far as it can."""
        return self._drawn().abs() * self._gradient.sign()

    def relative(self) -> Tensor:
        """Zeros stay zero: a rectifier that gets exact zeros is not moved off its kink."""
        return torch.where(self._theta == 0, torch.zeros_like(self._theta), self.random())

    def within(self, still: Sequence[bool]) -> Tensor:
        """The tensors that are marked alone."""
        pieces = self._vector.views(self._drawn())
        return torch.cat([(p if s else p * 0).reshape(-1) for p, s in zip(pieces, still, strict=True)])


def around(vector: ParameterVector, saved: Sequence[Tensor], theta: Tensor, d: Tensor, h: float) -> Iterator[Tensor]:
    """Move to ``theta + h d``, then to ``theta - h d``; yields the displacement there, as the parameters hold it.

    Parameters of low precision cannot take any value, so that it is not quite ``h d``. Whoever asks for them puts the
    parameters back.
    """
    for sign in (1.0, -1.0):
        vector.move(saved, d, sign * h)
        yield vector.flatten(vector.params) - theta


def absolute(a: Tensor, b: Tensor) -> float:
    """``sum |a_i b_i|``, what the rounding of ``a'b`` is measured by."""
    return dot(a.abs(), b.abs())
