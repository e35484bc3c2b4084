"""The batches of an experiment by role: which a step takes, each drawn once, and the losses over them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from hfopt.experiment.carried import Carried, outputs_of
from hfopt.experiment.data import Batch, Minibatches, Problem
from hfopt.experiment.generators import untouched_generators
from hfopt.experiment.metrics import Metric, metrics_of

Forward = Callable[[nn.Module, Any], Tensor | Carried]
Closure = Callable[[], Tensor]


@dataclass(frozen=True)
class Growth:
    """How many batches a step takes where they are to grow: ``n_k = first (last / first)^(k / steps)``, then ``last``.

    The first steps need few cases to go the right way; the last ones need many to stand out from their noise (Byrd,
    Chin, Nocedal & Wu, Math. Program. 2012; with this schedule Martens & Grosse, arXiv:1503.05671, section 13).

    Args:
        first: of step 0.
        last: of step ``steps`` and of all after it.
        steps: that it takes to get there.

    Raises:
        ValueError: a number below 1.
    """

    first: int
    last: int
    steps: int

    def __post_init__(self) -> None:
        if min(self.first, self.last, self.steps) < 1:
            raise ValueError(f"Growth needs numbers of at least 1, but has {self.first}, {self.last}, {self.steps}")

    def at(self, step: int) -> int:
        """The number of batches of a step."""
        return round(self.first * math.pow(self.last / self.first, min(step / self.steps, 1.0)))

    def before(self, step: int) -> int:
        """The number of batches of all earlier steps together."""
        growing = min(step, self.steps)
        return sum(map(self.at, range(growing))) + self.last * (step - growing)


def in_turn(batches: list[int], per_step: int | Growth, step: int) -> list[int]:
    """Those of the batches that a step takes: all, or so many of them in turn."""
    pace = per_step if isinstance(per_step, Growth) else Growth(per_step, per_step, 1)
    count, first = pace.at(step), pace.before(step)
    return batches if count == len(batches) else [batches[(first + i) % len(batches)] for i in range(count)]


class Roles:
    """Which batches each role of an optimizer's step has.

    Args:
        optimizer: its `step` may take `curvature=`, `evaluation=` and `debias=`.
        train: the problem's training batches.
        gradient, curvature, evaluation, debias: the batches given; None for the default (see :class:`hfopt.HF`).
        per_step: of the gradient's; None for all.

    Raises:
        ValueError: batches that are not among `train`, a role that the optimizer does not have, or a number of
            batches per step that there are not.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        train: Sequence[int],
        *,
        gradient: Sequence[int] | None,
        curvature: Sequence[int] | None,
        evaluation: Sequence[int] | None,
        debias: Sequence[int] | None,
        per_step: int | Growth | None,
    ) -> None:
        taken = set(inspect.signature(optimizer.step).parameters)
        if debias is not None and "debias" not in taken:
            raise ValueError(f"debias_batches: the step of {type(optimizer).__name__} takes no debias=")
        self.names = taken & {"curvature", "evaluation", *(["debias"] if debias is not None else [])}
        self.gradient = chosen_batches("gradient_batches", gradient, train, list(train))
        self.curvature = chosen_batches("curvature_batches", curvature, train, self.gradient[:1])
        self.debias = chosen_batches("debias_batches", debias, train, self.gradient)
        judges = self.gradient if debias is None else self.debias
        self.evaluation = chosen_batches("evaluation_batches", evaluation, train, judges)
        given = {"curvature": curvature, "evaluation": evaluation}
        self._given = {role for role, batches in given.items() if batches is not None}
        most = len(self.gradient)
        self.per_step: int | Growth = most if per_step is None else per_step
        n = self.per_step
        if not all(1 <= count <= most for count in ((n.first, n.last) if isinstance(n, Growth) else (n,))):
            raise ValueError(f"batches_per_step={n}: choose from 1 to {most}")

    def of(self, step: int) -> tuple[list[int], dict[str, list[int] | None]]:
        """The gradient's batches at a step, and those of the other roles; None where they are the default."""
        chosen = in_turn(self.gradient, self.per_step, step)
        judges = self.debias if "debias" in self.names else chosen
        others = {
            "curvature": (self.curvature if "curvature" in self._given else chosen[:1], chosen),
            "evaluation": (self.evaluation if "evaluation" in self._given else judges, judges),
            "debias": (self.debias, None),
        }
        return chosen, {
            role: None if batches == default else batches
            for role, (batches, default) in others.items()
            if role in self.names
        }


def chosen_batches(name: str, given: Sequence[int] | None, there: Sequence[int], default: list[int]) -> list[int]:
    """The batches of a role: those given, or the default; ValueError if the problem does not have them."""
    chosen = default if given is None else list(given)
    foreign = [i for i in chosen if i not in there]
    if foreign or not chosen:
        raise ValueError(f"{name}={chosen}: choose at least one of the problem's train_batches, {list(there)}")
    return chosen


