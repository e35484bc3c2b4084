"""Callbacks: what happens beside the updates of an experiment, at fixed moments, and is saved with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from hfopt.experiment.metrics import Metric
from hfopt.experiment.roles import Forward


class Experiment(Protocol):
    """What a callback may rely on: :class:`hfopt.HF` has it, and more."""

    path: Path
    model: nn.Module
    problem: Any
    optimizer: torch.optim.Optimizer
    metrics: list[Metric]
    forward: Forward
    step: int

    @property
    def tested(self) -> nn.Module: ...
    @property
    def second_order(self) -> bool: ...
    def save(self, name: str | None = None) -> None: ...
    def stop(self, why: str) -> None: ...


class Callback:
    """The base of a callback: override what is needed; `hf` is the experiment.

    A step of an experiment calls, in this order, `after_test` (if a test was due), `before_update`, `after_gradient`
    (once per gradient that the optimizer asks for), `after_update`, and `after_save` (if a save was due). A callback
    whose further steps depend on earlier ones has a state, which is saved and loaded with the experiment: the resumed
    run then computes the same bits. Public attributes that are plain numbers or strings are its settings: a run is
    resumed only with the same.
    """

    def attach(self, hf: Experiment) -> None:
        """Once, when the experiment has been built."""

    def before_update(self, hf: Experiment) -> None:
        """Before the optimizer's step; `hf.step` updates have been made."""

    def after_gradient(self, hf: Experiment) -> None:
        """After a gradient was computed and before the optimizer uses it.

        Not called for optimizers such as :class:`hfopt.HessianFree` whose steps compute more than gradients.
        """

    def after_update(self, hf: Experiment, row: Mapping[str, Any]) -> None:
        """After the optimizer's step; `row` is what is recorded of it."""

    def after_test(self, hf: Experiment, row: Mapping[str, Any]) -> None:
        """After a test; `row` has `step`, `test_loss`, and every metric under its column."""

    def after_save(self, hf: Experiment, key: str) -> None:
        """After a checkpoint was written; `key` is its name."""

    def state_dict(self) -> dict[str, Any]:
        """What the callback's next actions depend on; empty if nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""


class Schedule(Callback):
    """A torch scheduler that takes a step after every update.

    Args:
        make: makes it from the optimizer: ``lambda o: torch.optim.lr_scheduler.StepLR(o, 1000)``.
    """

    def __init__(self, make: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]) -> None:
        self._make = make

    def attach(self, hf: Experiment) -> None:
        """Make the scheduler."""
        self._scheduler = self._make(hf.optimizer)

    def after_update(self, hf: Experiment, row: Mapping[str, Any]) -> None:
        """Take its step, unless the optimizer skipped its own."""
        if row["accepted"] and math.isfinite(row["train_loss"]):
            self._scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        """The scheduler's."""
        return {key: value for key, value in self._scheduler.state_dict().items() if _plain(value)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The scheduler's."""
        self._scheduler.load_state_dict(state)


class LowerOnPlateau(Schedule):
    """Lower the learning rate when so many tests in a row were no better than the best before them.

    It is torch's ReduceLROnPlateau, asked after every test.

    Args:
        patience: the number of tests.
        factor: of the learning rate.
        metric: its name; default the first metric.
    """

    def __init__(self, patience: int, factor: float = 0.5, metric: str | None = None) -> None:
        if patience < 1:
            raise ValueError(f"patience={patience}: must be at least 1")
        self.patience, self.factor, self.metric = patience, factor, metric
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
        # torch counts the tests that are let pass; by its own threshold and eps, small changes would be none.
        super().__init__(lambda o: plateau(o, factor=factor, patience=patience - 1, threshold=0.0, eps=0.0))
        self._tested = -1

    def after_update(self, hf: Experiment, row: Mapping[str, Any]) -> None:
        """Do nothing: progress is seen by tests."""

    def after_test(self, hf: Experiment, row: Mapping[str, Any]) -> None:
        """Lower the learning rate, if it is time."""
        if row["step"] == self._tested:  # the test that ended a run is made again when that goes on
            return
        self._tested = row["step"]
        metric = next(m for m in hf.metrics if self.metric in (None, m.name, m.column))
        self._scheduler.step(metric.rank(row[metric.column]))  # type: ignore[arg-type]  # of this scheduler: the metric

    def state_dict(self) -> dict[str, Any]:
        """The scheduler's, and the step of the last test."""
        return {**super().state_dict(), "tested": self._tested}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from it."""
        super().load_state_dict({key: value for key, value in state.items() if key != "tested"})
        self._tested = state["tested"]


class ClipGradient(Callback):
    """Scale the gradient of all parameters together to a norm of at most `norm`, for optimizers of gradients."""

    def __init__(self, norm: float) -> None:
        if not norm > 0:
            raise ValueError(f"norm={norm}: must be above 0")
        self.norm = norm

    def attach(self, hf: Experiment) -> None:
        """Refuse an optimizer that is no optimizer of gradients."""
        if hf.second_order:
            raise ValueError(
                f"ClipGradient: a step of {type(hf.optimizer).__name__} is no gradient, so that clipping has no place; "
                "its length is limited by damping"
            )

    def after_gradient(self, hf: Experiment) -> None:
        """Clip."""
        nn.utils.clip_grad_norm_(hf.model.parameters(), self.norm)


class Project(Callback):
    """Put the parameters back into a set after every update.

    Args:
        project: changes the model's parameters in place; called without gradients.
    """

    def __init__(self, project: Callable[[nn.Module], Any]) -> None:
        self._project = project

    def after_update(self, hf: Experiment, row: Mapping[str, Any]) -> None:
        """Project."""
        with torch.no_grad():
            self._project(hf.model)


class KeepBest(Callback):
    """Save the state with the best test so far under a name, from which ``hf.load(name)`` goes on.

    Args:
        metric: its name; default the first metric, then the test loss.
        name: of the checkpoint.

    Attributes:
        best: the metric of that state.
    """

    def __init__(self, metric: str | None = None, name: str = "best-test") -> None:
        self.metric, self.name = metric, name
        self._best: list[float] = [math.inf, math.inf]

    def attach(self, hf: Experiment) -> None:
        """Find the metric."""
        found = [m for m in hf.metrics if self.metric in (None, m.name, m.column)]
        if not found:
            raise ValueError(f"KeepBest: there is no metric {self.metric!r}; there are {[m.name for m in hf.metrics]}")
        self._metric = found[0]

    def after_test(self, hf: Experiment, row: Mapping[str, Any]) -> None:
        """Save if this is the best."""
        now = [self._metric.rank(row[self._metric.column]), row["test_loss"]]
        if now < self._best:
            self._best = now
            hf.save(self.name)

    def state_dict(self) -> dict[str, Any]:
        """The best test so far."""
        return {"best": self._best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from it."""
        self._best = list(state["best"])


class StopWithout(Callback):
    """End the run when so many tests in a row were no better than the best before them.

    Args:
        progress_in: the number of tests.
        metric: its name; default the first metric.
    """

    def __init__(self, progress_in: int, metric: str | None = None) -> None:
        if progress_in < 1:
            raise ValueError(f"progress_in={progress_in}: must be at least 1")
        self.progress_in, self.metric = progress_in, metric
        self._best, self._worse, self._tested = math.inf, 0, -1

    def after_test(self, hf: Experiment, row: Mapping[str, Any]) -> None:
        """Count, and stop."""
        metric = next(m for m in hf.metrics if self.metric in (None, m.name, m.column))
        if row["step"] != self._tested:  # the test that ended a run is made again when that goes on
            self._tested, rank = row["step"], metric.rank(row[metric.column])
            self._best, self._worse = (rank, 0) if rank < self._best else (self._best, self._worse + 1)
        if self._worse >= self.progress_in:
            hf.stop(f"no progress of {metric.name} in {self._worse} tests")

    def state_dict(self) -> dict[str, Any]:
        """The best test, how many have followed it, and the step of the last one."""
        return {"best": self._best, "worse": self._worse, "tested": self._tested}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from it."""
        self._best, self._worse, self._tested = state["best"], state["worse"], state.get("tested", -1)


class Callbacks:
    """All callbacks of an experiment, under their names: the class's, with a number where one occurs twice."""

    def __init__(self, callbacks: Iterable[Callback]) -> None:
        self.named: dict[str, Callback] = {}
        for callback in callbacks:
            if not isinstance(callback, Callback):
                raise TypeError(f"callbacks: a {type(callback).__name__} is no hfopt.experiment.hooks.Callback")
            name, number = type(callback).__qualname__, 2
            while name in self.named:
                name, number = f"{type(callback).__qualname__} {number}", number + 1
            self.named[name] = callback

    def __iter__(self) -> Iterator[Callback]:
        return iter(self.named.values())

    def state_dict(self) -> dict[str, Any]:
        """The states of those that have one."""
        return {name: state for name, callback in self.named.items() if (state := callback.state_dict())}

    def load_state_dict(self, states: Mapping[str, Any]) -> list[str]:
        """Load the states of those that both know; returns a phrase per callback that only one side knows."""
        for name, callback in self.named.items():
            if name in states:
                callback.load_state_dict(states[name])
        own = {name for name, callback in self.named.items() if callback.state_dict()}
        return [
            *(f"callback {name} begins without a state" for name in sorted(own - states.keys())),
            *(f"the state of callback {name} is not used" for name in sorted(states.keys() - self.named.keys())),
        ]


def _plain(value: Any) -> bool:
    """Whether a value can be saved; schedulers keep functions too."""
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    if isinstance(value, Mapping):
        return all(map(_plain, value.values()))
    return value is None or isinstance(value, (bool, int, float, str, torch.Tensor))
