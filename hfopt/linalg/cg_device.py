"""Conjugate gradients on a device, without host synchronisation between checks.

The iterates are those of :mod:`hfopt.linalg.cg`, and so are the iteration at which a solve ends and the reason; only
when the host learns of it differs. All scalars live on the device. Each iteration decides there whether the solve goes
on, by the same comparisons of the same numbers as the host would make, and writes them to a log. If the solve does not
go on, the remaining iterations up to the next check leave x and r as they are. At checks the host reads the log, and
finds the first iteration that ended the solve.

An iteration calls torch's operations on the same tensors every time, with nothing from the host but those tensors, so
that it can be recorded once and repeated (:mod:`hfopt.linalg.cuda_graphs`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from hfopt.linalg.cg_host import HostCG
from hfopt.linalg.rules import FAST, GROWTH, StoppingRules, after_product, before_product, lost, shallow
from hfopt.linalg.solution import Iterate, LinearMap, Nested, Solution
from hfopt.linalg.vector import norm

# What one line of the log holds, in this order; those from |r'z| on decide whether the solve goes on, the
# last one by the least curvature that a step may divide by.
LEAST, PHI, SHARE, RZ, SIZE, RESIDUAL, CURVATURE = range(7)

# The first recorded iteration must do what the iteration itself does, but for the order of sums in atomic additions.
_AGREEMENT = 1e-3


class Recorder(Protocol):
    """Interface of recordings of an iteration; see :class:`hfopt.linalg.cuda_graphs.Recording`."""

    @property
    def proven(self) -> bool:
        """Whether a recording need not be compared with the work."""

    def prove(self) -> None:
        """Record that recordings need no comparison from now on."""

    def watch(self, work: Callable[[], None]) -> None:
        """Do ``work``, and find out whether it can be recorded."""

    def record(self, work: Callable[[], None]) -> Callable[[], None] | None:
        """Return a function that repeats ``work``, without running it now; None if recording fails."""

    def refuse(self, reason: str) -> None:
        """Give up recording."""


@runtime_checkable
class Counter(Protocol):
    """Interface of operators that count their products."""

    products: int


class DeviceCG(HostCG):
    """One solve, without reading from the device between checks.

    ``products`` counts those made, also between the end of the solve and the check that notices it.
    """

    def __init__(
        self,
        options: StoppingRules,
        op: LinearMap,
        b: Tensor,
        x0: Tensor | None,
        preconditioner: Callable[[Tensor], Tensor] | None,
        recorder: Recorder | None = None,
        directions: int = 0,
        augment: Tensor | None = None,
        exact: bool = False,
        regular: bool = False,
    ) -> None:
        super().__init__(options, op, b, x0, preconditioner, directions, augment, exact, regular)
        self.recorder = recorder
        self.repeat: Callable[[], None] | None = None
        self.bound = 0.0  # of |r|
        self.counters: list[Counter] = []  # without this object, which is to go with its last reference
        inner: object = op
        while isinstance(inner, Nested):
            self.counters += [inner] if isinstance(inner, Counter) else []
            inner = inner.base
        self.counters += [inner] if isinstance(inner, Counter) else []
        device, steps = b.device, options.max_iterations + 1

        def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        # Directions and their products, in order; the last line is for those that are not kept.
        rows = min(directions, options.max_iterations) + 1 if directions else 0
        self.kept_d, self.kept_ad = zeros(rows, len(b), dtype=b.dtype), zeros(rows, len(b), dtype=b.dtype)
        self.row = zeros(1, dtype=torch.int64)
        self.d = torch.empty_like(b)
        self.wide = [torch.empty_like(b, dtype=torch.float64) for _ in range(0 if b.dtype == torch.float64 else 2)]
        self.step_length, self.turn = zeros(dtype=b.dtype), zeros(dtype=b.dtype)
        self.alpha, self.old, self.spare = zeros(), zeros(), zeros()
        self.along_u, self.length = zeros(), zeros(dtype=b.dtype)
        self.line, self.log = zeros(1, 7), zeros(steps, 7)
        self.least_curved, self.value, _, self.rz, self.size, self.residual, self.curvature = self.line[0].unbind()
        self.i = zeros(1, dtype=torch.int64)

        # The progress rule as tables over iterations: how far to look back, and which share is too little.
        windows = [options.window(i) for i in range(steps)]
        self.limits = [options.least_share(i) for i in range(steps)]
        self.limit = torch.tensor(self.limits, dtype=torch.float64, device=device)
        self.back = torch.tensor([0 if k is None else i - k for i, k in enumerate(windows)], device=device)
        self.there = zeros(1, dtype=torch.int64)
        self.then, self.least = zeros(1), zeros(1)

        # One flag for every condition to go on: numbers that are large enough and finite, progress, none failed so far.
        self.judged = self.line[0, RESIDUAL if preconditioner is None else SIZE :]
        n = len(self.judged)
        self.bounds = zeros(n)
        self.bound_of_curvature = self.bounds[-1]
        self.flat, self.pushed, self.dmd, self.inverses = zeros(), zeros(), zeros(), zeros()
        self.flags = torch.ones(2 * n + 2, dtype=torch.bool, device=device)
        self.large, self.finite, self.progress, self.so_far = torch.split(self.flags, [n, n, 1, 1])
        self.falling = zeros(1, dtype=torch.bool)
        self.alive, self.dead = torch.ones((), dtype=torch.bool, device=device), zeros(dtype=torch.bool)
        self.pending: list[tuple[int, Tensor]] = []

    def prepare(self) -> None:
        """Compute the start, and the model's value there."""
        super().prepare()
        self.value.fill_(self.history[0])

    # -- one iteration: nothing below reads from the device --------------------------------------------------------

    def dot_into(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        """Compute ``a'b`` in float64."""
        if self.wide:
            wide = self.wide[0].copy_(a)
            a, b = wide, wide if b is a else self.wide[1].copy_(b)
        torch.dot(a, b, out=out)

    def look_back(self) -> None:
        """Apply the progress rule to the present iteration."""
        value, share = self.line[:, PHI], self.line[:, SHARE]
        torch.index_select(self.back, 0, self.i, out=self.there)
        torch.index_select(self.log[:, PHI], 0, self.there, out=self.then)
        torch.index_select(self.limit, 0, self.i, out=self.least)
        torch.sub(value, self.then, out=share)
        share.div_(value)
        if self.residuals is not None:
            self.wait(share)
        torch.lt(share, self.least, out=self.progress)
        torch.lt(value, 0.0, out=self.falling)
        torch.logical_and(self.progress, self.falling, out=self.progress)
        self.progress.logical_not_()

    def wait(self, share: Tensor) -> None:
        """Let the progress rule pass while the residual falls fast; the present line still has the latest one."""
        self.there.sub_(1).clamp_(min=0)
        torch.index_select(self.log[:, RESIDUAL], 0, self.there, out=self.then)
        torch.le(self.residual, self.then.mul_(FAST), out=self.falling)
        share.masked_fill_(self.falling, math.inf)

    def measure(self) -> Tensor:
        """Compute ``z = M^-1 r``, with ``r'z`` and ``|r|``."""
        z = self.r if self.precondition is None else self.precondition(self.r)
        self.dot_into(self.r, z, self.rz)
        if self.precondition is None:
            torch.sqrt(self.rz, out=self.residual)
        else:
            torch.abs(self.rz, out=self.size)
            self.dot_into(self.r, self.r, self.residual)
            self.residual.sqrt_()
        return z

    def conjugate(self, d: Tensor, z: Tensor) -> None:
        """Compute ``d -= u (Au)'z``."""
        if self.u is not None:
            self.dot_into(z, self.au, self.along_u)
            self.length.copy_(self.along_u)
            d.addcmul_(self.u, self.length, value=-1.0)

    def correct(self) -> None:
        """Move to the minimum along u, unless the solve has ended."""
        if self.u is not None:
            self.dot_into(self.r, self.u, self.along_u)
            self.along_u.masked_fill_(self.dead, 0.0)
            self.length.copy_(self.along_u)
            self.x.addcmul_(self.u, self.length)
            self.r.addcmul_(self.au, self.length, value=-1.0)

    def curve(self) -> None:
        """Compute ``A d`` and ``d'A d``."""
        product = self.multiply(self.d)
        if product is not self.scratch:
            self.scratch.copy_(product)
        if self.directions:
            torch.clamp(self.i, max=len(self.kept_d) - 1, out=self.row)
            self.kept_d.index_copy_(0, self.row, self.d.unsqueeze(0))
            self.kept_ad.index_copy_(0, self.row, self.scratch.unsqueeze(0))
        self.dot_into(self.d, self.scratch, self.curvature)
        # Which curvature is too little to divide by: see rules.after_product.
        if not self.regular:
            self.dot_into(self.scratch, self.scratch, self.pushed)
            self.pushed.sqrt_().mul_(self.rz).div_(self.residual).div_(GROWTH)
        torch.reciprocal(self.rz, out=self.dmd)
        self.inverses.add_(self.dmd)
        torch.mul(self.rz, self.rz, out=self.dmd)
        self.dmd.mul_(self.inverses)
        torch.mul(self.flat, self.dmd, out=self.least_curved)
        if not self.regular:
            torch.minimum(self.least_curved, self.pushed, out=self.pushed)
        self.least_curved.mul_(lost(self.b.dtype))
        if not self.regular:
            torch.maximum(self.least_curved, self.pushed, out=self.least_curved)

    def judge(self) -> None:
        """Decide whether to continue; if not, set ``d`` and ``A d`` to zero, so that nothing moves."""
        self.bound_of_curvature.copy_(self.least_curved)
        torch.gt(self.judged, self.bounds, out=self.large)
        torch.lt(self.judged, math.inf, out=self.finite)
        torch.all(self.flags, 0, out=self.alive)
        self.so_far.copy_(self.alive)
        torch.logical_not(self.alive, out=self.dead)
        torch.div(self.curvature, self.dmd, out=self.spare)
        self.spare.mul_(shallow(self.b.dtype)).masked_fill_(self.dead, 0.0)
        torch.maximum(self.flat, self.spare, out=self.flat)
        self.d.masked_fill_(self.dead, 0.0)
        self.scratch.masked_fill_(self.dead, 0.0)

    def move(self) -> None:
        """Update ``x += alpha d``, ``r -= alpha A d`` and ``phi -= alpha r'z / 2``, and write the log."""
        torch.div(self.rz, self.curvature, out=self.alpha)
        self.alpha.masked_fill_(self.dead, 0.0)
        self.step_length.copy_(self.alpha)
        self.x.addcmul_(self.d, self.step_length)
        self.r.addcmul_(self.scratch, self.step_length, value=-1.0)
        self.correct()
        self.log.index_copy_(0, self.i, self.line)
        torch.mul(self.alpha, self.rz, out=self.spare)
        self.value.sub_(self.spare, alpha=0.5)
        self.old.copy_(self.rz)
        self.i.add_(1)

    def iteration(self) -> None:
        """Run everything of an iteration that is the same every time."""
        if self.o.tolerance != 0:
            self.look_back()
        z = self.measure()
        torch.div(self.rz, self.old, out=self.turn)
        torch.addcmul(z, self.d, self.turn, out=self.d)
        self.conjugate(self.d, z)
        self.curve()
        self.judge()
        self.move()

    def advance(self, i: int) -> None:
        """Run iteration ``i``, counted from 0: twice without a recording, then recorded, then repeated."""
        recorder = self.recorder
        if self.repeat is not None:
            self.replay()
        elif recorder is None or i < 2:
            work = self.iteration
            work() if recorder is None else recorder.watch(work)
        else:
            self.repeat = self.recorded(recorder)
            self.recorder = None
            self.advance(i)

    def replay(self) -> None:
        """Run the recorded iteration, which counts no products."""
        assert self.repeat is not None
        self.repeat()
        self.products += 1
        for c in self.counters:
            c.products += 1

    def recorded(self, recorder: Recorder) -> Callable[[], None] | None:
        """Return the recorded iteration; verify it first if it is the first of its kind."""
        counters = [self, *self.counters]
        made = [c.products for c in counters]
        repeat = recorder.record(self.iteration)
        for c, products in zip(counters, made, strict=True):
            c.products = products
        if repeat is None or recorder.proven:
            return repeat
        state = [self.x, self.r, self.d, self.line, self.log, self.old, self.i, self.so_far, self.flat, self.inverses]
        before = [t.clone() for t in state]
        self.iteration()
        expected, value = self.x - before[0], float(self.value)  # a look at the device, once in the life of a CG
        for t, saved in zip(state, before, strict=True):
            t.copy_(saved)
        self.repeat = repeat
        self.replay()
        error, off = norm(self.x - before[0] - expected), abs(float(self.value) - value)
        if not (error <= _AGREEMENT * norm(expected) and off <= _AGREEMENT * abs(float(self.spare))):
            recorder.refuse("a recorded product differed from the product itself, which must depend on no other state")
            repeat = None
        elif bool(self.alive):
            recorder.prove()
        for t, saved in zip(state, before, strict=True):
            t.copy_(saved)
        return repeat

    def settle(self, i: int) -> None:
        """Run the occasional parts of an iteration: residual or phi from scratch, storing an iterate."""
        o = self.o
        if o.repair_every and i % o.repair_every == 0:
            torch.sub(self.b, self.multiply(self.x), out=self.scratch)
            torch.where(self.alive, self.scratch, self.r, out=self.r)
            self.correct()
        if not self.carries(i):
            self.dot_into(self.b, self.x, self.spare)
            self.dot_into(self.r, self.x, self.value)
            self.value.add_(self.spare).mul_(-0.5)
        if i in self.stored:
            self.pending.append((i, self.x.clone()))

    # -- checks ----------------------------------------------------------------------------------------------------

    def read(self, start: int, stop: int) -> list[list[float]]:
        """Read the rows from ``start`` to ``stop - 1`` and the present one: the only place where the host waits."""
        self.log[stop : stop + 1].copy_(self.line)
        lines: list[list[float]] = self.log[start : stop + 1].tolist()
        return lines

    def ended(self, i: int, line: list[float]) -> str | None:
        """Return the reason to end before the step of iteration ``i``, in the order in which the host checks."""
        if line[PHI] < 0 and line[SHARE] < self.limits[i]:
            return "progress"
        return before_product(line[RZ], line[RESIDUAL], self.bound) or after_product(line[CURVATURE], line[LEAST])

    def end(self, reason: str, i: int) -> Solution:
        """Discard everything after iteration ``i``; x and r have not moved since."""
        del self.history[i + 1 :]
        self.collect(i)
        self.carried = self.carries(i)
        return super().end(reason, i)

    def collect(self, i: int) -> None:
        """Collect the iterates kept up to ``i``, with their phi."""
        self.kept += [Iterate(j, x, self.history[j]) for j, x in self.pending if j <= i]
        self.pending.clear()

    def seen(self, i: int) -> tuple[Tensor, Tensor] | None:
        """Return ``S`` and ``A S``."""
        if self.directions:
            self.pairs += zip(self.kept_d[:-1], self.kept_ad[:-1], strict=True)
        return super().seen(i)

    def first(self) -> Solution | None:
        """Run the first iteration with the host following each step; return the solution if it ends there."""
        z = self.measure()
        self.d.copy_(z)
        self.conjugate(self.d, z)
        line = self.read(0, 0)[0]
        reason = before_product(line[RZ], line[RESIDUAL], self.bound)
        if reason is not None:
            return self.end(reason, 0)
        self.curve()
        line = self.read(0, 0)[0]
        reason = self.ended(0, line)
        if reason == "negative curvature" and line[CURVATURE] < 0:
            self.x.add_(self.d, alpha=line[RZ] / -line[CURVATURE])
            self.r.add_(self.scratch, alpha=line[RZ] / line[CURVATURE])
            self.history.append(self.phi())
            return self.done(reason, 1)
        if reason is not None:
            return self.end(reason, 0)
        self.judge()
        self.move()
        return None

    def iterate(self, size_b: float, stop: Callable[[int, Tensor, float], bool] | None) -> Solution:
        """Solve; ``stop`` is asked at checks."""
        o = self.o
        self.prepare()
        self.bound = o.residual * size_b
        self.bounds[-2] = self.bound
        if self.history[0] != 0.0 and math.isfinite(self.history[0]):
            self.keep(0)
        solution = self.first()
        if solution is not None:
            return solution
        seen = 0
        for i in range(1, o.max_iterations + 1):
            self.settle(i)
            if i % o.check_every == 0 or i == o.max_iterations:
                lines = self.read(seen, i)
                self.history[seen:] = [line[PHI] for line in lines]
                if self.residuals is not None:
                    self.residuals[seen:] = [line[RESIDUAL] for line in lines[:-1]]
                for j, line in enumerate(lines[:-1], seen):
                    reason = self.ended(j, line)
                    if reason is not None:
                        return self.end(reason, j)
                self.collect(i)
                seen = i
                if i % o.check_every == 0:
                    self.check(i)
                    if stop is not None and stop(i, self.x, self.history[-1]):
                        return self.end("stopped", i)
                if o.progress_is_little(self.history, self.residuals):
                    return self.end("progress", i)
            if i < o.max_iterations:
                self.advance(i)
        self.measure()
        line = self.read(o.max_iterations, o.max_iterations)[0]
        reason = before_product(line[RZ], line[RESIDUAL], self.bound) or "iterations"
        return self.end(reason, o.max_iterations)
