"""Candidates for a step: solve, backtrack or follow a path of lambdas, and judge each by the loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from hfopt.curvature.gauss_newton import GaussNewton
from hfopt.damping import KrylovDamping
from hfopt.linalg.cg_debiased import Quadratic
from hfopt.linalg.krylov import DampingPath
from hfopt.linalg.solution import Iterate, Solution
from hfopt.linalg.vector import dot
from hfopt.step.objective import Objective
from hfopt.step.settings import StepMemory, StepParts

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


class CandidateSearch:
    """The candidates of one step on an objective; ``memory`` has the last solution, where a solve may begin."""

    def __init__(self, objective: Objective, parts: StepParts, memory: StepMemory) -> None:
        self.objective, self.settings, self.parts, self.memory = objective, objective.settings, parts, memory

    def cg_start(self) -> dict[str, Tensor]:
        """What the last solution of CG is to the next solve: ``augment``, with a decay ``x0``, or nothing."""
        starts = self.memory.starts
        decay = self.parts.cg.decay_after(self.memory.steps)
        if decay == 0 or all(s is None for s in starts):
            return {}
        # Gradient hooks may hold other entries than in the last step.
        last = self.objective.op.project(self.objective.vector.flatten(starts))
        return {"augment": last} if decay is None else {"x0": last.mul_(decay)}

    def solve(self, damping: float, start: Mapping[str, Tensor] = NOWHERE, directions: int = 0) -> Solution:
        """Solve with ``lambda = damping``; ``start`` as :meth:`cg_start` gives it."""
        at, mu, cg = self.objective, self.settings.structural, self.parts.cg
        x0, augment = start.get("x0"), start.get("augment")
        # In scaled coordinates lambda damps theta / sqrt(sigma), which is a damping of lambda / sigma here.
        decay = at.decay if at.scale is None else at.decay + damping * (1 / at.scale - 1)
        system = at.op.damped(damping, mu, decay)
        given = self.parts.preconditioner
        chosen = given if given is not None and given.active else None
        preconditioner = chosen if chosen is not None else self.coordinates
        if chosen is not None:
            chosen.damp(damping, decay)
        seen = system if chosen is None else chosen.watch(system)
        if preconditioner is not None and at.op.projection is not None:
            preconditioner = at.op.projection.after(preconditioner)
        if at.model.op is at.op:
            solution = cg.solve(seen, -at.g, x0, preconditioner, directions=directions, augment=augment)
        else:
            second = Quadratic(at.model.op.damped(damping, mu, decay), -at.model.g, self.settings.debias_slopes)
            solution = cg.solve(seen, -at.g, x0, preconditioner, second=second)
        at.products += solution.products
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
        change = value - self.objective.f0
        return change / quadratic if quadratic < 0 and math.isfinite(change) else math.nan

    @property
    def coordinates(self) -> Callable[[Tensor], Tensor] | None:
        """What makes conjugate gradients those of the scaled coordinates: ``sigma r``, their metric's inverse."""
        scale = self.objective.scale
        return None if scale is None else lambda r: r * scale

    def scaled(self, x: Tensor) -> Tensor:
        """The longest step along an iterate: ``lr x``."""
        return x if self.objective.rate == 1.0 else x * self.objective.rate

    def backtrack(self, solution: Solution) -> tuple[Iterate, Tensor, float, dict[int, float]]:
        """The iterate that the evaluation loss prefers, its step and loss, and the losses of all that were tried."""
        iterates = solution.iterates
        best, p = iterates[-1], self.scaled(iterates[-1].x)
        value = self.objective.f(p)
        evaluated = {best.iteration: value}
        if self.settings.backtracking == "none":
            return best, p, value, evaluated
        for iterate in reversed(iterates[:-1]):
            trial = self.scaled(iterate.x)
            other = self.objective.f(trial)
            evaluated[iterate.iteration] = other
            if other < value or not math.isfinite(value):
                best, p, value = iterate, trial, other
            elif self.settings.backtracking == "walk" and value < self.objective.f0:
                break
        return best, p, value, evaluated

    def quadratic(self, chosen: Iterate, damping: float) -> float:
        """``q(p) = g'p + p'(G + c)p/2``, without lambda and mu."""
        op, linear = self.objective.model.op, dot(self.objective.model.g, chosen.x)
        curvature = 2.0 * (chosen.phi - linear)  # x'Ax
        curvature -= damping * dot(
            chosen.x, chosen.x if self.objective.scale is None else chosen.x / self.objective.scale
        )
        if self.settings.structural and isinstance(op, GaussNewton):
            curvature -= damping * self.settings.structural * op.structural_quadratic(chosen.x)
        return self.objective.rate * linear + 0.5 * self.objective.rate**2 * curvature

    def curvature_along_gradient(self) -> float:
        """``g'Gg / g'g``, a lambda of the loss's own scale; where that is of no use, another."""
        self.objective.products += 1
        d = self.objective.g if self.objective.scale is None else self.objective.g * self.objective.scale
        curved = self.objective.op.damped(0.0, 0.0, self.objective.decay).multiply(d)
        gg = dot(self.objective.g, d)
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
        kept = rule.kept(self.objective.vector.size * self.objective.g.element_size())
        solution = self.solve(at, NOWHERE if calibrates else self.cg_start(), kept)
        if solution.reason == "not finite" or solution.pairs is None or not len(solution.pairs[0]):
            return at, self.judged(at, solution)
        path = DampingPath(
            *solution.pairs, -self.objective.g, at, None if self.objective.scale is None else 1 / self.objective.scale
        )
        solution.pairs = None
        given = self.on_path(solution, path, first, at, path.solution(first))
        best = given if self.settings.backtracking == "none" else self.walk(rule, solution, path, at, given)
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
        best, first, everything = given, given.damping or 0.0, self.settings.backtracking == "smallest"
        upwards = not best.rho > 0.5
        for up in (upwards, not upwards):
            for damping in rule.ladder(max(first, path.least / rule.ratio) if up else first, up):
                x = path.solution(damping)
                value = self.objective.f(self.scaled(x))
                if value < best.value - _CLEAR * max(self.objective.f0 - best.value, 0.0) or not math.isfinite(
                    best.value
                ):
                    best = self.on_path(solution, path, damping, at, x, value)
                elif best.value < self.objective.f0 and not everything:
                    break
            if not everything and (best is not given or (up and not best.value < self.objective.f0)):
                break
        return best

    def on_path(
        self, solution: Solution, path: DampingPath, damping: float, at: float, x: Tensor, value: float | None = None
    ) -> Candidate:
        """A step ``x = p(lambda)`` from a solve with ``lambda = at``, judged by rho."""
        p = self.scaled(x)
        value = self.objective.f(p) if value is None else value
        along, curved = path.model(damping)
        if self.settings.structural and isinstance(self.objective.op, GaussNewton):
            curved -= at * self.settings.structural * self.objective.op.structural_quadratic(x)
        quadratic = -self.objective.rate * along + 0.5 * self.objective.rate**2 * curved
        chosen = Iterate(solution.iterations, x, math.nan)
        return Candidate(solution, chosen, p, value, quadratic, self.rho(value, quadratic), {}, damping)
