"""The files of a run: their names, the columns of the tables, and the rules that make them safe.

A run is a folder with

* `run.h5`, which is never modified in place: each save writes a whole new version beside it and renames it
  over the old one, so that a process killed at any moment leaves one complete version;
* `journal-<n>.jsonl`, the steps since then, one JSON line per step. `run.h5` names the journal that follows
  it (attribute `journal`), so a journal that a newer version already contains is never read again;
* `results` and `detailed_results`, the same for human readers.

Whoever reads both applies one rule, `supersede`: the row of step k replaces all older rows of steps k and
later, because it was computed after the run had been taken back to step k. A torn last line of the journal
was never acknowledged and is left out.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from hfopt.errors import HfoptError

FORMAT = "hfopt run"
VERSION = 1
RUN, RESULTS, DETAILED = "run.h5", "results", "detailed_results"

# One row per step of the driver. What an optimizer does not report is nan, -1 or "".
STEP_COLUMNS: dict[str, tuple[str, str]] = {
    "step": ("i8", "number of updates made before this row's losses were computed"),
    "updated": ("?", "False in the closing row of a finished run: evaluated, not updated"),
    "train_loss": ("f8", "loss on the gradient batches before the update"),
    "test_loss": ("f8", "loss on the test batches before the update; nan where the test was not due"),
    "error_rate": ("f8", "share of test cases that are wrong before the update, or their mean error"),
    "evaluation_loss": ("f8", "loss on the data that judge the step, before it"),
    "new_loss": ("f8", "the same after the step"),
    "rho": ("f8", "change of the loss over the change that the quadratic model predicted"),
    "damping": ("f8", "lambda used in this step"),
    "new_damping": ("f8", "lambda of the next step"),
    "structural": ("f8", "mu, the weight of structural damping relative to lambda"),
    "cg_iterations": ("i8", "iterations of conjugate gradients"),
    "cg_reason": ("S48", "why they stopped"),
    "backtracked": ("i8", "the iterate that was taken"),
    "step_length": ("f8", "factor of the line search"),
    "line_search_tries": ("i8", "evaluations of the line search"),
    "gradient_norm": ("f8", "norm of the gradient"),
    "parameter_norm": ("f8", "norm of all parameters after the update"),
    "solution_norm": ("f8", "norm of the last iterate"),
    "update_norm": ("f8", "norm of the change of the parameters"),
    "quadratic": ("f8", "value of the undamped quadratic model at the step"),
    "gradients": ("i8", "gradient evaluations"),
    "products": ("i8", "curvature products"),
    "evaluations": ("i8", "evaluations of the loss besides those of the gradients"),
    "linearisation": ("S24", "how the products were computed"),
    "accepted": ("?", "False if the parameters were left as they were"),
    "optimizer_seconds": ("f8", "seconds of the optimizer's step"),
    "seconds": ("f8", "seconds of the whole step with its tests"),
    "total_seconds": ("f8", "seconds of all steps up to this one"),
    "cpu_seconds": ("f8", "processor time of the whole step with its tests, all threads together"),
    "finished": ("f8", "when the step ended, in seconds since 1970"),
}
# One row per check of conjugate gradients.
CHECK_COLUMNS: dict[str, tuple[str, str]] = {
    "step": ("i8", "step of the driver"),
    "iteration": ("i8", "iteration of conjugate gradients"),
    "model": ("f8", "value of the damped quadratic model"),
    "residual": ("f8", "norm of the residual"),
    "norm": ("f8", "norm of the iterate"),
    "evaluation": ("f8", "change of the loss there on the evaluation data; nan where it was not looked at"),
}
STEP_TYPE = np.dtype([(name, kind) for name, (kind, _) in STEP_COLUMNS.items()])
CHECK_TYPE = np.dtype([(name, kind) for name, (kind, _) in CHECK_COLUMNS.items()])
_ABSENT = {"f": math.nan, "i": -1, "b": False, "S": ""}

Row = dict[str, Any]
Table = npt.NDArray[np.void]


class RunError(HfoptError):
    """A run cannot be read, continued or written; the message says which file, why, and what to do."""


def table(rows: Iterable[Mapping[str, Any]], columns: np.dtype[np.void]) -> Table:
    """A structured array of `rows`; columns that a row lacks are nan, -1, False or empty."""
    filled = [tuple(map(_plain, complete(row, columns).values())) for row in rows]
    return np.array(filled, dtype=columns)


def complete(row: Mapping[str, Any], columns: np.dtype[np.void]) -> Row:
    """`row` with all columns, in their order."""
    return {name: row.get(name, _ABSENT[columns[name].kind]) for name in columns.names or ()}


def row_of(record: Any, columns: np.dtype[np.void], without: Iterable[str]) -> Row:
    """The attributes of `record` that have a column, as Python scalars; those that are None are left out."""
    kinds = {"f": float, "i": int, "b": bool, "S": str}
    found = {name: getattr(record, name, None) for name in columns.names or () if name not in set(without)}
    return {name: kinds[columns[name].kind](value) for name, value in found.items() if value is not None}


def _plain(value: Any) -> Any:
    return value.encode("ascii", "replace") if isinstance(value, str) else value


def as_columns(array: Table, columns: np.dtype[np.void]) -> Table:
    """`array` with the given columns; those that an older version did not write are absent in every row."""
    if array.dtype == columns:
        return array
    full = table([{}] * len(array), columns)
    for name in set(array.dtype.names or ()) & set(columns.names or ()):
        full[name] = array[name]
    return full


def supersede(old: Table, journal: Iterable[tuple[Row, list[Row]]], columns: np.dtype[np.void]) -> Table:
    """The table `old` (steps or checks) followed by the journal's rows, later rows replacing earlier ones."""
    kept: list[tuple[Row, list[Row]]] = []
    for entry in journal:
        while kept and kept[-1][0]["step"] >= entry[0]["step"]:
            kept.pop()
        kept.append(entry)
    if not kept:
        return old
    # The smallest step of the journal empties `kept`, so its first entry tells where the old table ends.
    old = old[old["step"] < kept[0][0]["step"]]
    rows = [step for step, _ in kept] if columns == STEP_TYPE else [row for _, checks in kept for row in checks]
    return np.concatenate([old, table(rows, columns)])


