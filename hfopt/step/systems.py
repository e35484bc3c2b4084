"""The damped systems of a step, ``(G + lambda I + c) x = -g``, and how they are solved: by CG, or densely."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from hfopt.curvature.gauss_newton import GaussNewton
from hfopt.linalg.cg_debiased import Quadratic
from hfopt.linalg.dense import DenseSystem
from hfopt.linalg.solution import Iterate, Solution
from hfopt.linalg.units import unit_of
from hfopt.linalg.vector import dot, norm
from hfopt.step.objective import Objective
from hfopt.step.settings import StepMemory, StepParts

# Parameters up to which a matrix is diagonalised in the time of a solve by conjugate gradients, and what the batched
# passes that form it may go through, in bytes, to cost no more than one.
_DENSE, _DENSE_BYTES = 384, 1 << 27
NOWHERE: Mapping[str, Tensor] = {}
"""No start: the solve begins at zero."""


class DampedSystems:
    """The systems of one step on an objective; ``memory`` has the last solution, where a solve may begin."""

    def __init__(self, objective: Objective, parts: StepParts, memory: StepMemory) -> None:
        self.objective, self.settings, self.parts, self.memory = objective, objective.settings, parts, memory
        self._system: DenseSystem | None = None

    def cg_start(self) -> dict[str, Tensor]:
        """Return the last solution as the next solve takes it: ``augment``, with a decay ``x0``, or nothing."""
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
        # lambda bounds the eigenvalues from below if the matrix is semi-definite, which a Hessian is not.
        known = damping if damping == 0 or isinstance(at.op, GaussNewton) else None
        if at.model.op is at.op:
            solution = cg.solve(seen, -at.g, x0, preconditioner, directions=directions, augment=augment, damping=known)
        else:
            second = Quadratic(at.model.op.damped(damping, mu, decay), -at.model.g, self.settings.debias_slopes)
            solution = cg.solve(seen, -at.g, x0, preconditioner, second=second, damping=known)
        at.products += solution.products
        return solution

    @functools.cached_property
    def dense(self) -> bool:
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
        if self._system is None or mu:
            with_mu = damping if mu else 0.0
            decay = at.decay if at.scale is None else at.decay + with_mu * (1 / at.scale - 1)
            # Columns within the space that gradient hooks leave: outside of it, the operator is not symmetric.
            eye = at.op.project(torch.eye(at.vector.size, dtype=at.vector.dtype, device=at.vector.device))
            matrix = at.op.damped(with_mu, mu, decay).multiply_many(eye)
            at.products += at.vector.size
            metric = None if at.scale is None else 1 / at.scale
            self._system = DenseSystem(matrix, -at.g, with_mu, metric, at.op.project)
        return self._system

    def dense_solution(self, system: DenseSystem, damping: float) -> Solution:
        """The solution for one lambda in the form that conjugate gradients give theirs."""
        if not system.finite:
            zero = torch.zeros_like(self.objective.g)
            return Solution(zero, [Iterate(0, zero, 0.0)], "not finite", 0, 0)
        x, scale = system.solution(damping), self.objective.scale
        along, curved = system.model(damping)
        curved += damping * dot(x, x if scale is None else x / scale)
        return Solution(x, [Iterate(0, x, 0.5 * curved - along)], "dense", 0, 0)

    @property
    def coordinates(self) -> Callable[[Tensor], Tensor] | None:
        """The preconditioner ``sigma r`` of the scaled coordinates, their inverse metric; None without scales."""
        scale = self.objective.scale
        return None if scale is None else lambda r: r * scale

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
