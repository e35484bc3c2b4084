"""Ways to fewer products that were tried and are no part of the package, and all that are compared."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hfopt import CG, HessianFree, KrylovDamping, LevenbergMarquardt
from hfopt.linalg.cg_debiased import Quadratic
from hfopt.linalg.cg_host import HostCG
from hfopt.linalg.krylov import DampingPath
from hfopt.linalg.operators import Operator
from hfopt.linalg.solution import LinearMap, Solution
from hfopt.linalg.vector import dot, norm
from hfopt.preconditioners import Preconditioner
from hfopt.preconditioners.base import System


class _FromScaledStart(HostCG):
    """A solve whose start is scaled before the first iteration."""

    def prepare(self) -> None:
        """See :meth:`HostCG.prepare`."""
        super().prepare()
        if not self.from_zero:
            product = self.b - self.r
            curvature = dot(self.x, product)
            c = max(dot(self.b, self.x) / curvature, 0.0) if curvature > 0 else 0.0
            self.x.mul_(c)
            torch.sub(self.b, product, alpha=c, out=self.r)
            self.history = [self.phi()]


class ScaledStart(CG):
    """Starts at ``c x``, x the last solution, of least ``phi(c x)``: ``c = b'x / x'Ax``, at no further product."""

    def solve(
        self,
        op: LinearMap,
        b: Tensor,
        x0: Tensor | None = None,
        preconditioner: Callable[[Tensor], Tensor] | None = None,
        stop: Callable[[int, Tensor, float], bool] | None = None,
        directions: int = 0,
        augment: Tensor | None = None,
        second: Quadratic | None = None,
        damping: float | None = None,
    ) -> Solution:
        """See :meth:`hfopt.CG.solve`."""
        regular = damping is not None and damping > 0
        run = _FromScaledStart(self, op, b, x0, preconditioner, directions, regular=regular)
        return run.iterate(norm(b), stop)


class Window(CG):
    """The rate of decrease is compared with that of other than 5 iterations before, at least."""

    least = 5

    def window(self, i: int) -> int | None:
        """See :meth:`hfopt.CG.window`."""
        k = max(self.least, math.ceil(0.1 * i))
        return None if i <= k or i < self.min_iterations else k


def window(least: int, **options: Any) -> CG:
    """A solver with another window."""
    found = Window(**options)
    found.least = least
    return found


class Thin(CG):
    """Keeps, in place of all directions, the differences of the iterates that backtracking would look at."""

    def solve(
        self,
        op: LinearMap,
        b: Tensor,
        x0: Tensor | None = None,
        preconditioner: Callable[[Tensor], Tensor] | None = None,
        stop: Callable[[int, Tensor, float], bool] | None = None,
        directions: int = 0,
        augment: Tensor | None = None,
        second: Quadratic | None = None,
        damping: float | None = None,
    ) -> Solution:
        """See :meth:`hfopt.CG.solve`, from zero."""
        solution = super().solve(op, b, None, preconditioner, stop, directions, damping=damping)
        if solution.pairs is None or not len(solution.pairs[0]):
            return solution
        s, a = solution.pairs
        length = (s.double() @ b.double() / (s.double() * a.double()).sum(1)).to(s.dtype).unsqueeze(1)
        ends = [i for i in sorted(self.stored_iterations()) if i < len(s)]
        blocks = list(zip([0, *ends], [*ends, len(s)], strict=True))
        solution.pairs = (
            torch.stack([(s * length)[i:j].sum(0) for i, j in blocks]),
            torch.stack([(a * length)[i:j].sum(0) for i, j in blocks]),
        )
        return solution


class Continuous(LevenbergMarquardt):
    """``lambda *= max(1/5, 1 - (2 rho - 1)^3)``, at most 4 (Nielsen, IMM-REP-1999-05)."""

    def update(self, rho: float, accepted: bool) -> None:
        """See :meth:`hfopt.damping.Damping.update`."""
        if self.value is None:
            return
        factor = self.rejected if not accepted else self.increase
        if accepted and math.isfinite(rho):
            factor = min(4.0, max(0.2, 1 - (2 * rho - 1) ** 3)) if rho > 0 else 4.0
        self.value = self._clamped(self.value * factor)


class Ritz(Preconditioner):
    """The largest Ritz values and vectors of the last solve: ``M = U diag(t) U' + t_r (I - U U') + lambda``.

    Source: Gosselet, Rey and Pebrel, Int. J. Numer. Methods Eng. 2013, for the reuse; Nystrom's form of M.
    """

    watched = True

    def __init__(self, rank: int = 20, most: int = 100) -> None:
        self.rank, self.most = rank, most
        self._u: Tensor | None = None
        self._t: Tensor | None = None
        self._now = 0.0
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._system: System | None = None
        self._at = 0.0

    def refresh(self, op: Operator, step: int) -> None:
        """Take the space of the last solve."""
        if len(self._pairs) < 3:
            return
        s, a = (torch.stack(found) for found in zip(*self._pairs, strict=True))
        path = DampingPath(s, a, s[0], self._at)
        kept = path.values > 1e-6 * path.values.max()
        columns = path.columns[:, kept][:, -self.rank :]
        self._u = (columns.t().to(s) @ path.s).t().contiguous()
        self._t = path.values[kept][-self.rank :].to(s)

    def damp(self, damping: float, decay: float | Tensor) -> None:
        """The lambda of the next solve; weight decay is part of the values."""
        self._now = damping

    def apply(self, r: Tensor) -> Tensor:
        """``M^-1 r``, scaled by ``t_r + lambda``."""
        if self._u is None or self._t is None:
            return r.clone()
        share = (self._t[0] + self._now) / (self._t + self._now) - 1
        return r + self._u @ (share * (self._u.t() @ r))

    def watch(self, system: System) -> System:
        """``system``, noting its products."""
        self._pairs, self._system, self._at = [], system, self._now
        return self

    def multiply(self, v: Tensor, out: Tensor | None = None) -> Tensor:
        """``A v``, noted."""
        assert self._system is not None
        out = self._system.multiply(v, out)
        if len(self._pairs) < self.most:
            self._pairs.append((v.clone(), out.clone()))
        return out


@dataclass(frozen=True)
class Method:
    """Settings of the optimizer, made again for every run; ``before`` is called before every step."""

    name: str
    group: str
    cg: Callable[[], CG]
    damping: Callable[[], LevenbergMarquardt]
    options: dict[str, Callable[[], Any]] = field(default_factory=dict)
    before: Callable[[HessianFree], None] | None = None


def rising(optimizer: HessianFree) -> None:
    """A start that rises from 0.5 to 0.99 times the last solution over 50 steps."""
    optimizer.cg = replace(optimizer.cg, decay=min(0.99, 0.5 + 0.49 * optimizer.steps / 50))


OLD = "Martens 2010"
NEW = "default"


def martens(**options: Any) -> CG:
    """The solver of 2010."""
    return CG(**{"tolerance": 5e-4, "decay": 0.95, **options})


def _old(
    name: str, group: str, cg: Callable[[], CG] = martens, damping: Any = LevenbergMarquardt, **more: Any
) -> Method:
    before = more.pop("before", None)
    return Method(name, group, cg, damping, more, before)


def _new(name: str, group: str, cg: Callable[[], CG] = CG, damping: Any = KrylovDamping, **more: Any) -> Method:
    return Method(name, group, cg, damping, more)


START, STOP, LAMBDA, REUSE, ALL = "start", "stop", "lambda", "reuse", "together"

METHODS = {
    method.name: method
    for method in (
        _old(OLD, ALL),
        _old("start 0", START, lambda: martens(decay=0.0)),
        _old("start 0.99", START, lambda: martens(decay=0.99)),
        _old("start 0.5 to 0.99", START, before=rising),
        _old("start scaled", START, lambda: ScaledStart(tolerance=5e-4, decay=1.0)),
        _old("start as a direction", START, lambda: martens(decay=None)),
        _old("stop by rate", STOP, lambda: CG(decay=0.95)),
        _old("stop by rate from 0", STOP, lambda: CG(decay=0.0)),
        _old("stop at eps 5e-3", STOP, lambda: martens(tolerance=5e-3)),
        _old("lambda times 2 or 1/4", LAMBDA, martens, lambda: LevenbergMarquardt(increase=2.0, decrease=0.25)),
        _old("lambda continuous", LAMBDA, martens, Continuous),
        _old("lambda by the loss", LAMBDA, martens, KrylovDamping),
        _old("L-BFGS", REUSE, preconditioner=lambda: "lbfgs"),
        _old("Ritz vectors", REUSE, preconditioner=Ritz),
        _new(NEW, ALL),
        _new("default: start 0", START, lambda: CG(decay=0.0)),
        _new("default: start 0.95", START, lambda: CG(decay=0.95)),
        _new("default: start scaled", START, lambda: ScaledStart(decay=1.0)),
        _new("default: overhead 5", STOP, lambda: CG(overhead=5.0)),
        _new("default: overhead 20", STOP, lambda: CG(overhead=20.0)),
        _new("default: window 3", STOP, lambda: window(3)),
        _new("default: window 10", STOP, lambda: window(10)),
        _new("default: ratio 2", LAMBDA, CG, lambda: KrylovDamping(ratio=2.0)),
        _new("default: ratio 10", LAMBDA, CG, lambda: KrylovDamping(ratio=10.0)),
        _new("default: span of iterates", LAMBDA, Thin),
        _new("default: L-BFGS", REUSE, preconditioner=lambda: "lbfgs"),
        _new("default: Ritz vectors", REUSE, preconditioner=Ritz),
    )
}
