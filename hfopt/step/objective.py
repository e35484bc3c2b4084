"""The function that a step minimises: loss, gradient and matrix at theta, and the loss around it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hfopt.closure.frozen import Frozen
from hfopt.closure.patch import undone
from hfopt.closure.run import ClosureRun, closure_run
from hfopt.closure.trace import Closure, differentiate, evaluate
from hfopt.curvature.fisher import Fisher
from hfopt.curvature.gauss_newton import GaussNewton
from hfopt.curvature.hessian import Hessian
from hfopt.curvature.policy import still_holds
from hfopt.errors import logger
from hfopt.linalg.vector import ParameterVector, dot, norm
from hfopt.step.settings import StepInput


def _undefined(error: Exception) -> bool:
    """Tell whether an error says that a function has no value at a point, rather than that the code is wrong."""
    if isinstance(error, (torch.linalg.LinAlgError, np.linalg.LinAlgError, ArithmeticError)):  # type: ignore[attr-defined]
        return True
    # torch.distributions checks its parameters and values, and has no error of its own for that.
    return isinstance(error, ValueError) and "to satisfy the constraint" in str(error)


@dataclass(frozen=True)
class QuadraticModel:
    """The quadratic model ``q(p) = g'p + p'(op + c)p/2`` of one batch; ``g (P,)`` has the penalty's gradient in it."""

    op: GaussNewton | Hessian
    g: Tensor


