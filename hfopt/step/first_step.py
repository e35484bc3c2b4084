"""The checks that every first step makes: is the step's loss the closure's, and do its products belong to it?

They catch closures and models that look right and are silently another function inside a step. Once for every kind of
closure, at the price of one product and a half and at most three evaluations of the loss.
"""

from __future__ import annotations

import torch

from hfopt.closure.trace import Closure
from hfopt.curvature.consistency import inconsistency
from hfopt.curvature.gauss_newton import GaussNewton
from hfopt.errors import ClosureError, NotDifferentiable, warn
from hfopt.linalg.graph import coarsest_eps
from hfopt.step.checks import kind_of
from hfopt.step.checks_derivatives import Derivatives
from hfopt.step.differences import absolute
from hfopt.step.objective import Objective


def check_first_step(objective: Objective, trusted: frozenset[str]) -> frozenset[str]:
    """Check a step whose kind of closure has not been seen before.

    Args:
        objective: the objective at theta.
        trusted: the kinds of closures that have passed.

    Returns:
        The kinds that have passed, this one included.

    Raises:
        ClosureError: a closure is another function where its derivatives are computed.
        NotDifferentiable: products with the curvature matrix would be wrong.
    """
    kind = kind_of(objective)
    if kind in trusted:
        return trusted
    op, closures = objective.op, objective.closures
    with objective.untouched():
        _same_loss(objective, "closure", closures.gradient, objective.loss)
        if closures.curvature is not None:
            _same_loss(objective, "curvature= closure", closures.curvature, float(op.loss))
        if isinstance(op, GaussNewton):
            _refuse(objective, inconsistency(op))
        elif op.custom_backward:
            # A Hessian has no tangents of its own to compare, so its products are compared with differences.
            Derivatives(objective, objective.op.gradient).check_products(objective.loss)
    return trusted | {kind}


def _same_loss(objective: Objective, name: str, closure: Closure, loss: float) -> None:
    """Compare the loss of a closure with what the step takes for it."""
    at = objective
    seen = at.loss_of(closure)
    dtypes = [at.vector.dtype, *(p.dtype for p in at.vector.params)]
    if isinstance(at.op, GaussNewton):
        dtypes += [z.dtype for part in at.op.parts for z in part.space.outputs]
    graphs = [z for part in at.op.parts for z in part.space.outputs] if isinstance(at.op, GaussNewton) else []
    eps = max(coarsest_eps(graphs), *(torch.finfo(dtype).eps for dtype in dtypes))
    # Terms may cancel in the loss; hardly in the sum of what every parameter contributes to its change.
    bound = 4 * eps**0.5 * (abs(loss) + abs(seen) + absolute(at.g, at.theta))
    if abs(seen - loss) <= bound:
        return
    again = at.loss_of(closure)
    if abs(again - seen) > bound:
        warn(
            f"two evaluations of the closure at the same parameters gave the losses {seen!r} and {again!r}, so that "
            "steps cannot be judged by the loss: draw random numbers before step() (teacher forcing, augmentation, "
            "samples), or from a generator whose draws are repeated inside a step"
        )
        return
    raise ClosureError(
        f"the {name}'s loss is {loss!r} where its derivatives are computed, but {seen!r} where it is only evaluated, "
        "at the same parameters: inside a step, the value of a criterion may only be added up, weighted and returned. "
        "Look for a criterion that the closure differentiates or whose value it uses to compute something else, for "
        ".item(), and for code that depends on torch.is_grad_enabled(). Ways out: pass outputs=<the module whose "
        "result is the network's output>, loss=<function> with a closure that returns that function's arguments, or "
        "curvature='hessian'"
    )


def _refuse(objective: Objective, found: str | None) -> None:
    """Raise for a message, in all processes if one of them has any."""
    processes = objective.processes
    if processes is not None and processes.mean(float(found is not None)) > 0 and found is None:
        found = "products with the curvature matrix would be wrong in another process, whose error says why"
    if found is not None:
        raise NotDifferentiable(found)
