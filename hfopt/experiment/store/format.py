"""The files of a run: their names, the columns of the tables, and the rules that make them safe.

A run is a folder with

* `run.h5`, which is never modified in place: a new version is written beside it and renamed over the old one, so
  that a process killed at any moment leaves one complete version;
* `journal-<n>.jsonl`, the steps since then, one JSON line with a checksum per step. `run.h5` names the journal that
  follows it (attribute `journal`), so a journal that a newer version already contains is never read again;
* `checkpoints/<step>.h5` and `checkpoints/<name>.h5`, one saved state each, written like `run.h5`;
* `recorded/<recorder>-<number>.h5`, what recorders kept of the steps, some frames a file, written like `run.h5`;
* `results` and `detailed_results`, the steps for human readers.

Whoever reads `run.h5` and its journal applies one rule, `supersede`: the row of step k replaces all older rows of
steps k and later, because it was computed after the run had been taken back to step k. A torn last line of the journal
was never acknowledged and is left out.

Format 1 had the checkpoints inside `run.h5`, no checksums and no named metrics; it is still read, and becomes format 2
when the run goes on.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hfopt.errors import HfoptError

FORMAT = "hfopt run"
VERSION = 2
OWN_LOOP = "own loop"  # the class of the driver in runs that HF did not write
RUN, RESULTS, DETAILED, CHECKPOINTS = "run.h5", "results", "detailed_results", "checkpoints"
RECORDED = "recorded"

# One row per step of the driver. What an optimizer does not report is nan, -1 or "". Metrics other than the default
# one follow in columns of their own names.
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
Columns = np.dtype[np.void]


class RunError(HfoptError):
    """A run cannot be read, continued or written; the message says which file, why, and what to do."""


class WriteError(RunError):
    """A file of a run cannot be written now (no room, no permission); what was computed is kept for later."""


def step_columns(metrics: Iterable[str] = ()) -> Columns:
    """The type of the table of steps: the columns of every run, and one per further metric."""
    more = [name for name in dict.fromkeys(metrics) if name not in STEP_COLUMNS]
    return np.dtype([*STEP_TYPE.descr, *((name, "f8") for name in more)]) if more else STEP_TYPE


def table(rows: Iterable[Mapping[str, Any]], columns: Columns) -> Table:
    """A structured array of `rows`; columns that a row lacks are nan, -1, False or empty."""
    filled = [tuple(map(_plain, complete(row, columns).values())) for row in rows]
    return np.array(filled, dtype=columns)


def complete(row: Mapping[str, Any], columns: Columns) -> Row:
    """`row` with all columns, in their order."""
    return {name: row.get(name, _ABSENT[columns[name].kind]) for name in columns.names or ()}


def row_of(record: Any, columns: Columns, without: Iterable[str]) -> Row:
    """The attributes of `record` that have a column, as Python scalars; those that are None are left out."""
    kinds = {"f": float, "i": int, "b": bool, "S": str}
    found = {name: getattr(record, name, None) for name in columns.names or () if name not in set(without)}
    return {name: kinds[columns[name].kind](value) for name, value in found.items() if value is not None}


def _plain(value: Any) -> Any:
    return value.encode("ascii", "replace") if isinstance(value, str) else value


def as_columns(array: Table, columns: Columns) -> Table:
    """`array` with the given columns; those that an older version did not write are absent in every row."""
    if array.dtype == columns:
        return array
    full = table([{}] * len(array), columns)
    for name in set(array.dtype.names or ()) & set(columns.names or ()):
        full[name] = array[name]
    return full


def supersede(old: Table, journal: Iterable[tuple[Row, list[Row]]], columns: Columns) -> Table:
    """The table `old` (steps or checks) followed by the journal's rows, later rows replacing earlier ones."""
    kept: list[tuple[Row, list[Row]]] = []
    for entry in journal:
        while kept and kept[-1][0]["step"] >= entry[0]["step"]:
            kept.pop()
        kept.append(entry)
    if not kept:
        return old
    # The smallest step of the journal empties `kept`, so its first entry tells where the old table ends.
    old = old[: int(np.searchsorted(old["step"], kept[0][0]["step"]))]
    checks = "iteration" in (columns.names or ())
    rows = [row for _, rows in kept for row in rows] if checks else [step for step, _ in kept]
    return np.concatenate([old, table(rows, columns)])


def journal_path(folder: Path, number: int) -> Path:
    """The journal that follows the version of run.h5 whose attribute `journal` is `number`."""
    return folder / f"journal-{number}.jsonl"


def journal_line(step: Row, checks: list[Row]) -> str:
    """One step as a JSON line that ends with its checksum; floats keep every bit, nan and inf are NaN and Infinity."""
    body = json.dumps({"step": step, "checks": checks}, separators=(",", ":"))
    return f'{body[:-1]},"crc":"{zlib.crc32(body.encode()):08x}"}}\n'


def read_journal(path: Path, version: int = VERSION) -> list[tuple[Row, list[Row]]]:
    """The steps in a journal; a torn last line is left out, and a missing journal has none.

    Raises RunError if another line is damaged, or the last one is whole but for its end.
    """
    try:
        *lines, torn = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror})") from error
    try:
        entries = [_entry(line, version) for line in lines]
        # What follows the last newline is empty, or a line that was being written when its process died: never more
        # than a whole line.
        if version > 1 and torn[:-1] and _is_entry(torn[:-1]):
            raise ValueError("the end of its last line is changed")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise RunError(f"{path} is damaged ({error}); delete it to use the run as it was last saved") from error
    return entries


def _entry(line: bytes, version: int) -> tuple[Row, list[Row]]:
    """A line's step and its checks; ValueError and the like if it is damaged."""
    if version > 1:
        body, _, end = line.rpartition(b',"crc":"')
        if len(end) != 10 or end[8:] != b'"}' or int(end[:8], 16) != zlib.crc32(body + b"}"):
            raise ValueError("a line does not have its checksum")
        line = body + b"}"
    entry = json.loads(line)
    step, checks = entry["step"], entry["checks"]
    if not isinstance(step["step"], int) or not all(isinstance(check["step"], int) for check in checks):
        raise TypeError("a row has no step")
    return step, checks


def _is_entry(line: bytes) -> bool:
    try:
        _entry(line, VERSION)
    except (ValueError, TypeError, KeyError, AttributeError):
        return False
    return True
