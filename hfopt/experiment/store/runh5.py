"""The file run.h5: the header of a run, its tables, and the list of its checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hfopt.experiment.metrics import metrics_in
from hfopt.experiment.store import sealed
from hfopt.experiment.store.checkpoints import Checkpoint
from hfopt.experiment.store.format import (
    CHECK_COLUMNS,
    CHECK_TYPE,
    FORMAT,
    STEP_COLUMNS,
    VERSION,
    RunError,
    Table,
    as_columns,
    step_columns,
)
from hfopt.experiment.store.tree import read_tree

_CHECKPOINT_TYPE = np.dtype([("key", "S100"), ("step", "i8"), ("serial", "i8"), ("named", "?"), ("saved", "f8")])
_TEXTS = ("configuration", "versions", "metrics", "sessions")


@dataclass
class Header:
    """What run.h5 says about a run besides its tables.

    Attributes:
        run: an id; those of format 1 have none.
        name, created, seed: of the run.
        configuration, versions: nested dicts.
        metrics: what is measured, see :meth:`hfopt.experiment.metrics.Metric.describe`.
        sessions: one dict per start and resumption: when, step, host, process, command line, versions.
        outcome: how it ended: "success", ...; empty while it runs, and if it was killed.
        journal: the number of the journal that follows.
        serial: checkpoints written so far.
    """

    run: str
    name: str
    created: str
    seed: int | None
    configuration: dict[str, Any]
    versions: dict[str, Any]
    metrics: list[dict[str, str]]
    sessions: list[dict[str, Any]] = field(default_factory=list)
    outcome: str = ""
    journal: int = 0
    serial: int = 0


@dataclass(frozen=True)
class Contents:
    """All that run.h5 holds; `checkpoints` are those at the time of writing."""

    version: int
    header: Header
    steps: Table
    checks: Table
    checkpoints: list[Checkpoint]


def write_run(path: Path, header: Header, steps: Table, checks: Table, checkpoints: Sequence[Checkpoint]) -> None:
    """Write a new version of run.h5, flushed to the disk; the old one stays until then.

    Raises WriteError if there is no room or no permission.
    """
    listed = np.array([(c.key.encode(), c.step, c.serial, c.named, c.saved) for c in checkpoints], _CHECKPOINT_TYPE)
    # In memory: HDF5 itself does not survive a disk that is full.
    with h5py.File(path.name, "w", driver="core", backing_store=False, userblock_size=sealed.BLOCK) as file:
        file.attrs["format"], file.attrs["version"], file.attrs["id"] = FORMAT, VERSION, header.run
        file.attrs["name"], file.attrs["created"], file.attrs["outcome"] = header.name, header.created, header.outcome
        file.attrs["journal"], file.attrs["serial"] = header.journal, header.serial
        if header.seed is not None:
            file.attrs["seed"] = header.seed
        for name in _TEXTS:
            sealed.put_text(file, name, getattr(header, name))
        for name, rows, documented in (("steps", steps, STEP_COLUMNS), ("checks", checks, CHECK_COLUMNS)):
            dataset = file.create_dataset(name, data=rows)
            for column in rows.dtype.names or ():
                dataset.attrs[column] = documented.get(column, ("", "metric of the test batches before the update"))[1]
        file.create_dataset("checkpoints", data=listed)
        file.flush()
        image = file.id.get_file_image()
    sealed.write_sealed(path, {"kind": "run", "version": VERSION}, [image])


def read_contents(path: Path, *, brief: bool = False) -> Contents:
    """Read run.h5, of format 1 or 2; `brief` leaves out checks, checkpoints, versions and sessions of format 2.

    Raises FileNotFoundError if there is none, and RunError if it is truncated, damaged, or not a run's.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no run at {path}")
    if sealed.is_sealed(path):
        facts = sealed.read_facts(path)
        if isinstance(facts.get("version"), int) and facts["version"] > VERSION:
            raise RunError(f"{path} has format version {facts['version']}, this hfopt reads up to {VERSION}; {_NEWER}")
        with sealed.open_sealed(path) as (facts, file):
            if facts.get("kind") != "run":
                raise RunError(f"{path} is a {facts.get('kind')} of hfopt, not a run")
            return _second(file, brief)
    return _first(path)


_NEWER = "use a newer hfopt"


