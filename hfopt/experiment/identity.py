"""What a run has in common with its continuation: settings are compared, generators restored.

Only what both know is compared: a run stays loadable when an option, a metric or a word in a model's printed form has
been added since, or taken away.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
import inspect
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from hfopt.experiment.metrics import Metric
from hfopt.experiment.roles import Roles
from hfopt.experiment.store.format import RunError
from hfopt.experiment.store.reader import SavedRun

_SCALARS = (bool, int, float, str)


def describe(value: Any) -> Any:
    """`value` as nested dicts and lists of plain scalars; objects by their class and fields."""
    if value is None or isinstance(value, _SCALARS):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, torch.Tensor):
        return value.item() if value.numel() == 1 else f"tensor of shape {tuple(value.shape)}"
    if isinstance(value, (torch.dtype, torch.device)):
        return str(value)
    if isinstance(value, os.PathLike):
        return str(os.fspath(value))
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, range)):
        return [describe(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((describe(item) for item in value), key=str)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        # A field that is not compared changes no result.
        fields = {f.name: describe(getattr(value, f.name)) for f in dataclasses.fields(value) if f.compare}
        return {"class": class_name(value), **fields}
    if isinstance(value, type) or hasattr(value, "__qualname__"):
        return value.__qualname__
    if callable(value):
        return _arguments(value) or class_name(value)
    return {"class": class_name(value), **_scalars(value)}


def describe_experiment(
    model: torch.nn.Module,
    problem: Any,
    optimizer: torch.optim.Optimizer,
    roles: Roles,
    average: float | None,
    metric: Metric,
    callbacks: Mapping[str, Any],
) -> dict[str, Any]:
    """All that changes what a run computes; what of it differs is in the way of a resumption."""
    return {
        "model": describe_model(model),
        "problem": describe_problem(problem),
        "optimizer": describe_optimizer(optimizer),
        "batches": {
            "gradient": roles.gradient,
            "curvature": roles.curvature,
            "evaluation": roles.evaluation,
            **({"debias": roles.debias} if "debias" in roles.names else {}),
            "per_step": describe(roles.per_step),
            "roles": ["gradient", *sorted(roles.names)],
        },
        "average": average,
        "metric": metric.name,
        "callbacks": {name: describe(callback) for name, callback in callbacks.items()},
    }


def describe_problem(problem: Any) -> dict[str, Any]:
    """Class, indices of the test batches, and public scalar attributes of a problem, its device left out.

    `error_name` is among them if the problem measures its errors.
    """
    measured = {"error_name": problem.error_name} if hasattr(problem, "errors") else {}
    return {"class": class_name(problem), **_scalars(problem), **measured, "test_batches": list(problem.test_batches)}


def describe_model(model: torch.nn.Module) -> dict[str, Any]:
    """Class, printed form, settings of all modules, and the type and shape of everything in the state, by name."""
    shapes = {
        name: f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
        for name, value in model.state_dict().items()
        if isinstance(value, torch.Tensor)
    }
    modules = {
        name: {
            "class": class_name(module),
            **{key: value for key, value in _scalars(module).items() if key not in _NO_MODULE_SETTINGS},
        }
        for name, module in model.named_modules()
    }
    printed = re.sub(r" at 0x[0-9a-f]+", "", repr(model))
    return {"class": class_name(model), "printed": printed, "parameters": shapes, "modules": modules}


_NO_MODULE_SETTINGS = ("training", "call_super_init", "dump_patches")
_PRINTED = re.compile(r"^(?P<indent> *)(?:\((?P<name>[^)]*)\): )?(?P<class>[A-Za-z_][\w.]*)\((?P<settings>.*)$")


def _settings_printed(printed: str) -> dict[str, dict[str, str]]:
    """The classes and the settings `name=value` of the modules in a printed model, by their paths."""
    found: dict[str, dict[str, str]] = {}
    above: list[str] = []
    for line in printed.splitlines():
        match = _PRINTED.match(line)
        if match is None:
            continue
        above = [*above[: len(match["indent"]) // 2], match["name"] or ""]
        settings = dict(re.findall(r"(\w+)=(\([^)]*\)|[^,()]+)", match["settings"]))
        found[".".join(above).strip(".")] = {"class": match["class"], **settings}
    return found


def _same_terms(saved: Any, present: Any) -> tuple[Any, Any]:
    """Two descriptions of models in terms that both know: older ones have the settings in the printed form alone."""
    models = [description.get("model") for description in (saved, present)]
    if not all(isinstance(model, Mapping) for model in models):
        return saved, present
    if all("modules" in model for model in models):
        models = [{key: value for key, value in model.items() if key != "printed"} for model in models]
    else:
        models = [
            {"class": m.get("class"), "parameters": m.get("parameters"), **_settings_printed(str(m.get("printed")))}
            for m in models
        ]
    return {**saved, "model": models[0]}, {**present, "model": models[1]}


def describe_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Class and settings of an optimizer; of each parameter group the settings and the number of tensors.

    Settings are what its constructors take and it keeps under the same names; all else is its state.
    """
    makers = [vars(kind)["__init__"] for kind in type(optimizer).__mro__[:-1] if "__init__" in vars(kind)]
    taken = {name for maker in makers for name in inspect.signature(maker).parameters}
    own = {name: value for name, value in vars(optimizer).items() if name in taken and name not in ("self", "defaults")}
    groups = [
        {
            **{key: describe(value) for key, value in group.items() if key != "params"},
            "tensors": len(group["params"]),
        }
        for group in optimizer.param_groups
    ]
    return {
        "class": class_name(optimizer),
        **{name: describe(value) for name, value in own.items()},
        "groups": groups,
    }


