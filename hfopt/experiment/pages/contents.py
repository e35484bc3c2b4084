"""What a page holds of a run, as values for JSON: curves, checks, recorded frames, settings.

Arrays are base64 text with their type and shape. A page stays of a size that a browser takes: of a long run every
k-th row is drawn, of recorded frames as many as find room, and the page says so.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from hfopt.experiment.metrics import Metric
from hfopt.experiment.store import catalogue
from hfopt.experiment.store.format import RUN, Table
from hfopt.experiment.store.reader import SavedRun
from hfopt.experiment.store.sealed import reading
from hfopt.experiment.summary import facts

Array = npt.NDArray[Any]
MOST_ROWS, MOST_CHECKS, MOST_BYTES = 20_000, 40_000, 6_000_000
_CURVES = ("train_loss", "test_loss", "damping", "rho", "cg_iterations", "backtracked", "step_length", "gradient_norm")
_CHECKS = ("step", "iteration", "model", "residual", "norm", "evaluation")


def contents(run: SavedRun, name: str) -> dict[str, Any]:
    """Everything of a run that a page shows; RunError if the run's file lacks what it should have."""
    with reading(run.path / RUN):
        return {
            **status(run, name),
            "created": run.created,
            "seed": run.seed,
            "facts": facts(run),
            "settings": {k: _plain(v) for k, v in catalogue.flat(dict(run.configuration)).items() if k},
            "metrics": [_metric(metric, run.steps) for metric in run.metrics],
            **rows(run),
            "recorded": {recorder: _recorded(run, recorder) for recorder in getattr(run, "recorded", {})},
        }


def status(run: SavedRun, name: str) -> dict[str, Any]:
    """Name, state and the numbers of lists."""
    found = catalogue.entry_of(run, name)
    metric = run.metrics[0]
    return {
        "id": name,
        "name": run.name,
        "state": found.state,
        "outcome": run.outcome,
        "step": found.step,
        "rows": len(run.steps),
        "seconds": _plain(float(run.steps["total_seconds"][-1])) if len(run.steps) else 0.0,
        "loss": _plain(found.loss),
        "error": "" if math.isnan(found.error) else metric.quantity(found.error),
        "error_title": metric.title,
        "model": found.model,
        "problem": found.problem,
        "optimizer": found.optimizer,
        "finished": _plain(float(run.steps["finished"][-1])) if len(run.steps) else 0.0,
        "frames": {name: len(frames.steps) for name, frames in getattr(run, "recorded", {}).items()},
    }


def rows(run: SavedRun, after: int | None = None) -> dict[str, Any]:
    """The rows of the table of steps behind step `after`, and their checks."""
    table = run.steps
    # A row's losses are those before its step, so they stand where the step began.
    products = np.maximum(table["products"], 0)
    begun = {
        "step": table["step"].astype("f8"),
        "seconds": table["total_seconds"] - table["seconds"],
        "products": (np.cumsum(products) - products).astype("f8"),
    }
    names = dict.fromkeys([*_CURVES, *(metric.column for metric in run.metrics)])
    known = [name for name in names if name in (table.dtype.names or ()) and _known(table[name]).any()]
    chosen = _chosen(table, run.metrics[0]) if after is None else np.flatnonzero(table["step"] > after)
    columns = {name: packed(values[chosen], "f8") for name, values in begun.items()}
    for name in known:
        values = np.where(_known(table[name]), table[name], np.nan)[chosen]
        columns[name] = packed(values, "f8" if len(chosen) < 2000 else "f4")
    words = {name: [w.decode("ascii", "replace") for w in table[name][chosen].tolist()] for name in ("cg_reason",)}
    checks = run.checks if after is None else run.checks[run.checks["step"] > after]
    if len(checks) > MOST_CHECKS:  # those of every k-th step that is drawn
        steps = table["step"][chosen]
        every = math.ceil(len(checks) / MOST_CHECKS * max(1.0, len(steps) / max(1, len(table))))
        checks = checks[np.isin(checks["step"], steps[::every])]
    return {
        "columns": columns,
        "words": words if any(words["cg_reason"]) else {},
        "checks": {name: packed(checks[name], "f8") for name in _CHECKS} if len(run.checks) else {},
        "of": len(table),
    }


def packed(values: Array, kind: str) -> dict[str, Any]:
    """An array as base64 text of little-endian numbers, with its type ("f4", "f8", "i4", "u1") and shape."""
    array = np.ascontiguousarray(values, dtype=np.dtype(kind).newbyteorder("<"))
    return {"type": kind, "shape": list(np.shape(values)), "data": base64.b64encode(array.tobytes()).decode("ascii")}


def _known(values: Array) -> npt.NDArray[np.bool_]:
    """Which values are there."""
    known: npt.NDArray[np.bool_] = np.isfinite(values) if values.dtype.kind == "f" else values >= 0
    return known


def _chosen(table: Table, metric: Metric) -> npt.NDArray[np.int64]:
    """The rows that are drawn: all, or of many every k-th, those with tests among them, and the last."""
    count = len(table)
    if count <= MOST_ROWS:
        return np.arange(count)
    tested = np.flatnonzero(_known(table["test_loss"]) | _known(table[metric.column]))
    half = MOST_ROWS // 2
    return np.unique(
        np.concatenate(
            [np.arange(0, count, math.ceil(count / half)), tested[:: math.ceil(len(tested) / half) or 1], [count - 1]]
        )
    )


def _metric(metric: Metric, table: Table) -> dict[str, Any]:
    values = table[metric.column]
    values = values[np.isfinite(values)]
    linear = metric.unit == "%" or metric.better == "higher" or bool((values <= 0).any())
    return {"column": metric.column, "title": metric.title, "factor": metric.factor, "log": not linear}


def _recorded(run: SavedRun, name: str) -> dict[str, Any]:
    """Frames of a recorder, evenly chosen from all if they are many; arrays that never change stand once."""
    frames = run.recorded[name]
    steps = [int(step) for step in frames.steps]
    if not steps:
        return {"steps": [], "of": 0, "about": _about(frames), "arrays": {}, "constant": {}}
    size = sum(_small(array).nbytes for array in frames.frame(steps[0]).values())
    most = max(2, MOST_BYTES // max(1, size))
    places = np.unique(np.linspace(0, len(steps) - 1, min(most, len(steps))).round().astype(int))
    kept = [steps[place] for place in places]
    taken = [{key: _small(array) for key, array in frames.frame(step).items()} for step in kept]
    arrays, constant = {}, {}
    for key in taken[0]:
        if len(taken) > 1 and all(np.array_equal(taken[0][key], other[key]) for other in taken[1:]):
            constant[key] = packed(taken[0][key], taken[0][key].dtype.str[1:])
        else:
            together = np.stack([frame[key] for frame in taken])
            arrays[key] = packed(together, together.dtype.str[1:])
    return {"steps": kept, "of": len(steps), "about": _about(frames), "arrays": arrays, "constant": constant}


def _small(array: Array) -> Array:
    """Numbers of four bytes or one; more digits cannot be seen."""
    array = np.asarray(array)
    return array.astype("u1" if array.dtype in (np.bool_, np.uint8) else "f4" if array.dtype.kind == "f" else "i4")


def _about(frames: Any) -> dict[str, Any]:
    about = frames.about if isinstance(frames.about, Mapping) else {}
    described = about.get("arrays")
    labels = {str(k): str(v.get("label", k)) for k, v in described.items()} if isinstance(described, Mapping) else {}
    return {"title": str(about.get("title", "")), "labels": labels}


def _plain(value: Any) -> Any:
    """A value for JSON, in which there is no nan."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
