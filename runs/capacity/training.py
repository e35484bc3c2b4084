"""Training of one network as its hyperparameters say, in a run folder, and what it comes to."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import hfopt
from hfopt.experiment.driver import HF as Driver
from hfopt.experiment.hooks import Callback, ClipGradient, Experiment, Schedule
from runs.capacity.hyperparameters import HF, Hyperparameters, checked
from runs.capacity.network import network
from runs.capacity.tasks import forward, output_of, score


@dataclass(frozen=True)
class Outcome:
    """What a training came to.

    Attributes:
        ended: how: "max_steps", "stopped" (by the clock), "diverged", "interrupted".
        num_params: of the network.
        units: of each layer.
        train_loss, valid_loss, eval_loss: see `runs.capacity.tasks.score`; infinite if the training diverged.
        steps: updates made.
        seconds: that they took.
    """

    ended: str
    num_params: int
    units: int
    train_loss: float
    valid_loss: float
    eval_loss: float
    steps: int
    seconds: float

    @property
    def feasible(self) -> bool:
        """Whether all losses are finite."""
        return math.isfinite(self.train_loss + self.valid_loss + self.eval_loss)


class Clock(Callback):
    """End a run when its steps have taken so many seconds; an interrupted one counts on."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._spent = 0.0

    def after_update(self, hf: Experiment, row: Mapping[str, Any]) -> None:
        """Look at the clock."""
        self._spent += row["optimizer_seconds"]
        if self._spent >= self._seconds:
            hf.stop(f"{self._seconds:g} seconds are over")

    def state_dict(self) -> dict[str, Any]:
        """The seconds."""
        return {"spent": self._spent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on."""
        self._spent = state["spent"]


def train(
    folder: Path,
    task: Any,
    architecture: str,
    depth: int,
    max_params: int,
    hparams: Mapping[str, Any],
    *,
    seed: int = 0,
    seconds: float | None = None,
    quiet: bool = True,
) -> Outcome:
    """Build a network, train it, and judge it on training draws, on validation draws and on test draws.

    Args:
        folder: of the run; an earlier run in it is moved aside.
        task: one of `runs.capacity.tasks.make_task`.
        architecture: by its published name.
        depth, max_params: number of layers and budget of parameters.
        hparams: by their published names.
        seed: of the initial weights.
        seconds: end it after so many seconds of optimization, if `train_steps` have not been made.
        quiet: print nothing.

    Raises:
        ValueError: hyperparameters that do not fit, or a budget that is too small.
    """
    given = checked(architecture, hparams)
    size = {"max_params": max_params, "output": output_of(task), "seed": seed}
    model = network(architecture, depth, task.V, task.O, given, **size)  # type: ignore[arg-type]
    second_order = given["optimizer"] == HF
    steps = int(given["train_steps"])
    callbacks: list[Callback] = [] if second_order else [ClipGradient(float(given["gradient_clip_val"])), decay(given)]
    run = Driver(
        folder,
        model,
        task,
        forward=forward,
        optimizer=lambda parameters: optimizer(given, parameters),
        batches_per_step=None if second_order else 1,
        callbacks=[*callbacks, *([] if seconds is None else [Clock(seconds)])],
        threshold=0,
        max_steps=steps,
        test_freq=max(1, steps // 5),
        save_freq=max(1, steps // 2),
        keep_checkpoints=1,
        seed=seed,
        settings={**given, "architecture": architecture, "n_layers": depth, "max_params": max_params},
        quiet=quiet,
    )
    ended = run.optimize()
    losses = (math.inf, math.inf, math.inf)
    if ended in ("max_steps", "stopped"):
        held_out = task.evaluated_on("test")
        losses = (
            score(model, task, task.train_batches),
            score(model, task, task.test_batches),
            score(model, held_out, held_out.test_batches),
        )
    count = sum(p.numel() for p in model.parameters())
    return Outcome(ended, count, model.hidden, *losses, steps=run.step, seconds=run.totals["seconds"])


def optimizer(hparams: Hyperparameters, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of hyperparameters.

    What the source leaves open: the sigmoid of `optimizer_logit_momentum` is the momentum of SGD with momentum, the
    decay of RMSProp's average, and Adam's beta_1; `l2_decay` adds to the gradients of matrices alone.
    """
    parameters = list(parameters)
    l2 = float(hparams["l2_decay"])
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": l2},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    name = hparams["optimizer"]
    if name == HF:
        initial = float(hparams["hf_damping"])
        by_ratio = hparams["hf_damping_rule"] == "ratio"
        rule = hfopt.LevenbergMarquardt(initial=initial) if by_ratio else hfopt.KrylovDamping(initial=initial)
        cg = hfopt.CG(max_iterations=int(hparams["hf_cg_iterations"]))
        return hfopt.HessianFree(
            groups, damping=rule, cg=cg, structural_damping=float(hparams["hf_structural_damping"])
        )
    lr = float(hparams["lr_init"])
    momentum = 1 / (1 + math.exp(-float(hparams["optimizer_logit_momentum"])))
    if name == "SGD":
        return torch.optim.SGD(groups, lr=lr)
    if name == "Momentum":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum)
    if name == "RMSProp":
        return torch.optim.RMSprop(groups, lr=lr, alpha=momentum)
    return torch.optim.Adam(groups, lr=lr, betas=(momentum, 0.999))


def decay(hparams: Hyperparameters) -> Schedule:
    """The schedule lr(t) = lr_init rate^(t / train_steps)."""
    rate, steps = float(hparams["lr_decay_rate"]), int(hparams["train_steps"])
    return Schedule(lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: rate ** (t / steps)))
