"""Rebuilding the experiment of a run that a file of `runs/` made, from the settings that the run recorded."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, get_args, get_type_hints

import torch

from hfopt.experiment.driver import HF
from hfopt.experiment.store.format import RunError
from hfopt.experiment.store.reader import SavedRun, read_run

S = TypeVar("S")
RUN_FILE = "run_file"
"""Under this name the settings of a run tell which file made it."""
_MODULE = re.compile(r"runs\.[a-z_]+", re.ASCII)
_wanted: ContextVar[Mapping[str, Any] | None] = ContextVar("hfopt_recorded_settings", default=None)


def load_run(path: str | Path, checkpoint: int | str = "last") -> HF:
    """The experiment of a run, with model, problem and optimizer as at one of its checkpoints.

    For runs of the files in `runs/`, which are found as `import runs` finds them: the file is executed with the
    settings that the run recorded. Continue with `hf.optimize(max_steps=...)`, or look at `hf.model`, `hf.problem(i)`
    and `hfopt.visualize`. A run of a CUDA device is loaded on the CPU where there is none.

    Args:
        path: name of the run, or its folder.
        checkpoint: "last", "best", the number of a saved step, or a name.

    Raises:
        FileNotFoundError: there is no such run.
        RunError: none of the files in `runs/` made it, or they have changed too much; or a file is damaged.
        KeyError: there is no such checkpoint.
    """
    run = read_run(path)
    name, recorded = _file_of(run), run.configuration.get("settings")
    if name is None or not isinstance(recorded, Mapping):
        raise RunError(
            f"{run.path} does not say which file of runs/ made it; build its objects as its run file did, then call "
            "hf.load(), or take its parameters alone: hfopt.read_run(path).parameters()"
        )
    device = str(recorded.get("device", "cpu"))
    here = device if torch.device(device).type != "cuda" or torch.cuda.is_available() else "cpu"
    token = _wanted.set({**recorded, "name": str(run.path.resolve()), "device": here})
    try:
        hf = getattr(_executed(name, run.path), "hf", None)
    except (SystemExit, TypeError, ValueError) as error:
        raise RunError(f"{name} cannot make the run in {run.path} any more: {error}") from error
    finally:
        _wanted.reset(token)
    if not isinstance(hf, HF):
        raise RunError(f"{name} has no experiment `hf`, which {run.path} is to be loaded into")
    hf.load(checkpoint)
    return hf


def _file_of(run: SavedRun) -> str | None:
    """The module that made a run; earlier versions tell by their command line alone."""
    settings = run.configuration.get("settings")
    told = settings.get(RUN_FILE) if isinstance(settings, Mapping) else None
    if told is None and run.sessions:
        found = re.search(r"-m (runs\.[a-z_]+)", str(run.sessions[0].get("command", "")), re.ASCII)
        told = found[1] if found else None
    return told if isinstance(told, str) and _MODULE.fullmatch(told) else None


def _executed(name: str, path: Path) -> ModuleType:
    """A module of `runs`, executed apart from the one that may have been imported."""
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.loader is None:
        raise RunError(f"{name}, which made {path}, is not here; call this in the folder of the checkout")
    module, imported = importlib.util.module_from_spec(spec), sys.modules.get(name)
    sys.modules[name] = module  # where dataclasses look for the names in their annotations
    try:
        spec.loader.exec_module(module)
    finally:
        if imported is None:
            del sys.modules[name]
        else:
            sys.modules[name] = imported
    return module


def recorded_settings(default: S) -> S | None:
    """The settings of the run that is being loaded, as a dataclass like `default`; None if none is.

    Settings that the run did not record, since they are newer, are those of `default`; paths that were recorded as the
    class of an object, which earlier versions did, too.
    """
    found = _wanted.get()
    if found is None:
        return None
    hints = get_type_hints(type(default))
    known = {f.name: found[f.name] for f in fields(default) if f.name in found}  # type: ignore[arg-type]
    taken = {}
    for name, value in known.items():
        if isinstance(value, Mapping) or name in ("resume", "overwrite", "picture"):
            continue
        as_path = isinstance(value, str) and Path in get_args(hints[name])
        taken[name] = tuple(value) if isinstance(value, list) else Path(value) if as_path else value
    changed: S = replace(default, **taken)  # type: ignore[type-var]
    return changed
