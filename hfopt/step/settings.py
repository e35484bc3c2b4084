"""The records that a step is given, and those that it gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from hfopt.closure.trace import Closure
from hfopt.curvature.policy import PreviousChoice
from hfopt.damping import Damping
from hfopt.linalg.cg import CG
from hfopt.linalg.operators import Operator
from hfopt.linalg.processes import Processes
from hfopt.linalg.solution import LinearMap
from hfopt.line_search import LineSearch
from hfopt.step.stats import StepStats

Curvature = Literal["gauss-newton", "hessian", "fisher", "empirical-fisher"]
Backtracking = Literal["walk", "smallest", "none"]
Solver = Literal["auto", "cg", "dense"]


class Preconditioner(Protocol):
    """The preconditioner as a step uses it: see :class:`hfopt.preconditioners.Preconditioner`."""

    @property
    def runs(self) -> int:
        """The number of times the last refresh ran the closure."""

    @property
    def active(self) -> bool:
        """Whether there is anything to apply."""

    def refresh(self, op: Operator, step: int) -> None:
        """Take the new point."""

    def damp(self, damping: float, decay: float | Tensor) -> None:
        """Set the damping of the next solve."""

    def watch(self, system: LinearMap) -> LinearMap:
        """The system as CG is to see it."""

    def __call__(self, r: Tensor) -> Tensor:
        """``M^-1 r``."""


@dataclass(frozen=True)
class Closures:
    """The closures of a step by their roles, as :meth:`hfopt.HessianFree.step` takes them."""

    gradient: Closure
    curvature: Closure | None = None
    evaluation: Closure | None = None
    debias: Closure | None = None

    @property
    def judge(self) -> Closure:
        """The closure whose loss iterates, step lengths and rho are judged by."""
        return next(c for c in (self.evaluation, self.debias, self.gradient) if c is not None)

    def by_role(self) -> dict[str, Closure]:
        """Every different closure, once, by the name of its first role."""
        found: dict[str, Closure] = {}
        roles = {"closure": self.gradient, "curvature": self.curvature, "debias": self.debias, "evaluation": self.judge}
        for name, closure in roles.items():
            if closure is not None and not any(closure is other for other in found.values()):
                found[name] = closure
        return found


@dataclass(frozen=True)
class Parameter:
    """One parameter, with the settings of its group."""

    value: Tensor
    lr: float
    weight_decay: float


@dataclass(frozen=True)
class StepSettings:
    """Settings that stay the same from step to step: see the arguments of :class:`hfopt.HessianFree`."""

    curvature: Curvature = "gauss-newton"
    backtracking: Backtracking = "walk"
    solver: Solver = "auto"
    structural: float = 0.0
    linearisation: str = "auto"
    memory_budget: int | None = None
    debias_slopes: str = "iterate"
    batch_dim: int = 0
    loss: Callable[..., Tensor] | None = None
    outputs: nn.Module | None = None
    check: bool | int = False


@dataclass(frozen=True)
class StepParts:
    """The replaceable parts of a step; rule, line search and preconditioner keep a state of their own."""

    cg: CG
    damping: Damping
    line_search: LineSearch
    preconditioner: Preconditioner | None


@dataclass(frozen=True)
class StepMemory:
    """State that a step takes over from the steps before and hands on to the next one.

    Attributes:
        steps: number of steps done.
        starts: the last solution of CG, one tensor per parameter of the step; None: nothing to start from.
        chosen: the linearisation that ``"auto"`` took, and for how many outputs.
        checked: kinds of closures that passed the checks asked for by ``check``.
        trusted: kinds of closures whose first step passed the checks of every first step.
    """

    steps: int = 0
    starts: tuple[Tensor | None, ...] = ()
    chosen: PreviousChoice | None = None
    checked: frozenset[str] = frozenset()
    trusted: frozenset[str] = frozenset()


@dataclass(frozen=True)
class StepOutcome:
    """The result of the closure, the record of the step, and the memory for the next one."""

    result: Any
    stats: StepStats
    memory: StepMemory


@dataclass(frozen=True)
class StepInput:
    """Everything that a step is made of."""

    settings: StepSettings
    parts: StepParts
    parameters: tuple[Parameter, ...]
    closures: Closures
    memory: StepMemory
    processes: Processes | None = None
