"""The settings that all runs have, and what a run file does with its command line."""

from __future__ import annotations

import hashlib
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar

import torch
import tyro

import hfopt
from hfopt.experiment import report
from hfopt.experiment.driver import HF
from hfopt.experiment.identity import describe
from hfopt.experiment.loading import RUN_FILE, recorded_settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

S = TypeVar("S")


@dataclass(frozen=True)
class Training:
    """Optimizer, seed, place and name of a run."""

    optimizer: Literal["hf", "adam", "rmsprop", "sgd", "nag", "muon", "lbfgs"] = "hf"
    """Hessian-free, or another to compare it with; nag is SGD with Nesterov's momentum on the schedule of 2013, muon
    has Adam for what is no matrix."""
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
    """The settings typed after `python -m module`; those not given are as in `default`.

    While `hfopt.load_run` loads a run, they are that run's.
    """
    recorded = recorded_settings(default)
    if recorded is not None:
        return recorded
    _say_refusals(module.partition(" ")[0])
    flags = (tyro.conf.FlagCreatePairsOff,)
    return tyro.cli(type(default), args=typed, prog=f"python -m {module}", default=default, config=flags)


def described(settings: object, module: str) -> dict[str, Any]:
    """What a run records of its settings: `hfopt.load_run` builds it from them again."""
    return {RUN_FILE: module, **describe(settings)}


class Placed(Protocol):
    """Settings that say where to compute."""

    @property
    def device(self) -> str: ...


class Identified(Protocol):
    """Settings, a dataclass, whose run is named by optimizer and seed."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def optimizer(self) -> str: ...
    @property
    def seed(self) -> int: ...


# What a run may be continued with or without, and what its name has by itself.
_NOT_IN_NAMES = (
    "name",
    "device",
    "threads",
    "max_steps",
    "threshold",
    "folder",
    "test_every",
    "optimizer",
    "seed",
    "record_every",
)
_LONGEST_NAME = 100


def run_name(stem: str, settings: Identified, preset: object, *, known: Sequence[str] = ()) -> str:
    """The default name of a run: `<stem>-<optimizer>-seed<seed>`, and every setting that is not as in its preset.

    So that a run with other settings is another run. `known` are settings that the stem tells.
    """
    parts = [stem, settings.optimizer, f"seed{settings.seed}"]
    left_out = {*_NOT_IN_NAMES, *known, *(f.name for f in fields(Action))}
    for field in fields(settings):
        value = getattr(settings, field.name)
        if field.name not in left_out and value != getattr(preset, field.name):
            words = "-".join(map(str, value)) if isinstance(value, tuple) else str(value)
            parts.append(f"{field.name.replace('_', '-')}-{re.sub('[^A-Za-z0-9.+-]+', '-', words)}")
    name = "-".join(parts)
    if len(name) <= _LONGEST_NAME:
        return name
    return f"{name[: _LONGEST_NAME - 9]}-{hashlib.blake2b(name.encode(), digest_size=4).hexdigest()}"


@contextmanager
def sentences(module: str, settings: Placed) -> Iterator[None]:
    """End the program with a sentence where settings do not fit each other or the machine, not with a traceback."""
    try:
        device = torch.device(settings.device)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError("there is no CUDA device here, or torch was built without CUDA; choose --device cpu")
        torch.empty(0, device=device)
        yield
    except REFUSALS as error:
        sys.exit(sentence(module, error))


def sentence(module: str, error: BaseException) -> str:
    """What a program says in place of a traceback."""
    return f"{module}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"


REFUSALS = (ValueError, TypeError, RuntimeError, OSError, ModuleNotFoundError, hfopt.HfoptError)


def _say_refusals(module: str) -> None:
    """Until training begins, end the program that was typed with a sentence where something is refused."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec is None or spec.name != module:
        return

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, REFUSALS):
            print(sentence(module, error), file=sys.stderr)
        else:
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = hook


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
    sys.excepthook = sys.__excepthook__
    try:
        if action.resume or action.picture:
            hf.load()
        if action.picture is None:
            return hf.optimize()
        visualize().savefig(action.picture, dpi=130)
        print(action.picture)
        return None
    except (hfopt.HfoptError, OSError) as error:
        sys.exit(f"{module}: {error}")
    except KeyboardInterrupt:
        print(f"\n{module}: stopped at once; what was saved last is in {report.short(hf.path)}", file=sys.stderr)
        sys.exit(130)


def status(outcome: str | None, *, wanted: bool = True) -> int:
    """The exit status: 0 for success or where nothing was `wanted`, 130 after Ctrl-C, else 1."""
    if outcome is None or outcome == "success" or (outcome == "max_steps" and not wanted):
        return 0
    return 130 if outcome == "interrupted" else 1
