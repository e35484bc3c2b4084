"""Reading a run: its rows, its configuration and its checkpoints, while it goes on or long after."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfopt.experiment.metrics import Metric, metrics_in
from hfopt.experiment.store import format as runfile
from hfopt.experiment.store.checkpoints import Checkpoint, list_checkpoints, read_checkpoint
from hfopt.experiment.store.format import RunError, Table
from hfopt.experiment.store.recorded import Recordings
from hfopt.experiment.store.runh5 import Contents, Header, read_contents, read_first_checkpoint
from hfopt.experiment.store.sealed import reading

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SavedRun:
    """A run as it was at the moment of reading.

    Attributes:
        path: the folder.
        steps: structured array, one row per step; its columns are `STEP_COLUMNS` of
            `hfopt.experiment.store.format`, and one per further metric.
        checks: structured array, one row per check of conjugate gradients (`CHECK_COLUMNS` there).
        checkpoints: the saved states, in the order of saving.
        header: name, seed, configuration, versions, metrics, sessions, outcome.
        version: of the format.
        missing: what is wrong if the newest checkpoint is gone, so that none of the others is the last.
    """

    path: Path
    steps: Table
    checks: Table
    checkpoints: list[Checkpoint]
    header: Header
    version: int = runfile.VERSION
    missing: str = ""

    @property
    def name(self) -> str:
        """What the run was called."""
        return self.header.name

    @property
    def seed(self) -> int | None:
        """Its seed; None if not given."""
        return self.header.seed

    @property
    def created(self) -> str:
        """When it began."""
        return self.header.created

    @property
    def configuration(self) -> dict[str, Any]:
        """Model, problem, optimizer and driver settings, as nested dicts."""
        return self.header.configuration

    @property
    def versions(self) -> dict[str, Any]:
        """Python, torch, numpy, hfopt, platform, threads, device at the start."""
        return self.header.versions

    @property
    def sessions(self) -> list[dict[str, Any]]:
        """One dict per start and resumption, with time, step, host, process, command line and versions."""
        return self.header.sessions

    @property
    def outcome(self) -> str:
        """How it ended, such as "success" or "max_steps"; empty while it runs, and if it was killed."""
        return self.header.outcome

    @property
    def metrics(self) -> list[Metric]:
        """What is measured; the first judges the run. Its values are in the column `metric.column` of `steps`."""
        return metrics_in({"metrics": self.header.metrics})

    @cached_property
    def recorded(self) -> Recordings:
        """What `HF(record=[...])` kept: the name of a recorder leads to its :class:`Recorded` frames.

        Raises RunError if one of the files is damaged.
        """
        return Recordings(self.path, self.header.run)

    @property
    def serial(self) -> int:
        """The number of checkpoints that have been written."""
        return max([self.header.serial, *(c.serial for c in self.checkpoints)])

    def find(self, which: int | str = "last") -> Checkpoint:
        """The checkpoint of a step (an int), `"last"`, `"best"` (best first metric, then test loss), or a
        name.

        Negative numbers count from the end: -1 is the last. Raises KeyError with the list of those there are, and
        RunError if the newest is missing and not another one is asked for by its step or name.
        """
        found: Checkpoint | None = None
        if self.missing and (which in ("last", "best") or (isinstance(which, int) and which < 0)):
            there = ", ".join(c.key if c.named else str(c.step) for c in self.checkpoints)
            raise RunError(f"{self.missing}; restore it from a copy, or load another one: there are {there or 'none'}")
        if which == "last" or (isinstance(which, int) and which < 0):
            place = -1 if isinstance(which, str) else which
            found = self.checkpoints[place] if -place <= len(self.checkpoints) else None
        elif which == "best":
            key = best_checkpoint({c.key: c.step for c in self.checkpoints}, self.steps, self.metrics[0])
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
        state: dict[str, Any] = self._read(which, None)
        return state

    def parameters(self, which: int | str = "last", *, averaged: bool = False) -> dict[str, Tensor]:
        """The model's state at a checkpoint, by name: what `model.load_state_dict` takes.

        Args:
            which: of the checkpoints.
            averaged: the running average of the parameters, which tests were of, in a run that has one.

        Raises:
            KeyError: there is no such checkpoint.
            RunError: averaged parameters of a run without an average, or a damaged file.
        """
        if not averaged:
            state: dict[str, Tensor] = self._read(which, "parameters")
            return state
        if self.configuration.get("average") is None:
            raise RunError(f"{self.path} was run without `average`: it has no averaged parameters")
        found: dict[str, Tensor] = self._read(which, "average")
        start = "module."
        return {name.removeprefix(start): value for name, value in found.items() if name.startswith(start)}

    def _read(self, which: int | str, part: str | None) -> Any:
        found = self.find(which)
        try:
            if self.version == 1:
                return read_first_checkpoint(self.path / runfile.RUN, found.key, part)
            return read_checkpoint(self.path / runfile.CHECKPOINTS / f"{found.key}.h5", found.serial, part)
        except FileNotFoundError as error:
            raise RunError(
                f"checkpoint {found.key} of {self.path} has been replaced since; read the run again"
            ) from error


def read_run(path: str | Path) -> SavedRun:
    """Read a run from its folder, its run.h5, or its name under runs/logs.

    A run that is being written may be read at any time. Raises FileNotFoundError if there is none and
    `hfopt.experiment.store.format.RunError` if a file is truncated, damaged, or not of a run.
    """
    return _read(path, brief=False)


def read_rows(path: str | Path) -> SavedRun:
    """Read a run without its checks, checkpoints, versions and sessions: what a list needs, in half the time."""
    return _read(path, brief=True)


def _read(path: str | Path, *, brief: bool) -> SavedRun:
    folder = run_folder(path)
    while True:
        contents = read_contents(folder / runfile.RUN, brief=brief)
        header = contents.header
        checkpoints, missing = ([], "") if brief else _checkpoints(folder, contents)
        at = runfile.journal_path(folder, header.journal)
        journal = runfile.read_journal(at, contents.version)
        # A save between the two readings has moved the journal's rows into a newer version.
        if at.exists() or read_contents(folder / runfile.RUN, brief=True).header.journal == header.journal:
            break
    with reading(at):
        steps = runfile.supersede(contents.steps, journal, contents.steps.dtype)
        checks = contents.checks if brief else runfile.supersede(contents.checks, journal, contents.checks.dtype)
    return SavedRun(folder, steps, checks, checkpoints, header, contents.version, missing)


def _checkpoints(folder: Path, contents: Contents) -> tuple[list[Checkpoint], str]:
    """The checkpoints that are there, in the folder or, of format 1, in run.h5; and a sentence if the newest is not."""
    listed = sorted(contents.checkpoints, key=lambda c: c.serial)
    if contents.version == 1:
        return listed, ""
    known = {c.key for c in listed[:-1]}
    found = list_checkpoints(folder, contents.header.run, known)
    # The newest of all is never removed, and a newer one would have a larger number.
    if listed and (not found or found[-1].serial < listed[-1].serial):
        return found, f"{folder / runfile.CHECKPOINTS / f'{listed[-1].key}.h5'} is missing or truncated"
    return found, ""


def run_path(path: str | Path) -> Path:
    """The folder of a run: `runs/logs/<name>` for a bare name; ValueError for what cannot name one."""
    folder = Path(path)
    if folder.name in ("", "..") or str(path).strip() in ("", ".") or not str(path).isprintable():
        raise ValueError(f"{str(path)!r} names no folder for a run; give a name such as 'first', or a folder")
    return Path("runs", "logs", path) if isinstance(path, str) and folder.name == path else folder


def run_folder(path: str | Path) -> Path:
    """The folder of a run given by its folder, its run.h5, or its plain name (then `runs/logs/<name>`)."""
    given = Path(path)
    if given.name == runfile.RUN:
        return given.parent
    return given if (given / runfile.RUN).exists() else run_path(path)


def best_checkpoint(steps_of: dict[str, int], steps: Table, metric: Metric) -> str | None:
    """The checkpoint whose parameters had the best metric, then test loss; None if no tested row tells.

    `steps_of` maps names of checkpoints to the steps at which they were taken.
    """
    tested = {int(row["step"]): row for row in steps if row["test_loss"] - row["test_loss"] == 0}
    known = {key: tested[step] for key, step in steps_of.items() if step in tested}
    return min(
        known, key=lambda k: (metric.rank(float(known[k][metric.column])), float(known[k]["test_loss"])), default=None
    )
