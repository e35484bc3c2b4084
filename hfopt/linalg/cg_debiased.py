"""Conjugate gradients with directions from one batch and step lengths from another.

The quadratic of a batch is biased along the directions that conjugate gradients find in it: this batch happens to be
steep or curved there, so slope and curvature along them differ from those on new data. A second batch, on which the
directions do not depend, has no such bias. Let ``d_0, d_1, ...`` be the directions for ``A x = b``, of the first batch
and damped as usual, and ``B``, ``c`` the same for the second one. The step along each direction goes to the minimum of
the second quadratic along it,

    x_{i+1} = x_i + a_i d_i,     a_i = (c - B x_i)'d_i / d_i'B d_i      slopes at the iterate
                                 a_i = (c - B x_0)'d_i / d_i'B d_i      slopes at the start

If both batches are the same, the directions are conjugate in B, and both forms are CG's iterates. Otherwise the
directions are not conjugate in B. The steps of the second form ignore each other, so their sum overshoots, increasingly
with every direction; those of the first form cannot increase the second quadratic.

Source: Tatzel, Mucsanyi, Hackel & Hennig, "Debiasing mini-batch quadratics for applications in deep learning",
arXiv:2410.14325, 2024, for directions of one batch and slopes and curvatures of another.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hfopt.linalg.cg_host import HostCG
from hfopt.linalg.rules import StoppingRules
from hfopt.linalg.solution import CGCheck, LinearMap
from hfopt.linalg.vector import dot, norm

SLOPES = ("iterate", "start")


@dataclass(frozen=True)
class Quadratic:
    """``phi(x) = x'Bx/2 - c'x`` of the second batch: ``op`` is B (P, P), ``b`` is c (P,); ``slopes`` names the form."""

    op: LinearMap
    b: Tensor
    slopes: str = "iterate"

    def __post_init__(self) -> None:
        if self.slopes not in SLOPES:
            raise ValueError(f"slopes is {self.slopes!r}, but must be one of {', '.join(map(repr, SLOPES))}")


class DebiasedCG(HostCG):
    """One solve: ``r`` belongs to the first quadratic, ``x``, phi and everything that is kept to the second."""

    def __init__(
        self,
        options: StoppingRules,
        op: LinearMap,
        b: Tensor,
        second: Quadratic,
        x0: Tensor | None,
        preconditioner: Callable[[Tensor], Tensor] | None,
        regular: bool = False,
    ) -> None:
        super().__init__(options, op, b, x0, preconditioner, regular=regular)
        self.second, self.moved, self.turned = second, False, False
        self.product = torch.empty_like(b)
        self.first_x = self.x.clone()
        self.rest = second.b.clone()  # c - B x
        self.at: Tensor | None = None

    def prepare(self) -> None:
        """Compute the start of both quadratics."""
        if not self.from_zero:
            self.products += 1
            self.rest -= self.second.op.multiply(self.first_x, self.product)
        self.at = self.rest.clone() if self.second.slopes == "start" else None
        super().prepare()

    def along(self, d: Tensor, ad: Tensor, alpha: float) -> str | None:
        """Move by ``alpha d`` in the first quadratic, and as far as the second says in that one."""
        if self.turned:
            return "negative curvature"
        if self.history[-1] > max(0.0, self.history[0]):
            return "progress"
        self.products += 1
        bd = self.second.op.multiply(d, self.product)
        curvature, slope = dot(d, bd), dot(self.rest if self.at is None else self.at, d)
        if not (math.isfinite(curvature) and math.isfinite(slope)):
            return "not finite"
        if curvature == 0 or (curvature < 0 and self.moved):
            return "negative curvature"
        self.turned = curvature < 0  # as in the first quadratic, one such direction is taken where nothing else is
        length = slope / abs(curvature)
        self.moved = True
        self.x.add_(d, alpha=length)
        self.rest.add_(bd, alpha=-length)
        self.first_x.add_(d, alpha=alpha)
        self.r.add_(ad, alpha=-alpha)
        return None

    def residual_from_scratch(self) -> None:
        """Compute ``r = b - A x`` in both quadratics."""
        torch.sub(self.b, self.multiply(self.first_x), out=self.r)
        if self.moved:
            self.products += 1
            torch.sub(self.second.b, self.second.op.multiply(self.x, self.product), out=self.rest)

    def phi(self) -> float:
        """Return the second model's value."""
        return -0.5 * (dot(self.second.b, self.x) + dot(self.rest, self.x))

    def check(self, i: int) -> None:
        """Add a row to the table of checks."""
        self.checks.append(CGCheck(i, self.history[-1], norm(self.rest), norm(self.x)))

    def carries(self, i: int) -> bool:
        """Return False: phi of the second quadratic does not follow from the first."""
        return False
