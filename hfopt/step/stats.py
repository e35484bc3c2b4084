"""The record of a step."""

from __future__ import annotations

from dataclasses import dataclass

from hfopt.linalg.solution import CGCheck


@dataclass(frozen=True)
class StepStats:
    """The record of one call of :meth:`hfopt.HessianFree.step`. Losses are in the closure's own unit.

    Attributes:
        step: number of the step, from 1.
        loss: of the gradient closure before the step, as ``step`` returns it (weight decay not included).
        new_loss: of the evaluation closure after the step (weight decay not included); equals ``evaluation_loss``
            after a rejected step. Without an ``evaluation`` closure it is the gradient closure's.
        evaluation_loss: of the evaluation closure before the step.
        rho: reduction ratio at the full step, undamped model; NaN if it is undefined.
        damping: lambda that CG's system was damped with; on a first step that found lambda, what it found.
        new_damping: lambda for the next step; with :class:`hfopt.KrylovDamping` also that of this one.
        structural: mu.
        cg_iterations: number of CG iterations of the solve that gave the step.
        cg_reason: why CG stopped, see :class:`hfopt.linalg.solution.Solution`; ``"dense"``, with no iterations, where
            the whole matrix was diagonalised; ``"converged"`` if the step was not taken since it promised less than the
            rounding error of the loss; ``"not finite"``, ``"zero gradient"`` or ``"zero learning rate"``, with no
            iterations, if the step was not tried.
        backtracked: the CG iteration whose iterate was taken.
        step_length: the line search's multiple of that iterate (times lr); 0 if the step was rejected.
        line_search_tries: evaluations that the line search looked at.
        gradient_norm: ``|g|``, weight decay included.
        solution_norm: ``|x|`` of the last CG iterate.
        update_norm: ``|theta_new - theta_old|``.
        quadratic: undamped model ``q(p)`` at the full step.
        gradients: gradient evaluations in this step.
        products: curvature products in this step, calibration included (not the preconditioner's adjoint passes).
        evaluations: loss evaluations in this step besides those of the gradients.
        accepted: False if the parameters were left as they were.
        seconds: wall-clock time of the step.
        linearisation: the policy behind the products, or the operator's name.
        checks: table of CG checks.
    """

    step: int
    loss: float
    new_loss: float
    evaluation_loss: float
    rho: float
    damping: float
    new_damping: float
    structural: float
    cg_iterations: int
    cg_reason: str
    backtracked: int
    step_length: float
    line_search_tries: int
    gradient_norm: float
    solution_norm: float
    update_norm: float
    quadratic: float
    gradients: int
    products: int
    evaluations: int
    accepted: bool
    seconds: float
    linearisation: str
    checks: tuple[CGCheck, ...] = ()
