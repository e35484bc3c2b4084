"""Self-checks of a step: is the closure what the optimizer takes it for, and are its derivatives right?

In this order, before the parameters move: the closure is the same function at every call; its loss is weighed as the
optimizer takes it to be; its gradient agrees with differences of the loss; products are symmetric and, where that is
promised, not negative; products agree with differences of the outputs (of the gradient, for a Hessian). They cost some
40 evaluations of the loss and 10 products, less than a step of many CG iterations, and leave no trace.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hfopt import structural
from hfopt.closure import Closure, outputs_again, trace
from hfopt.curvature import GaussNewton
from hfopt.differences import Directions, Rung, Verdict, absolute, around, judge, lengths
from hfopt.errors import CheckFailed
from hfopt.output_space import Matching
from hfopt.reductions import Look, unequal_batches
from hfopt.vector import dot

if TYPE_CHECKING:
    from hfopt.objective import Objective

logger = logging.getLogger("hfopt")

CUSTOM = (
    "Look for a torch.autograd.Function with a wrong backward, and for detach(), .data, .item(), numpy or no_grad on "
    "the way from the parameters to the loss"
)


def check(step: Objective, gradient: Tensor, result: Any) -> None:
    """Check a step that is about to be taken, if its optimizer asks for it now.

    Args:
        step: the objective at theta.
        gradient: of the loss alone (P,).
        result: what the closure returned.

    Raises:
        CheckFailed: what was found, and what to do.
    """
    o = step.o
    if o.check is False:
        return
    kind = _kind(step)
    if o.checked and (kind in o.checked if o.check is True else o.steps % o.check):
        return
    with _untouched(step):
        _Checks(step, gradient, result).run()
    o.checked.add(kind)


def _kind(step: Objective) -> str:
    """What ``check=True`` tells one kind of closure by."""
    if not isinstance(step.op, GaussNewton):
        return f"{type(step.op).__name__} {step.curvature is None}"
    spaces = {
        str([type(part.space).__name__, *((z.dim(), str(z.dtype)) for z in part.space.outputs), *_closed(part.space)])
        for part in step.op.parts
    }
    return f"{type(step.op).__name__} {step.curvature is None} {step.own_evaluation} {sorted(spaces)}"


def _closed(space: Any) -> list[str]:
    return [type(b.closed).__name__ for b in space.blocks] if isinstance(space, Matching) else []


@contextmanager
def _untouched(step: Objective) -> Iterator[None]:
    """Puts back all that runs of the closures may change beside what :class:`hfopt.frozen.Frozen` does."""
    params = [p for group in step.o.param_groups for p in group["params"]]
    grads = [p.grad for p in params]
    names = ("gradients", "evaluations", "products", "farthest")
    counts, values, products = {n: getattr(step, n) for n in names}, set(step.values), step.op.products
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the user's own draws
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        step.values, step.op.products = values, products
        for name, count in counts.items():
            setattr(step, name, count)
        for p, g in zip(params, grads, strict=True):
            p.grad = g


class _Checks:
    """All checks of one step."""

    def __init__(self, step: Objective, gradient: Tensor, result: Any) -> None:
        self.step, self.op, self.g, self.result = step, step.op, gradient, result
        self.directions = Directions(step.vector, step.theta, seed=step.o.steps)
        roles = {"closure": step.closure, "curvature": step.curvature, "debias": step.debias}
        roles["evaluation"] = step.evaluation
        self.closures: dict[str, Closure] = {}
        for name, closure in roles.items():
            if closure is not None and not any(closure is other for other in self.closures.values()):
                self.closures[name] = closure
        # What the rounding errors of a loss are measured by: terms may cancel in the loss, hardly in this.
        self.reach = absolute(gradient, step.theta)

    def run(self) -> None:
        looks = {name: self._look(closure) for name, closure in self.closures.items()}
        self.eps = max(torch.finfo(self.step.vector.dtype).eps, *(look.eps for look in looks.values()))
        self.base = self._determinism()
        self._reductions(looks)
        self._gradient()
        self._symmetry()
        self._products()

    def _fail(self, message: str | None) -> None:
        """Raise for a message, in all processes if one of them has any."""
        processes = self.step.processes
        if processes is not None and processes.mean(float(message is not None)) > 0 and message is None:
            message = "a self-check failed in another process, whose error says what was found and what to do"
        if message is not None:
            raise CheckFailed(message)

    def _look(self, closure: Closure) -> Look:
        look = Look()
        with self.step._running() as scaling, structural.collecting(False):
            look.run(closure)
        for criterion in look.criteria:
            criterion.factor *= scaling.unit
        return look

    # -- the closure -----------------------------------------------------------------------------------------------

    def _determinism(self) -> float:
        """Every closure twice at the same point; returns the loss of the first one."""
        step, found = self.step, []
        for name, closure in self.closures.items():
            first, second = step.loss_of(closure), step.loss_of(closure)
            found.append(first)
            size = abs(first) + self.reach
            bound = max(64 * torch.finfo(step.vector.dtype).eps, 4 * self.eps) * size
            if not abs(first - second) <= bound:
                self._fail(
                    f"two calls of the {self._name(name)} at the same parameters gave the losses {first!r} and "
                    f"{second!r}: it must be one function of the parameters within a step. Draw batches and numbers of "
                    "numpy and random before step(), and keep no state from call to call; torch's own draws (dropout) "
                    "are repeated by the optimizer"
                )
            if name == "closure" and not abs(first - step.loss) <= 4 * self.eps**0.5 * size:
                self._fail(
                    f"the closure's loss is {step.loss!r} where its gradient is computed, but {first!r} where it is "
                    "only evaluated, at the same parameters: it must not depend on whether gradients are enabled, nor "
                    "on how often it was called"
                )
        return found[0]

    def _name(self, role: str) -> str:
        return "closure" if role == "closure" else f"{role}= closure"

    def _reductions(self, looks: dict[str, Look]) -> None:
        self._fail(self._returned())
        own = looks["closure"].criteria
        o = self.step.o
        if not isinstance(self.op, GaussNewton) or not isinstance(self.op.space, Matching):
            return
        self._fail(unequal_batches(own, o.batch_dim))
        for name, look in looks.items():
            self._fail(self._weights(name, looks["closure"], look))
        self._fail(self._cases(looks["curvature" if "curvature" in looks else "closure"]))

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

    def _weights(self, name: str, own: Look, other: Look) -> str | None:
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

    def _cases(self, look: Look) -> str | None:
        """What the Fisher matrices and a preconditioner take for cases."""
        o = self.step.o
        dim = (
            o.batch_dim
            if o.curvature in ("fisher", "empirical-fisher")
            else getattr(o.preconditioner, "batch_dim", None)
        )
        if dim is None:
            return None
        for c in look.criteria:
            if c.by_class and len(c.shape) > 1 and dim % len(c.shape) == 1:
                return (
                    f"batch_dim is {dim}, but that is the dimension of the classes of {c.name}, whose input has shape "
                    f"{c.shape}: give the dimension along which cases stand (0 for inputs (N, C))"
                )
            if o.curvature == "empirical-fisher" and c.summed:
                return (
                    f"the empirical Fisher matrix takes the loss for a mean over cases, but {c.name} is summed over "
                    f"{c.terms} terms with the factor 1: use reduction='mean', or divide by the number of cases"
                )
        return None

    # -- derivatives -----------------------------------------------------------------------------------------------

    def _ladder(self, d: Tensor, rung: Callable[[Sequence[Tensor], Sequence[Any], float], Rung], at: Any) -> Verdict:
        """Differences along d: ``rung`` gets two displacements, ``at()`` at both, and the length."""
        step, rungs = self.step, []
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

        return self._ladder(d, rung, lambda: self.step.loss_of(self.step.closure))

    def _gradient(self) -> None:
        self._silent()
        d = self.directions

        def tries() -> Iterator[Verdict]:
            yield self._slope(d.random())
            yield self._slope(d.aligned(self.g))
            yield self._slope(d.relative())
            yield self._slope(d.random())

        found = self._twice("the gradient", tries())
        if found is not None and found.quotient == 0.0:
            self._fail(
                "the closure's loss did not change by a bit when the parameters were moved, though its gradient says "
                f"that it would by {found.foretold:.6g} per unit: compute the model's outputs anew in every call of "
                "the closure"
            )
        if found is not None:
            self._fail(
                f"the gradient of the closure's loss is wrong: along a random direction it foretells a slope of "
                f"{found.foretold:.6g}, but differences of the loss give {found.quotient:.6g} (to {found.error:.1g}). "
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
            self._fail(
                f"the gradient is zero in parameters of shapes {shapes}, but the loss changes when they are moved (its "
                f"slope is {found.quotient:.6g}, to {found.error:.1g}). {CUSTOM}"
            )

    def _symmetry(self) -> None:
        v, w = self.directions.random(), self.directions.random()
        gv, gw = self.op.multiply(v), self.op.multiply(w)
        a, b = dot(w, gv), dot(v, gw)
        quadratics = dot(v, gv), dot(w, gw)
        size = absolute(w, gv) + absolute(v, gw) + abs(quadratics[0] * quadratics[1]) ** 0.5
        tolerance = 4 * self.eps**0.5
        if not abs(a - b) <= tolerance * size:
            self._fail(
                f"the curvature matrix is not symmetric: w'Gv is {a:.6g} and v'Gw is {b:.6g} for two random vectors. "
                "Look for a torch.autograd.Function in the model whose derivative cannot be differentiated again "
                "(operations on detached tensors in backward), or a forward mode (jvp) that is not that of its backward"
            )
        if not isinstance(self.op, GaussNewton) or not all(self._promised(part.space) for part in self.op.parts):
            return
        for x, gx, q in ((v, gv, quadratics[0]), (w, gw, quadratics[1])):
            q -= self._beside(x)
            if q < -tolerance * absolute(x, gx):
                self._fail(
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
        found = self._twice("products", (along(x) for x in (d.random(), d.relative(), d.random(), d.aligned(self.g))))
        if found is not None:
            what = "outputs" if isinstance(self.op, GaussNewton) else "gradient"
            self._fail(
                f"products with the curvature matrix are wrong: v'Gv is {found.foretold:.6g} for a random vector v, "
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
        kind = "module" if step.o.outputs else "loss" if step.o.loss else "criteria" if criteria else "result"
        sites = [site for part in op.parts for site in part.sites]
        with step._running(), torch.set_grad_enabled(op.differentiates):
            found = outputs_again(op._closure, kind, sites, module=step.o.outputs)
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
            w, direct = op._output_product(i, list(cast), vs)
            for x, z, y in zip(own, zs, w, strict=True):
                if y is not None:
                    total += float((x * y.double()).sum())
                    size += float((z.abs() * y.double().abs()).sum())
            total += sum(float((v * r).sum()) for v, r in zip(vs, direct, strict=True) if r is not None)
        return self._mean(total * op.unit), self._mean(size * op.unit)

    def _of_gradients(self, d: Tensor) -> Verdict:
        """``d'Hd`` against differences of the gradient."""
        step, op = self.step, self.op
        closure = step.closure if step.curvature is None else step.curvature

        def slopes() -> Tensor:
            with step._running() as scaling:
                seen = trace(closure, loss=step.o.loss, cut=False)
            found: Sequence[Tensor | None] = torch.autograd.grad(seen.total, step.vector.params, allow_unused=True)
            flat = step.vector.flatten(found).mul_(scaling.unit)
            return flat if step.processes is None else step.processes.mean_(flat)

        def rung(deltas: Sequence[Tensor], values: Sequence[Tensor], h: float) -> Rung:
            mean = (deltas[0] - deltas[1]) / (2 * h)
            product = op.multiply(mean)
            forward, backward = dot(mean, values[0] - op.gradient) / h, dot(mean, op.gradient - values[1]) / h
            rounding = 8 * self.eps * absolute(mean, op.gradient) / h + 100 * self.eps * absolute(mean, product)
            return Rung((forward + backward) / 2, dot(mean, product), forward - backward, rounding)

        return self._ladder(d, rung, slopes)


def check_option(check: Any) -> bool | int:
    """The argument ``check``, if it is one.

    Raises:
        ValueError: neither a truth value nor a positive number of steps.
    """
    if isinstance(check, bool) or (isinstance(check, int) and check > 0):
        return check
    raise ValueError(f"check is {check!r}, but must be True, False, or after how many steps to check again (1, 2, ...)")