def changes(saved: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    """One phrase per setting that changes what a run computes and is not the same as when it was saved."""
    return differences(*_same_terms(saved, present))


def refuse_another(run: SavedRun, present: Mapping[str, Any]) -> None:
    """Raise RunError if a run was made by something else than what `present` describes."""
    saved = {key: run.configuration.get(key) for key in present if key in run.configuration}
    differing = changes({**saved, "seed": run.seed, "metric": run.metrics[0].name}, present)
    if differing:
        raise RunError(
            f"the run in {run.path} was made with other settings: {'; '.join(differing)}. Use its settings, or start "
            "a run under another name; its parameters alone are hfopt.read_run(path).parameters()"
        )


def version_changes(saved: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    """One phrase per thing that a run is continued on and that was another before; what was not known is none."""

    def known(tree: Mapping[str, Any]) -> dict[str, Any]:
        nested = {key: known(value) if isinstance(value, Mapping) else value for key, value in tree.items()}
        return {key: value for key, value in nested.items() if value not in (None, "", {})}

    return differences(known(saved), known(present))


def differences(saved: Any, present: Any, name: str = "") -> list[str]:
    """One phrase per setting that both `saved` and `present` have, two nested descriptions, with different values."""
    if isinstance(saved, Mapping) and isinstance(present, Mapping):
        return [
            phrase
            for key in saved
            if key in present
            for phrase in differences(saved[key], present[key], f"{name}.{key}".lstrip("."))
        ]
    # An earlier version may have known of an object no more than its class.
    for one, other in ((saved, present), (present, saved)):
        if isinstance(one, str) and isinstance(other, Mapping) and other.get("class") == one:
            return []
    if isinstance(saved, list) and isinstance(present, list) and len(saved) == len(present):
        pairs = enumerate(zip(saved, present, strict=True))
        return [phrase for i, (old, new) in pairs for phrase in differences(old, new, f"{name}[{i}]")]
    if saved == present or (saved != saved and present != present):
        return []
    return [f"{name} was {saved!r} and is {present!r}"]


def class_name(value: Any) -> str:
    """The name of an object's class, without its module: a run file may be `__main__` or not."""
    return type(value).__qualname__


def _scalars(value: Any) -> dict[str, Any]:
    fields = getattr(value, "__dict__", {})
    plain = (*_SCALARS, torch.dtype)
    return {
        name: describe(item)
        for name, item in fields.items()
        if not name.startswith("_") and (item is None or isinstance(item, plain))
    }


def _arguments(value: Any) -> dict[str, Any]:
    """Class of an object that can be called, and what it keeps of its constructor's arguments under their names."""
    names: list[str] = []
    with suppress(ValueError):  # classes written in C may tell nothing
        names = list(inspect.signature(type(value)).parameters)
    kept = {name: getattr(value, name) for name in names if hasattr(value, name)}
    plain = {name: item for name, item in kept.items() if item is None or isinstance(item, _SCALARS)}
    return {"class": class_name(value), **plain} if plain else {}


def versions(device: torch.device) -> dict[str, Any]:
    """What the computation runs on."""
    try:
        own = importlib.metadata.version("hfopt")
    except importlib.metadata.PackageNotFoundError:
        own = "not installed, used from a checkout"
    return {
        "hfopt": own,
        "commit": commit(Path(__file__).resolve().parent),
        "native": _native(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "numpy": np.__version__,
        "h5py": h5py.__version__,
        "host": platform.node(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
    }


def session(step: int, versions: Mapping[str, Any]) -> dict[str, Any]:
    """What a run is started or continued by, for the record."""
    main = getattr(sys.modules.get("__main__"), "__file__", None)
    return {
        "step": step,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "process": os.getpid(),
        "command": shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "folder": os.getcwd(),
        "script_commit": commit(Path(main).resolve().parent) if main else "",
        "versions": dict(versions),
    }


@functools.cache
def commit(folder: Path) -> str:
    """The git commit of a checkout, with "+changes" if files differ from it; empty where there is none."""
    if not any((parent / ".git").exists() for parent in (folder, *folder.parents)):
        return ""

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def _native() -> dict[str, Any]:
    """What the compiled recurrences are, as far as they tell: another compiler may round differently."""
    try:
        build = importlib.import_module("hfopt.recurrences.native.build")
        found = build.identity()
        return {str(key): describe(value) for key, value in found.items()}
    except Exception:  # whatever is wrong with a compiler is no reason not to start a run
        return {}


def _processor() -> str:
    """The name of the processor, as far as the system tells it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