def _second(file: Any, brief: bool) -> Contents:
    attributes = {name: _scalar(file.attrs, name) for name in file.attrs}
    if attributes.get("format") != FORMAT:
        raise ValueError("no run of hfopt wrote it")
    left_out: dict[str, Any] = {"versions": {}, "sessions": []} if brief else {}
    texts = [left_out[n] if n in left_out else json.loads(sealed.text(sealed.item(file, n))) for n in _TEXTS]
    configuration, versions, metrics, sessions = texts
    _check_described(configuration, versions)
    metrics_in({"metrics": metrics})
    header = Header(
        run=str(attributes["id"]),
        name=str(attributes["name"]),
        created=str(attributes["created"]),
        seed=int(attributes["seed"]) if "seed" in attributes else None,
        configuration=configuration,
        versions=versions,
        metrics=[{key: str(m[key]) for key in ("name", "unit", "better", "column")} for m in metrics],
        sessions=[dict(session) for session in sessions],
        outcome=str(attributes["outcome"]),
        journal=int(attributes["journal"]),
        serial=int(attributes["serial"]),
    )
    steps = _table(file, "steps", step_columns(m["column"] for m in header.metrics))
    if brief:
        return Contents(VERSION, header, steps, np.empty(0, CHECK_TYPE), [])
    listed = sealed.array(sealed.item(file, "checkpoints"), "V", 1)
    if listed.dtype != _CHECKPOINT_TYPE:
        raise TypeError(f"/checkpoints has type {listed.dtype}")
    checkpoints = [
        Checkpoint(row["key"].decode("ascii"), *(row[name].item() for name in ("step", "serial", "named", "saved")))
        for row in listed
    ]
    return Contents(VERSION, header, steps, _table(file, "checks", CHECK_TYPE), checkpoints)


def _first(path: Path) -> Contents:
    with sealed.reading(path), h5py.File(path, "r") as file:
        if _scalar(file.attrs, "format") != FORMAT:
            raise RunError(f"{path} is an HDF5 file, but no run of hfopt wrote it")
        version = _scalar(file.attrs, "version")
        if not isinstance(version, int) or version < 1:
            raise ValueError(f"its format version is {version!r}")
        if version > 1:
            raise RunError(f"{path} has format version {version}, this hfopt reads up to {VERSION}; {_NEWER}")
        configuration, versions = (read_tree(sealed.item(file, name)) for name in ("configuration", "versions"))
        _check_described(configuration, versions)
        header = Header(
            run="",
            name=str(_scalar(file.attrs, "name")),
            created=str(_scalar(file.attrs, "created")),
            seed=int(_scalar(file.attrs, "seed")) if "seed" in file.attrs else None,
            configuration=configuration,
            versions=versions,
            metrics=[metric.describe() for metric in metrics_in(configuration)],
            journal=int(_scalar(file.attrs, "journal")),
            serial=int(_scalar(file.attrs, "serial")),
        )
        checkpoints, group = [], sealed.item(file, "checkpoints")
        for key in group:
            attributes = sealed.item(group, key).attrs
            facts = [_scalar(attributes, fact) for fact in ("step", "serial", "named", "saved")]
            checkpoints.append(Checkpoint(key, int(facts[0]), int(facts[1]), bool(facts[2]), float(facts[3])))
        steps = _table(file, "steps", step_columns())
        return Contents(1, header, steps, _table(file, "checks", CHECK_TYPE), checkpoints)


def read_first_checkpoint(path: Path, key: str, part: str | None) -> Any:
    """A checkpoint of a run of format 1, or one of its parts."""
    with sealed.reading(path), h5py.File(path, "r") as file:
        group = sealed.item(sealed.item(file, "checkpoints"), key)
        return read_tree(group if part is None else sealed.item(group, part))


def _table(file: Any, name: str, columns: Any) -> Table:
    """One of the tables; its steps rise."""
    rows: Table = sealed.array(sealed.item(file, name), "V", 1, columns)
    if "step" not in (rows.dtype.names or ()) or rows.dtype["step"].kind != "i" or (np.diff(rows["step"]) < 0).any():
        raise ValueError(f"/{name} has no rising steps")
    return as_columns(rows, columns)


def _scalar(attributes: Any, name: str) -> Any:
    """An attribute that is a number or a string; None if there is none."""
    if name not in attributes:
        return None
    space = attributes.get_id(name)
    if space.shape not in ((), None) or space.get_storage_size() > 1 << 16:
        raise ValueError(f"the attribute {name} has shape {space.shape}")
    value = attributes[name]
    if isinstance(value, bytes):
        return value.decode("utf-8")
    return value.item() if isinstance(value, np.generic) else value


def _check_described(configuration: Any, versions: Any) -> None:
    """The parts of a description that others rely on."""
    if not isinstance(versions, Mapping) or not isinstance(configuration, Mapping):
        raise TypeError("/configuration or /versions is no table of names")
