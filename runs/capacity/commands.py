"""What is typed after `python -m runs.capacity`."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from runs.capacity.hyperparameters import FIRST_ORDER, HF, Hyperparameters
from runs.settings import REFUSALS, sentence

TaskName = Literal["per_cap", "mem_thru", "rcf", "text8", "parens_counting", "arithmetic"]
Cell = Literal["rnn", "irnn", "ugrnn", "gru", "lstm", "+rnn"]
LOGS = Path(__file__).resolve().parents[1] / "logs" / "capacity"


@dataclass(frozen=True)
class Tune:
    """Work on a study until it has --trials finished trials; the same line typed again is another worker."""

    task: TaskName
    """The task."""
    architecture: Cell
    """The recurrent cell."""
    max_params: int
    """Budget of parameters, initial states and readout included."""
    layers: int = 1
    """Layers of the network."""
    trials: int = 60
    """Finished trials of the study, those of all workers together."""
    hf: bool = False
    """Tune Hessian-free in place of the four first-order optimizers."""
    train_steps: int | None = None
    """Updates of a trial; by default 2,000, for Hessian-free 50."""
    seconds: float | None = None
    """End a trial's training after so many seconds of optimization."""
    batch_size: int | None = None
    """Sequences in a minibatch; by default 64, of per_cap 100. For Hessian-free 500, of per_cap all."""
    test_batches: int = 10
    """Minibatches of the validation, and of the test; per_cap has its set instead."""
    options: str = "{}"
    """Other arguments of the task, as JSON: '{"samples": 2000}'."""
    data: Path | None = None
    """Folder of the text8 file; by default the folder text8 in the one that HFOPT_DATA names."""
    study: Path | None = None
    """Folder of the study; by default made of task, cell, layers, budget and optimizer, in runs/logs/capacity."""
    storage: str | None = None
    """URL of a database for the study, such as sqlite:///study.db; by default a journal in its folder."""
    seed: int = 0
    """Seed of the task's draws, and of the search."""
    threads: int = 1
    """Threads of torch."""


@dataclass(frozen=True)
class Export:
    """Write the trials of a study as a table with the published columns."""

    study: Path
    """Folder of the study."""
    to: Path
    """File to write: .p (a pickled array, as published), .npy or .h5."""
    storage: str | None = None
    """URL of the study's database, if it has one."""


@dataclass(frozen=True)
class Best:
    """Print the best hyperparameters of a task and a cell, as the published data set's example does."""

    data: Path
    """The published archive, or a table that was exported to .p."""
    task: TaskName
    """The task."""
    architecture: Cell
    """The recurrent cell."""


@dataclass(frozen=True)
class Pictures:
    """Draw capacity, losses, the distribution of trials, and what hyperparameters matter."""

    data: tuple[Path, ...]
    """Tables (.p), or the published archive."""
    to: Path = field(default=Path("pictures"))
    """Folder for the pictures."""


Command = (
    Annotated[Tune, tyro.conf.subcommand("tune")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Best, tyro.conf.subcommand("best")]
    | Annotated[Pictures, tyro.conf.subcommand("pictures")]
)


def main(typed: list[str]) -> int:
    """Do what was typed; returns the exit status. What is refused is a sentence."""
    command: Any = tyro.cli(
        Command,
        args=typed,
        prog="python -m runs.capacity",
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    try:
        actions: dict[type, Any] = {Tune: tune, Export: export, Best: best, Pictures: pictures}
        actions[type(command)](command)
    except REFUSALS as error:
        print(sentence("runs.capacity", error), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nruns.capacity: stopped; the trial in progress does not count", file=sys.stderr)
        return 130
    return 0


def tune(command: Tune) -> None:
    """Work on a study."""
    _need_optuna()
    from runs.capacity import tuning
    from runs.capacity.table import best as best_of
    from runs.capacity.table import sentences
    from runs.capacity.tasks import make_task
    from runs.capacity.training import Outcome, train

    torch.set_num_threads(command.threads)
    if command.trials < 1:
        raise ValueError(f"trials is {command.trials}; it is at least 1")
    options = _options(command)
    optimizers = (HF,) if command.hf else FIRST_ORDER
    steps = command.train_steps or (50 if command.hf else 2000)
    study = tuning.Study(
        Path(),
        command.task,
        command.architecture,
        command.layers,
        command.max_params,
        optimizers,
        steps,
        {"options": options, "seconds": command.seconds, "seed": command.seed},
        command.storage,
        command.seed,
    )
    study = replace(study, folder=command.study or LOGS / study.name)
    where = {} if command.data is None or command.task != "text8" else {"data": command.data}
    task = make_task(command.task, **options, **where)
    state = task.state_dict()

    def objective(number: int, hparams: Hyperparameters) -> Outcome:
        task.load_state_dict(state)  # every trial sees the same data; its initial weights are its own
        size = (command.architecture, command.layers, command.max_params)
        return train(study.run(number), task, *size, hparams, seed=number, seconds=command.seconds)

    print(f"study {study.name} in {study.folder}", flush=True)
    shared = tuning.tune(study, command.trials, objective, say=lambda line: print(line, flush=True))
    print(sentences(best_of(tuning.rows([shared]), task_type=command.task, architecture=command.architecture)))


def _options(command: Tune) -> dict[str, Any]:
    """Arguments of the task."""
    try:
        given = json.loads(command.options)
    except json.JSONDecodeError as error:
        raise ValueError(f"options is {command.options!r}, which is no JSON ({error})") from None
    if not isinstance(given, dict):
        raise ValueError(f"options is {command.options!r}; give a JSON object such as '{{\"samples\": 2000}}'")
    made: dict[str, Any] = {"seed": command.seed}
    if command.task == "per_cap":
        made["batch_size"] = command.batch_size or (None if command.hf else 100)
    else:
        made["batch_size"] = command.batch_size or (500 if command.hf else 64)
        if command.task == "text8":
            made["test_symbols"] = command.test_batches * made["batch_size"] * 37
        else:
            made["test_batches"] = command.test_batches
    return {**made, **given}


def export(command: Export) -> None:
    """Write a table."""
    _need_optuna()
    from runs.capacity import table, tuning

    rows = tuning.rows(tuning.load(command.study, command.storage))
    print(f"{table.export(rows, command.to)}: {len(rows)} rows")


def best(command: Best) -> None:
    """Print the best row."""
    from runs.capacity import archive, table

    rows = archive.read(command.data)
    print(f"{command.data}: SHA-256 {archive.checksum(command.data)}, {len(rows):,} rows")
    print(table.sentences(table.best(rows, task_type=command.task, architecture=command.architecture)))


def pictures(command: Pictures) -> None:
    """Draw tables."""
    import numpy as np

    from runs.capacity import archive
    from runs.capacity.pictures import draw

    rows = np.concatenate([archive.read(path) for path in command.data])
    for path in draw(rows, command.to):
        print(path)


def _need_optuna() -> None:
    try:
        import optuna  # noqa: F401
    except ModuleNotFoundError:
        raise ModuleNotFoundError("the tuner needs optuna: pip install 'hfopt[tune]', or pip install optuna") from None
