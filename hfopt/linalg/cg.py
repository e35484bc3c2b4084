"""Preconditioned conjugate gradients for ``A x = b``, designed for truncated Newton steps.

Minimises the quadratic model ``phi(x) = x'Ax/2 - b'x`` and stops when its decrease per product is largest, or on
small relative progress (Martens, "Deep learning via Hessian-free optimization", ICML 2010, section 4.4), keeping
iterates along the way for backtracking (section 4.6), and directions for solutions with other dampings
(:mod:`hfopt.linalg.krylov`).
On a CUDA device the same iterations run without host synchronisation: :mod:`hfopt.linalg.cg_device`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from hfopt.linalg.cg_debiased import DebiasedCG, Quadratic
from hfopt.linalg.cg_device import DeviceCG
from hfopt.linalg.cg_host import HostCG
from hfopt.linalg.cuda_graphs import Attempts, recording
from hfopt.linalg.rules import StoppingRules
from hfopt.linalg.solution import LinearMap, Solution
from hfopt.linalg.units import InUnit, from_unit, preconditioner_in_unit, unit_of
from hfopt.linalg.vector import norm

# Dimensions, as a multiple of a step's overhead, up to which an exact solution is always worth its iterations.
_FEW = 5


@dataclass
class CG(StoppingRules):
    """Settings of the solver.

    Args:
        max_iterations: maximum number of iterations per solve (Martens 2010: 250).
        min_iterations: number of iterations before the progress rule applies.
        tolerance: eps of the progress rule: stop when ``phi_i < 0`` and ``(phi_i - phi_{i-k}) / phi_i < k eps`` with
            ``k = max(10, ceil(0.1 i))`` (Martens 2010: 5e-4); 0 switches the rule off. None: eps is
            ``1 / (overhead + i)`` and ``k = max(5, ceil(0.1 i))``, which stops when ``-phi_i / (overhead + i)``,
            the model's decrease per product, is less than it was k iterations before.
        overhead: cost of a step apart from its iterations, in products: the gradient, the set-up for
            products, the evaluations of the loss. Not used if ``tolerance`` is a number.
        residual: stop when ``|b - A x| <= residual |b|``.
        decay: a step starts CG at this multiple of the last CG solution (Martens' code: 0.95); 0 starts at zero. Or a
            schedule: a function of the number of steps done so far, such as :class:`hfopt.RisingDecay`. None: the last
            solution is one more direction, whose length the model chooses, at one product, the cost of any start;
            solves with two batches (``debias=``) then start at zero.
        growth: iterates are kept at ``ceil(5 growth^j)`` and at the end (Martens 2010, section 4.6: 1.3).
        check_every: iterations between rows of the table of checks.
        repair_every: recompute ``r = b - A x`` from scratch every so many iterations, at one product each; 0: never.
        cuda_graphs: on a CUDA device, record an iteration as a CUDA graph: ``"auto"`` if that is possible, True
            (an error if it is not), or False. Results do not change.
    """

    decay: float | Callable[[int], float] | None = None
    cuda_graphs: bool | Literal["auto"] = field(default="auto", compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._attempts = Attempts()
        if not (self.decay is None or callable(self.decay) or 0 <= self.decay <= 1):
            raise ValueError(f"decay is {self.decay}, but must be in [0, 1], a schedule, or None")
        if self.cuda_graphs not in ("auto", True, False):
            raise ValueError(f"cuda_graphs is {self.cuda_graphs!r}, but must be 'auto', True or False")

    def decay_after(self, steps: int) -> float | None:
        """Return the multiple of the last solution at which a step starts, after ``steps`` steps.

        None if the model chooses it.

        Raises:
            ValueError: a schedule gave a number outside [0, 1].
        """
        if not callable(self.decay):
            return self.decay
        found = float(self.decay(steps))
        if not 0 <= found <= 1:
            raise ValueError(f"the schedule of CG's decay gave {found} after {steps} steps, but must stay in [0, 1]")
        return found

    def solve(
        self,
        op: LinearMap,
        b: Tensor,
        x0: Tensor | None = None,
        preconditioner: Callable[[Tensor], Tensor] | None = None,
        stop: Callable[[int, Tensor, float], bool] | None = None,
        directions: int = 0,
        augment: Tensor | None = None,
        second: Quadratic | None = None,
        damping: float | None = None,
    ) -> Solution:
        """Minimise ``phi`` from ``x0``, or along ``augment`` and directions conjugate to it.

        The iteration ends at a direction of negative or zero curvature. If it is the first direction, and nothing
        better is known, the result is that direction with the step for the absolute value of its curvature.

        Args:
            op: A (P, P), symmetric.
            b: right-hand side (P,).
            x0: start (P,); None: zero.
            preconditioner: ``z = M^-1 r`` for a fixed symmetric positive definite M; None: identity.
            stop: called at every check with (iteration, x, phi); True ends the solve ("stopped").
            directions: number of directions to keep with their products, two vectors each.
            augment: u (P,), one more direction, in place of ``x0``; it has no effect unless ``u'Au`` is clearly
                positive.
            second: take step lengths from this quadratic, at one more product an iteration (see
                :mod:`hfopt.linalg.cg_debiased`). Iterates have its phi and its residual, and its progress ends the
                solve, as does a value above those at zero and at the start. The host follows every iteration, also on
                a CUDA device.
            damping: the lambda in A, if it is known. With a positive one, A is not singular, and no direction is
                refused for its little curvature, rounding aside. With 0 the solution is the quadratic's own minimum, so
                precision pays: without a ``tolerance``, the progress rule waits as long as the residual halves within
                its k iterations, and is off in at most ``5 overhead`` dimensions.

        Raises:
            ValueError: vectors of different shapes, both ``x0`` and ``augment``, a right-hand side that is not finite,
                ``directions`` or ``augment`` with a second quadratic, or required graphs if nothing can be
                recorded.
            RuntimeError: graphs are required, but the system cannot be recorded.
        """
        vectors = {"b": b, "x0": x0, "augment": augment, "the second b": None if second is None else second.b}
        shapes = {name: list(v.shape) for name, v in vectors.items() if v is not None}
        if b.dim() != 1 or any(shape != shapes["b"] for shape in shapes.values()):
            found = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
            raise ValueError(f"all vectors of a solve must be flat and of one shape, but their shapes are {found}")
        if x0 is not None and augment is not None:
            raise ValueError("a solve starts at x0 or along augment, but both are given")
        size_b = norm(b)
        if not (math.isfinite(size_b) and (second is None or math.isfinite(norm(second.b)))):
            raise ValueError("the right-hand side b is not finite")
        if (unit := unit_of(size_b, b.dtype)) != 1.0:
            by = 1 / unit
            if second is not None:
                second = replace(second, op=InUnit(second.op, unit), b=second.b * by)
            ending = None if stop is None else lambda i, x, phi: stop(i, x, phi * unit)
            m = preconditioner_in_unit(preconditioner, unit)
            damping = None if damping is None else damping * by
            solution = self.solve(InUnit(op, unit), b * by, x0, m, ending, directions, augment, second, damping)
            return from_unit(solution, unit)
        exact, regular = damping == 0 and self.tolerance is None, damping is not None and damping > 0
        if second is not None:
            if directions or augment is not None:
                raise ValueError("a solve with a second quadratic keeps no directions and starts at x0 or at zero")
            if self.cuda_graphs is True:
                raise ValueError("cuda_graphs is True, but a solve with two batches cannot be recorded; use 'auto'")
            return DebiasedCG(self, op, b, second, x0, preconditioner, regular).iterate(size_b, stop)
        options: StoppingRules = self
        if exact and len(b) <= _FEW * self.overhead:
            # In so few dimensions the solution is found in the time of a few steps.
            options = replace(self, tolerance=0.0)
        given: dict[str, Any] = {"directions": directions, "augment": augment, "exact": exact, "regular": regular}
        if b.device.type != "cuda":
            if self.cuda_graphs is True:
                raise ValueError(f"cuda_graphs is True, but the right-hand side b is on {b.device}; leave it at 'auto'")
            return HostCG(options, op, b, x0, preconditioner, **given).iterate(size_b, stop)
        with recording(op, b, self.cuda_graphs, self._attempts) as recorder:
            return DeviceCG(options, op, b, x0, preconditioner, recorder, **given).iterate(size_b, stop)


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
        """Return the decay after t steps."""
        share = min(t / self.steps, 1.0)
        return float(1 - (1 - self.first) * ((1 - self.last) / (1 - self.first)) ** share)
