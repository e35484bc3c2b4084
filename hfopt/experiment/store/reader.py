"""Reading a run: its rows, its configuration and its checkpoints, while it goes on or long after."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hfopt.experiment.store import format as runfile
from hfopt.experiment.store.format import RunError, Table
from hfopt.experiment.store.tree import read_tree
from hfopt.experiment.store.writer import best_checkpoint


@dataclass(frozen=True)
class Checkpoint:
    """One saved state: the name of its group, the step it stands before, its place in the order of saving."""

    key: str
    step: int
    serial: int
    named: bool
    saved: float


@dataclass(frozen=True)
class Run:
    """A run as it was at the moment of reading.

    Attributes:
        path: the folder.
        name: what the run was called.
        seed: its seed; None if not given.
        created: when it began.
        steps: structured array, one row per step; its columns are `STEP_COLUMNS` of
            `hfopt.experiment.store.format`.
        checks: structured array, one row per check of conjugate gradients (`CHECK_COLUMNS` there).
        configuration: model, problem, optimizer and driver settings, as nested dicts.
        versions: python, torch, numpy, hfopt, platform, threads, device at the start.
        checkpoints: the saved states, in the order of saving.
    """

    path: Path
    name: str
    seed: int | None
    created: str
    steps: Table
    checks: Table
    configuration: dict[str, Any]
    versions: dict[str, Any]
    checkpoints: list[Checkpoint]

    def find(self, which: int | str = "last") -> Checkpoint:
        """The checkpoint of a step (an int), `"last"`, `"best"` (lowest error rate, then test loss), or a
        name.

        Negative numbers count from the end: -1 is the last. Raises KeyError with the list of those there are.
        """
        found: Checkpoint | None = None
        if which == "last" or (isinstance(which, int) and which < 0):
            place = -1 if isinstance(which, str) else which
            found = self.checkpoints[place] if -place <= len(self.checkpoints) else None
        elif which == "best":
            key = best_checkpoint({c.key: c.step for c in self.checkpoints}, self.steps)
            found = next((c for c in self.checkpoints if c.key == key), None)
        else:
            for checkpoint in self.checkpoints:
                if checkpoint.key == which or (not checkpoint.named and checkpoint.step == which):
                    found = checkpoint
        if found is None:
            there = ", ".join(c.key if c.named else str(c.step) for c in self.checkpoints)
            raise KeyError(f"{self.path} has no checkpoint {which!r}; there are {there or 'none'}")
        return found

    def checkpoint(self, which: int | str = "last") -> dict[str, Any]:
        """Everything in one checkpoint: parameters, optimizer, generators, problem, step, totals."""
        state: dict[str, Any] = self._read(which, "")
        return state

    def parameters(self, which: int | str = "last", *, averaged: bool = False) -> dict[str, Tensor]:
        """The model's state at a checkpoint, by name: what `model.load_state_dict` takes.

        Args:
            which: of the checkpoints.
            averaged: the running average of the parameters, which tests were of, in a run that has one.

        Raises:
            KeyError: there is no such checkpoint.
            RunError: averaged parameters of a run without an average.
        """
        if not averaged:
            state: dict[str, Tensor] = self._read(which, "/parameters")
            return state
        if self.configuration.get("average") is None:
            raise RunError(f"{self.path} was run without `average`: it has no averaged parameters")
        found: dict[str, Tensor] = self._read(which, "/average")
        start = "module."
        return {name.removeprefix(start): value for name, value in found.items() if name.startswith(start)}

    def _read(self, which: int | str, part: str) -> Any:
        key = self.find(which).key
        with runfile.open_run(self.path / runfile.RUN) as file:
            if key not in file["checkpoints"]:
                raise RunError(f"checkpoint {key} of {self.path} has been replaced since; read the run again")
            return read_tree(file[f"checkpoints/{key}{part}"])


def read_run(path: str | Path) -> Run:
    """Read a run from its folder, its run.h5, or its name under runs/logs.

    A run that is being written may be read at any time. Raises FileNotFoundError if there is none and
    `hfopt.experiment.store.format.RunError` if the file is truncated, no HDF5 file, or not a run.
    """
    folder = run_folder(path)
    while True:
        with runfile.open_run(folder / runfile.RUN) as file:
            number = int(file.attrs["journal"])
            steps = runfile.as_columns(file["steps"][()], runfile.STEP_TYPE)
            checks = runfile.as_columns(file["checks"][()], runfile.CHECK_TYPE)
            checkpoints = [
                Checkpoint(key, *(group.attrs[fact].item() for fact in ("step", "serial", "named", "saved")))
                for key, group in file["checkpoints"].items()
            ]
            attributes = dict(file.attrs)
            configuration, versions = read_tree(file["configuration"]), read_tree(file["versions"])
        journal = runfile.read_journal(runfile.journal_path(folder, number))
        with runfile.open_run(folder / runfile.RUN) as file:
            # A save between the two readings has moved the journal's rows into a newer version.
            if int(file.attrs["journal"]) == number:
                break
    return Run(
        path=folder,
        name=str(attributes["name"]),
        seed=int(attributes["seed"]) if "seed" in attributes else None,
        created=str(attributes["created"]),
        steps=runfile.supersede(steps, journal, runfile.STEP_TYPE),
        checks=runfile.supersede(checks, journal, runfile.CHECK_TYPE),
        configuration=configuration,
        versions=versions,
        checkpoints=sorted(checkpoints, key=lambda c: c.serial),
    )


def run_folder(path: str | Path) -> Path:
    """The folder of a run given by its folder, its run.h5, or its plain name (then `runs/logs/<name>`)."""
    given = Path(path)
    if given.name == runfile.RUN:
        return given.parent
    if isinstance(path, str) and given.name == path and not (given / runfile.RUN).exists():
        return Path("runs", "logs", path)
    return given
