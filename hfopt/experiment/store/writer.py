"""Writing a run: rows, checkpoints and text logs, so that a kill at any moment loses no finished step.

A step is first appended to the journal and to the text logs, then shown to the user. A save writes one checkpoint into
a file of its own; the journal's rows move into a new version of run.h5 once they are many, and when the run ends. The
files and the rules are described in `hfopt/experiment/store/format.py`.
"""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from hfopt.experiment.metrics import metrics_in
from hfopt.experiment.store import format as runfile
from hfopt.experiment.store import reader
from hfopt.experiment.store.appender import Appender
from hfopt.experiment.store.checkpoints import NAME, OWN_NAMES, Checkpoint, CheckpointWriter
from hfopt.experiment.store.format import RunError, Table
from hfopt.experiment.store.lock import Lock
from hfopt.experiment.store.recorded import FrameWriter, remove_all
from hfopt.experiment.store.runh5 import Header, write_run
from hfopt.experiment.store.sealed import SyncBudget, cannot_write

# Rows in the journal from which they are moved into run.h5: so many, and a share of those that are there, so that all
# rewriting together costs no more than a few times the rows.
_MANY, _SHARE = 500, 0.25
_FOLDERS = (runfile.CHECKPOINTS, runfile.RECORDED)


class RunLog:
    """The writer of one run folder; only one process may hold it at a time.

    Args:
        folder: where the run lives; `start` and `resume` make a writer of a new and of an existing run.
        keep: how many of the numbered checkpoints stay, besides the best and the named ones; None keeps all.
    """

    def __init__(self, folder: Path, *, keep: int | None) -> None:
        """Take the lock of `folder`; raises RunError if another process holds it."""
        self.folder = folder
        self._keep = keep
        self._lock = Lock(folder)
        self._texts: list[Appender] = []
        self._journal: Appender | None = None
        self._budget = SyncBudget()
        self._header: Header
        self._steps: Table
        self._checks: Table
        self._pending: list[tuple[runfile.Row, list[runfile.Row]]] = []
        self._checkpoints: list[Checkpoint] = []
        self._durable: str | None = None  # the latest checkpoint known to be on the disk
        self.serial = 0
        self.earlier_versions: dict[str, Any] = {}
        """What the run was last started or continued with, before it was resumed here."""
        for leftover in (*folder.glob(".*.tmp"), *(p for sub in _FOLDERS for p in folder.glob(f"{sub}/.*.tmp"))):
            leftover.unlink(missing_ok=True)

    @classmethod
    def start(
        cls,
        folder: Path,
        header: Mapping[str, Any],
        checkpoint: Mapping[str, Any] | None,
        *,
        keep: int | None,
        overwrite: bool,
    ) -> tuple[RunLog, Path | None]:
        """Begin a new run in `folder`, with `header` (name, created, seed, configuration, versions, metrics, session)
        and a checkpoint, or none.

        An earlier run there is moved aside to the first free of `<folder>.1`, `<folder>.2`, ..., and this
        path is returned as well; with `overwrite`, or if the earlier run has not finished a single step, it
        is deleted. Raises RunError if another process is writing it.
        """
        moved = None
        log = cls(folder, keep=keep)
        try:
            while log._is_occupied():
                if overwrite or log._is_empty():
                    clear(folder)
                    break
                moved = _free_name(folder)
                try:
                    folder.rename(moved)
                except OSError as error:
                    raise cannot_write(moved, error) from error
                # The lock went along; whoever takes the one of a new folder first has it.
                log.close()
                log = cls(folder, keep=keep)
            clear(folder)
            metrics = header.get("metrics") or [m.describe() for m in metrics_in(header["configuration"])]
            log._header = Header(
                run=uuid.uuid4().hex,
                name=header["name"],
                created=header["created"],
                seed=header["seed"],
                configuration=header["configuration"],
                versions=header["versions"],
                metrics=list(metrics),
                sessions=[header["session"]] if header.get("session") else [],
            )
            log._prepare(runfile.table([], log._columns()), runfile.table([], runfile.CHECK_TYPE))
            # First the checkpoint: without run.h5 there is no run yet.
            if checkpoint is not None:
                log._write_checkpoint(checkpoint, None)
            log._consolidate()
        except BaseException:
            log.close()
            raise
        return log, moved

    @classmethod
    def resume(
        cls,
        folder: Path,
        serial: int,
        newest: int,
        *,
        keep: int | None,
        metrics: Sequence[Mapping[str, str]] = (),
        session: Mapping[str, Any] | None = None,
    ) -> RunLog:
        """Go on with the run in `folder` from its checkpoint number `serial`; later numbered checkpoints are
        dropped.

        Rows of later steps stay until the same steps have been computed again. `newest` is the run's last
        serial number that the caller knows; raises RunError if there are newer checkpoints. `metrics` may have more
        than the run had, and `session` says by what it is continued.
        """
        log = cls(folder, keep=keep)
        try:
            run = reader.read_run(folder)
            if run.serial != newest:
                raise RunError(f"the run in {folder} has gone on elsewhere since; call load() to take its state")
            log._header = run.header
            log.serial = newest
            known = {metric["column"] for metric in log._header.metrics}
            log._header.metrics += [dict(metric) for metric in metrics if metric["column"] not in known]
            sessions = log._header.sessions
            log.earlier_versions = dict(sessions[-1].get("versions", {})) if sessions else log._header.versions
            if session:
                sessions.append(dict(session))
            log._header.outcome = ""
            log._prepare(runfile.as_columns(run.steps, log._columns()), run.checks)
            dropped = [c for c in run.checkpoints if not c.named and c.serial > serial]
            log._checkpoints = [c for c in run.checkpoints if c not in dropped]
            log._durable = log._checkpoints[-1].key if log._checkpoints else None
            if run.version == 1:
                log._move_out(run, log._checkpoints)
            # What run.h5 lists is there: later checkpoints are removed when it lists them no longer.
            log._consolidate()
            log._remove(dropped)
            log._prune()
            _ = log.frames  # a damaged one is told before a step is taken
        except BaseException:
            log.close()
            raise
        return log

    # -- recording --------------------------------------------------------------------------------------

    def append(self, step: runfile.Row, checks: list[runfile.Row], block: str, detailed: str) -> None:
        """Record one step: its row, its checks, and what the two text logs say about it.

        Raises WriteError if it cannot be written; the step is kept, and written first by the next call of anything.
        """
        assert self._journal is not None
        self._pending.append((step, checks))
        self._note_test(step)
        self._journal.write(runfile.journal_line(step, checks), self._budget)
        for text, content in zip(self._texts, (block, detailed), strict=True):
            text.write(content)

    @cached_property
    def frames(self) -> FrameWriter:
        """The writer of what recorders keep."""
        return FrameWriter(self.folder, self._header.run)

    def measure(self, metrics: Sequence[Mapping[str, str]]) -> None:
        """Have columns for these metrics, those of the run among them, from the next row on; the first judges the run.

        Raises WriteError if it cannot be written; the run then has the columns it had.
        """
        before = self._header.metrics, self._steps
        self._header.metrics = [dict(metric) for metric in metrics]
        self._steps = runfile.as_columns(self._steps, self._columns())
        self._metric = metrics_in({"metrics": self._header.metrics})[0]
        try:
            self.retry()
            self._consolidate()
        except RunError:
            self._header.metrics, self._steps = before
            raise

    def note(self, sentence: str) -> None:
        """Add a line to both text logs."""
        for text in self._texts:
            text.write(sentence.rstrip("\n") + "\n")

    def retry(self) -> None:
        """Write what could not be written; raises WriteError again."""
        for file in filter(None, [self._journal, *self._texts]):
            if file.waits:
                file.write()

    def save(self, checkpoint: Mapping[str, Any] | None, name: str | None = None) -> None:
        """Write `checkpoint`, if given, to a file of its own; without, move the journal's rows into run.h5.

        A checkpoint with a `name` stays until it is replaced by another of that name.
        """
        if name is not None and (not NAME.fullmatch(name) or name in OWN_NAMES):
            raise ValueError(f"name={name!r}: a checkpoint's name begins with a letter and is neither of {OWN_NAMES}")
        self.retry()
        if checkpoint is not None:
            self._write_checkpoint(checkpoint, name)
            self._prune()
        if checkpoint is None or len(self._pending) >= max(_MANY, _SHARE * len(self._steps)):
            self._consolidate()

    def finish(self, outcome: str) -> None:
        """Record how the run ended, with everything on the disk."""
        self.retry()
        self._header.outcome = outcome
        self._settle()
        self._consolidate()

    def close(self) -> None:
        """Close the files and release the lock."""
        if self._journal is not None:
            with suppress(RunError, OSError):
                self._settle()
        for handle in [*self._texts, self._journal]:
            if handle is not None:
                handle.close()
        self._texts, self._journal = [], None
        self._lock.release()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- tables -----------------------------------------------------------------------------------------

    def _columns(self) -> runfile.Columns:
        return runfile.step_columns(metric["column"] for metric in self._header.metrics)

    def _prepare(self, steps: Table, checks: Table) -> None:
        """Take over the rows that are there."""
        self._steps, self._checks = steps, checks
        self._metric = metrics_in({"metrics": self._header.metrics})[0]
        self._tests: dict[int, tuple[float, float]] = {}
        self._last_test = -1
        for row in steps[np.isfinite(steps["test_loss"])]:
            self._note_test({name: row[name] for name in ("step", "test_loss", self._metric.column)})

    def _note_test(self, row: Mapping[str, Any]) -> None:
        """Remember how good a state was; rows of later steps are superseded."""
        step = int(row["step"])
        if step <= self._last_test:
            self._tests = {k: v for k, v in self._tests.items() if k < step}
        self._last_test = step
        loss = float(row.get("test_loss", np.nan))
        if np.isfinite(loss):
            self._tests[step] = self._metric.rank(float(row.get(self._metric.column, np.nan))), loss

    def _consolidate(self) -> None:
        """Write a new version of run.h5 that has all rows, and begin the journal that follows it."""
        steps = runfile.supersede(self._steps, self._pending, self._steps.dtype)
        checks = runfile.supersede(self._checks, self._pending, runfile.CHECK_TYPE)
        header = self._header
        header.journal, header.serial = header.journal + 1, self.serial
        path = runfile.journal_path(self.folder, header.journal)
        journal = Appender(path, fresh=True)
        try:
            write_run(self.folder / runfile.RUN, header, steps, checks, self._checkpoints)
        except BaseException:
            journal.close()
            path.unlink(missing_ok=True)
            header.journal -= 1
            raise
        if self._journal is not None:
            self._journal.close()
        self._journal, self._steps, self._checks, self._pending = journal, steps, checks, []
        for other in self.folder.glob("journal-*.jsonl"):
            if other != path:
                other.unlink(missing_ok=True)
        if not self._texts:
            self._texts = [Appender(self.folder / name) for name in (runfile.RESULTS, runfile.DETAILED)]

    # -- checkpoints ------------------------------------------------------------------------------------

    def _writer(self) -> CheckpointWriter:
        if not hasattr(self, "_checkpoint_writer"):
            self._checkpoint_writer = CheckpointWriter(self.folder, self._header.run)
        return self._checkpoint_writer

    def _write_checkpoint(self, state: Mapping[str, Any], name: str | None) -> None:
        key = name or f"{state['step']:08d}"
        made = Checkpoint(key, int(state["step"]), self.serial + 1, name is not None, time.time())
        flushed = self._writer().write(made, state)
        self.serial += 1
        self._checkpoints = [*(c for c in self._checkpoints if c.key != key), made]
        if flushed:
            self._durable = key

    def _prune(self) -> None:
        """Remove the numbered checkpoints that make room for newer ones."""
        if self._keep is None:
            return
        numbered = [c for c in self._checkpoints if not c.named]
        best = best_of({c.key: c.step for c in numbered}, self._tests)
        kept = {*(c.key for c in numbered[-self._keep :]), best, self._durable}
        self._remove([c for c in numbered if c.key not in kept])

    def _settle(self) -> None:
        """Have the newest checkpoint on the disk, so that those kept in its place can go."""
        if self._checkpoints and self._durable not in (None, self._checkpoints[-1].key):
            self._writer().sync(self._checkpoints[-1].key)
            self._durable = self._checkpoints[-1].key
        self._prune()

    def _remove(self, gone: Iterable[Checkpoint]) -> None:
        gone = list(gone)
        for checkpoint in gone:
            self._writer().path(checkpoint.key).unlink(missing_ok=True)
        self._checkpoints = [c for c in self._checkpoints if c not in gone]

    def _move_out(self, run: reader.SavedRun, checkpoints: Iterable[Checkpoint]) -> None:
        """Write checkpoints of a run of format 1 to files of their own; its run.h5 stays until it is replaced."""
        self._header.run = uuid.uuid4().hex
        for checkpoint in checkpoints:
            self._writer().write(checkpoint, run.checkpoint(checkpoint.key))

    # -- earlier runs -----------------------------------------------------------------------------------

    def _is_occupied(self) -> bool:
        return (self.folder / runfile.RUN).exists() or any(self.folder.glob(f"{runfile.CHECKPOINTS}/*.h5"))

    def _is_empty(self) -> bool:
        """Whether the run here has not finished a step, so that nothing is lost with it."""
        if not (self.folder / runfile.RUN).exists():  # killed before its first version was there
            return [p.name for p in self.folder.glob(f"{runfile.CHECKPOINTS}/*.h5")] == ["00000000.h5"]
        try:
            return len(reader.read_run(self.folder).steps) == 0
        except (RunError, FileNotFoundError):
            return False


def clear(folder: Path) -> None:
    """Remove the files of a run, the one that makes it a run first; what else lies there stays.

    The lock is held by the caller. Links are removed, not what they lead to. Raises WriteError without permission.
    """
    try:
        for name in (runfile.RUN, runfile.RESULTS, runfile.DETAILED):
            (folder / name).unlink(missing_ok=True)
        for path in folder.glob("journal-*.jsonl"):
            path.unlink()
        checkpoints = folder / runfile.CHECKPOINTS
        if checkpoints.is_symlink():
            checkpoints.unlink()
        elif checkpoints.is_dir():
            shutil.rmtree(checkpoints)
        remove_all(folder)
    except OSError as error:
        raise cannot_write(folder, error) from error


def best_of(steps_of: Mapping[str, int], tests: Mapping[int, tuple[float, float]]) -> str | None:
    """The checkpoint that stands before the best test: first metric, then test loss; None if none was tested."""
    known = {key: tests[step] for key, step in steps_of.items() if step in tests}
    return min(known, key=lambda key: known[key]) if known else None


def _free_name(folder: Path) -> Path:
    number = 1
    while (moved := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    return moved
