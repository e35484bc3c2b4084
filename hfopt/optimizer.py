"""The Hessian-free optimizer."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.optim import Optimizer

from hfopt.closure import loss_scaling
from hfopt.closure.ddp import without_reductions
from hfopt.closure.differentiable import twice_differentiable
from hfopt.closure.patch import settled
from hfopt.closure.recurrent_layers import replacing
from hfopt.closure.trace import Closure
from hfopt.curvature.linearisation import POLICIES
from hfopt.curvature.policy import PreviousChoice
from hfopt.damping import AverageRatio, Damping, KrylovDamping, as_damping
from hfopt.errors import warn
from hfopt.linalg.cg import CG
from hfopt.linalg.cg_debiased import SLOPES
from hfopt.linalg.cuda_graphs import side_stream
from hfopt.linalg.processes import processes_of
from hfopt.linalg.vector import ParameterVector
from hfopt.line_search import FullStep, LineSearch
from hfopt.preconditioners import Preconditioner, as_preconditioner
from hfopt.step.settings import (
    Backtracking,
    Closures,
    Curvature,
    Parameter,
    Solver,
    StepInput,
    StepMemory,
    StepOutcome,
    StepParts,
    StepSettings,
)
from hfopt.step.stats import StepStats
from hfopt.step.step import Step

CURVATURES: tuple[str, ...] = get_args(Curvature)
BACKTRACKING: tuple[str, ...] = get_args(Backtracking)
Linearisation = Literal["auto", "double-backward", "linearize", "checkpoint", "recompute", "differences"]
Slopes = Literal["iterate", "start"]

# Below this, a learning rate is one of another optimizer: it was chosen for steps along gradients.
_SMALL_RATE = 0.1


class HessianFree(Optimizer):
    """Minimises a loss by truncated Newton steps: ``(G + lambda I) p = -g`` solved by conjugate gradients.

    Takes the place of ``torch.optim.LBFGS`` with the closure unchanged. One step computes the gradient and, about the
    same point, products ``G v`` with the curvature matrix; solves for p; lets the loss choose lambda, CG's iterate and
    the length along p; and leaves the parameters exactly as they were if nothing improved the loss. Large batches
    suit it: all evaluations inside a step must see the same data.

    Args:
        params: parameters or parameter groups, which may have their own ``lr`` and ``weight_decay``.
        lr: the longest step, as a multiple of CG's solution. Where groups differ in it, the largest one is that; the
            others weigh the groups against each other: with ``sigma = lr / max lr``, the step is computed in the
            coordinates ``theta / sqrt(sigma)``, so that it solves ``(G + lambda / sigma) p = -g``. A group of a
            small ``lr`` is damped that much more: for a large lambda all go along ``-lr g``, as in SGD, and
            whatever lambda the step leads downhill. A group with ``lr`` 0 is left out, its ``p.grad`` too.
        weight_decay: c of a penalty ``c/2 |theta|^2``, part of loss, gradient and curvature.
        curvature: ``"gauss-newton"``, ``"hessian"``, ``"fisher"`` (targets sampled from the model) or
            ``"empirical-fisher"``.
        damping: None (:class:`hfopt.KrylovDamping`: chosen by the loss), a number (lambda of the first step, which then
            follows rho), or a rule such as :class:`hfopt.LevenbergMarquardt` or :class:`hfopt.FixedDamping`. Rules have
            a state, and the optimizer takes a copy: its own is ``optimizer.damping``. So with ``line_search``.
        cg: settings of the solver, :class:`hfopt.CG`.
        solver: ``"cg"``; ``"dense"``, which forms the matrix by P products in a few batched passes, diagonalises it and
            has the exact solution for every lambda; or ``"auto"``: ``"dense"`` for networks of up to some 400
            parameters where that is no more work than conjugate gradients, unless ``cg``, ``preconditioner`` or
            ``curvature="hessian"`` asks for these.
        preconditioner: ``"auto"``, None, ``"empirical-fisher"``, ``"hutchinson"``, ``"nystrom"``, ``"kfac"``,
            ``"lbfgs"`` or an object of :mod:`hfopt.preconditioners`. ``"auto"`` is K-FAC for networks of linear and
            convolution layers whose lambda is chosen by the loss (``damping=None``), and otherwise none.
        line_search: ``"armijo"`` (:class:`hfopt.LineSearch`), an object of that class or of
            :class:`hfopt.FullStep`; None: the full step or none.
        backtracking: over CG's stored iterates, by the evaluation loss: ``"walk"`` from the last one back while the
            loss falls, ``"smallest"`` of all, ``"none"``. With :class:`hfopt.KrylovDamping`, over lambdas likewise.
        structural_damping: mu of structural damping (Martens & Sutskever 2011); needs models that mark their hidden
            states. ``structural`` is its former name.
        linearisation: see :mod:`hfopt.curvature.linearisation`.
        memory_budget: bytes for the kept graph; default: 80% of what is free.
        replace_recurrences: compute ``nn.RNN``, ``nn.LSTM`` and ``nn.GRU`` inside a step by hfopt's recurrences where
            that is exact and faster (see :mod:`hfopt.closure.recurrent_layers`).
        debias_slopes: with a second batch for step lengths (``debias`` of :meth:`step`), where its slope along a
            direction is taken: ``"iterate"``, where the directions before have led, or ``"start"`` (see
            :mod:`hfopt.linalg.cg_debiased`).
        batch_dim: the outputs' dimension along which cases stand, for the Fisher matrices and a preconditioner
            given by name.
        loss: a function of what the closure returns, if the loss is not a criterion of torch.nn.functional.
        outputs: the module whose result is the network's output, everything after it being the loss.
        process_group: ``"auto"``: all processes of ``torch.distributed``, if it was initialised, train one model, the
            loss being the mean of what their closures compute (see :mod:`hfopt.linalg.processes`); a group: those of
            it; None: this process trains by itself.
        check: True: before the first step of this object, and whenever the closure gives other kinds of criteria or
            outputs, check the closure and its derivatives (see :mod:`hfopt.step.checks`); k: before every k-th step,
            the first one included. It costs some 40 evaluations and 20 products and leaves no trace.
        history: how many entries ``stats`` has at most; None: no limit.

    Attributes:
        stats: one :class:`hfopt.StepStats` per step of this object, the newest last.

    Sources: Martens, ICML 2010; Martens & Sutskever, ICML 2011 and "Training deep and recurrent networks with
    Hessian-free optimization", 2012.
    """

    stats: list[StepStats]
    _step_supports_amp_scaling = True  # asks torch.amp.GradScaler.step to leave scaled gradients and infinities to us

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.0,
        *,
        weight_decay: float = 0.0,
        curvature: Curvature = "gauss-newton",
        damping: float | Damping | None = None,
        cg: CG | None = None,
        solver: Solver = "auto",
        preconditioner: str | Preconditioner | None = "auto",
        line_search: LineSearch | Literal["armijo"] | None = "armijo",
        backtracking: Backtracking = "walk",
        structural_damping: float = 0.0,
        structural: float | None = None,
        linearisation: Linearisation = "auto",
        memory_budget: int | None = None,
        replace_recurrences: bool = True,
        debias_slopes: Slopes = "iterate",
        batch_dim: int = 0,
        loss: Callable[..., Tensor] | None = None,
        outputs: nn.Module | None = None,
        process_group: Any = "auto",
        check: bool | int = False,
        history: int | None = 10_000,
    ) -> None:
        structural_damping = structural_damping if structural is None else structural
        _one_of("curvature", curvature, CURVATURES)
        _one_of("backtracking", backtracking, BACKTRACKING)
        _one_of("linearisation", linearisation, POLICIES)
        _one_of("solver", solver, get_args(Solver))
        _one_of("debias_slopes", debias_slopes, SLOPES)
        _number("lr", lr)
        _number("weight_decay", weight_decay)
        _number("structural_damping", structural_damping)
        if isinstance(damping, str):
            raise TypeError(f"damping is {damping!r}, but must be a number, a rule such as hfopt.FixedDamping, or None")
        if structural_damping and curvature == "hessian":
            raise ValueError(
                "structural_damping needs curvature 'gauss-newton' or a Fisher matrix, not 'hessian': set one of them"
            )
        if loss is not None and outputs is not None:
            raise ValueError("give loss= or outputs=, not both")
        _instance("cg", cg, CG, "settings of the solver, as in cg=hfopt.CG(max_iterations=30)")
        if line_search != "armijo":
            _instance("line_search", line_search, LineSearch, "hfopt.LineSearch(), hfopt.FullStep() or None")
        _instance("outputs", outputs, nn.Module, "the module whose result is the network's output, not its name")
        if loss is not None and not callable(loss):
            raise TypeError(f"loss is {loss!r}, but must be a function of what the closure returns, or None")
        for name, count in (("memory_budget", memory_budget), ("history", history), ("batch_dim", batch_dim)):
            if count is not None and (isinstance(count, bool) or not isinstance(count, int)):
                raise TypeError(f"{name} is {count!r}, but must be an integer" + " (of bytes)" * (name[0] == "m"))
        if memory_budget is not None and memory_budget < 0:
            raise ValueError(f"memory_budget is {memory_budget} bytes, but must not be negative")
        if history is not None and history < 1:
            raise ValueError(f"history is {history}, but must be at least 1, or None for no limit")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        inherited = set(vars(self))
        self.curvature, self.backtracking = curvature, backtracking
        self.structural_damping, self.linearisation = float(structural_damping), linearisation
        self.memory_budget, self.replace_recurrences = memory_budget, replace_recurrences
        self.debias_slopes, self.batch_dim = debias_slopes, batch_dim
        self.loss, self.outputs = loss, outputs
        self.process_group, self.history = process_group, history
        self.check = _check_option(check)
        # Rules have a state: what is given is copied, so that no other optimizer goes on with this one's lambda.
        self.damping = copy.deepcopy(as_damping(damping))
        asked = cg is not None or preconditioner != "auto"
        self.solver: Solver = "cg" if solver == "auto" and asked else solver
        self.cg = CG() if cg is None else cg
        if preconditioner == "auto" and not isinstance(self.damping, KrylovDamping):
            preconditioner = None
        self.preconditioner = as_preconditioner(preconditioner, batch_dim)
        if line_search is None:
            self.line_search: LineSearch = LineSearch(max_tries=1)
        else:
            self.line_search = LineSearch() if isinstance(line_search, str) else copy.deepcopy(line_search)
        self.stats = []
        self.steps = 0
        self.chosen: PreviousChoice | None = None
        self.checked: frozenset[str] = frozenset()
        self.trusted: frozenset[str] = frozenset()
        self._own = frozenset(vars(self)) - inherited | {"_own"}
        if 0 < lr < _SMALL_RATE:
            warn(
                f"lr is {lr:g}, but for HessianFree it is the longest step as a multiple of the solution of "
                f"(G + lambda I) p = -g, so that steps are {1 / lr:.3g} times shorter than they should be: leave it at "
                "1.0 where Adam, SGD or LBFGS needed a smaller one"
            )

    def __repr__(self) -> str:
        groups = super().__repr__().rstrip()
        names = (
            "curvature", "damping", "cg", "preconditioner", "line_search", "backtracking", "structural_damping",
            "linearisation", "memory_budget", "loss", "outputs", "check",
        )  # fmt: skip
        settings = "".join(f"{name}: {getattr(self, name)!r}\n" for name in names)
        return f"{groups.removesuffix(')')}{settings})"

    @property
    def structural(self) -> float:
        """The former name of ``structural_damping``."""
        return self.structural_damping

    @structural.setter
    def structural(self, value: float) -> None:
        self.structural_damping = value

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with its own ``lr`` and ``weight_decay`` if given; its CG start is zero."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for name in ("lr", "weight_decay"):
                if not float(group[name]) >= 0:
                    raise ValueError(f"{name} is {group[name]}, but must not be negative")
            ParameterVector(p for g in self.param_groups for p in g["params"])
        except Exception:
            del self.param_groups[-1]  # a group that is refused is not added
            raise

    def step(
        self,
        closure: Closure | None = None,
        *,
        curvature: Closure | None = None,
        evaluation: Closure | None = None,
        debias: Closure | None = None,
    ) -> Any:
        """One Hessian-free step.

        Args:
            closure: clears gradients, computes outputs, calls a criterion of torch.nn.functional (or its module), calls
                ``backward()`` and returns the loss, as for LBFGS. ``backward()`` may be called several times, one
                batch each (the loss is their sum), or not at all. It may also return ``(outputs, loss)``. It is run
                several times a step and must then see the same data. Running statistics, and draws of torch,
                ``random`` and numpy, also from generator objects that the closure refers to, are repeated by the
                optimizer.
                Gradients are set when the step is done: clipping inside the closure has no effect.
            curvature: a closure on the data of the curvature products; default: ``closure``.
            evaluation: a closure on the data that iterates, step lengths and rho are judged by; default: ``debias``, or
                ``closure``.
            debias: a closure on a second batch, of which slope and curvature along CG's directions are taken, and with
                them how far the step goes along each; directions come from ``closure`` and ``curvature`` as ever. It
                costs one more gradient, and one more product per iteration of CG (see :mod:`hfopt.linalg.cg_debiased`;
                Tatzel et al., arXiv:2410.14325). Default: one batch for both.

        Returns:
            The loss that ``closure`` returned, before the step.

        Raises:
            ClosureError: the closure could not be understood; the message says what was found and how to go on.
            NotDifferentiable: the model could not be linearised.
            CheckFailed: a self-check that ``check`` asks for found something wrong; the parameters have not moved.
        """
        if closure is None:
            raise ValueError("step() needs a closure that computes the loss, as torch.optim.LBFGS does: step(closure)")
        given = self._given(Closures(closure, curvature, evaluation, debias))
        device = given.parameters[0].value.device
        graphs = self.cg.cuda_graphs is not False

        def run() -> StepOutcome:
            # Entered once here, the patches are already in place in each of the step's runs.
            with (
                replacing(self.replace_recurrences),
                side_stream(device, graphs),
                without_reductions(),
                twice_differentiable(),
                loss_scaling.watching(),
            ):
                return Step(given, lambda scaler: scaler.unscale_(self)).run()

        outcome = settled(run)
        self._remember(given.parameters, outcome.memory)
        self.stats.append(outcome.stats)
        if self.history is not None:
            del self.stats[: -self.history]
        return outcome.result

    def _given(self, closures: Closures) -> StepInput:
        """Put together what a step needs."""
        trainable = self.trainable()
        # A group with lr 0 stays where it is: the model is one of the others alone, as if it were frozen.
        moving = [(g, p) for g, p in trainable if float(g["lr"]) != 0.0] or trainable
        parameters = tuple(Parameter(p, float(g["lr"]), float(g["weight_decay"])) for g, p in moving)
        settings = StepSettings(
            curvature=self.curvature,
            backtracking=self.backtracking,
            solver=self.solver,
            structural=self.structural_damping,
            linearisation=self.linearisation,
            memory_budget=self.memory_budget,
            debias_slopes=self.debias_slopes,
            batch_dim=self.batch_dim,
            loss=self.loss,
            outputs=self.outputs,
            check=self.check,
        )
        parts = StepParts(self.cg, self.damping, self.line_search, self.preconditioner)
        starts = tuple(self.state[p].get("cg_start") if p in self.state else None for _, p in moving)
        memory = StepMemory(self.steps, starts, self.chosen, self.checked, self.trusted)
        vector = ParameterVector(p.value for p in parameters)
        return StepInput(settings, parts, parameters, closures, memory, processes_of(self.process_group, vector.device))

    def _remember(self, parameters: Iterable[Parameter], memory: StepMemory) -> None:
        """Take over what a step hands on."""
        self.steps, self.chosen = memory.steps, memory.chosen
        self.checked, self.trusted = memory.checked, memory.trusted
        for p, start in zip(parameters, memory.starts, strict=True):
            if start is not None:
                self.state[p.value]["cg_start"] = start
            else:
                self.state[p.value].pop("cg_start", None)

    def trainable(self) -> list[tuple[dict[str, Any], Tensor]]:
        """(group, parameter) for every parameter that requires a gradient, in order."""
        return [(g, p) for g in self.param_groups for p in g["params"] if p.requires_grad]

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on: the parameters' CG start, lambda, the number of steps, and which
        linearisation ``"auto"`` has chosen for how many outputs.
        """
        state = super().state_dict()
        chosen = None if self.chosen is None else list(self.chosen)
        state["hessian_free"] = {"steps": self.steps, "damping": self.damping.state_dict(), "chosen": chosen}
        if searched := self.line_search.state_dict():
            state["hessian_free"]["line_search"] = searched
        if self.preconditioner is not None:
            state["hessian_free"]["preconditioner"] = self.preconditioner.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`, of an optimizer over parameters of the same shapes; all of it or nothing.

        Raises:
            ValueError: a state of another optimizer, or of other parameters; nothing has been changed then.
        """
        if "hessian_free" not in state_dict:
            raise ValueError("state_dict is not that of a HessianFree optimizer: the entry 'hessian_free' is missing")
        own = state_dict["hessian_free"]
        stateful = {"damping": self.damping, "line_search": self.line_search, "preconditioner": self.preconditioner}
        present: dict[str, Any] = {name: part for name, part in stateful.items() if part is not None}
        before = {name: part.state_dict() for name, part in present.items()}
        try:
            steps = int(own["steps"])
            chosen = None if own["chosen"] is None else (str(own["chosen"][0]), int(own["chosen"][1]))
            starts = self._checked_starts(state_dict)
            for name, part in present.items():
                part.load_state_dict(own[name] if name == "damping" else own.get(name, {}))
            super().load_state_dict({k: v for k, v in state_dict.items() if k != "hessian_free"})
        except Exception as error:
            for name, part in present.items():
                part.load_state_dict(before[name])
            if isinstance(error, (KeyError, TypeError, AttributeError, IndexError)):
                message = f"state_dict is damaged ({type(error).__name__}: {error}); nothing has been loaded"
                raise ValueError(message) from error
            raise
        # torch brings states to the precision of their parameters; CG's start has that of the flat vector.
        for p, start in starts:
            self.state[p]["cg_start"] = start.to(p.device, copy=True)
        self.steps, self.chosen = steps, chosen

    def _checked_starts(self, state_dict: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
        """(parameter, its CG start) of a state that fits this optimizer's groups."""
        counts = [[len(g["params"]) for g in groups] for groups in (state_dict["param_groups"], self.param_groups)]
        if counts[0] != counts[1]:
            raise ValueError(
                f"state_dict has parameter groups of {counts[0]} parameters, but the optimizer of {counts[1]}"
            )
        own = [p for g in self.param_groups for p in g["params"]]
        indices = [i for g in state_dict["param_groups"] for i in g["params"]]
        found = []
        for i, p in zip(indices, own, strict=True):
            start = state_dict["state"].get(i, {}).get("cg_start")
            if start is not None:
                if start.shape != p.shape:
                    raise ValueError(
                        f"state_dict has a CG start of shape {tuple(start.shape)} for a parameter of shape "
                        f"{tuple(p.shape)}"
                    )
                found.append((p, start))
        return found

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle: everything but what torch attaches and rebuilds."""
        return {**super().__getstate__(), **{name: getattr(self, name) for name in self._own}}


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}, but must be one of {', '.join(map(repr, allowed))}")


def _number(name: str, value: Any) -> None:
    """Refuse what is no finite number, 0 or more."""
    try:
        fits = float(value) >= 0 and math.isfinite(float(value)) and not isinstance(value, str)
    except (TypeError, ValueError):
        fits = False
    if not fits:
        kind = ValueError if isinstance(value, (int, float)) else TypeError
        raise kind(f"{name} is {value!r}, but must be a finite number and must not be negative")


def _instance(name: str, value: Any, kind: type, help_: str) -> None:
    """Refuse what is neither None nor an instance of ``kind``."""
    if value is not None and not isinstance(value, kind):
        raise TypeError(f"{name} is {value!r}, but must be {help_}")


def _check_option(check: Any) -> bool | int:
    """The argument ``check``, if it is one.

    Raises:
        ValueError: neither a truth value nor a positive number of steps.
    """
    if isinstance(check, bool) or (isinstance(check, int) and check > 0):
        return check
    raise ValueError(f"check is {check!r}, but must be True, False, or after how many steps to check again (1, 2, ...)")


def for_minibatches(
    params: Iterable[Any],
    lr: float = 1.0,
    *,
    iterations: int = 10,
    decay: float | Callable[[int], float] = 0.5,
    **options: Any,
) -> HessianFree:
    """Make a :class:`hfopt.HessianFree` for minibatches: short solves with momentum, full steps, and a slow lambda.

    On small batches the minimum of a batch's own quadratic is not what is wanted. A few iterations of conjugate
    gradients that start at the decayed solution of the last step move towards that minimum and no further. The start
    keeps what earlier batches agreed on, as the velocity does in Nesterov's method, and each batch adds a correction,
    along its steepest and most curved directions first. The gradient of the quadratic at the start is Nesterov's
    look-ahead gradient to first order (Sutskever, Martens, Dahl & Hinton, "On the importance of initialization and
    momentum in deep learning", ICML 2013, section 5). Since the loss of a single batch says little, a step is taken as
    a whole unless it did great harm, and lambda follows the average of the reduction ratio over many steps.

    A second batch may judge its steps, ``step(closure, evaluation=closure_of_another_batch)``: it guards against bad
    batches and against fitting one batch too well, and costs progress where neither is a danger. docs/minibatches.md
    has sizes and measurements.

    Args:
        params, lr: as for :class:`hfopt.HessianFree`.
        iterations: of conjugate gradients in every step.
        decay: of the last solution, where a solve begins: what momentum is to other optimizers. A number, or a schedule
            such as :class:`hfopt.RisingDecay`.
        options: any other argument of :class:`hfopt.HessianFree`, in place of what is chosen here: ``cg``,
            ``damping`` (:class:`hfopt.AverageRatio`), ``line_search`` (:class:`hfopt.FullStep`),
            ``backtracking`` (``"none"``).
    """
    chosen: dict[str, Any] = {
        "cg": CG(max_iterations=iterations, decay=decay, tolerance=0.0),
        "damping": AverageRatio(),
        "line_search": FullStep(),
        "backtracking": "none",
    }
    return HessianFree(params, lr, **(chosen | options))