class Objective:
    """The loss of a step with its gradient, its matrix and its values around theta, all of the same data and draws.

    Attributes:
        vector: the parameters that move, as one vector (P,).
        theta: their values before the step (P,); ``saved``: the same in their own precision.
        op: the curvature operator at theta, without damping.
        g: gradient of loss and penalty (P,); ``loss`` is the loss of the gradient closure.
        model: the quadratic model that step lengths and rho are computed with: of ``debias``'s batch if there is one.
        f0: loss and penalty of the evaluation closure at theta; ``f0_plain`` without the penalty.
        chosen: the linearisation that ``"auto"`` has taken, and for how many outputs.
    """

    op: GaussNewton | Hessian
    model: QuadraticModel
    g: Tensor
    theta: Tensor
    saved: list[Tensor]
    loss: float
    f0: float
    f0_plain: float
    scaler: Any

    def __init__(self, given: StepInput) -> None:
        self.settings, self.closures, self.processes = given.settings, given.closures, given.processes
        self.steps, self.chosen = given.memory.steps, given.memory.chosen
        self.vector = ParameterVector(p.value for p in given.parameters)
        self.frozen = Frozen(self.vector.device, given.closures.by_role().values())
        self.saved = []
        self.moved = False  # by a step that is accepted
        self.decay = self._per_parameter([p.weight_decay for p in given.parameters])
        rates = [p.lr for p in given.parameters]
        self.rate = max(rates)
        # sigma, the square of the scale of each parameter's coordinate; None where all groups have one lr.
        scale = self._per_parameter([r / self.rate if self.rate else 1.0 for r in rates])
        self.scale = scale if isinstance(scale, Tensor) else None
        self.gradients = self.evaluations = self.products = 0
        self.differentiates = False
        self.values: set[float] = set()  # of the evaluation loss, wherever it was looked at
        self.farthest = 0.0  # from theta

    def _per_parameter(self, values: list[float]) -> float | Tensor:
        """Return a number if all parameters share it, else a flat vector (P,)."""
        if len(set(values)) == 1:
            return values[0]
        sizes = torch.tensor(self.vector.sizes)
        flat = torch.repeat_interleave(torch.tensor(values, dtype=self.vector.dtype), sizes)
        return flat.to(self.vector.device)

    def begin(self) -> tuple[Tensor, Any]:
        """Compute loss, gradient and penalty at theta; return the loss's gradient alone, and the closure's result."""
        loss, gradient, result = self._differentiate()
        theta = self.vector.flatten(self.vector.params)
        self.saved = self.vector.views(theta) if self._same_dtype() else self.vector.snapshot()
        self.g = self._with_decay(self.op, gradient, theta)
        self.theta = theta
        self.model = QuadraticModel(self.op, self.g)
        if self.closures.debias is not None:
            second = self.operator(self.closures.debias)
            self.gradients += 1
            self.model = QuadraticModel(second, self._with_decay(second, second.gradient, theta))
        own = self.closures.evaluation is not None
        seen = loss if self.closures.debias is None else float(self.model.op.loss)
        self.f0_plain = self.loss_alone() if own else seen
        self.f0 = self.f0_plain + self.penalty(theta)
        self.loss = loss
        return gradient, result

    def _with_decay(self, op: GaussNewton | Hessian, gradient: Tensor, theta: Tensor) -> Tensor:
        """Add the penalty's gradient; what gradient hooks hold still, the penalty does not move either."""
        return op.project(gradient + theta * self.decay) if self.decays() else gradient

    def _differentiate(self) -> tuple[float, Tensor, Any]:
        """Compute loss and gradient; the operator comes with them unless it has a closure of its own."""
        if self.closures.curvature is None:
            self.op = self.operator(self.closures.gradient)
            self.scaler = self.op.scaler
            loss, gradient, result = float(self.op.loss), self.op.gradient, self.op.result
        else:
            with self.running() as run:
                value, result = differentiate(self.closures.gradient, self.vector.params, loss=self.settings.loss)
            scaling = run.scaling
            loss, gradient = float(value), self.vector.flatten([p.grad for p in self.vector.params])
            if scaling.scaler is not None:
                loss, gradient = loss * scaling.unit, gradient.mul_(scaling.unit)
            if self.processes is not None:
                loss, gradient = self.processes.mean(loss), self.processes.mean_(gradient)
            self.op = self.operator(self.closures.curvature)
            self.scaler = scaling.scaler
        self.gradients += 1
        self.differentiates = self.op.differentiates
        return loss, gradient, result

    def operator(self, closure: Closure) -> GaussNewton | Hessian:
        """Build the curvature operator that the settings ask for."""
        s = self.settings
        if s.curvature == "hessian":
            return Hessian(closure, self.vector.params, loss=s.loss, frozen=self.frozen, processes=self.processes)
        options: dict[str, Any] = {
            "structural": s.structural > 0,
            "linearisation": s.linearisation,
            "known": self.chosen,
            "memory_budget": s.memory_budget,
            "loss": s.loss,
            "outputs": s.outputs,
            "frozen": self.frozen,
            "processes": self.processes,
            "verify": False,  # the first step of every kind of closure is checked as a whole
        }
        op = self._matrix(closure, options)
        outputs, name, known = op.outputs, op.linearisation.name, self.chosen
        if s.linearisation == "auto" and (known is None or name != known[0] or not still_holds(known, outputs)):
            self.chosen = name, outputs
        return op

    def _matrix(self, closure: Closure, options: dict[str, Any]) -> GaussNewton:
        """Build the Gauss-Newton matrix, or one of the Fisher matrices."""
        s = self.settings
        if s.curvature == "gauss-newton":
            return GaussNewton(closure, self.vector.params, **options)
        # Seeded by the step, so that a resumed run draws the same targets and the user's generator is left alone.
        generator = torch.Generator(device=self.vector.device).manual_seed(self.steps)
        kind = "sampled" if s.curvature == "fisher" else "empirical"
        return Fisher(closure, self.vector.params, kind=kind, batch_dim=s.batch_dim, generator=generator, **options)

    def running(self) -> AbstractContextManager[ClosureRun]:
        """Return the context of a run of a closure for its loss, or its loss and gradient."""
        return closure_run(self.frozen, checkpoint=self._checkpoints())

    def _checkpoints(self) -> bool:
        """Tell whether sequences are long enough that no run may hold all their hidden states."""
        chosen = self.chosen[0] if self.chosen is not None else ""
        policy = self.settings.linearisation
        return "checkpoint" in (policy, chosen if policy == "auto" else "")

    @property
    def rounding(self) -> float:
        """The size of a change of the loss that says nothing: its rounding error."""
        return 4 * torch.finfo(self.vector.dtype).eps * abs(self.f0)

    def decays(self) -> bool:
        """Tell whether any group has a penalty."""
        return isinstance(self.decay, Tensor) or self.decay != 0.0

    def _same_dtype(self) -> bool:
        return all(p.dtype == self.vector.dtype for p in self.vector.params)

    def penalty(self, theta: Tensor) -> float:
        """Return ``sum c/2 theta^2``."""
        if not self.decays():
            return 0.0
        return 0.5 * dot(theta, theta * self.decay)

    def loss_alone(self) -> float:
        """Return the evaluation closure's loss at the present parameters."""
        self.evaluations += 1
        return self.loss_of(self.closures.judge)

    def loss_of(self, closure: Closure, *, trial: bool = False) -> float:
        """Return the loss of any of the step's closures at the present parameters.

        With ``trial``, a loss that is not defined there (a matrix without a factorisation, a distribution without a
        density, an overflow in Python) is infinite; elsewhere it is the user's error.
        """
        try:
            with self.running() as run:
                value = float(evaluate(closure, loss=self.settings.loss, differentiates=self.differentiates))
            if run.scaling.scaler is not None:
                value *= run.scaling.unit
        except (RuntimeError, ValueError, ArithmeticError) as error:
            if not (trial and _undefined(error)):
                raise
            logger.info("the loss is not defined at a trial point, which is rejected: %s", error)
            value = math.inf
        return value if self.processes is None else self.processes.mean(value)

    def accept(self, direction: Tensor, length: float) -> None:
        """Move to ``theta + length * direction`` for good."""
        self.vector.move(self.saved, direction, length)
        self.moved = True
        for p in self.vector.params:
            torch.autograd.graph.increment_version(p)

    def back(self) -> None:
        """Put the parameters back to theta, unless a step was accepted; may be called at any time, and twice."""
        if self.saved and not self.moved:
            self.vector.restore(self.saved)

    def f(self, direction: Tensor, length: float = 1.0) -> float:
        """Return loss and penalty at ``theta + length * direction``; the parameters come back to the bit."""
        with undone(lambda: self.vector.restore(self.saved)):
            self.vector.move(self.saved, direction, length)
            self.evaluations += 1
            value = self.loss_of(self.closures.judge, trial=True)
        self.values.add(value)
        self.farthest = max(self.farthest, abs(length) * norm(direction))
        if self.decays():
            value += self.penalty(self.theta + length * direction)
        return value

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Put back at the end what runs of the closures and products in the block have counted and left behind."""
        grads = [p.grad for p in self.vector.params]
        names = ("gradients", "evaluations", "products", "farthest")
        counts, values, products = {n: getattr(self, n) for n in names}, set(self.values), self.op.products
        try:
            yield
        finally:
            self.values, self.op.products = values, products
            for name, count in counts.items():
                setattr(self, name, count)
            for p, g in zip(self.vector.params, grads, strict=True):
                p.grad = g

    def set_gradient(self, gradient: Tensor) -> None:
        """Leave a gradient (P,) in ``p.grad``."""
        for p, g in zip(self.vector.params, self.vector.cast_views(gradient), strict=True):
            p.grad = g
