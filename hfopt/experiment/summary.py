"""What a run was, in a few lines: for the terminal and for pages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from hfopt.experiment import report
from hfopt.experiment.store import catalogue
from hfopt.experiment.store.format import OWN_LOOP
from hfopt.experiment.store.reader import SavedRun

_VERSIONS = ("hfopt", "torch", "numpy", "python", "device", "threads")


def facts(run: SavedRun) -> dict[str, str]:
    """What ran, on what, and how far it came, by the names of the lines.

    What a damaged or crafted file lacks is a KeyError, a TypeError or the like.
    """
    own = (run.configuration.get("driver") or {}).get("class") == OWN_LOOP
    session = run.sessions[-1] if run.sessions else {}
    found = {
        **({"settings": pairs(run.configuration["settings"])} if own else _parts(run)),
        "versions": pairs({key: run.versions[key] for key in _VERSIONS}),
        **({"commit": str(session["versions"]["commit"])} if session else {}),
        **({"command": f"{session['command']}  on {session['versions']['host']}"} if session else {}),
        "state": f"{catalogue.state_of(run)}{f' ({run.outcome})' if run.outcome else ''}",
        "checkpoints": ", ".join(p.key if p.named else str(p.step) for p in run.checkpoints),
    }
    if len(run.steps):
        measure = run.metrics[0]
        last, tested = run.steps[-1], run.steps[np.isfinite(run.steps[measure.column])]
        found["so far"] = f"{int(run.steps['updated'].sum())} updates, {report.duration(float(last['total_seconds']))}"
        if len(tested):
            best = tested[np.argmin([measure.rank(value) for value in tested[measure.column]])]
            found["wrong" if measure.counted else measure.name] = (
                f"{measure.quantity(tested[-1][measure.column])} at step {tested[-1]['step']}, "
                f"best {measure.quantity(best[measure.column])} at step {best['step']}"
            )
    else:
        found["so far"] = "no step has ended"
    return found


def _parts(run: SavedRun) -> dict[str, str]:
    """Problem, model, optimizer and batches of an experiment."""
    c = run.configuration
    shapes = c["model"]["parameters"]
    batches = ", ".join(f"{role} {len(c['batches'][role])}" for role in c["batches"]["roles"])
    problem = {key: value for key, value in c["problem"].items() if key not in ("class", "test_batches")}
    optimizer = {key: value for key, value in c["optimizer"].items() if key not in ("class", "groups")}
    group = {key: value for key, value in c["optimizer"]["groups"][0].items() if key != "tensors"}
    return {
        "problem": f"{c['problem']['class']}  {pairs(problem)}",
        "model": f"{c['model']['printed'].splitlines()[0].rstrip('(')}  {len(shapes)} tensors",
        "optimizer": f"{c['optimizer']['class']}  {pairs({**group, **optimizer})}",
        "batches": f"{batches}, test {len(c['problem']['test_batches'])}",
    }


def pairs(settings: Mapping[str, Any]) -> str:
    """`name=value` of settings that are given, nested ones by their class."""
    parts = []
    for name, value in settings.items():
        if value is None or value is False:
            continue
        if isinstance(value, Mapping):
            value = f"{value.get('class', '')}({pairs({k: v for k, v in value.items() if k != 'class'})})"
        parts.append(f"{name}={value}")
    return ", ".join(parts)
