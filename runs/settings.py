"""The settings that all runs have, and what a run file does with its command line."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import tyro

import hfopt
from hfopt.experiment import report
from hfopt.experiment.driver import HF

if TYPE_CHECKING:
    from matplotlib.figure import Figure

S = TypeVar("S")


@dataclass(frozen=True)
class Training:
    """Optimizer, seed, place and name of a run."""

    optimizer: Literal["hf", "adam", "rmsprop", "sgd", "nag", "lbfgs"] = "hf"
    """Hessian-free, or another to compare it with; nag is SGD with Nesterov's momentum on the schedule of 2013."""
    lr: float | None = None
    """Learning rate; by default a usual one, for hf 1."""
    momentum: float = 0.99
    """Largest momentum of nag."""
    final_steps: int = 0
    """Steps at the end with a momentum of at most 0.9, for nag."""
    damping: float | None = None
    """Lambda at the start; by default found at the first step."""
    weight_decay: float = 0.0
    """Coefficient c of the penalty c/2 |theta|^2, for hf."""
    cg_iterations: int = 250
    """Iterations of conjugate gradients at most."""
    cg_tolerance: float | None = 5e-4
    """Relative progress per iteration below which conjugate gradients stop; None: where progress per product falls."""
    cg_decay: float | None = 0.95
    """Factor of the last solution that conjugate gradients start from; None: the last solution is a direction."""
    max_steps: int | None = None
    """Steps at most; by default 500, for stochastic optimizers 50,000."""
    seed: int = 0
    """Seed of the initial parameters and of all data."""
    threads: int | None = None
    """Threads of torch on the CPU; by default as torch chooses."""
    device: str = "cpu"
    """Where to compute: cpu, cuda, cuda:1, ..."""
    name: str | None = None
    """Name of the run, or an absolute path for its folder; by default made of the main settings."""


@dataclass(frozen=True)
class Action:
    """What to do with a run, besides starting it."""

    resume: bool = False
    """Go on with the run of this name where it was last saved."""
    overwrite: bool = False
    """Delete an earlier run of this name instead of moving it aside."""
    picture: Path | None = None
    """Do not train: load the run and draw test cases into this file."""


def parse(default: S, typed: Sequence[str], module: str) -> S:
    """The settings typed after `python -m module`; those not given are as in `default`."""
    flags = (tyro.conf.FlagCreatePairsOff,)
    return tyro.cli(type(default), args=typed, prog=f"python -m {module}", default=default, config=flags)


def hints(module: str, typed: Sequence[str], seen: str) -> dict[str, str]:
    """What to type next, as the driver's `hints`; `seen` is what the picture shows."""
    kept = (word for word in typed if word not in ("--resume", "--overwrite"))
    command = shlex.join([report.command("python"), "-m", module, *kept])
    picture = seen.replace(" ", "-") + ".png"
    return {seen: f"{command} --picture {picture}", "to go on": f"{command} --resume"}


def main(module: str, action: Action, hf: HF, visualize: Callable[[], Figure]) -> str | None:
    """Do what was asked for; returns how the training ended, None if there was none.

    A run that cannot be read or continued ends the program with a sentence.
    """
    try:
        if action.resume or action.picture:
            hf.load()
        if action.picture is None:
            return hf.optimize()
        visualize().savefig(action.picture, dpi=130)
        print(action.picture)
        return None
    except (hfopt.HfoptError, FileNotFoundError) as error:
        sys.exit(f"{module}: {error}")


def status(outcome: str | None, *, wanted: bool = True) -> int:
    """The exit status: 0 for success or where nothing was `wanted`, 130 after Ctrl-C, else 1."""
    if outcome is None or outcome == "success" or (outcome == "max_steps" and not wanted):
        return 0
    return 130 if outcome == "interrupted" else 1
