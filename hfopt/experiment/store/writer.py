"""Writing a run: rows, checkpoints and text logs, so that a kill at any moment loses no finished step.

A step is first appended to the journal and to the text logs, then shown to the user; a save moves the
journal's rows and one checkpoint into a new version of run.h5. The files and the rules are described in
`hfopt/experiment/store/format.py`.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from hfopt.experiment.store import format as runfile
from hfopt.experiment.store.format import RunError, Table
from hfopt.experiment.store.tree import write_tree

if sys.platform != "win32":
    import fcntl

_NAME = re.compile(r"[A-Za-z][\w.+-]*")
_OWN_NAMES = ("last", "best")


class RunLog:
    """The writer of one run folder; only one process may hold it at a time.

    Args:
        folder: where the run lives; `start` and `resume` make a writer of a new and of an existing run.
        keep: how many of the numbered checkpoints stay, besides the best and the named ones; None keeps all.
    """

    def __init__(self, folder: Path, *, keep: int | None) -> None:
        """Take the lock of `folder`; raises RunError if another process holds it."""
        self.folder = folder
        self.texts = [folder / runfile.RESULTS, folder / runfile.DETAILED]
        self._keep = keep
        self._lock = _lock(folder)
        self.serial = 0
        self._handles: list[IO[str]] = []
        self._journal: IO[str] | None = None
        self._pending: list[tuple[runfile.Row, list[runfile.Row]]] = []
        for leftover in folder.glob(f".{runfile.RUN}.*.tmp"):
            leftover.unlink(missing_ok=True)

    @classmethod
    def start(
        cls,
        folder: Path,
        header: Mapping[str, Any],
        checkpoint: Mapping[str, Any],
        *,
        keep: int | None,
        overwrite: bool,
    ) -> tuple[RunLog, Path | None]:
        """Begin a new run in `folder`, with `header` (name, created, seed, configuration, versions) and a
        checkpoint.

        An earlier run there is moved aside to the first free of `<folder>.1`, `<folder>.2`, ..., and this
        path is returned as well; with `overwrite`, or if the earlier run has not finished a single step, it
        is deleted.
        """
        moved = None
        if (folder / runfile.RUN).exists():
            log = cls(folder, keep=keep)
            try:
                if overwrite or log._is_empty():
                    for path in (folder / runfile.RUN, *log.texts):
                        path.unlink(missing_ok=True)
                else:
                    moved = _free_name(folder)
                    folder.rename(moved)
            finally:
                log.close()
        folder.mkdir(parents=True, exist_ok=True)
        log = cls(folder, keep=keep)
        try:
            for path in folder.glob("journal-*.jsonl"):  # of a run whose run.h5 somebody took away
                path.unlink()

            def write(file: Any) -> None:
                for key in ("name", "created", "seed"):
                    if header[key] is not None:
                        file.attrs[key] = header[key]
                for key in ("configuration", "versions"):
                    write_tree(file.create_group(key), header[key])

            log._replace(checkpoint, None, first=write)
            log._open()
        except BaseException:
            log.close()
            raise
        return log, moved

    @classmethod
    def resume(cls, folder: Path, serial: int, newest: int, *, keep: int | None) -> RunLog:
        """Go on with the run in `folder` from its checkpoint number `serial`; later numbered checkpoints are
        dropped.

        Rows of later steps stay until the same steps have been computed again. `newest` is the run's last
        serial number that the caller knows; raises RunError if there are newer checkpoints.
        """
        log = cls(folder, keep=keep)
        try:
            with runfile.open_run(folder / runfile.RUN) as file:
                if int(file.attrs["serial"]) != newest:
                    raise RunError(f"the run in {folder} has gone on elsewhere since; call load() to take its state")
                log._pending = runfile.read_journal(runfile.journal_path(folder, int(file.attrs["journal"])))
            log._replace(None, None, up_to=serial)
            log._open()
        except BaseException:
            log.close()
            raise
        return log

    def append(self, step: runfile.Row, checks: list[runfile.Row], block: str, detailed: str) -> None:
        """Record one step: its row, its checks, and what the two text logs say about it."""
        assert self._journal is not None
        self._journal.write(runfile.journal_line(step, checks))
        self._journal.flush()
        self._pending.append((step, checks))
        for text, content in zip(self._handles, (block, detailed), strict=True):
            if content:
                text.write(content)
                text.flush()

    def note(self, sentence: str) -> None:
        """Add a line to both text logs."""
        for text in self._handles:
            text.write(sentence.rstrip("\n") + "\n")
            text.flush()

    def save(self, checkpoint: Mapping[str, Any] | None, name: str | None = None) -> None:
        """Move the journal's rows, and `checkpoint` if given, into a new version of run.h5.

        A checkpoint with a `name` stays until it is replaced by another of that name.
        """
        if name is not None and (not _NAME.fullmatch(name) or name in _OWN_NAMES):
            raise ValueError(f"name={name!r}: a checkpoint's name begins with a letter and is neither of {_OWN_NAMES}")
        self._replace(checkpoint, name)
        self._open()

    def close(self) -> None:
        """Close the files and release the lock."""
        for handle in [*self._handles, self._journal, self._lock]:
            if handle is not None:
                handle.close()
        self._handles, self._journal, self._lock = [], None, None

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> None:
        """Open the journal that the present run.h5 names, drop older ones, and open the text logs."""
        if self._journal is not None:
            self._journal.close()
        path = runfile.journal_path(self.folder, self._number)
        self._journal = path.open("w", encoding="utf-8")
        self._pending = []
        for other in self.folder.glob("journal-*.jsonl"):
            if other != path:
                other.unlink(missing_ok=True)
        if not self._handles:
            self._handles = [path.open("a", encoding="utf-8") for path in self.texts]

    def _is_empty(self) -> bool:
        try:
            with runfile.open_run(self.folder / runfile.RUN) as file:
                journal = runfile.journal_path(self.folder, int(file.attrs["journal"]))
                return len(file["steps"]) == 0 and not runfile.read_journal(journal)
        except RunError:
            return False

    def _replace(
        self,
        checkpoint: Mapping[str, Any] | None,
        name: str | None,
        *,
        up_to: int | None = None,
        first: Any = None,
    ) -> None:
        """Write the next version of run.h5: the content of the old one, the pending rows, a checkpoint."""

        def write(file: Any) -> None:
            file.attrs["format"] = runfile.FORMAT
            file.attrs["version"] = runfile.VERSION
            group = file.create_group("checkpoints")
            if first is not None:
                first(file)
                self._number, serial = 1, 0
                _write_tables(file, None, self._pending)
            else:
                with runfile.open_run(self.folder / runfile.RUN) as old:
                    for key in ("name", "created", "seed"):
                        if key in old.attrs:
                            file.attrs[key] = old.attrs[key]
                    for key in ("configuration", "versions"):
                        old.copy(key, file)
                    self._number, serial = int(old.attrs["journal"]) + 1, int(old.attrs["serial"])
                    steps = _write_tables(file, old, self._pending)
                    for key in self._kept(old["checkpoints"], steps, up_to, checkpoint is not None):
                        old.copy(f"checkpoints/{key}", group)
            if checkpoint is not None:
                key = name or f"{checkpoint['step']:08d}"
                if key in group:
                    del group[key]
                serial += 1
                facts = {"serial": serial, "named": name is not None, "saved": time.time()}
                write_tree(group.create_group(key), {**facts, **checkpoint})
            file.attrs["serial"] = self.serial = serial
            file.attrs["journal"] = self._number

        runfile.replace_run(self.folder, write)

    def _kept(self, checkpoints: Any, steps: Table, up_to: int | None, room: bool) -> list[str]:
        """The names of the old checkpoints that the next version keeps."""
        facts = {key: dict(group.attrs) for key, group in checkpoints.items()}
        named = [key for key in facts if facts[key]["named"]]
        numbered = sorted((key for key in facts if key not in named), key=lambda key: int(facts[key]["serial"]))
        if up_to is not None:
            numbered = [key for key in numbered if facts[key]["serial"] <= up_to]
        if self._keep is None:
            return named + numbered
        newest = numbered[max(0, len(numbered) - self._keep + room) :]
        best = best_checkpoint({key: int(facts[key]["step"]) for key in numbered}, steps)
        return named + [key for key in numbered if key in newest or key == best]


def best_checkpoint(steps_of: Mapping[str, int], steps: Table) -> str | None:
    """The checkpoint whose parameters had the lowest error rate, then test loss; None if no tested row tells.

    `steps_of` maps names of checkpoints to the steps at which they were taken.
    """
    tested = {int(row["step"]): (row["error_rate"], row["test_loss"]) for row in steps if np.isfinite(row["test_loss"])}
    known = {key: tested[step] for key, step in steps_of.items() if step in tested}
    return min(known, key=lambda key: known[key]) if known else None


def _write_tables(file: Any, old: Any, pending: list[tuple[runfile.Row, list[runfile.Row]]]) -> Table:
    steps = None
    for name, columns, documented in (
        ("steps", runfile.STEP_TYPE, runfile.STEP_COLUMNS),
        ("checks", runfile.CHECK_TYPE, runfile.CHECK_COLUMNS),
    ):
        before = runfile.table([], columns) if old is None else runfile.as_columns(old[name][()], columns)
        rows = runfile.supersede(before, pending, columns)
        dataset = file.create_dataset(name, data=rows)
        for column, (_, meaning) in documented.items():
            dataset.attrs[column] = meaning
        if steps is None:
            steps = rows
    assert steps is not None
    return steps


def _free_name(folder: Path) -> Path:
    number = 1
    while (moved := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    return moved


def _lock(folder: Path) -> IO[str] | None:
    """Hold the folder's lock file until it is closed or the process ends, however it ends."""
    if sys.platform == "win32":  # there, a run is not protected from a second writer
        return None
    handle = (folder / "lock").open("a+", encoding="utf-8")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        handle.seek(0)
        holder = handle.read().strip()
        handle.close()
        raise RunError(
            f"process {holder or '?'} is writing the run in {folder}; wait until it ends, or choose another name"
        ) from error
    except OSError:  # a file system without locks
        return handle
    handle.truncate(0)
    handle.write(str(os.getpid()))
    handle.flush()
    return handle
