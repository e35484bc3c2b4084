"""Candidates for a step: solve, backtrack or follow a path of lambdas, and judge each by the loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hfopt.curvature.gauss_newton import GaussNewton
from hfopt.damping import KrylovDamping
from hfopt.linalg.cg_debiased import Quadratic
from hfopt.linalg.dense import DenseSystem
from hfopt.linalg.krylov import DampingPath
from hfopt.linalg.solution import Iterate, Solution
from hfopt.linalg.units import unit_of
from hfopt.linalg.vector import dot, norm
from hfopt.step.ladder import walk
from hfopt.step.objective import Objective
from hfopt.step.settings import StepMemory, StepParts

# First step: lambda is tried over this many powers of ten, downwards from the curvature along the gradient.
_CALIBRATION_TRIES = 8
# Where one solve has to do for all of them, it is made with this multiple of that curvature.
_CALIBRATION_DEPTH = 1e-3
# Parameters up to which a matrix is diagonalised in the time of a solve by conjugate gradients, and what the batched
# passes that form it may go through, in bytes, to cost no more than one.
_DENSE, _DENSE_BYTES = 384, 1 << 27
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
        self.dense = False  # until the objective has begun
        self.system: DenseSystem | None = None
        self.by_rho = False  # whether lambda follows rho after this step

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
        if self.dense:
            return self.dense_solution(self.densely(damping), damping)
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
            exact = damping == 0
            solution = cg.solve(seen, -at.g, x0, preconditioner, directions=directions, augment=augment, exact=exact)
        else:
            second = Quadratic(at.model.op.damped(damping, mu, decay), -at.model.g, self.settings.debias_slopes)
            solution = cg.solve(seen, -at.g, x0, preconditioner, second=second)
        at.products += solution.products
        return solution

    def solves_densely(self) -> bool:
        """Whether the matrix is formed and diagonalised, in place of conjugate gradients."""
        op, size = self.objective.op, self.objective.vector.size
        if self.settings.solver == "cg" or self.objective.model.op is not op:
            return False
        if self.settings.solver == "dense":
            return True
        if size > _DENSE or not isinstance(op, GaussNewton):
            return False
        # By counts, not by times: a resumed run takes the same steps.
        parts = [part.linearisation for part in op.parts]
        column = sum(math.inf if lin is None else lin.column_bytes() for lin in parts)
        pays = not op.one_by_one and size * column <= _DENSE_BYTES
        return pays if op.processes is None else op.processes.mean(float(pays)) == 1.0

    def densely(self, damping: float) -> DenseSystem:
        """The system of all lambdas; structural damping is that of one."""
        at, mu = self.objective, self.settings.structural
        if self.system is None or mu:
            with_mu = damping if mu else 0.0
            decay = at.decay if at.scale is None else at.decay + with_mu * (1 / at.scale - 1)
            # Columns within the space that gradient hooks leave: outside of it, the operator is not symmetric.
            eye = at.op.project(torch.eye(at.vector.size, dtype=at.vector.dtype, device=at.vector.device))
            matrix = at.op.damped(with_mu, mu, decay).multiply_many(eye)
            at.products += at.vector.size
            metric = None if at.scale is None else 1 / at.scale
            self.system = DenseSystem(matrix, -at.g, with_mu, metric, at.op.project)
        return self.system

    def dense_solution(self, system: DenseSystem, damping: float) -> Solution:
        """The solution for one lambda in the form that conjugate gradients give theirs."""
        if not system.finite:
            zero = torch.zeros_like(self.objective.g)
            return Solution(zero, [Iterate(0, zero, 0.0)], "not finite", 0, 0)
        x, scale = system.solution(damping), self.objective.scale
        along, curved = system.model(damping)
        curved += damping * dot(x, x if scale is None else x / scale)
        return Solution(x, [Iterate(0, x, 0.5 * curved - along)], "dense", 0, 0)

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
        g, scale = self.objective.g, self.objective.scale
        g = g * (1 / unit) if (unit := unit_of(norm(g), g.dtype)) != 1.0 else g
        d = g if scale is None else g * scale
        curved = self.objective.op.damped(0.0, 0.0, self.objective.decay).multiply(d)
        gg = dot(g, d)
        damping = abs(dot(d, curved)) / gg if gg > 0 else 0.0
        if not (math.isfinite(damping) and damping > 0):
            damping = unit * math.sqrt(gg) if gg > 0 else 1.0
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
        at = first if self.dense or not calibrates else first * _CALIBRATION_DEPTH
        path: DampingPath | DenseSystem
        if self.dense:
            path = self.densely(at)
            solution = self.dense_solution(path, at)
            if not path.finite:
                return at, self.judged(at, solution)
        else:
            kept = rule.kept(self.objective.vector.size * self.objective.g.element_size())
            solution = self.solve(at, NOWHERE if calibrates else self.cg_start(), kept)
            if solution.reason == "not finite" or solution.pairs is None or not len(solution.pairs[0]):
                return at, self.judged(at, solution)
            scale = self.objective.scale
            path = DampingPath(*solution.pairs, -self.objective.g, at, None if scale is None else 1 / scale)
            solution.pairs = None
        f0, rounding = self.objective.f0, self.objective.rounding
        first, clear = self.clear_of_rounding(rule, path, first)
        given = self.on_path(solution, path, first, at, path.solution(first))
        self.by_rho = self.settings.backtracking == "none" or not clear or rule.data_have_changed(f0, rounding)
        best = given if self.by_rho else self.walk(rule, solution, path, at, given)
        # What is known of the last iterate is its own loss; on the first step, that of the same iterate for lambda.
        best.evaluated[solution.iterations] = best.value if calibrates else given.value
        return (best.damping or first) if calibrates else first, best

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
