"""Checks of a step's derivatives: its gradient and its products against differences, and what products promise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hfopt.closure.trace import outputs_again, trace
from hfopt.curvature.gauss_newton import GaussNewton
from hfopt.curvature.output_space import Matching
from hfopt.errors import CheckFailed, logger
from hfopt.linalg.processes import Processes
from hfopt.linalg.vector import dot
from hfopt.step.differences import Directions, Rung, Verdict, absolute, around, judge, lengths
from hfopt.step.objective import Objective

CUSTOM = (
    "Look for a torch.autograd.Function with a wrong backward, and for detach(), .data, .item(), numpy or no_grad on "
    "the way from the parameters to the loss"
)


def fail(processes: Processes | None, message: str | None) -> None:
    """Raise for a message, in all processes if one of them has any.

    Raises:
        CheckFailed: with the message, or with one that points to the process that has it.
    """
    if processes is not None and processes.mean(float(message is not None)) > 0 and message is None:
        message = "a self-check failed in another process, whose error says what was found and what to do"
    if message is not None:
        raise CheckFailed(message)


class Derivatives:
    """A step's gradient and products."""

    def __init__(self, step: Objective, gradient: Tensor) -> None:
        self.step, self.op, self.g = step, step.op, gradient
        self.base, self.eps = step.loss, torch.finfo(step.vector.dtype).eps
        self.directions = Directions(step.vector, step.theta, gradient, seed=step.steps)
        # What the rounding errors of a loss are measured by: terms may cancel in the loss, hardly in this.
        self.reach = absolute(gradient, step.theta)

    def check(self, base: float, eps: float) -> None:
        """Check all of them.

        Args:
            base: the closure's loss at theta, as evaluations give it.
            eps: of the lowest precision that is computed in.

        Raises:
            CheckFailed: what was found, and what to do.
        """
        self.base, self.eps = base, eps
        self._gradient()
        self._symmetry()
        self._products()

    def check_products(self, base: float) -> None:
        """Check the products alone; ``base`` as for :meth:`check`."""
        self.base = base
        self._products()

    def fail(self, message: str | None) -> None:
        """Raise for a message, in all processes if one of them has any."""
        fail(self.step.processes, message)

    def _ladder(self, d: Tensor, rung: Callable[[Sequence[Tensor], Sequence[Any], float], Rung], at: Any) -> Verdict:
        """Differences along d: ``rung`` gets two displacements, ``at()`` at both, and the length."""
        step, rungs, d = self.step, [], self.op.project(d)
        try:
            for h in lengths(self.eps):
                pairs = [(delta, at()) for delta in around(step.vector, step.saved, step.theta, d, h)]
                step.vector.restore(step.saved)
                rungs.append(rung([p[0] for p in pairs], [p[1] for p in pairs], h))
        finally:
            step.vector.restore(step.saved)
        return judge(rungs, self.eps)

    def _twice(self, what: str, tries: Iterator[Verdict]) -> Verdict | None:
        """A second wrong verdict; a first right one ends the matter, as do directions that leave it undecided."""
        wrong = right = 0
        for verdict in tries:
            wrong, right = wrong + verdict.wrong, right + verdict.right
            if wrong == 2:
                return verdict
            if right and not wrong:
                return None
        if not right:
            logger.info("self-check of %s: differences are too inexact to decide", what)
        return None

    def _slope(self, d: Tensor) -> Verdict:
        """``g'd`` against differences of the loss."""
        own = 100 * self.eps * absolute(self.g, d)

        def rung(deltas: Sequence[Tensor], values: Sequence[float], h: float) -> Rung:
            (up, down), slopes = values, [dot(self.g, delta) for delta in deltas]
            forward = (up - self.base - slopes[0]) / h
            backward = (self.base - down + slopes[1]) / h
            rounding = 8 * self.eps * (abs(self.base) + self.reach) / h + own
            return Rung((up - down) / (2 * h), (slopes[0] - slopes[1]) / (2 * h), forward - backward, rounding)

        return self._ladder(d, rung, lambda: self.step.loss_of(self.step.closures.gradient))

    def _gradient(self) -> None:
        self._silent()
        d = self.directions

        def tries() -> Iterator[Verdict]:
            yield self._slope(d.random())
            yield self._slope(d.aligned())
            yield self._slope(d.relative())
            yield self._slope(d.random())

        found = self._twice("the gradient", tries())
        if found is not None and found.quotient == 0.0:
            self.fail(
                "the closure's loss did not change by a bit when the parameters were moved, though its gradient says "
                f"that it would by {found.predicted:.6g} per unit: compute the model's outputs again in every call of "
                "the closure"
            )
        if found is not None:
            self.fail(
                f"the gradient of the closure's loss is wrong: along a random direction it predicts a slope of "
                f"{found.predicted:.6g}, but differences of the loss give {found.quotient:.6g} (to {found.error:.1g}). "
                f"{CUSTOM}"
            )

    def _silent(self) -> None:
        """Parameters without a gradient, which may be few among many: the loss must not change with them."""
        still = [not bool(g.any()) for g in self.step.vector.views(self.g)]
        if not any(s and p.numel() for s, p in zip(still, self.step.vector.params, strict=True)):
            return
        found = self._twice(
            "parameters without gradient", (self._slope(self.directions.within(still)) for _ in range(2))
        )
        if found is not None:
            shapes = [tuple(p.shape) for s, p in zip(still, self.step.vector.params, strict=True) if s]
            self.fail(
                f"the gradient is zero in parameters of shapes {shapes}, but the loss changes when they are moved (its "
                f"slope is {found.quotient:.6g}, to {found.error:.1g}). {CUSTOM}"
            )

    def _symmetry(self) -> None:
        v, w = (self.op.project(self.directions.random()) for _ in range(2))
        gv, gw = self.op.multiply(v), self.op.multiply(w)
        a, b = dot(w, gv), dot(v, gw)
        quadratics = dot(v, gv), dot(w, gw)
        size = absolute(w, gv) + absolute(v, gw) + abs(quadratics[0] * quadratics[1]) ** 0.5
        tolerance = 4 * self.eps**0.5
        if not abs(a - b) <= tolerance * size:
            self.fail(
                f"the curvature matrix is not symmetric: w'Gv is {a:.6g} and v'Gw is {b:.6g} for two random vectors. "
                "Look for a torch.autograd.Function in the model whose derivative cannot be differentiated again "
                "(operations on detached tensors in backward), or a forward mode (jvp) that is not that of its backward"
            )
        if not isinstance(self.op, GaussNewton) or not all(self._promised(part.space) for part in self.op.parts):
            return
        for x, gx, q in ((v, gv, quadratics[0]), (w, gw, quadratics[1])):
            q -= self._beside(x)
            if q < -tolerance * absolute(x, gx):
                self.fail(
                    f"the curvature of the criteria is negative: v'Gv is {q:.6g} for a random vector v. Look for a "
                    "minus sign, a negative weight of a criterion or negative class weights; for a loss that is meant "
                    "to be so, use curvature='hessian'"
                )

    def _promised(self, space: Any) -> bool:
        """Whether all criteria have a closed form, which is positive semi-definite."""
        return isinstance(space, Matching) and all(b.closed is not None for b in space.blocks)

    def _beside(self, v: Tensor) -> float:
        """The curvature along v of regularisers, which may be anything."""
        vs, total = self.step.vector.views(v), 0.0
        assert isinstance(self.op, GaussNewton)
        for part in self.op.parts:
            _, direct = part.space.product([None] * part.count, self.step.vector.cast_views(v))
            total += sum(float((x * g).sum()) for x, g in zip(vs, direct, strict=True) if g is not None)
        return self._mean(total * self.op.unit)

    def _mean(self, value: float) -> float:
        return value if self.step.processes is None else self.step.processes.mean(value)

    def _products(self) -> None:
        along = self._of_outputs if isinstance(self.op, GaussNewton) else self._of_gradients
        d = self.directions
        found = self._twice("products", (along(x) for x in (d.random(), d.relative(), d.random(), d.aligned())))
        if found is not None:
            what = "outputs" if isinstance(self.op, GaussNewton) else "gradient"
            self.fail(
                f"products with the curvature matrix are wrong: v'Gv is {found.predicted:.6g} for a random vector v, "
                f"but differences of the {what} give {found.quotient:.6g} (to {found.error:.1g}). {CUSTOM}; or try "
                "another linearisation="
            )

    def _of_outputs(self, d: Tensor) -> Verdict:
        """``d'Gd`` against ``u'H u + d'R''d``, u from differences of the outputs."""
        base = self._outputs()
        vector = self.step.vector

        def rung(deltas: Sequence[Tensor], values: Sequence[list[Tensor]], h: float) -> Rung:
            mean = (deltas[0] - deltas[1]) / (2 * h)
            pairs = list(zip(*values, base, strict=True))
            central, rounding = self._quadratic([(up - down) / (2 * h) for up, down, _ in pairs], mean, base)
            forward, _ = self._quadratic([(up - z) / h for up, _, z in pairs], mean, base)
            backward, _ = self._quadratic([(z - down) / h for _, down, z in pairs], mean, base)
            product = self.op.multiply(mean)
            rounding = 8 * self.eps * rounding / h + 100 * self.eps * absolute(mean, product)
            return Rung(central, dot(mean, product), forward - backward, rounding)

        assert vector.size == len(d)
        return self._ladder(d, rung, self._outputs)

    def _outputs(self) -> list[Tensor]:
        """All outputs of the operator's closure, in double precision."""
        step, op = self.step, self.op
        assert isinstance(op, GaussNewton)
        criteria = isinstance(op.parts[0].space, Matching)
        kind = (
            "module"
            if step.settings.outputs
            else "loss"
            if step.settings.loss
            else "criteria"
            if criteria
            else "result"
        )
        sites = [site for part in op.parts for site in part.sites]
        with step.running(), torch.set_grad_enabled(op.differentiates):
            found = outputs_again(op.closure, kind, sites, module=step.settings.outputs)
        return [z.detach().double() for z in found]

    def _quadratic(self, u: Sequence[Tensor], d: Tensor, base: Sequence[Tensor]) -> tuple[float, float]:
        """``u'H u`` with the regulariser's part, and ``sum |H u| |z|``, what its rounding is measured by."""
        op, left, outputs = self.op, list(u), list(base)
        assert isinstance(op, GaussNewton)
        vs = self.step.vector.cast_views(d)
        total = size = 0.0
        for i, part in enumerate(op.parts):
            own, zs = [left.pop(0) for _ in range(part.count)], [outputs.pop(0) for _ in range(part.count)]
            cast = [x.to(z.dtype) for x, z in zip(own, part.space.outputs, strict=True)]
            w, direct = op.output_product(i, list(cast), vs)
            for x, z, y in zip(own, zs, w, strict=True):
                if y is not None:
                    total += float((x * y.double()).sum())
                    size += float((z.abs() * y.double().abs()).sum())
            total += sum(float((v * r).sum()) for v, r in zip(vs, direct, strict=True) if r is not None)
        return self._mean(total * op.unit), self._mean(size * op.unit)

    def _of_gradients(self, d: Tensor) -> Verdict:
        """``d'Hd`` against differences of the gradient."""
        step, op = self.step, self.op
        closures = step.closures
        closure = closures.gradient if closures.curvature is None else closures.curvature

        def slopes() -> Tensor:
            with step.running() as run:
                seen = trace(closure, loss=step.settings.loss, cut=False)
            found: Sequence[Tensor | None] = torch.autograd.grad(seen.total, step.vector.params, allow_unused=True)
            flat = step.vector.flatten(found).mul_(run.scaling.unit)
            return flat if step.processes is None else step.processes.mean_(flat)

        def rung(deltas: Sequence[Tensor], values: Sequence[Tensor], h: float) -> Rung:
            mean = (deltas[0] - deltas[1]) / (2 * h)
            product = op.multiply(mean)
            forward, backward = dot(mean, values[0] - op.gradient) / h, dot(mean, op.gradient - values[1]) / h
            rounding = 8 * self.eps * absolute(mean, op.gradient) / h + 100 * self.eps * absolute(mean, product)
            return Rung((forward + backward) / 2, dot(mean, product), forward - backward, rounding)

        return self._ladder(d, rung, slopes)