def journal_path(folder: Path, number: int) -> Path:
    """The journal that follows the version of run.h5 whose attribute `journal` is `number`."""
    return folder / f"journal-{number}.jsonl"


def journal_line(step: Row, checks: list[Row]) -> str:
    """One step as a JSON line; floats keep every bit, and nan and inf are written as NaN and Infinity."""
    return json.dumps({"step": step, "checks": checks}, separators=(",", ":")) + "\n"


def read_journal(path: Path) -> list[tuple[Row, list[Row]]]:
    """The steps in a journal; a torn last line is left out, and a missing journal has none.

    Raises RunError if a line other than the last is damaged.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    # What follows the last newline is empty, or a line that was being written when its process died.
    try:
        entries = [json.loads(line) for line in lines[:-1]]
        return [(entry["step"], entry["checks"]) for entry in entries]
    except (ValueError, TypeError, KeyError) as error:
        raise RunError(f"{path} is damaged ({error}); delete it to use the run as it was last saved") from error


def open_run(path: Path) -> Any:
    """Open the run.h5 at `path` for reading.

    Raises FileNotFoundError if there is none and RunError if it is truncated, no HDF5 file, or of another
    origin.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no run at {path}")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise RunError(
            f"{path} cannot be read: it is truncated, damaged or no HDF5 file ({error}); "
            "restore it from a copy, or start a new run under another name"
        ) from error
    origin = file.attrs.get("format")
    if origin != FORMAT:
        file.close()
        raise RunError(f"{path} is an HDF5 file, but no run of hfopt wrote it")
    if file.attrs["version"] > VERSION:
        version = file.attrs["version"]
        file.close()
        raise RunError(f"{path} has format version {version}, this hfopt reads up to {VERSION}; use a newer hfopt")
    return file


def replace_run(folder: Path, write: Callable[[Any], None]) -> None:
    """Replace run.h5 by a new version, filled by `write(file)`; the old one stays until that is on disk."""
    temporary = folder / f".{RUN}.{os.getpid()}.tmp"
    try:
        with h5py.File(temporary, "w") as file:
            write(file)
        with temporary.open("rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, folder / RUN)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; systems that cannot open a folder do not need it."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
