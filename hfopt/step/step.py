"""One step: gradient, curvature, solve, backtracking, line search, damping."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hfopt.curvature.gauss_newton import GaussNewton
from hfopt.damping import KrylovDamping
from hfopt.errors import warn
from hfopt.linalg.cg_debiased import Quadratic
from hfopt.linalg.krylov import DampingPath
from hfopt.linalg.solution import Iterate, Solution
from hfopt.linalg.vector import dot, norm
from hfopt.line_search import LineSearchResult
from hfopt.step.checks import check
from hfopt.step.objective import Objective
from hfopt.step.stats import StepStats

NOT_FINITE = (
    "the loss or its gradient is not finite before the step, so the step is skipped and the parameters stay: look "
    "for NaN or infinity in this batch, or for parameters that have overflowed"
)
CONSTANT = (
    "the loss was the same, to the bit, at every point that the step tried, so that no step can be judged: check that "
    "the closure (or the evaluation= closure) computes the model's outputs anew at every call, for the parameters of "
    "this optimizer"
)

# First step: lambda is tried over this many powers of ten, downwards from the curvature along the gradient.
_CALIBRATION_TRIES = 8
# Where one solve has to do for all of them, it is made with this multiple of that curvature.
_CALIBRATION_DEPTH = 1e-3
# Another lambda is better if the loss falls by so much more, as a share of the decrease.
_CLEAR = 1e-2
NOWHERE: Mapping[str, Tensor] = {}
"""No start: the solve begins at zero."""


@dataclass(frozen=True)
class Candidate:
    """A step p that backtracking settled on, and how it was judged.

    ``value`` is the loss there, ``quadratic`` the undamped model's change, ``evaluated`` the loss at every iterate that
    was looked at, by its iteration; ``damping`` the lambda that the loss
    chose, if it did.
    """

    solution: Solution
    chosen: Iterate
    p: Tensor
    value: float
    quadratic: float
    rho: float
    evaluated: dict[int, float]
    damping: float | None = None


class Step(Objective):
    """One step on an objective; every quantity is computed once."""

    stats: StepStats

    def run(self) -> Any:
        """Take the step and fill in ``stats``; returns what the closure returned."""
        start = time.perf_counter()
        gradient, result = self.begin()
        size = norm(self.g)
        if not all(map(math.isfinite, (self.f0, self.loss, size, norm(self.model.g)))):
            if self.scaler is None:  # which tries scales until one is too large
                warn(NOT_FINITE)
            self._stay("not finite")
        elif size == 0.0:
            self._stay("zero gradient")
        elif self.at_rest:
            self._stay("zero learning rate")
        else:
            check(self, gradient, result)
            self._solve_and_move()
        self._tell_scaler(gradient)
        self._set_gradient(gradient)
        self.stats = replace(self.stats, seconds=time.perf_counter() - start)
        return result

    # -- solve, backtrack, judge -----------------------------------------------------------------------------------

    def cg_start(self) -> dict[str, Tensor]:
        """What the last solution of CG is to the next solve: ``augment``, with a decay ``x0``, or nothing."""
        starts = [self.o.state[p].get("cg_start") for p in self.vector.params]
        decay = self.o.cg.decay_after(self.o.steps)
        if decay == 0 or all(s is None for s in starts):
            return {}
        last = self.vector.flatten(starts)
        return {"augment": last} if decay is None else {"x0": last.mul_(decay)}

    def solve(self, damping: float, start: Mapping[str, Tensor] = NOWHERE, directions: int = 0) -> Solution:
        """Solve with ``lambda = damping``; ``start`` as :meth:`cg_start` gives it."""
        o, x0, augment = self.o, start.get("x0"), start.get("augment")
        decay = self.decay if self.scale is None else self.decay + damping * (1 / self.scale - 1)
        system = self.op.damped(damping, o.structural, decay)
        chosen = o.preconditioner if o.preconditioner is not None and o.preconditioner.active else None
        preconditioner = chosen if chosen is not None else self.coordinates
        if chosen is not None:
            chosen.damp(damping, decay)
        seen = system if chosen is None else chosen.watch(system)
        if self.model.op is self.op:
            solution = o.cg.solve(seen, -self.g, x0, preconditioner, directions=directions, augment=augment)
        else:
            second = Quadratic(self.model.op.damped(damping, o.structural, decay), -self.model.g, o.debias_slopes)
            solution = o.cg.solve(seen, -self.g, x0, preconditioner, second=second)
        self.products += solution.products
        return solution

    def candidate(self, damping: float, start: Mapping[str, Tensor] = NOWHERE) -> Candidate:
        """Solve with ``lambda = damping``, backtrack, and judge the step by rho."""
        return self.judged(damping, self.solve(damping, start))

    def judged(self, damping: float, solution: Solution) -> Candidate:
        """Backtrack over the iterates of a solve, and judge the step by rho."""
        chosen, p, value, evaluated = self.backtrack(solution)
        quadratic = self.quadratic(chosen, damping)
        return Candidate(solution, chosen, p, value, quadratic, self.rho(value, quadratic), evaluated)

    def rho(self, value: float, quadratic: float) -> float:
        """The reduction ratio; NaN if there is none."""
        change = value - self.f0
        return change / quadratic if quadratic < 0 and math.isfinite(change) else math.nan

    @property
    def coordinates(self) -> Callable[[Tensor], Tensor] | None:
        """What makes conjugate gradients those of the scaled coordinates: ``sigma r``, their metric's inverse."""
        scale = self.scale
        return None if scale is None else lambda r: r * scale

    def scaled(self, x: Tensor) -> Tensor:
        """The longest step along an iterate: ``lr x``."""
        return x if self.rate == 1.0 else x * self.rate

    def backtrack(self, solution: Solution) -> tuple[Iterate, Tensor, float, dict[int, float]]:
        """The iterate that the evaluation loss prefers, its step and loss, and the losses of all that were tried."""
        iterates = solution.iterates
        best, p = iterates[-1], self.scaled(iterates[-1].x)
        value = self.f(p)
        evaluated = {best.iteration: value}
        if self.o.backtracking == "none":
            return best, p, value, evaluated
        for iterate in reversed(iterates[:-1]):
            trial = self.scaled(iterate.x)
            other = self.f(trial)
            evaluated[iterate.iteration] = other
            if other < value or not math.isfinite(value):
                best, p, value = iterate, trial, other
            elif self.o.backtracking == "walk" and value < self.f0:
                break
        return best, p, value, evaluated

    def quadratic(self, chosen: Iterate, damping: float) -> float:
        """``q(p) = g'p + p'(G + c)p/2``, without lambda and mu."""
        op, linear = self.model.op, dot(self.model.g, chosen.x)
        curvature = 2.0 * (chosen.phi - linear)  # x'Ax
        curvature -= damping * dot(chosen.x, chosen.x if self.scale is None else chosen.x / self.scale)
        if self.o.structural and isinstance(op, GaussNewton):
            curvature -= damping * self.o.structural * op.structural_quadratic(chosen.x)
        return self.rate * linear + 0.5 * self.rate**2 * curvature

    def curvature_along_gradient(self) -> float:
        """``g'Gg / g'g``, a lambda of the loss's own scale; where that is of no use, another."""
        self.products += 1
        d = self.g if self.scale is None else self.g * self.scale
        curved = self.op.damped(0.0, 0.0, self.decay).multiply(d)
        gg = dot(self.g, d)
        damping = abs(dot(d, curved)) / gg if gg > 0 else 0.0
        if not (math.isfinite(damping) and damping > 0):
            damping = math.sqrt(gg) if gg > 0 else 1.0
        return damping

    def calibrated(self) -> tuple[float, Candidate]:
        """The first step's lambda, by trial: the largest decrease among those that the model predicts well.

        Starts at the curvature along the gradient, ``g'Gg / g'g``, where lambda has the scale of the loss, and goes in
        powers of ten: down as long as rho is above the rule's upper threshold and the loss falls further, up if it is
        below the lower one.
        """
        damping = self.curvature_along_gradient()
        best = (damping, self.candidate(damping))
        trusted = best[1].rho >= 0.25
        for _ in range(_CALIBRATION_TRIES):
            if trusted and not best[1].rho > 0.75:
                break
            damping = damping / 10 if trusted else damping * 10
            trial = self.candidate(damping)
            if trusted and not (trial.rho > 0.5 and trial.value < best[1].value):
                break
            best = (damping, trial)
            if not trusted and trial.rho >= 0.25:
                break
        return best

    # -- lambda by the loss ----------------------------------------------------------------------------------------

    def explored(self, rule: KrylovDamping) -> tuple[float, Candidate]:
        """The step's lambda, and the step that the evaluation loss prefers, all candidates from one solve.

        Where a solve met numbers that are not finite, its iterates are all there is.
        """
        calibrates, value = rule.calibrates, rule.value
        first = self.curvature_along_gradient() if value is None else value
        at = first * _CALIBRATION_DEPTH if calibrates else first
        kept = rule.kept(self.vector.size * self.g.element_size())
        solution = self.solve(at, NOWHERE if calibrates else self.cg_start(), kept)
        if solution.reason == "not finite" or solution.pairs is None or not len(solution.pairs[0]):
            return at, self.judged(at, solution)
        path = DampingPath(*solution.pairs, -self.g, at, None if self.scale is None else 1 / self.scale)
        solution.pairs = None
        given = self.on_path(solution, path, first, at, path.solution(first))
        best = given if self.o.backtracking == "none" else self.walk(rule, solution, path, at, given)
        # What is known of the last iterate is its own loss; on the first step, that of the same iterate for lambda.
        best.evaluated[solution.iterations] = best.value if calibrates else given.value
        return (best.damping or first) if calibrates else first, best

    def walk(
        self, rule: KrylovDamping, solution: Solution, path: DampingPath, at: float, given: Candidate
    ) -> Candidate:
        """The best candidate on the ladders of lambda.

        Where lambda is far below all curvatures, it changes nothing: such candidates are passed over upwards, and not
        gone to downwards, as each has to be better by a hundredth of the decrease.
        """
        best, first, everything = given, given.damping or 0.0, self.o.backtracking == "smallest"
        upwards = not best.rho > 0.5
        for up in (upwards, not upwards):
            for damping in rule.ladder(max(first, path.least / rule.ratio) if up else first, up):
                x = path.solution(damping)
                value = self.f(self.scaled(x))
                if value < best.value - _CLEAR * max(self.f0 - best.value, 0.0) or not math.isfinite(best.value):
                    best = self.on_path(solution, path, damping, at, x, value)
                elif best.value < self.f0 and not everything:
                    break
            if not everything and (best is not given or (up and not best.value < self.f0)):
                break
        return best

    def on_path(
        self, solution: Solution, path: DampingPath, damping: float, at: float, x: Tensor, value: float | None = None
    ) -> Candidate:
        """A step ``x = p(lambda)`` from a solve with ``lambda = at``, judged by rho."""
        p = self.scaled(x)
        value = self.f(p) if value is None else value
        along, curved = path.model(damping)
        if self.o.structural and isinstance(self.op, GaussNewton):
            curved -= at * self.o.structural * self.op.structural_quadratic(x)
        quadratic = -self.rate * along + 0.5 * self.rate**2 * curved
        chosen = Iterate(solution.iterations, x, math.nan)
        return Candidate(solution, chosen, p, value, quadratic, self.rho(value, quadratic), {}, damping)

    # -- the move --------------------------------------------------------------------------------------------------

    def _solve_and_move(self) -> None:
        rule = self.o.damping
        if self.o.preconditioner is not None:
            self.o.preconditioner.refresh(self.op, self.o.steps)
            self.gradients += self.o.preconditioner.runs
        if isinstance(rule, KrylovDamping) and self.debias is None:  # whose lengths are not those of the Krylov space
            calibrates = rule.calibrates
            damping, candidate = self.explored(rule)
            if (calibrates or self.scaler is not None) and self._overflown(candidate):
                return
            if calibrates:
                rule.start(damping)
        elif rule.calibrates:
            damping, candidate = self.calibrated()
            if self._overflown(candidate):
                return
            rule.start(damping)
        else:
            damping = rule.value or 0.0
            candidate = self.candidate(damping, self.cg_start())
            if self.scaler is not None and self._overflown(candidate):
                return
        # A decrease below the rounding error of the loss says nothing about the model: the minimum is reached.
        rounding = 4 * torch.finfo(self.vector.dtype).eps * abs(self.f0)
        if abs(candidate.quadratic) <= rounding and not candidate.value < self.f0:
            found = LineSearchResult(0.0, self.f0, 1)
        else:
            found = self.o.line_search.search(
                lambda s: self.f(candidate.p, s), self.f0, dot(self.model.g, candidate.p), candidate.value
            )
        accepted = found.length > 0
        # Rounding aside: steps that must have changed the loss, and did not.
        seen = self.farthest > 1e3 * torch.finfo(self.vector.dtype).eps * norm(self.theta)
        if seen and self.values == {self.f0_plain} and abs(candidate.quadratic) > rounding:
            warn(CONSTANT)
        if accepted:
            self.vector.move(self.saved, candidate.p, found.length)
            for p in self.vector.params:
                torch.autograd.graph.increment_version(p)
        # Nor does a step below that of the parameters, at a minimum where the loss is zero.
        least = 16 * torch.finfo(self.vector.dtype).eps * norm(self.theta)
        if accepted or not (abs(candidate.quadratic) <= rounding or norm(candidate.p) <= least):
            chosen = None if self.o.backtracking == "none" else candidate.damping
            if isinstance(rule, KrylovDamping) and chosen is not None and math.isfinite(candidate.value):
                rule.choose(chosen)
            if chosen is None or not accepted:
                rule.update(candidate.rho, accepted)
        self._keep_start(candidate.solution.x if accepted else None)
        self._record(damping, rule.value or 0.0, candidate, found)

    def _overflown(self, candidate: Candidate) -> bool:
        """Whether products were not finite and nothing came of them, which tells nothing of lambda; if so, stay."""
        if candidate.solution.reason != "not finite" or candidate.value < self.f0:
            return False
        self._stay("not finite")
        return True

    def _keep_start(self, x: Tensor | None) -> None:
        for i, p in enumerate(self.vector.params):
            if x is None:
                self.o.state[p].pop("cg_start", None)
            else:
                self.o.state[p]["cg_start"] = self.vector.views(x)[i].clone()

    def _set_gradient(self, gradient: Tensor) -> None:
        for p, g in zip(self.vector.params, self.vector.cast_views(gradient), strict=True):
            p.grad = g

    def _tell_scaler(self, gradient: Tensor) -> None:
        """Let a gradient scaler see the scaled gradient, whose infinities (or a product's) decide on its next scale."""
        if self.scaler is not None:
            overflown = self.stats.cg_reason == "not finite"
            self._set_gradient(gradient * (math.inf if overflown else self.scaler.get_scale()))
            self.scaler.unscale_(self.o)

    def _record(self, damping: float, new_damping: float, c: Candidate, found: LineSearchResult) -> None:
        accepted = found.length > 0
        moved = self.theta + found.length * c.p if self.decays() and accepted else self.theta
        new_loss = found.value - self.penalty(moved) if accepted else self.f0_plain
        rows = tuple(
            replace(row, evaluation=c.evaluated[row.iteration] - self.f0) if row.iteration in c.evaluated else row
            for row in c.solution.checks
        )
        self.stats = StepStats(
            step=0,
            loss=self.loss,
            new_loss=new_loss,
            evaluation_loss=self.f0_plain,
            rho=c.rho,
            damping=damping,
            new_damping=new_damping,
            structural=self.o.structural,
            cg_iterations=c.solution.iterations,
            cg_reason=c.solution.reason,
            backtracked=c.chosen.iteration,
            step_length=found.length * self.rate,
            line_search_tries=found.tries,
            gradient_norm=norm(self.g),
            solution_norm=norm(c.solution.x),
            update_norm=found.length * norm(c.p),
            quadratic=c.quadratic,
            gradients=self.gradients,
            products=self.products,
            evaluations=self.evaluations,
            accepted=accepted,
            seconds=0.0,
            linearisation=self._policy(),
            checks=rows,
        )

    def _policy(self) -> str:
        return self.op.linearisation.name if isinstance(self.op, GaussNewton) else type(self.op).__name__

    def _stay(self, reason: str) -> None:
        """The record of a step that was not tried."""
        nan = math.nan
        value = self.o.damping.value or 0.0
        self.stats = StepStats(
            0, self.loss, self.f0_plain, self.f0_plain, nan, value, value, self.o.structural, 0, reason, 0, 0.0, 0,
            norm(self.g), 0.0, 0.0, nan, self.gradients, self.products, self.evaluations, False, 0.0, self._policy(),
        )  # fmt: skip
