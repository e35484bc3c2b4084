"""Runs that are chosen by validation: when they stop, which parameters are kept, and what is reported of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hfopt.experiment.data import Problem
from hfopt.experiment.driver import HF
from hfopt.experiment.hooks import Callback, ClipGradient, KeepBest, LowerOnPlateau, StopWithout
from hfopt.experiment.metrics import metrics_of
from hfopt.experiment.roles import Forward, evaluate, on_inputs
from runs.optimizers import Factory, first_order, optimizer, pace
from runs.settings import Training, main, sentences

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BEST = "best-valid"
"""The checkpoint with the best validation so far."""
REPORT = "report.json"
"""What a finished run's best parameters reach, in its folder."""


@dataclass(frozen=True)
class Validated:
    """How validation ends a run and what regularises it."""

    patience: int = 10
    """Validations in a row without progress after which the run ends."""
    halve: int = 0
    """Validations in a row without progress after which a first-order optimizer's learning rate is halved; 0: never."""
    clip: float = 0.0
    """Largest norm of the gradient, for first-order optimizers; 0 for none."""
    report: bool = False
    """Do not train: report on the best parameters of the run so far, which a finished run has done."""
    average: float | None = None
    """Share of what was before in the running average of the parameters that is validated in place of them."""
    validate_every: int | None = None
    """Steps from one validation to the next; by default 1 for hf, and a pass over the data for the others."""


def callbacks(settings: Validated, *, stochastic: bool) -> list[Callback]:
    """Keep the best parameters, stop in time, and halve and clip as the settings say."""
    found: list[Callback] = [KeepBest(name=BEST), StopWithout(settings.patience)]
    if stochastic and settings.halve:
        found.append(LowerOnPlateau(settings.halve))
    if stochastic and settings.clip:
        found.append(ClipGradient(settings.clip))
    return found


FIRST_ORDER = ("adam", "sgd", "rmsprop", "muon")


def factory(settings: Training, rates: dict[str, float], **hessian_free: Any) -> Factory:
    """What makes the optimizer: hf with these arguments, or one of `FIRST_ORDER`, with the weight decay but for muon.

    Args:
        settings: of the run.
        rates: learning rates by optimizer, where the settings have none.
        hessian_free: further arguments of `runs.optimizers.optimizer` and `hfopt.HessianFree`.
    """
    if settings.optimizer in ("adam", "sgd", "rmsprop"):
        lr = rates[settings.optimizer] if settings.lr is None else settings.lr
        return first_order(settings.optimizer, lr, settings.weight_decay)
    return optimizer(settings, rates, **hessian_free)


def paced(settings: Training, validated: Validated, batches: int) -> dict[str, Any]:
    """The pace of the driver: hf takes all batches at a step, the others one, and saves about once in a pass."""
    stochastic = settings.optimizer in FIRST_ORDER
    chosen = pace(settings.optimizer, settings.max_steps)
    every = validated.validate_every or (batches if stochastic else 1)
    return {**chosen, "test_freq": every, "save_freq": max(chosen["save_freq"], every)}


def trained(module: str, settings: Any, hf: HF, visualize: Callable[[], Figure]) -> str | None:
    """Train, or do what else was asked for; "success" where there is something to report, however training ended.

    Args:
        module: what was typed, for messages.
        settings: with the fields of `Action`, `Training` and `Validated`.
        hf: the run.
        visualize: draws the best parameters by validation.
    """
    if settings.report:
        with sentences(module, settings):
            hf.load(BEST)
        return "success"

    def draw() -> Figure:
        hf.load(BEST)
        return visualize()

    outcome = main(module, settings, hf, draw)
    return "success" if outcome in ("stopped", "max_steps") else outcome


Row = dict[str, float]


def report(
    hf: HF,
    roles: Mapping[str, Problem],
    forward: Forward = on_inputs,
    more: Callable[[], Mapping[str, Any]] = dict,
) -> dict[str, Row]:
    """Load the best parameters by validation and evaluate them; the numbers are kept in the run's folder, and printed.

    Args:
        hf: the run, with a checkpoint of the best validation.
        roles: data objects whose test batches are evaluated, by name.
        forward: as of the driver.
        more: what else the file is to hold, found with the best parameters.

    Returns:
        Loss and metrics by role.
    """
    hf.load(BEST)
    found: dict[str, Row] = {}
    for role, problem in roles.items():
        evaluated = evaluate(hf.tested, problem, problem.test_batches, forward)
        found[role] = {"loss": evaluated.loss, **evaluated.values}
    names = {m.column: m for m in metrics_of(next(iter(roles.values())))}
    for role, row in found.items():
        values = ", ".join(f"{m.name} {m.quantity(row[column])}" for column, m in names.items())
        print(f"{role:>8}: {values}")
    content = {"step": hf.step, "parameters": count(hf.model), **found, **more()}
    path = hf.path / REPORT
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1), encoding="utf-8")
    part.replace(path)
    return found


def read_report(folder: Path) -> dict[str, Any] | None:
    """What `report` kept in the folder of a run; None if it is not there."""
    try:
        found: dict[str, Any] = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found


def count(model: nn.Module) -> int:
    """The number of parameters."""
    return sum(p.numel() for p in model.parameters())


def seeded(settings: Training) -> None:
    """Set torch's seed and number of threads."""
    torch.manual_seed(settings.seed)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
