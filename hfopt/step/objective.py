"""What a step minimises: loss, gradient and matrix at theta, and the loss around it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hfopt.closure import loss_scaling
from hfopt.closure.differentiable import twice_differentiable
from hfopt.closure.frozen import Frozen
from hfopt.closure.trace import Closure, differentiate, evaluate
from hfopt.curvature.fisher import Fisher
from hfopt.curvature.gauss_newton import GaussNewton, Hessian
from hfopt.curvature.policy import still_holds
from hfopt.linalg.processes import processes_of
from hfopt.linalg.vector import ParameterVector, dot, norm
from hfopt.recurrences.segments import checkpointing

if TYPE_CHECKING:
    from hfopt.optimizer import HessianFree


@dataclass(frozen=True)
class QuadraticModel:
    """The quadratic model ``q(p) = g'p + p'(op + c)p/2`` of one batch; ``g (P,)`` has the penalty's gradient in it."""

    op: GaussNewton | Hessian
    g: Tensor


class Objective:
    """The loss of a step with its gradient, its matrix and its values around theta, all of the same data and draws."""

    def __init__(
        self,
        optimizer: HessianFree,
        closure: Closure,
        curvature: Closure | None,
        evaluation: Closure | None,
        debias: Closure | None = None,
    ) -> None:
        self.o = optimizer
        trainable = optimizer.trainable()
        # A group with lr 0 stays where it is: the model is one of the others alone, as if it were frozen.
        moving = [(g, p) for g, p in trainable if float(g["lr"]) != 0.0]
        self.at_rest = not moving
        groups_params = moving or trainable
        self.vector = ParameterVector(p for _, p in groups_params)
        self.closure, self.curvature, self.debias = closure, curvature, debias
        self.evaluation = next(c for c in (evaluation, debias, closure) if c is not None)
        self.own_evaluation = evaluation is not None
        self.frozen = Frozen(self.vector.device)
        self.decay = self._per_parameter([float(g["weight_decay"]) for g, _ in groups_params])
        rates = [float(g["lr"]) for g, _ in groups_params]
        self.rate = max(rates)
        # sigma, the square of the scale of each parameter's coordinate; None where all groups have one lr.
        scale = self._per_parameter([r / self.rate if self.rate else 1.0 for r in rates])
        self.scale = scale if isinstance(scale, Tensor) else None
        self.gradients = self.evaluations = self.products = 0
        self.differentiates = False
        self.values: set[float] = set()  # of the evaluation loss, wherever it was looked at
        self.farthest = 0.0  # from theta
        self.processes = processes_of(optimizer.process_group, self.vector.device)
        self._same_everywhere()

    def _per_parameter(self, values: list[float]) -> float | Tensor:
        """A number if all parameters share it, else a flat vector (P,)."""
        if len(set(values)) == 1:
            return values[0]
        sizes = torch.tensor(self.vector.sizes)
        flat = torch.repeat_interleave(torch.tensor(values, dtype=self.vector.dtype), sizes)
        return flat.to(self.vector.device)

    def _same_everywhere(self) -> None:
        """All processes must begin at the same point."""
        if self.processes is not None:
            theta = self.vector.flatten(self.vector.params)
            damping = self.o.damping.value or 0.0
            sizes = {"numbers of parameters": float(self.vector.size), "numbers of steps": float(self.o.steps)}
            self.processes.agree(**sizes, **{"norms of the parameters": norm(theta), "lambda": damping})

    def begin(self) -> tuple[Tensor, Any]:
        """Loss, gradient and penalty at theta: the loss's gradient alone, and what the closure returned.

        ``model`` is what step lengths and rho are computed with: that of ``debias``'s batch if there is one.
        """
        loss, gradient, result = self.differentiate()
        theta = self.vector.flatten(self.vector.params)
        self.saved = self.vector.views(theta) if self._same_dtype() else self.vector.snapshot()
        self.g = gradient + theta * self.decay if self.decays() else gradient
        self.theta = theta
        self.model = QuadraticModel(self.op, self.g)
        if self.debias is not None:
            second = self.operator(self.debias)
            self.gradients += 1
            self.model = QuadraticModel(
                second, second.gradient + theta * self.decay if self.decays() else second.gradient
            )
        seen = loss if self.debias is None else float(self.model.op.loss)
        self.f0_plain = self.loss_alone() if self.own_evaluation else seen
        self.f0 = self.f0_plain + self.penalty(theta)
        self.loss = loss
        return gradient, result

    def differentiate(self) -> tuple[float, Tensor, Any]:
        """Loss and gradient; the operator comes with them unless it has a closure of its own."""
        if self.curvature is None:
            self.op = self.operator(self.closure)
            self.scaler = self.op.scaler
            loss, gradient, result = float(self.op.loss), self.op.gradient, self.op.result
        else:
            with self._running() as scaling:
                value, result = differentiate(self.closure, self.vector.params, loss=self.o.loss)
            loss, gradient = float(value), self.vector.flatten([p.grad for p in self.vector.params])
            if scaling.scaler is not None:
                loss, gradient = loss * scaling.unit, gradient.mul_(scaling.unit)
            if self.processes is not None:
                loss, gradient = self.processes.mean(loss), self.processes.mean_(gradient)
            self.op = self.operator(self.curvature)
            self.scaler = scaling.scaler
        self.gradients += 1
        self.differentiates = self.op.differentiates
        return loss, gradient, result

    def operator(self, closure: Closure) -> GaussNewton | Hessian:
        """The curvature operator that the optimizer asks for."""
        o = self.o
        if o.curvature == "hessian":
            return Hessian(closure, self.vector.params, loss=o.loss, frozen=self.frozen, processes=self.processes)
        options: dict[str, Any] = {
            "structural": o.structural > 0,
            "linearisation": o.linearisation,
            "known": o.chosen,
            "memory_budget": o.memory_budget,
            "loss": o.loss,
            "outputs": o.outputs,
            "frozen": self.frozen,
            "processes": self.processes,
        }
        op = self._matrix(closure, options)
        outputs, name = op.outputs, op.linearisation.name
        if o.linearisation == "auto" and (
            o.chosen is None or name != o.chosen[0] or not still_holds(o.chosen, outputs)
        ):
            o.chosen = name, outputs
        return op

    def _matrix(self, closure: Closure, options: dict[str, Any]) -> GaussNewton:
        """The Gauss-Newton matrix, or one of the Fisher matrices."""
        o = self.o
        if o.curvature == "gauss-newton":
            return GaussNewton(closure, self.vector.params, **options)
        # Seeded by the step, so that a resumed run draws the same targets and the user's generator is left alone.
        rank = 0 if self.processes is None else self.processes.rank
        generator = torch.Generator(device=self.vector.device).manual_seed(o.steps + (rank << 32))
        kind = "sampled" if o.curvature == "fisher" else "empirical"
        return Fisher(closure, self.vector.params, kind=kind, batch_dim=o.batch_dim, generator=generator, **options)

    @contextmanager
    def _running(self) -> Iterator[loss_scaling.Scaling]:
        """The context of a run of a closure for its loss, or its loss and gradient."""
        with (
            self.frozen.run(),
            twice_differentiable(),
            checkpointing(self._checkpointed()),
            loss_scaling.watching() as scaling,
        ):
            yield scaling

    def _checkpointed(self) -> bool:
        """Whether sequences are long enough that no run may hold all their hidden states."""
        chosen = self.o.chosen[0] if self.o.chosen is not None else ""
        return "checkpoint" in (self.o.linearisation, chosen if self.o.linearisation == "auto" else "")

    def decays(self) -> bool:
        """Whether any group has a penalty."""
        return isinstance(self.decay, Tensor) or self.decay != 0.0

    def _same_dtype(self) -> bool:
        return all(p.dtype == self.vector.dtype for p in self.vector.params)

    def penalty(self, theta: Tensor) -> float:
        """``sum c/2 theta^2``."""
        if not self.decays():
            return 0.0
        return 0.5 * dot(theta, theta * self.decay)

    def loss_alone(self) -> float:
        """The evaluation closure's loss at the present parameters."""
        self.evaluations += 1
        return self.loss_of(self.evaluation)

    def loss_of(self, closure: Closure) -> float:
        """The loss of any of the step's closures at the present parameters."""
        with self._running() as scaling:
            value = float(evaluate(closure, loss=self.o.loss, differentiates=self.differentiates))
        if scaling.scaler is not None:
            value *= scaling.unit
        return value if self.processes is None else self.processes.mean(value)

    def f(self, direction: Tensor, length: float = 1.0) -> float:
        """Loss and penalty at ``theta + length * direction``; the parameters come back to the bit."""
        try:
            self.vector.move(self.saved, direction, length)
            value = self.loss_alone()
        finally:
            self.vector.restore(self.saved)
        self.values.add(value)
        self.farthest = max(self.farthest, abs(length) * norm(direction))
        if self.decays():
            value += self.penalty(self.theta + length * direction)
        return value
