"""One step: gradient, curvature, solve, backtracking, line search, damping."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hfopt.closure.patch import undone
from hfopt.curvature.gauss_newton import GaussNewton
from hfopt.damping import KrylovDamping
from hfopt.errors import warn
from hfopt.linalg.vector import dot, norm
from hfopt.line_search import LineSearchResult
from hfopt.step.candidates import Candidate, CandidateSearch
from hfopt.step.checks import check
from hfopt.step.first_step import check_first_step
from hfopt.step.objective import Objective
from hfopt.step.settings import StepInput, StepMemory, StepOutcome
from hfopt.step.stats import StepStats
from hfopt.step.systems import DampedSystems

NOT_FINITE = (
    "the loss or its gradient is not finite before the step, so the step is skipped and the parameters stay: look "
    "for NaN or infinity in this batch, or for parameters that have overflowed"
)
CONSTANT = (
    "the loss was the same, to the bit, at every point that the step tried, so that no step can be judged: check that "
    "the closure (or the evaluation= closure) computes the model's outputs again at every call, for the parameters of "
    "this optimizer"
)


@dataclass(frozen=True)
class Move:
    """The record of how far a step went, and what the next solve may start from: one tensor per parameter, or None."""

    stats: StepStats
    starts: tuple[Tensor | None, ...]


class Step:
    """One step on an objective; every quantity is computed once.

    Args:
        given: settings, parts, parameters, closures and memory.
        unscale: called with the gradient scaler that scaled the loss, if there is one, while ``p.grad`` holds the
            scaled gradient (or infinity where a product overflowed).
    """

    def __init__(self, given: StepInput, unscale: Callable[[Any], None]) -> None:
        self.given, self.settings, self.parts, self.memory = given, given.settings, given.parts, given.memory
        self.unscale = unscale
        self.objective = Objective(given)
        self.systems = DampedSystems(self.objective, given.parts, given.memory)
        self.search = CandidateSearch(self.objective, self.systems)
        self._same_everywhere()

    def _same_everywhere(self) -> None:
        """Check that all processes begin at the same point."""
        at = self.objective
        if at.processes is not None:
            theta = at.vector.flatten(at.vector.params)
            damping = self.parts.damping.value or 0.0
            sizes = {"numbers of parameters": float(at.vector.size), "numbers of steps": float(self.memory.steps)}
            at.processes.agree(**sizes, **{"norms of the parameters": norm(theta), "lambda": damping})

    def run(self) -> StepOutcome:
        """Take the step.

        Broken off by an exception, it leaves the parameters where they were, or where an accepted step has taken them.
        """
        with undone(self.objective.back):
            return self._run()

    def _run(self) -> StepOutcome:
        begun = time.perf_counter()
        at = self.objective
        gradient, result = at.begin()
        size = norm(at.g)
        checked, trusted = self.memory.checked, self.memory.trusted
        if not all(map(math.isfinite, (at.f0, at.loss, size, norm(at.model.g)))):
            if at.scaler is None:  # which tries scales until one is too large
                warn(NOT_FINITE)
            at.frozen.put_back()  # running statistics would be NaN for ever after
            move = self._stay("not finite")
        elif size == 0.0:
            move = self._stay("zero gradient")
        elif at.rate == 0.0:
            move = self._stay("zero learning rate")
        else:
            checked = check(at, self.given, gradient, result)  # which says more than the checks of every first step
            trusted = check_first_step(at, trusted)
            move = self._solve_and_move()
        if at.scaler is not None:
            # A gradient scaler sees the scaled gradient: its infinities, or a product's, decide on the next scale.
            overflown = move.stats.cg_reason == "not finite"
            at.set_gradient(gradient * (math.inf if overflown else at.scaler.get_scale()))
            self.unscale(at.scaler)
        at.set_gradient(gradient)
        memory = StepMemory(self.memory.steps + 1, move.starts, at.chosen, checked, trusted)
        seconds = time.perf_counter() - begun
        return StepOutcome(result, replace(move.stats, step=memory.steps, seconds=seconds), memory)

    def _solve_and_move(self) -> Move:
        """Find a candidate by the rule's way of choosing lambda, search along it, move, and let the rule learn."""
        at, rule, preconditioner = self.objective, self.parts.damping, self.parts.preconditioner
        if preconditioner is not None and not self.systems.dense:
            preconditioner.refresh(at.op, self.memory.steps)
            at.gradients += preconditioner.runs
        calibrates = rule.calibrates
        # Step lengths of a second batch are not those of the Krylov space, on which lambda could be chosen.
        explores = isinstance(rule, KrylovDamping) and self.given.closures.debias is None
        if explores:
            assert isinstance(rule, KrylovDamping)
            damping, candidate = self.search.explored(rule)
        elif calibrates:
            damping, candidate = self.search.calibrated()
        else:
            damping = rule.value or 0.0
            candidate = self.search.candidate(damping, self.systems.cg_start())
        # Products that were not finite tell nothing of lambda where nothing came of them.
        nothing = candidate.solution.reason == "not finite" and not candidate.value < at.f0
        if nothing and (calibrates or at.scaler is not None):
            return self._stay("not finite")
        if calibrates:
            rule.start(damping)
        found = self._searched(candidate)
        accepted = found.length > 0
        if accepted:
            at.accept(candidate.p, found.length)
        self._update_rule(candidate, accepted)
        if isinstance(rule, KrylovDamping):
            rule.saw(at.f0, found.value if accepted else at.f0)
        starts: tuple[Tensor | None, ...] = (None,) * len(at.vector.params)
        if accepted:
            starts = tuple(v.clone() for v in at.vector.views(candidate.solution.x))
        return Move(self._record(damping, rule.value or 0.0, candidate, found), starts)

    def _searched(self, candidate: Candidate) -> LineSearchResult:
        """Search along a candidate, and warn where no point told anything."""
        at, rounding, eps = self.objective, self.objective.rounding, torch.finfo(self.objective.vector.dtype).eps
        # A decrease below the rounding error of the loss says nothing about the model: the minimum is reached.
        if abs(candidate.quadratic) <= rounding and not candidate.value < at.f0:
            found = LineSearchResult(0.0, at.f0, 1)
        else:
            slope, made = dot(at.model.g, candidate.p), at.evaluations

            def f(s: float) -> float:
                # Steps that promise less than the loss's rounding error cannot be judged by it.
                return at.f(candidate.p, s) if abs(s * slope) > rounding else math.nan

            found = self.parts.line_search.search(f, at.f0, slope, candidate.value)
            found = replace(found, tries=min(found.tries, 1 + at.evaluations - made))
        # Rounding aside: steps that must have changed the loss, and did not.
        moved = at.farthest > 1e3 * eps * norm(at.theta)
        if moved and at.values == {at.f0_plain} and abs(candidate.quadratic) > rounding:
            warn(CONSTANT)
        return found

    def _update_rule(self, candidate: Candidate, accepted: bool) -> None:
        """Let the damping rule learn from a step, unless the step was too small to tell anything."""
        at, rule, rounding = self.objective, self.parts.damping, self.objective.rounding
        # Nor does a step below the rounding of the parameters, at a minimum where the loss is zero.
        least = 16 * torch.finfo(at.vector.dtype).eps * norm(at.theta)
        if abs(candidate.quadratic) <= rounding or (not accepted and norm(candidate.p) <= least):
            return
        chosen = candidate.damping
        if isinstance(rule, KrylovDamping) and chosen is not None and math.isfinite(candidate.value):
            rule.choose(chosen)
        if chosen is None or not accepted:
            rule.update(candidate.rho, accepted)

    def _record(self, damping: float, new_damping: float, c: Candidate, found: LineSearchResult) -> StepStats:
        at, accepted = self.objective, found.length > 0
        moved = at.theta + found.length * c.p if at.decays() and accepted else at.theta
        rows = tuple(
            replace(row, evaluation=c.evaluated[row.iteration] - at.f0) if row.iteration in c.evaluated else row
            for row in c.solution.checks
        )
        return replace(
            self._empty_record(),
            new_loss=found.value - at.penalty(moved) if accepted else at.f0_plain,
            rho=c.rho,
            damping=damping,
            new_damping=new_damping,
            cg_iterations=c.solution.iterations,
            cg_reason=c.solution.reason if accepted or abs(c.quadratic) > at.rounding else "converged",
            backtracked=c.chosen.iteration,
            step_length=found.length * at.rate,
            line_search_tries=found.tries,
            solution_norm=norm(c.solution.x),
            update_norm=found.length * norm(c.p),
            quadratic=c.quadratic,
            accepted=accepted,
            checks=rows,
        )

    def _stay(self, reason: str) -> Move:
        """Record a step that was not tried."""
        return Move(replace(self._empty_record(), cg_reason=reason), self.memory.starts)

    def _empty_record(self) -> StepStats:
        """Record what is known of a step before anything is solved: nothing has moved."""
        at, value = self.objective, self.parts.damping.value or 0.0
        return StepStats(
            step=self.memory.steps + 1,
            loss=at.loss,
            new_loss=at.f0_plain,
            evaluation_loss=at.f0_plain,
            rho=math.nan,
            damping=value,
            new_damping=value,
            structural=self.settings.structural,
            cg_iterations=0,
            cg_reason="",
            backtracked=0,
            step_length=0.0,
            line_search_tries=0,
            gradient_norm=norm(at.g),
            solution_norm=0.0,
            update_norm=0.0,
            quadratic=math.nan,
            gradients=at.gradients,
            products=at.products,
            evaluations=at.evaluations,
            accepted=False,
            seconds=0.0,
            linearisation=at.op.linearisation.name if isinstance(at.op, GaussNewton) else type(at.op).__name__,
        )
