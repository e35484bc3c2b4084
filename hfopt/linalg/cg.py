"""Preconditioned conjugate gradients for ``A x = b``, made for truncated Newton steps.

Minimises the quadratic model ``phi(x) = x'Ax/2 - b'x`` and stops where its decrease per product is largest, or on
little relative progress (Martens, "Deep learning via Hessian-free optimization", ICML 2010, section 4.4), keeping
iterates on the way for backtracking (section 4.6), and directions for solutions with other dampings
(:mod:`hfopt.linalg.krylov`).
On a CUDA device the same iterations are made without waiting for it: :mod:`hfopt.linalg.cg_device`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from hfopt.linalg.cuda_graphs import Attempts, recording
from hfopt.linalg.vector import dot, norm


class LinearMap(Protocol):
    """Anything with a product: ``multiply(v, out)`` writes ``A v`` to ``out`` and returns it."""

    def multiply(self, v: Tensor, out: Tensor | None = None) -> Tensor:
        """``A v``."""


@dataclass(frozen=True)
class CGCheck:
    """One line of the table of checks.

    Attributes:
        iteration: number of CG iterations done.
        model: ``phi`` there, damping included.
        residual: ``|b - A x|``, as the recurrence has it.
        norm: ``|x|``.
        evaluation: change of the loss on the evaluation data at this iterate, where backtracking has looked; else None.
    """

    iteration: int
    model: float
    residual: float
    norm: float
    evaluation: float | None = None


@dataclass(frozen=True)
class Iterate:
    """A stored iterate ``x (P,)`` after ``iteration`` iterations, with its ``phi``."""

    iteration: int
    x: Tensor
    phi: float


@dataclass
class Solution:
    """What a solve found.

    Attributes:
        x: the last iterate, (P,).
        iterates: those kept for backtracking, the last one always among them.
        reason: ``"progress"``, ``"residual"``, ``"iterations"``, ``"negative curvature"``, ``"not finite"`` or
            ``"stopped"``.
        iterations: number of CG iterations.
        products: number of products with A, on a CUDA device those included that were made before a check showed that
            the solve had ended.
        checks: one row every ``check_every`` iterations and for the last.
        pairs: if directions were asked for, ``S`` and ``A S``, both (m, P): a start that is not zero, the first
            directions, and the last iterate if there were more.
    """

    x: Tensor
    iterates: list[Iterate]
    reason: str
    iterations: int
    products: int
    checks: list[CGCheck] = field(default_factory=list)
    pairs: tuple[Tensor, Tensor] | None = None


@dataclass
class CG:
    """Settings of the solver.

    Args:
        max_iterations: at most this many iterations a solve (Martens 2010: 250).
        min_iterations: the progress rule is not applied before this many.
        tolerance: eps of the progress rule: stop when ``phi_i < 0`` and ``(phi_i - phi_{i-k}) / phi_i < k eps`` with
            ``k = max(10, ceil(0.1 i))`` (Martens 2010: 5e-4); 0 switches the rule off. None: eps is
            ``1 / (overhead + i)`` and ``k = max(5, ceil(0.1 i))``, which is to stop when ``-phi_i / (overhead + i)``,
            the model's decrease per product, is less than it was k iterations before.
        overhead: what a step costs besides its iterations, in products: the gradient, what is made ready for
            products, the evaluations of the loss. Not used where ``tolerance`` is a number.
        residual: stop when ``|b - A x| <= residual |b|``.
        decay: a step starts CG at this multiple of the last CG solution (Martens' code: 0.95); 0 starts at zero. Or a
            schedule: a function of the number of steps done so far, such as :class:`hfopt.RisingDecay`. None: the last
            solution is one more direction, whose length the model chooses, at the one product that a start costs, too;
            solves with two batches (``debias=``) start at zero then.
        growth: iterates are kept at ``ceil(5 growth^j)`` and at the end (Martens 2010, section 4.6: 1.3).
        check_every: iterations between rows of the table of checks.
        repair_every: recompute ``r = b - A x`` from scratch every so many iterations, at one product each; 0: never.
        cuda_graphs: on a CUDA device, record an iteration and launch it as one: ``"auto"`` where that is possible, True
            (an error where it is not), or False. It changes no result.
    """

    max_iterations: int = 250
    min_iterations: int = 1
    tolerance: float | None = None
    overhead: float = 10.0
    residual: float = 1e-10
    decay: float | Callable[[int], float] | None = None
    growth: float = 1.3
    check_every: int = 10
    repair_every: int = 0
    cuda_graphs: bool | str = field(default="auto", compare=False)

    def __post_init__(self) -> None:
        self._attempts = Attempts()
        if self.max_iterations < 1 or self.min_iterations < 1 or self.min_iterations > self.max_iterations:
            raise ValueError(
                f"iterations must satisfy 1 <= min_iterations <= max_iterations, but are {self.min_iterations} and "
                f"{self.max_iterations}"
            )
        tolerance = 0.0 if self.tolerance is None else self.tolerance
        if not (
            tolerance >= 0
            and self.residual >= 0
            and (self.decay is None or callable(self.decay) or 0 <= self.decay <= 1)
            and self.growth > 1
        ):
            raise ValueError(
                f"tolerance and residual must be >= 0, decay in [0, 1], growth > 1, but are {self.tolerance}, "
                f"{self.residual}, {self.decay}, {self.growth}"
            )
        if not (self.overhead >= 0 and math.isfinite(self.overhead)):
            raise ValueError(f"overhead is {self.overhead}, but must be a finite number of products, 0 or more")
        if self.check_every < 1 or self.repair_every < 0:
            raise ValueError(
                f"check_every must be positive and repair_every not negative, but are {self.check_every}, "
                f"{self.repair_every}"
            )
        if self.cuda_graphs not in ("auto", True, False):
            raise ValueError(f"cuda_graphs is {self.cuda_graphs!r}, but must be 'auto', True or False")

    def decay_after(self, steps: int) -> float | None:
        """The multiple of the last solution that a step starts at, ``steps`` having been done before.

        None where the model chooses it.

        Raises:
            ValueError: a schedule gave a number outside [0, 1].
        """
        if not callable(self.decay):
            return self.decay
        found = float(self.decay(steps))
        if not 0 <= found <= 1:
            raise ValueError(f"the schedule of CG's decay gave {found} after {steps} steps, but must stay in [0, 1]")
        return found

    def stored_iterations(self) -> set[int]:
        """``ceil(5 growth^j)`` up to the largest number of iterations."""
        kept, value = set(), 5.0
        while math.ceil(value) <= self.max_iterations:
            kept.add(math.ceil(value))
            value *= self.growth
        return kept

    def window(self, i: int) -> int | None:
        """``k`` of the progress rule after ``i`` iterations; None where it is not applied."""
        k = max(5 if self.tolerance is None else 10, math.ceil(0.1 * i))
        return None if self.tolerance == 0 or i <= k or i < self.min_iterations else k

    def least_share(self, i: int) -> float:
        """``k eps`` of the progress rule after ``i`` iterations; minus infinity where the rule is not applied."""
        k = self.window(i)
        if k is None:
            return -math.inf
        return k / (self.overhead + i) if self.tolerance is None else k * self.tolerance

    def progress_is_little(self, history: list[float]) -> bool:
        """The progress rule on ``phi_0, ..., phi_i``."""
        i = len(history) - 1
        k = self.window(i)
        if k is None:
            return False
        now, then = history[i], history[i - k]
        return now < 0 and (now - then) / now < self.least_share(i)

    def solve(
        self,
        op: LinearMap,
        b: Tensor,
        x0: Tensor | None = None,
        preconditioner: Callable[[Tensor], Tensor] | None = None,
        stop: Callable[[int, Tensor, float], bool] | None = None,
        directions: int = 0,
        augment: Tensor | None = None,
    ) -> Solution:
        """Minimise ``phi`` from ``x0``, or along ``augment`` and what is conjugate to it.

        On a direction of negative or zero curvature the iteration ends; if it is the first direction, and nothing
        better is known, the answer is that direction with the step its curvature's absolute value would give.

        Args:
            op: A (P, P), symmetric.
            b: right-hand side (P,).
            x0: start (P,); None: zero.
            preconditioner: ``z = M^-1 r`` for a fixed symmetric positive definite M; None: identity.
            stop: called at every check with (iteration, x, phi); True ends the solve ("stopped").
            directions: how many directions are kept, with their products: two vectors each.
            augment: u (P,), one more direction, in place of ``x0``; without effect where ``u'Au`` is not clearly
                positive.

        Raises:
            ValueError: ``b``, ``x0`` or ``augment`` of another shape, both of the latter, a right-hand side that is not
                finite, or graphs that are required where there is no CUDA device.
            RuntimeError: graphs are required, but the system cannot be recorded.
        """
        for name, given in (("x0", x0), ("augment", augment)):
            if b.dim() != 1 or (given is not None and given.shape != b.shape):
                other = None if given is None else given.shape
                raise ValueError(f"b must be flat and {name} of its shape, but they have shapes {b.shape} and {other}")
        if x0 is not None and augment is not None:
            raise ValueError("a solve starts at x0 or along augment, but both are given")
        size_b = norm(b)
        if not math.isfinite(size_b):
            raise ValueError("the right-hand side b is not finite")
        if b.device.type != "cuda":
            if self.cuda_graphs is True:
                raise ValueError(f"cuda_graphs is True, but the right-hand side b is on {b.device}; leave it at 'auto'")
            run = HostCG(self, op, b, x0, preconditioner, directions=directions, augment=augment)
            return run.iterate(size_b, stop)
        from hfopt.linalg.cg_device import DeviceCG  # which needs this module

        with recording(op, b, self.cuda_graphs, self._attempts) as recorder:
            run = DeviceCG(self, op, b, x0, preconditioner, recorder, directions=directions, augment=augment)
            return run.iterate(size_b, stop)


class HostCG:
    """One solve where reading a number costs nothing; its vectors are updated in place, allocated once."""

    def __init__(
        self,
        options: CG,
        op: LinearMap,
        b: Tensor,
        x0: Tensor | None,
        preconditioner: Callable[[Tensor], Tensor] | None,
        directions: int = 0,
        augment: Tensor | None = None,
    ) -> None:
        self.o, self.op, self.b, self.precondition = options, op, b, preconditioner
        self.stored = options.stored_iterations()
        self.products = 0
        self.scratch = torch.empty_like(b)
        zero_start = x0 is None or not bool(x0.any())
        self.x = torch.zeros_like(b) if x0 is None else x0.clone()
        self.r = b.clone()
        if not zero_start:
            self.residual_from_scratch()
        self.directions = directions
        self.pairs: list[tuple[Tensor, Tensor]] = []
        if directions and not zero_start:
            self.pairs.append((self.x.clone(), b - self.r))
        self.u: Tensor | None = None
        self.au = b
        if augment is not None:
            self.start_along(augment)
        self.warm = len(self.pairs)
        self.kept: list[Iterate] = []
        self.checks: list[CGCheck] = []
        self.history = [self.phi()]
        self.carried = False  # whether the last phi is the one before, carried along

    def start_along(self, u: Tensor) -> None:
        """Begin at the minimum of phi along u, which is scaled to ``u'Au = 1``."""
        au = self.multiply(u)
        curvature = dot(u, au)
        # Less than that is rounding: of directions in A's null space nothing is known.
        if not 8 * torch.finfo(u.dtype).eps * norm(u) * norm(au) < curvature < math.inf:
            return
        self.u, self.au = u * curvature**-0.5, au * curvature**-0.5
        if self.directions:
            self.pairs.append((self.u, self.au))
        self.correct()

    def correct(self) -> None:
        """To the minimum along u, where rounding would lead away from it."""
        if self.u is not None:
            length = dot(self.u, self.r)
            self.x.add_(self.u, alpha=length)
            self.r.add_(self.au, alpha=-length)

    def conjugate(self, d: Tensor, z: Tensor) -> None:
        """Take out of d what makes z not conjugate to u."""
        if self.u is not None:
            d.add_(self.u, alpha=-dot(z, self.au))

    def multiply(self, v: Tensor) -> Tensor:
        """``A v`` in ``scratch``."""
        self.products += 1
        return self.op.multiply(v, self.scratch)

    def along(self, d: Tensor, ad: Tensor, alpha: float) -> str | None:
        """Move by ``alpha d``, given ``A d``; a reason not to is given back."""
        self.x.add_(d, alpha=alpha)
        self.r.add_(ad, alpha=-alpha)
        return None

    def residual_from_scratch(self) -> None:
        """``r = b - A x``."""
        torch.sub(self.b, self.multiply(self.x), out=self.r)

    def phi(self) -> float:
        """``-(b + r)'x / 2``: the model's value without another product.

        Between the iterates that are kept or shown, phi is carried along by ``-alpha r'z / 2``, which costs nothing:
        on wide networks inner products over (P,) would be a large part of a solve.
        """
        return -0.5 * (dot(self.b, self.x) + dot(self.r, self.x))

    def carries(self, i: int) -> bool:
        """Whether phi after ``i`` iterations is the one before, carried along."""
        o = self.o
        repaired = o.repair_every and i % o.repair_every == 0
        return not repaired and i not in self.stored and i % o.check_every != 0

    def check(self, i: int) -> None:
        """Add a row to the table of checks."""
        self.checks.append(CGCheck(i, self.history[-1], norm(self.r), norm(self.x)))

    def keep(self, i: int) -> None:
        """Keep the iterate for backtracking."""
        if not self.kept or self.kept[-1].iteration != i:
            self.kept.append(Iterate(i, self.x.clone(), self.history[-1]))

    def done(self, reason: str, i: int) -> Solution:
        """The solution, at the present iterate."""
        if self.carried:
            self.history[-1], self.carried = self.phi(), False
        self.keep(i)
        if not self.checks or self.checks[-1].iteration != i:
            self.check(i)
        return Solution(self.x, self.kept, reason, i, self.products, self.checks, self.seen(i))

    def seen(self, i: int) -> tuple[Tensor, Tensor] | None:
        """``S`` and ``A S`` after ``i`` iterations; what was multiplied after them is left out."""
        if not self.directions:
            return None
        del self.pairs[self.warm + i :]
        if i > self.directions:
            self.pairs.append((self.x, self.b - self.r))
        if not self.pairs:
            return self.b.new_empty(0, len(self.b)), self.b.new_empty(0, len(self.b))
        s, a = (list(found) for found in zip(*self.pairs, strict=True))
        self.pairs.clear()  # one copy of each at a time
        first = torch.stack(s)
        s.clear()
        return self.unmixed(first, torch.stack(a))

    def unmixed(self, s: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        """The same space, by directions at right angles to u, of which conjugate ones can contain far more than else.

        Where u has little curvature, they would be taken for dependent ones.
        """
        if self.u is not None and self.warm:
            share = s[1:] @ self.u / norm(self.u) ** 2
            s[1:].addr_(share, self.u, alpha=-1.0)
            a[1:].addr_(share, self.au, alpha=-1.0)
        return s, a

    def iterate(self, size_b: float, stop: Callable[[int, Tensor, float], bool] | None) -> Solution:
        """Solve, with ``size_b = |b|``; ``stop`` is asked at checks."""
        o, stored = self.o, self.stored
        if self.history[0] != 0.0 and math.isfinite(self.history[0]):
            self.keep(0)
        z = self.r if self.precondition is None else self.precondition(self.r)
        d = z.clone()
        self.conjugate(d, z)
        rz = dot(self.r, z)
        for i in range(o.max_iterations + 1):
            residual = rz**0.5 if self.precondition is None and rz >= 0 else norm(self.r)
            if not math.isfinite(rz) or not math.isfinite(residual):
                return self.back_off("not finite", i)
            if residual <= o.residual * size_b or rz == 0:
                return self.done("residual", i)
            if i == o.max_iterations:
                return self.done("iterations", i)
            ad = self.multiply(d)
            if i < self.directions:
                self.pairs.append((d.clone(), ad.clone()))
            curvature = dot(d, ad)
            if not math.isfinite(curvature):
                return self.back_off("not finite", i)
            if curvature <= 0:
                if i == 0 and curvature < 0:
                    self.along(d, ad, rz / -curvature)
                    self.history.append(self.phi())
                    return self.done("negative curvature", 1)
                return self.done("negative curvature", i)
            alpha = rz / curvature
            if (reason := self.along(d, ad, alpha)) is not None:
                return self.back_off(reason, i) if reason == "not finite" else self.done(reason, i)
            self.correct()
            if o.repair_every and (i + 1) % o.repair_every == 0:
                self.residual_from_scratch()
                self.correct()
            self.carried = self.carries(i + 1)
            self.history.append(self.history[-1] - 0.5 * alpha * rz if self.carried else self.phi())
            if i + 1 in stored:
                self.keep(i + 1)
            if (i + 1) % o.check_every == 0:
                self.check(i + 1)
                if stop is not None and stop(i + 1, self.x, self.history[-1]):
                    return self.done("stopped", i + 1)
            if o.progress_is_little(self.history):
                return self.done("progress", i + 1)
            z = self.r if self.precondition is None else self.precondition(self.r)
            rz, old = dot(self.r, z), rz
            torch.add(z, d, alpha=rz / old, out=d)
            self.conjugate(d, z)
        raise AssertionError("unreachable")

    def back_off(self, reason: str, i: int) -> Solution:
        """End at the last iterate that was stored while all was finite."""
        if math.isfinite(self.history[-1]) and bool(torch.isfinite(self.x).all()):
            return self.done(reason, i)
        last = self.kept[-1] if self.kept else Iterate(0, torch.zeros_like(self.b), 0.0)
        self.kept = self.kept or [last]
        return Solution(last.x, self.kept, reason, i, self.products, self.checks)


@dataclass(frozen=True)
class RisingDecay:
    """A schedule for CG's start, ``1 - decay`` falling by the same factor at every step from ``first`` to ``last``.

        decay(t) = 1 - (1 - first) ((1 - last) / (1 - first))^min(t / steps, 1)

    Momentum is raised late in training, where fine structure is left to learn (Sutskever et al. 2013, sections 3 and
    5). It depends on the number of the step alone, so that there is no state to save.

    Raises:
        ValueError: unless ``0 <= first <= last < 1`` and ``steps >= 1``.
    """

    first: float = 0.5
    last: float = 0.95
    steps: int = 1000

    def __post_init__(self) -> None:
        if not (0 <= self.first <= self.last < 1 and self.steps >= 1):
            raise ValueError(
                f"need 0 <= first <= last < 1 and steps >= 1, but they are {self.first}, {self.last}, {self.steps}"
            )

    def __call__(self, t: int) -> float:
        """The decay after t steps."""
        share = min(t / self.steps, 1.0)
        return float(1 - (1 - self.first) * ((1 - self.last) / (1 - self.first)) ** share)
