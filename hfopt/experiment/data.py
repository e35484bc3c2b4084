"""What an experiment asks of a data object, and the losses over several of its batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class Batch(Protocol):
    """Sequences of one batch: `inputs (T, B, V)`, and whatever the problem's losses look at."""

    @property
    def inputs(self) -> Tensor: ...


class Data(Protocol):
    """A data object: batches by index, drawn anew after `forget()`, and their loss."""

    @property
    def train_batches(self) -> Sequence[int]: ...
    @property
    def test_batches(self) -> Sequence[int]: ...
    def __call__(self, index: int, /) -> Any: ...
    def size(self, batch: Any, /) -> int: ...
    def forget(self) -> None: ...
    def loss(self, outputs: Tensor, batch: Any, /) -> Tensor: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any], /) -> None: ...


class Counted(Data, Protocol):
    """A data object whose answers are right or wrong: `zero_one_loss` is the number of wrong sequences."""

    def zero_one_loss(self, outputs: Tensor, batch: Any, /) -> Tensor: ...


class Measured(Data, Protocol):
    """A data object whose answers are more or less wrong: `errors (N,)` of the cases, and what they are called."""

    @property
    def error_name(self) -> str: ...
    def errors(self, outputs: Tensor, batch: Any, /) -> Tensor: ...


Problem = Counted | Measured


Forward = Callable[[nn.Module, Any], Tensor]


def chosen_batches(name: str, given: Sequence[int] | None, there: Sequence[int], default: list[int]) -> list[int]:
    """The batches of a role: those given, or the default; ValueError if the problem does not have them."""
    chosen = default if given is None else list(given)
    foreign = [i for i in chosen if i not in there]
    if foreign or not chosen:
        raise ValueError(f"{name}={chosen}: choose at least one of the problem's train_batches, {list(there)}")
    return chosen


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


def averaged(model: nn.Module, share: float) -> AveragedModel:
    """A copy of the model with a running average of its parameters: ``min(1 - 1/n, share)`` of it stays at update n.

    So the first updates are averaged evenly, where a fixed share would keep the very first for many steps.
    """
    if not 0 < share < 1:
        raise ValueError(f"average={share}: must be above 0 and below 1")

    def mix(averages: Sequence[Tensor], now: Sequence[Tensor], before: Tensor | int) -> None:
        get_ema_multi_avg_fn(min(1 - 1 / (int(before) + 1), share))(averages, now, before)  # type: ignore[no-untyped-call]

    return AveragedModel(model, multi_avg_fn=mix)


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
) -> Callable[[], Tensor]:
    """A closure of the mean loss over the scored outputs of some batches: batch i weighs `size(i) / sum of
    sizes`.

    With an optimizer it clears the gradients first and makes one backward pass per batch, so that only one
    batch's graph is held at a time; without, the loss is returned with its graph.
    """
    weights = _weights([problem.size(problem(i)) for i in indices])

    def loss_of_batches() -> Tensor:
        if optimizer is not None:
            optimizer.zero_grad()
        total: Tensor | None = None
        for i, weight in zip(indices, weights, strict=True):
            batch = problem(i)  # held no longer than it is needed: a problem may keep few of large ones
            loss = problem.loss(forward(model, batch), batch)
            if weight != 1:
                loss = loss * weight
            if optimizer is not None:
                loss.backward()  # type: ignore[no-untyped-call]
                loss = loss.detach()
            total = loss if total is None else total + loss
        assert total is not None
        return total

    return loss_of_batches


def evaluate(
    model: nn.Module, problem: Problem, indices: Sequence[int], forward: Forward = on_inputs
) -> tuple[float, float]:
    """Mean loss over the scored outputs of some batches, and the share of their cases that are wrong.

    If the problem measures errors instead of counting them, the second is the mean error of the cases. The model is
    in evaluation mode meanwhile.
    """
    losses, sizes, wrong, cases = [], [], 0.0, 0
    with torch.no_grad(), _evaluating(model):
        for i in indices:
            batch = problem(i)
            outputs = forward(model, batch)
            losses.append(float(problem.loss(outputs, batch)))
            sizes.append(problem.size(batch))
            batch_wrong, batch_cases = _errors(problem, outputs, batch)
            wrong, cases = wrong + batch_wrong, cases + batch_cases
    return sum(weight * loss for weight, loss in zip(_weights(sizes), losses, strict=True)), wrong / cases


def _errors(problem: Problem, outputs: Tensor, batch: Any) -> tuple[float, int]:
    """The sum of the cases' errors, a wrong case counting 1, and the number of cases."""
    measured = getattr(problem, "errors", None)
    if measured is None:
        counted: Callable[[Tensor, Any], Tensor] = problem.zero_one_loss  # type: ignore[union-attr]
        return int(counted(outputs, batch)), batch.inputs.shape[1]
    errors: Tensor = measured(outputs, batch)
    return float(errors.sum(dtype=torch.float64)), errors.numel()


def norm(tensors: Iterable[Tensor]) -> float:
    """The Euclidean norm of all tensors together, summed in float64."""
    return math.hypot(*(float(torch.linalg.vector_norm(t.detach(), dtype=torch.float64)) for t in tensors))


def _weights(sizes: Sequence[int]) -> list[float]:
    total = sum(sizes)
    return [size / total for size in sizes]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the whole model; afterwards every module has the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
