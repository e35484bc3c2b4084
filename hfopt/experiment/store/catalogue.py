"""Many runs at once: which there are, in what state, how they differ, and which was probably meant."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

from hfopt.experiment.store.format import RUN, RunError
from hfopt.experiment.store.lock import is_held
from hfopt.experiment.store.reader import Run, read_run

LOGS = Path("runs", "logs")
_DEEP = 4  # folders below the one that is searched
_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "!=": operator.ne,
    "=": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
    "~": lambda value, part: str(part) in str(value),
}


@dataclass(frozen=True)
class Entry:
    """One run of a list.

    Attributes:
        name: its folder, below the one that was searched.
        model, problem, optimizer: their classes.
        step: updates made.
        loss: the last test loss, else the last training loss.
        error: the first metric at the last test.
        state: "running", "finished" (it ended by itself), "killed" (it did not), or "damaged".
        run: the run; None if it is damaged.
        said: what is wrong with a damaged one.
    """

    name: str
    model: str
    problem: str
    optimizer: str
    step: int
    loss: float
    error: float
    state: str
    run: Run | None = None
    said: str = ""


COLUMNS = tuple(f.name for f in fields(Entry) if f.name not in ("run", "said"))


def find_runs(root: Path) -> Iterator[Path]:
    """The folders of all runs below `root`."""
    places = [(root, 0)]
    while places:
        folder, depth = places.pop(0)
        if (folder / RUN).is_file():
            yield folder
        elif depth < _DEEP and folder.is_dir():
            places += [(p, depth + 1) for p in sorted(folder.iterdir()) if p.is_dir() and not p.name.startswith(".")]


def state_of(run: Run) -> str:
    """Whether a run is running, finished, or was killed."""
    if is_held(run.path):
        return "running"
    ended = bool(run.outcome) or (run.version == 1 and len(run.steps) > 0 and not run.steps[-1]["updated"])
    return "finished" if ended and run.outcome != "broken off" else "killed"


def entry(folder: Path, root: Path) -> Entry:
    """A run as an entry; one that cannot be read as "damaged"."""
    name = str(folder.relative_to(root)) if folder != root else folder.name
    try:
        run = read_run(folder)
    except (RunError, FileNotFoundError) as error:
        return Entry(name, "", "", "", -1, math.nan, math.nan, "damaged", said=str(error))
    tested = run.steps[np.isfinite(run.steps["test_loss"])]
    loss = tested["test_loss"][-1:] if len(tested) else run.steps["train_loss"][-1:]
    errors = tested[run.metrics[0].column][-1:]
    classes = {part: str(_at(run.configuration, f"{part}.class") or "") for part in ("model", "problem", "optimizer")}
    return Entry(
        name,
        classes["model"],
        classes["problem"],
        classes["optimizer"],
        step=int(run.steps["updated"].sum()),
        loss=float(loss[0]) if len(loss) else math.nan,
        error=float(errors[0]) if len(errors) else math.nan,
        state=state_of(run),
        run=run,
    )


def select(
    entries: Iterable[Entry], where: Sequence[str] = (), sort: str | None = None, *, reverse: bool = False
) -> list[Entry]:
    """Those entries for which all conditions hold, sorted by a column.

    A condition is `column=value`, with `=`, `!=`, `<`, `<=`, `>`, `>=` or `~` (contains); the column is one of
    `COLUMNS`, or a setting of the run such as `problem.T`, `optimizer.groups.0.lr` or `settings.hidden`. Runs that do
    not have it are left out. Raises ValueError for a condition or a column that is none.
    """
    chosen = list(entries)
    for condition in where:
        match = re.fullmatch(r"([\w.]+)\s*(<=|>=|!=|=|<|>|~)\s*(.*)", condition)
        if match is None:
            raise ValueError(f"--where {condition!r}: write a condition such as 'error<0.01' or 'problem.T=30'")
        name, sign, value = match.groups()
        chosen = [e for e in chosen if _holds(_value(e, name), sign, value)]
    if sort is not None:
        if sort not in COLUMNS:
            raise ValueError(f"--sort {sort}: choose from {', '.join(COLUMNS)}")
        known = [e for e in chosen if getattr(e, sort) == getattr(e, sort)]
        absent = [e for e in chosen if getattr(e, sort) != getattr(e, sort)]
        chosen = sorted(known, key=lambda e: getattr(e, sort), reverse=reverse) + absent
    return chosen


def _value(found: Entry, name: str) -> Any:
    if name in COLUMNS:
        return getattr(found, name)
    return None if found.run is None else _at(found.run.configuration, name)


def _holds(value: Any, sign: str, wanted: str) -> bool:
    if value is None:
        return False
    compare = _COMPARISONS[sign]
    if sign != "~" and isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return compare(value, float(wanted))
        except ValueError:
            return sign == "!="
    return compare(str(value), wanted)


def _at(tree: Any, path: str) -> Any:
    """What stands at a path such as `optimizer.groups.0.lr`; None if nothing does."""
    for name in path.split("."):
        if isinstance(tree, Mapping):
            tree = tree.get(name)
        elif isinstance(tree, list) and name.isdigit() and int(name) < len(tree):
            tree = tree[int(name)]
        else:
            return None
    return tree


def flat(tree: Any, name: str = "") -> dict[str, Any]:
    """The leaves of nested settings by their paths."""
    if isinstance(tree, Mapping):
        return {k: v for key, item in tree.items() for k, v in flat(item, f"{name}.{key}".lstrip(".")).items()}
    if isinstance(tree, list) and any(isinstance(item, (Mapping, list)) for item in tree):
        return {k: v for i, item in enumerate(tree) for k, v in flat(item, f"{name}.{i}").items()}
    return {name: tree}


def differing(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The settings that are not the same in all runs: a value per run, None where it has none."""
    described = [flat({k: v for k, v in run.configuration.items() if k != "metrics"}) for run in runs]
    names = dict.fromkeys(name for settings in described for name in settings if name != "model.printed")
    values = {name: [settings.get(name) for settings in described] for name in names}
    return {name: row for name, row in values.items() if any(value != row[0] for value in row)}


def near_misses(given: str) -> list[str]:
    """Runs whose names are like one that is not there."""
    path = Path(given)
    root = LOGS if path.name == given else path.parent
    names = {str(folder.relative_to(root)): None for folder in find_runs(root)} if root.is_dir() else {}
    close = get_close_matches(path.name, names, n=4, cutoff=0.4)
    close += [name for name in names if path.name.lower() in name.lower() and name not in close]
    return [name if root == LOGS else str(root / name) for name in close[:4]]
