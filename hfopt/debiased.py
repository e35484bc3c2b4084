"""Conjugate gradients with directions from one batch and step lengths from another.

A batch's quadratic is biased along the directions that conjugate gradients find in it: they are those in which this
batch, of all batches, is steep and curved, so that slope and curvature along them are other than on new data. A second
batch did not choose the directions and is free of that. With directions ``d_i`` from ``A x = b``, of the first batch
and damped as usual, and ``B``, ``c`` the same of a second one,

    y = x_0 + sum_i  (c - B x_0)'d_i / d_i'B d_i  d_i,

the step along each direction to the minimum that the second quadratic has there, seen from x_0. Where both batches are
the same, the directions are conjugate in B, and y is CG's iterate.

Source: Tatzel, Mucsanyi, Hackel & Hennig, "Debiasing mini-batch quadratics for applications in deep learning",
arXiv:2410.14325, 2024.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hfopt.cg import CG, CGCheck, LinearMap, Run, Solution
from hfopt.vector import dot, norm


@dataclass(frozen=True)
class Quadratic:
    """``phi(x) = x'Bx/2 - c'x``: ``op`` is B (P, P), ``b`` is c (P,)."""

    op: LinearMap
    b: Tensor


def solve_debiased(
    options: CG,
    op: LinearMap,
    b: Tensor,
    second: Quadratic,
    x0: Tensor | None = None,
    preconditioner: Callable[[Tensor], Tensor] | None = None,
) -> Solution:
    """Directions by conjugate gradients for ``op x = b``, step lengths by ``second``; at two products an iteration.

    Iterates, their phi, residuals and norms are those of ``y`` in the second quadratic, and so is the progress that
    ends a solve: it ends where the second batch no longer gains. On a CUDA device the host follows every iteration,
    and none is recorded.

    Args:
        options: settings of the solver.
        op: A (P, P), symmetric.
        b: right-hand side (P,).
        second: the quadratic that step lengths are taken from.
        x0: start (P,); None: zero.
        preconditioner: of A, as for :meth:`hfopt.CG.solve`.

    Raises:
        ValueError: vectors of other shapes, a right-hand side that is not finite, or recording is required.
    """
    shapes = {tuple(v.shape) for v in (b, second.b, b if x0 is None else x0)}
    if b.dim() != 1 or len(shapes) != 1:
        raise ValueError(f"b, the second b and x0 must be flat and of one shape, but they have shapes {sorted(shapes)}")
    size_b = norm(b)
    if not (math.isfinite(size_b) and math.isfinite(norm(second.b))):
        raise ValueError("a right-hand side is not finite")
    if options.cuda_graphs is True:
        raise ValueError("cuda_graphs is True, but a solve with two batches cannot be recorded; leave it at 'auto'")
    return DebiasedRun(options, op, b, second, x0, preconditioner).iterate(size_b, None)


class DebiasedRun(Run):
    """One solve: ``r`` belongs to the first quadratic, ``x``, phi and everything that is kept to the second."""

    def __init__(
        self,
        options: CG,
        op: LinearMap,
        b: Tensor,
        second: Quadratic,
        x0: Tensor | None,
        preconditioner: Callable[[Tensor], Tensor] | None,
    ) -> None:
        self.second, self.moved = second, False
        self.product = torch.empty_like(b)
        self.first_x = torch.zeros_like(b) if x0 is None else x0.clone()
        self.slope = second.b.clone()  # c - B x0
        self.start_products = 0
        if x0 is not None and bool(x0.any()):
            self.slope -= second.op.multiply(x0, self.product)
            self.start_products = 1
        self.rest = self.slope.clone()  # c - B x
        self.turned = False
        super().__init__(options, op, b, x0, preconditioner)
        self.products += self.start_products

    def along(self, d: Tensor, ad: Tensor, alpha: float) -> str | None:
        """Move by ``alpha d`` in the first quadratic, and as far as the second says in that one."""
        if self.turned:
            return "negative curvature"
        self.products += 1
        bd = self.second.op.multiply(d, self.product)
        curvature, slope = dot(d, bd), dot(self.slope, d)
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
        """``r = b - A x`` in both quadratics."""
        torch.sub(self.b, self.multiply(self.first_x), out=self.r)
        if self.moved:
            self.products += 1
            torch.sub(self.second.b, self.second.op.multiply(self.x, self.product), out=self.rest)

    def phi(self) -> float:
        """The second model's value."""
        return -0.5 * (dot(self.second.b, self.x) + dot(self.rest, self.x))

    def check(self, i: int) -> None:
        """Add a row to the table of checks."""
        self.checks.append(CGCheck(i, self.history[-1], norm(self.rest), norm(self.x)))

    def carries(self, i: int) -> bool:
        """Phi is not carried along by what is known of the first quadratic."""
        return False