class Drawn:
    """The batches of one step, each asked of the problem once.

    Those that a `Minibatches` does not keep itself, for lack of memory, are not held here either.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._held: dict[int, Any] = {}
        self._sizes: dict[int, int] = {}
        self._carried: set[int] = set()

    def __call__(self, i: int) -> Any:
        """Batch `i`."""
        if i in self._held:
            return self._held[i]
        batch = self._problem(i)
        if not isinstance(self._problem, Minibatches) or self._problem.keeps(i):
            self._held[i] = batch
        return batch

    def size(self, i: int) -> int:
        """The size of batch `i`."""
        if i not in self._sizes:
            self._sizes[i] = self._problem.size(self(i))
        return self._sizes[i]

    def outputs(self, i: int, found: Tensor | Carried) -> Tensor:
        """The outputs that a forward found for batch `i`; states that came along are handed on, once."""
        if i not in self._carried and isinstance(found, Carried):
            self._carried.add(i)
            hand_on(self._problem, i, found)
        return outputs_of(found)

    def weights(self, indices: Sequence[int]) -> list[float]:
        """`size(i) / sum of sizes`; a single batch is not drawn for that."""
        return [1.0] if len(indices) == 1 else _shares([self.size(i) for i in indices])


def averaged(model: nn.Module, share: float) -> AveragedModel:
    """A copy of the model with a running average of its parameters: ``min(1 - 1/n, share)`` of it stays at update n.

    So the first updates are averaged evenly, where a fixed share would keep the very first for many steps.
    """
    if not 0 < share < 1:
        raise ValueError(f"average={share}: must be above 0 and below 1")

    def mix(averages: Sequence[Tensor], now: Sequence[Tensor], before: Tensor | int) -> None:
        get_ema_multi_avg_fn(min(1 - 1 / (int(before) + 1), share))(averages, now, before)  # type: ignore[no-untyped-call]

    return AveragedModel(model, multi_avg_fn=mix)


def hand_on(problem: Problem, i: int, found: Carried) -> None:
    """Give the states after batch `i` to the problem, as constants; TypeError if it takes none."""
    carry = getattr(problem, "carry", None)
    if carry is None:
        raise TypeError(
            f"forward returned states to be carried, but the data object, a {type(problem).__name__}, has no "
            "carry(i, states), which takes them; hfopt.experiment.carried.Carrier has what it needs"
        )
    carry(i, tuple(state.detach() for state in found.states))


def on_inputs(model: nn.Module, batch: Batch) -> Tensor:
    """The outputs of a model that wants the inputs and nothing else."""
    outputs: Tensor = model(batch.inputs)
    return outputs


def closure(
    model: nn.Module,
    problem: Problem,
    indices: Sequence[int],
    forward: Forward = on_inputs,
    optimizer: torch.optim.Optimizer | None = None,
    drawn: Drawn | None = None,
) -> Closure:
    """A closure of the mean loss over the scored outputs of some batches: batch i weighs `size(i) / sum of
    sizes`.

    With an optimizer it clears the gradients first and makes one backward pass per batch, so that only one
    batch's graph is held at a time; without, the loss is returned with its graph. `drawn` holds the batches that
    several closures share.
    """
    drawn = Drawn(problem) if drawn is None else drawn
    weights = drawn.weights(indices)

    def loss_of_batches() -> Tensor:
        if optimizer is not None:
            optimizer.zero_grad()
        total: Tensor | None = None
        for i, weight in zip(indices, weights, strict=True):
            batch = drawn(i)
            loss = problem.loss(drawn.outputs(i, forward(model, batch)), batch)
            if weight != 1:
                loss = loss * weight
            if optimizer is not None:
                loss.backward()  # type: ignore[no-untyped-call]
                loss = loss.detach()
            total = loss if total is None else total + loss
        assert total is not None
        return total

    return loss_of_batches


class Evaluation(NamedTuple):
    """What a test found: the mean loss, the first metric, and all metrics by their columns."""

    loss: float
    error: float
    values: dict[str, float]


def evaluate(
    model: nn.Module,
    problem: Problem,
    indices: Sequence[int],
    forward: Forward = on_inputs,
    metrics: Sequence[Metric] | None = None,
) -> Evaluation:
    """Evaluate some batches: mean loss over their scored outputs, and metrics over their cases.

    By default the metrics are the problem's own; the first is the share of wrong cases if it counts them. The model is
    in evaluation mode meanwhile. States that are carried are handed on from batch to batch.
    """
    metrics = metrics_of(problem) if metrics is None else metrics
    losses, sizes = [], []
    sums, counts = ([0.0] * len(metrics) for _ in range(2))
    with torch.no_grad(), evaluating(model):
        for i in indices:
            batch = problem(i)
            outputs = forward(model, batch)
            if isinstance(outputs, Carried):
                hand_on(problem, i, outputs)
            outputs = outputs_of(outputs)
            losses.append(float(problem.loss(outputs, batch)))
            sizes.append(problem.size(batch))
            for k, metric in enumerate(metrics):
                total, count = metric.parts(outputs, batch)
                sums[k], counts[k] = sums[k] + total, counts[k] + count
    values = {m.column: m.value(total, count) for m, total, count in zip(metrics, sums, counts, strict=True)}
    loss = sum(weight * loss for weight, loss in zip(_shares(sizes), losses, strict=True))
    return Evaluation(loss, values[metrics[0].column] if metrics else math.nan, values)


def loss_of_next(model: nn.Module, problem: Problem, roles: Roles, step: int, forward: Forward = on_inputs) -> float:
    """The training loss on the draws that the step to come would see; problem and generators stay as they were."""
    before = problem.state_dict()
    with untouched_generators():
        problem.forget()
        chosen, _ = roles.of(step)
        loss = evaluate(model, problem, chosen, forward, []).loss
        problem.load_state_dict(before)
    return loss


def norm(tensors: Iterable[Tensor]) -> float:
    """The Euclidean norm of all tensors together, summed in float64."""
    return math.hypot(*(float(torch.linalg.vector_norm(t.detach(), dtype=torch.float64)) for t in tensors))


def _shares(sizes: Sequence[int]) -> list[float]:
    total = sum(sizes)
    if total <= 0:
        raise ValueError(f"the batches' sizes are {list(sizes)}: nothing in them is scored, so they have no mean loss")
    return [size / total for size in sizes]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the whole model; afterwards every module has the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
