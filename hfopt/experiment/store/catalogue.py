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
from hfopt.experiment.store.reader import SavedRun, read_rows

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
        run: the run without its checks and checkpoints; None if it is damaged.
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
    run: SavedRun | None = None
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


def state_of(run: SavedRun) -> str:
    """Whether a run is running, finished, or was killed."""
    if is_held(run.path):
        return "running"
    ended = bool(run.outcome) or (run.version == 1 and len(run.steps) > 0 and not run.steps[-1]["updated"])
    return "finished" if ended and run.outcome != "broken off" else "killed"


def entry(folder: Path, root: Path) -> Entry:
    """A run as an entry; one that cannot be read as "damaged"."""
    name = str(folder.relative_to(root)) if folder != root else folder.name
    try:
        run = read_rows(folder)
    except (RunError, FileNotFoundError) as error:
        return Entry(name, "", "", "", -1, math.nan, math.nan, "damaged", said=str(error))
    return entry_of(run, name)


def entry_of(run: SavedRun, name: str) -> Entry:
    """A run that has been read as an entry."""
    loss = _last(run.steps["test_loss"]) or _last(run.steps["train_loss"])
    errors = _last(run.steps[run.metrics[0].column])
    classes = {part: _class(run.configuration, part) for part in ("model", "problem", "optimizer")}
    return Entry(
        name,
        classes["model"],
        classes["problem"],
        classes["optimizer"],
        step=int(run.steps["updated"].sum()),
        loss=loss[0] if loss else math.nan,
        error=errors[0] if errors else math.nan,
        state=state_of(run),
        run=run,
    )


def _last(values: Any) -> list[float]:
    """The last finite value, if there is one."""
    known = np.flatnonzero(np.isfinite(values))[-1:]
    return [float(value) for value in values[known]]


def _class(configuration: Mapping[str, Any], part: str) -> str:
    """The class of a part of an experiment; of a loop of one's own what its settings call it."""
    found = _at(configuration, f"{part}.class") or _at(configuration, f"settings.{part}")
    return str(found) if isinstance(found, str) else ""


def select(
    entries: Iterable[Entry], where: Sequence[str] = (), sort: str | None = None, *, reverse: bool = False
) -> list[Entry]:
    """Those entries for which all conditions hold, sorted by a column.

    A condition is `column=value`, with `=`, `!=`, `<`, `<=`, `>`, `>=` or `~` (contains), or several joined by `and`;
    words are compared without regard to case. The column is one of `COLUMNS`, or a setting of the run such as
    `problem.T`, `optimizer.groups.0.lr` or `settings.hidden`, of which the last word is enough where all settings that
    end in it have the same value. Runs that do not have it are left out. Raises ValueError for a condition or a column
    that is none.
    """
    chosen = list(entries)
    for condition in (part for given in where for part in re.split(r"\s+and\s+", given)):
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
    if found.run is None:
        return None
    value = _at(found.run.configuration, name)
    if value is None and "." not in name:
        values = [v for key, v in flat(found.run.configuration).items() if key.rpartition(".")[2] == name]
        value = values[0] if values and all(v == values[0] for v in values) else None
    return value


def _holds(value: Any, sign: str, wanted: str) -> bool:
    if value is None:
        return False
    compare = _COMPARISONS[sign]
    if sign != "~" and isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return compare(value, float(wanted))
        except ValueError:
            return sign == "!="
    return compare(str(value).casefold(), wanted.strip().casefold())


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


def differing(runs: Sequence[SavedRun]) -> dict[str, list[Any]]:
    """The settings that are not the same in all runs: a value per run, None where it has none."""
    described = [flat({k: v for k, v in run.configuration.items() if k != "metrics"}) for run in runs]
    names = dict.fromkeys(name for settings in described for name in settings if name != "model.printed")
    values = {name: [settings.get(name) for settings in described] for name in names}
    return {name: row for name, row in values.items() if any(value != row[0] for value in row)}


def near_misses(given: str, root: Path = LOGS) -> list[str]:
    """Runs whose names are like one that is not there."""
    path = Path(given)
    place = root if path.name == given else (root / path).parent if (root / path).parent.is_dir() else path.parent
    names = {str(folder.relative_to(place)): None for folder in find_runs(place)} if place.is_dir() else {}
    close = get_close_matches(path.name, names, n=4, cutoff=0.4)
    close += [name for name in names if path.name.lower() in name.lower() and name not in close]
    return [name if path.name == given else str(path.parent / name) for name in close[:4]]
