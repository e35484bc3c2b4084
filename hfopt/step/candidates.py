"""Candidates for a step: solve, backtrack or follow a path of lambdas, and judge each by the loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from hfopt.curvature.gauss_newton import GaussNewton
from hfopt.damping import KrylovDamping
from hfopt.linalg.dense import DenseSystem
from hfopt.linalg.krylov import DampingPath
from hfopt.linalg.solution import Iterate, Solution
from hfopt.linalg.vector import dot
from hfopt.step.ladder import walk
from hfopt.step.objective import Objective
from hfopt.step.systems import NOWHERE, DampedSystems

# First step: lambda is tried over this many powers of ten, downwards from the curvature along the gradient.
_CALIBRATION_TRIES = 8
# Where one solve has to do for all of them, it is made with this multiple of that curvature.
_CALIBRATION_DEPTH = 1e-3


@dataclass(frozen=True)
class Candidate:
    """A step p that backtracking settled on, and how it was judged.

    ``value`` is the loss there, ``quadratic`` the undamped model's change, ``evaluated`` the loss at every iterate that
    was looked at, by its iteration; ``damping`` the lambda that the loss chose, None if lambda follows rho instead.
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
    """The candidates of one step on an objective, from solutions of its damped systems."""

    def __init__(self, objective: Objective, systems: DampedSystems) -> None:
        self.objective, self.settings, self.systems = objective, objective.settings, systems

    def candidate(self, damping: float, start: Mapping[str, Tensor] = NOWHERE) -> Candidate:
        """Solve with ``lambda = damping``, backtrack, and judge the step by rho."""
        return self.judged(damping, self.systems.solve(damping, start))

    def judged(self, damping: float, solution: Solution) -> Candidate:
        """Backtrack over the iterates of a solve, and judge the step by rho."""
        chosen, p, value, evaluated = self.backtrack(solution)
        quadratic = self.quadratic(chosen, damping)
        return Candidate(solution, chosen, p, value, quadratic, self.rho(value, quadratic), evaluated)

    def rho(self, value: float, quadratic: float) -> float:
        """The reduction ratio; NaN if there is none."""
        change = value - self.objective.f0
        return change / quadratic if quadratic < 0 and math.isfinite(change) else math.nan

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

    def calibrated(self) -> tuple[float, Candidate]:
        """The first step's lambda, by trial: the largest decrease among those that the model predicts well.

        Starts at the curvature along the gradient, ``g'Gg / g'g``, where lambda has the scale of the loss, and goes in
        powers of ten: down as long as rho is above the rule's upper threshold and the loss falls further, up if it is
        below the lower one.
        """
        damping = self.systems.curvature_along_gradient()
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
        first = self.systems.curvature_along_gradient() if value is None else value
        at = first if self.systems.dense or not calibrates else first * _CALIBRATION_DEPTH
        path: DampingPath | DenseSystem
        if self.systems.dense:
            path = self.systems.densely(at)
            solution = self.systems.dense_solution(path, at)
            if not path.finite:
                return at, self.judged(at, solution)
        else:
            kept = rule.kept(self.objective.vector.size * self.objective.g.element_size())
            solution = self.systems.solve(at, NOWHERE if calibrates else self.systems.cg_start(), kept)
            if solution.reason == "not finite" or solution.pairs is None or not len(solution.pairs[0]):
                return at, self.judged(at, solution)
            scale = self.objective.scale
            path = DampingPath(*solution.pairs, -self.objective.g, at, None if scale is None else 1 / scale)
            solution.pairs = None
        f0, rounding = self.objective.f0, self.objective.rounding
        first, clear = self.clear_of_rounding(rule, path, first)
        given = self.on_path(solution, path, first, at, path.solution(first))
        by_rho = self.settings.backtracking == "none" or not clear or rule.data_have_changed(f0, rounding)
        best = given if by_rho else self.walk(rule, solution, path, at, given)
        # What is known of the last iterate is its own loss; on the first step, that of the same iterate for lambda.
        best.evaluated[solution.iterations] = best.value if calibrates else given.value
        damping = (best.damping or first) if calibrates else first
        return damping, replace(best, damping=None) if by_rho else best

    def clear_of_rounding(
        self, rule: KrylovDamping, path: DampingPath | DenseSystem, first: float
    ) -> tuple[float, bool]:
        """The nearest lambda from ``first`` downwards that promises more than the loss's rounding error; if any does.

        Below that, the loss would choose by the noise in its last digits, step after step.
        """
        rate, rounding = self.objective.rate, self.objective.rounding
        for damping in (first, *rule.ladder(first, False)):
            along, curved = path.model(damping)
            if rate * along - 0.5 * rate**2 * curved > rounding:
                return damping, True
        return first, False

    def walk(
        self, rule: KrylovDamping, solution: Solution, path: DampingPath | DenseSystem, at: float, given: Candidate
    ) -> Candidate:
        """The best candidate on the ladders of lambda.

        Where lambda is far below all curvatures, it changes nothing: such candidates are passed over upwards, and not
        gone to downwards, as each has to be better by a hundredth of the decrease.
        """

        def judge(damping: float) -> Candidate:
            return self.on_path(solution, path, damping, at, path.solution(damping))

        return walk(
            rule,
            given,
            judge,
            self.objective.f0,
            least=path.least,
            everything=self.settings.backtracking == "smallest",
            rounding=self.objective.rounding / 2,
        )

    def on_path(
        self, solution: Solution, path: DampingPath | DenseSystem, damping: float, at: float, x: Tensor
    ) -> Candidate:
        """A step ``x = p(lambda)`` from a solve with ``lambda = at``, judged by rho."""
        p = self.scaled(x)
        value = self.objective.f(p)
        along, curved = path.model(damping)
        if self.settings.structural and isinstance(self.objective.op, GaussNewton):
            curved -= at * self.settings.structural * self.objective.op.structural_quadratic(x)
        quadratic = -self.objective.rate * along + 0.5 * self.objective.rate**2 * curved
        chosen = Iterate(solution.iterations, x, math.nan)
        return Candidate(solution, chosen, p, value, quadratic, self.rho(value, quadratic), {}, damping)
