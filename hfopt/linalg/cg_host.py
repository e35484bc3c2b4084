"""Conjugate gradients with host synchronisation in every iteration: on the CPU, where reading a number is free."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hfopt.linalg.rules import GROWTH, StoppingRules, after_product, before_product, lost, shallow
from hfopt.linalg.solution import CGCheck, Iterate, LinearMap, Solution
from hfopt.linalg.vector import dot, norm


class HostCG:
    """One solve where reading numbers is free; its vectors are allocated once and updated in place."""

    def __init__(
        self,
        options: StoppingRules,
        op: LinearMap,
        b: Tensor,
        x0: Tensor | None,
        preconditioner: Callable[[Tensor], Tensor] | None,
        directions: int = 0,
        augment: Tensor | None = None,
        exact: bool = False,
        regular: bool = False,
    ) -> None:
        self.o, self.op, self.b, self.precondition = options, op, b, preconditioner
        self.residuals: list[float] | None = [] if exact else None  # one per iteration, if the progress rule waits
        self.regular = regular  # A is known to be positive definite: little curvature is no sign of a null space
        self.stored = options.stored_iterations()
        self.products = 0
        self.scratch = torch.empty_like(b)
        self.x = torch.zeros_like(b) if x0 is None else x0.clone()
        self.from_zero = x0 is None or not bool(x0.any())
        self.augment = augment
        self.r = b.clone()
        self.directions = directions
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.warm = 0  # how many of the pairs come from the start
        self.u: Tensor | None = None
        self.au = b
        self.kept: list[Iterate] = []
        self.checks: list[CGCheck] = []
        self.history: list[float] = []
        self.carried = False  # whether the last phi is the one before, carried along
        self.floor = 0.0  # of d'Ad / d'Md, a share of the largest one so far: flatter directions are looked at
        self.inverse_rz = 0.0  # the sum of 1 / r'z over the iterations

    def prepare(self) -> None:
        """Compute residual and model at the start; apart from the constructor, since it calls what others override."""
        if not self.from_zero:
            self.residual_from_scratch()
            if self.directions:
                self.pairs.append((self.x.clone(), self.b - self.r))
        if self.augment is not None:
            self.start_along(self.augment)
        self.warm = len(self.pairs)
        self.history = [self.phi()]

    def start_along(self, u: Tensor) -> None:
        """Begin at the minimum of phi along u, which is scaled to ``u'Au = 1``."""
        au = self.multiply(u)
        curvature = dot(u, au)
        # Less than that is rounding: of directions in A's null space nothing is known.
        if not 8 * torch.finfo(u.dtype).eps * norm(u) * norm(au) < curvature < math.inf:
            return
        self.u, self.au = u * curvature**-0.5, au * curvature**-0.5
        if self.directions:
            self.pairs.append((self.u, self.au))
        self.correct()

    def correct(self) -> None:
        """Move to the minimum along u, to correct rounding errors."""
        if self.u is not None:
            length = dot(self.u, self.r)
            self.x.add_(self.u, alpha=length)
            self.r.add_(self.au, alpha=-length)

    def conjugate(self, d: Tensor, z: Tensor) -> None:
        """Remove the component of d that makes z not conjugate to u."""
        if self.u is not None:
            d.add_(self.u, alpha=-dot(z, self.au))

    def multiply(self, v: Tensor) -> Tensor:
        """Compute ``A v`` in ``scratch``."""
        self.products += 1
        return self.op.multiply(v, self.scratch)

    def along(self, d: Tensor, ad: Tensor, alpha: float) -> str | None:
        """Move by ``alpha d``, given ``A d``; return a reason not to, if there is one."""
        self.x.add_(d, alpha=alpha)
        self.r.add_(ad, alpha=-alpha)
        return None

    def residual_from_scratch(self) -> None:
        """Compute ``r = b - A x``."""
        torch.sub(self.b, self.multiply(self.x), out=self.r)

    def phi(self) -> float:
        """Return ``-(b + r)'x / 2``: the model's value without another product.

        Between the iterates that are kept or shown, phi is carried along by ``-alpha r'z / 2``, which costs nothing:
        on wide networks inner products over (P,) would be a large part of a solve.
        """
        return -0.5 * (dot(self.b, self.x) + dot(self.r, self.x))

    def curved(self, curvature: float, rz: float, residual: float, ad: Tensor) -> str | None:
        """Return the reason to make no move along d, given ``d'A d``, ``r'z`` and ``|r|``.

        As ``d_k = r_k'z_k sum_j z_j / r_j'z_j`` over the iterations j up to k, ``d_k'M d_k`` is
        ``(r_k'z_k)^2 sum_j 1 / r_j'z_j``.
        """
        self.inverse_rz += 1 / rz
        dmd = rz * rz * self.inverse_rz
        least = self.floor * dmd
        if 0 < curvature <= least:
            grows = 0.0 if self.regular else min(least, rz * norm(ad) / (GROWTH * residual))
            least = max(grows, least * lost(self.b.dtype))
        reason = after_product(curvature, least)
        if reason is None:
            self.floor = max(self.floor, shallow(self.b.dtype) * curvature / dmd)
        return reason

    def carries(self, i: int) -> bool:
        """Return whether phi after ``i`` iterations follows from its previous value."""
        o = self.o
        repaired = o.repair_every and i % o.repair_every == 0
        return not repaired and i not in self.stored and i % o.check_every != 0

    def check(self, i: int) -> None:
        """Add a row to the table of checks."""
        self.checks.append(CGCheck(i, self.history[-1], norm(self.r), norm(self.x)))

    def keep(self, i: int) -> None:
        """Keep the iterate for backtracking."""
        if not self.kept or self.kept[-1].iteration != i:
            self.kept.append(Iterate(i, self.x.clone(), self.history[-1]))

    def done(self, reason: str, i: int) -> Solution:
        """Return the solution at the present iterate."""
        if self.carried:
            self.history[-1], self.carried = self.phi(), False
        self.keep(i)
        if not self.checks or self.checks[-1].iteration != i:
            self.check(i)
        return Solution(self.x, self.kept, reason, i, self.products, self.checks, self.seen(i))

    def seen(self, i: int) -> tuple[Tensor, Tensor] | None:
        """Return ``S`` and ``A S`` after ``i`` iterations, without later products."""
        if not self.directions:
            return None
        del self.pairs[self.warm + i :]
        if i > self.directions:
            self.pairs.append((self.x, self.b - self.r))
        if not self.pairs:
            return self.b.new_empty(0, len(self.b)), self.b.new_empty(0, len(self.b))
        s, a = (list(found) for found in zip(*self.pairs, strict=True))
        self.pairs.clear()  # one copy of each at a time
        first = torch.stack(s)
        s.clear()
        return self.unmixed(first, torch.stack(a))

    def unmixed(self, s: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        """Return the same space in directions orthogonal to u; conjugate ones can consist almost entirely of u.

        Where u has little curvature, they would be taken for dependent ones.
        """
        if self.u is not None and self.warm:
            share = s[1:] @ self.u / norm(self.u) ** 2
            s[1:].addr_(share, self.u, alpha=-1.0)
            a[1:].addr_(share, self.au, alpha=-1.0)
        return s, a

    def iterate(self, size_b: float, stop: Callable[[int, Tensor, float], bool] | None) -> Solution:
        """Solve, with ``size_b = |b|``; ``stop`` is asked at checks."""
        o, stored = self.o, self.stored
        self.prepare()
        if self.history[0] != 0.0 and math.isfinite(self.history[0]):
            self.keep(0)
        z = self.r if self.precondition is None else self.precondition(self.r)
        d = z.clone()
        self.conjugate(d, z)
        rz = dot(self.r, z)
        for i in range(o.max_iterations + 1):
            residual = rz**0.5 if self.precondition is None and rz >= 0 else norm(self.r)
            if self.residuals is not None:
                self.residuals.append(residual)
            if (reason := before_product(rz, residual, o.residual * size_b)) is not None:
                return self.end(reason, i)
            if i == o.max_iterations:
                return self.done("iterations", i)
            ad = self.multiply(d)
            if i < self.directions:
                self.pairs.append((d.clone(), ad.clone()))
            curvature = dot(d, ad)
            if (reason := self.curved(curvature, rz, residual, ad)) is not None:
                if i == 0 and curvature < 0:
                    # The model has no minimum along its first direction: go as far as the absolute curvature says.
                    self.along(d, ad, rz / -curvature)
                    self.history.append(self.phi())
                    return self.done(reason, 1)
                return self.end(reason, i)
            alpha = rz / curvature
            if (reason := self.along(d, ad, alpha)) is not None:
                return self.end(reason, i)
            self.correct()
            if o.repair_every and (i + 1) % o.repair_every == 0:
                self.residual_from_scratch()
                self.correct()
            self.carried = self.carries(i + 1)
            self.history.append(self.history[-1] - 0.5 * alpha * rz if self.carried else self.phi())
            if i + 1 in stored:
                self.keep(i + 1)
            if (i + 1) % o.check_every == 0:
                self.check(i + 1)
                if stop is not None and stop(i + 1, self.x, self.history[-1]):
                    return self.done("stopped", i + 1)
            if o.progress_is_little(self.history, self.residuals):
                return self.done("progress", i + 1)
            z = self.r if self.precondition is None else self.precondition(self.r)
            rz, old = dot(self.r, z), rz
            torch.add(z, d, alpha=rz / old, out=d)
            self.conjugate(d, z)
        raise AssertionError("unreachable")

    def end(self, reason: str, i: int) -> Solution:
        """End after ``i`` iterations, at the present iterate or, if that is not finite, at an earlier one."""
        return self.back_off(reason, i) if reason == "not finite" else self.done(reason, i)

    def back_off(self, reason: str, i: int) -> Solution:
        """End at the last iterate that was stored while all was finite."""
        if math.isfinite(self.history[-1]) and bool(torch.isfinite(self.x).all()):
            return self.done(reason, i)
        last = self.kept[-1] if self.kept else Iterate(0, torch.zeros_like(self.b), 0.0)
        self.kept = self.kept or [last]
        return Solution(last.x, self.kept, reason, i, self.products, self.checks)
