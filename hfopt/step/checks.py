"""Self-checks of a step: is the closure what the optimizer takes it for, and are its derivatives right?

In this order, before the parameters move: the closure is the same function at every call; its loss is weighed as the
optimizer takes it to be; its gradient agrees with differences of the loss; products are symmetric and, where that is
promised, not negative; products agree with differences of the outputs (of the gradient, for a Hessian). They cost some
40 evaluations of the loss and 10 products, less than a step of many CG iterations, and leave no trace.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hfopt import structural
from hfopt.closure.trace import Closure
from hfopt.curvature.gauss_newton import GaussNewton
from hfopt.curvature.output_space import Matching
from hfopt.step.checks_derivatives import Derivatives, fail
from hfopt.step.checks_reductions import ReductionTrace, unequal_batches
from hfopt.step.objective import Objective
from hfopt.step.settings import StepInput


def check(objective: Objective, given: StepInput, gradient: Tensor, result: Any) -> frozenset[str]:
    """Check a step that is about to be taken, if the settings ask for it now.

    Args:
        objective: the objective at theta.
        given: what the step was given.
        gradient: of the loss alone (P,).
        result: what the closure returned.

    Returns:
        The kinds of closures that have passed so far.

    Raises:
        CheckFailed: what was found, and what to do.
    """
    option, checked = given.settings.check, given.memory.checked
    if option is False:
        return checked
    kind = kind_of(objective)
    if checked and (kind in checked if option is True else given.memory.steps % option):
        return checked
    with objective.untouched():
        _Checks(objective, given, gradient, result).run()
    return checked | {kind}


def kind_of(objective: Objective) -> str:
    """Return what tells one kind of closures from another: roles, criteria, and the forms of the outputs."""
    closures = objective.closures
    if not isinstance(objective.op, GaussNewton):
        return f"{type(objective.op).__name__} {closures.curvature is None}"
    spaces = {
        str([type(part.space).__name__, *((z.dim(), str(z.dtype)) for z in part.space.outputs), *_closed(part.space)])
        for part in objective.op.parts
    }
    own = closures.evaluation is not None
    return f"{type(objective.op).__name__} {closures.curvature is None} {own} {sorted(spaces)}"


def _closed(space: Any) -> list[str]:
    return [type(b.closed).__name__ for b in space.blocks] if isinstance(space, Matching) else []


class _Checks:
    """All checks of one step."""

    def __init__(self, objective: Objective, given: StepInput, gradient: Tensor, result: Any) -> None:
        self.step, self.op, self.result = objective, objective.op, result
        self.settings, self.preconditioner = given.settings, given.parts.preconditioner
        self.derivatives = Derivatives(objective, gradient)
        self.closures = given.closures.by_role()
        self.eps = torch.finfo(objective.vector.dtype).eps

    def fail(self, message: str | None) -> None:
        """Raise for a message, in all processes if one of them has any."""
        fail(self.step.processes, message)

    def run(self) -> None:
        looks = {name: self._look(closure) for name, closure in self.closures.items()}
        self.eps = max(self.eps, *(look.eps for look in looks.values()))
        base = self._determinism()
        self._reductions(looks)
        self.derivatives.check(base, self.eps)

    def _look(self, closure: Closure) -> ReductionTrace:
        look = ReductionTrace()
        with self.step.running() as run, structural.collecting(False):
            look.run(closure)
        for criterion in look.criteria:
            criterion.factor *= run.scaling.unit
        return look

    def _determinism(self) -> float:
        """Every closure twice at the same point; returns the loss of the first one."""
        step, found = self.step, []
        for name, closure in self.closures.items():
            first, second = step.loss_of(closure), step.loss_of(closure)
            found.append(first)
            size = abs(first) + self.derivatives.reach
            bound = max(64 * torch.finfo(step.vector.dtype).eps, 4 * self.eps) * size
            if not abs(first - second) <= bound:
                self.fail(
                    f"two calls of the {self._name(name)} at the same parameters gave the losses {first!r} and "
                    f"{second!r}: it must be one function of the parameters within a step. Draw batches before step() "
                    "and keep no state from call to call; draws of torch, random and numpy are repeated by the "
                    "optimizer, but not those of a generator that the closure does not refer to itself"
                )
            if name == "closure" and not abs(first - step.loss) <= 4 * self.eps**0.5 * size:
                self.fail(
                    f"the closure's loss is {step.loss!r} where its gradient is computed, but {first!r} where it is "
                    "only evaluated, at the same parameters: it must not depend on whether gradients are enabled, nor "
                    "on how often it was called"
                )
        return found[0]

    def _name(self, role: str) -> str:
        return "closure" if role == "closure" else f"{role}= closure"

    def _reductions(self, looks: dict[str, ReductionTrace]) -> None:
        self.fail(self._returned())
        own = looks["closure"].criteria
        # A Hessian takes the criteria as they come; declared outputs need none.
        if isinstance(self.op, GaussNewton) and not all(isinstance(p.space, Matching) for p in self.op.parts):
            return
        self.fail(unequal_batches(own, self.settings.batch_dim))
        for name, look in looks.items():
            self.fail(self._weights(name, looks["closure"], look))
        self.fail(self._cases(looks["curvature" if "curvature" in looks else "closure"]))

    def _returned(self) -> str | None:
        """The loss that the closure returned against what it called ``backward()`` on."""
        result = self.result
        if isinstance(result, Tensor) and result.numel() == 1:
            result = float(result.detach())
        given = isinstance(result, float)
        processes = self.step.processes
        value = float(result) if given else 0.0
        if processes is not None:
            value, given = processes.mean(value), processes.mean(float(given)) == 1.0
        if not given:
            return None
        minimised = self.step.loss
        scales = {1.0, 1.0 if self.step.scaler is None else 1.0 / self.step.scaler.get_scale()}
        size = abs(value) + abs(minimised)
        if any(abs(value * s - minimised) <= 1e-3 * size + 64 * self.eps * size for s in scales):
            return None
        return (
            f"the closure returned the loss {value!r}, but called backward() on losses that sum to {minimised!r}, "
            "which is what is minimised: return the same loss, the sum of all that backward() is called on (or None)"
        )

    def _weights(self, name: str, own: ReductionTrace, other: ReductionTrace) -> str | None:
        """Whether the losses of two closures are in one unit."""
        names = [sorted({c.name for c in look.criteria}) for look in (own, other)]
        a, b = (sum(c.weight for c in look.criteria) for look in (own, other))
        if names[0] != names[1] or not (a > 0 and b > 0) or 2 / 3 <= a / b <= 1.5:
            return None
        return (
            f"the criteria of the {self._name(name)} have the weight {b:.6g} in all (1 for a mean over cases, their "
            f"number for a sum), but {a:.6g} in the closure of the gradient, so that the two losses are in different "
            "units: use means over cases (reduction='mean') in all closures of a step"
        )

    def _cases(self, look: ReductionTrace) -> str | None:
        """Describe a mistake in the dimension along which a Fisher matrix or a preconditioner takes cases."""
        s = self.settings
        fisher = s.curvature in ("fisher", "empirical-fisher")
        dim = s.batch_dim if fisher else getattr(self.preconditioner, "batch_dim", None)
        if dim is None:
            return None
        for c in look.criteria:
            if c.by_class and len(c.shape) > 1 and dim % len(c.shape) == 1:
                return (
                    f"batch_dim is {dim}, but that is the dimension of the classes of {c.name}, whose input has shape "
                    f"{c.shape}: give the dimension along which cases stand (0 for inputs (N, C))"
                )
            if s.curvature == "empirical-fisher" and c.summed:
                return (
                    f"the empirical Fisher matrix takes the loss for a mean over cases, but {c.name} is summed over "
                    f"{c.terms} terms with the factor 1: use reduction='mean', or divide by the number of cases"
                )
        return None
