"""Which runs are meant: by name, by folder, or by a pattern of names below a root."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from hfopt.experiment.store import catalogue
from hfopt.experiment.store.format import RUN
from hfopt.experiment.store.reader import SavedRun, read_run, run_folder

NAMES = "name below the root (patterns such as 'demo-*' too), folder of a run, or its run.h5"
Commands = Any  # argparse has no public name for it


def command(commands: Commands, name: str, does: str, **options: Any) -> argparse.ArgumentParser:
    """A new command, with the option that all have."""
    made: argparse.ArgumentParser = commands.add_parser(
        name, help=does, description=does[0].upper() + does[1:] + ".", **options
    )
    made.add_argument("--root", type=Path, default=catalogue.LOGS, help="where runs are (default: runs/logs)")
    return made


def folders(given: Iterable[str], root: Path) -> list[Path]:
    """The folders of all runs that are meant; FileNotFoundError with near misses for one that is not there."""
    found: list[Path] = []
    for name in given:
        found += [folder for folder in _folders(name, root) if folder not in found]
    return found


def runs(given: Iterable[str], root: Path) -> list[SavedRun]:
    """The runs that are meant."""
    return [read_run(folder) for folder in folders(given, root)]


def folder(given: str, root: Path) -> Path:
    """The folder of the one run that is meant; ValueError if a pattern fits several."""
    found = folders([given], root)
    if len(found) > 1:
        names = ", ".join(path.name for path in found[:4])
        raise ValueError(f"{given} fits {len(found)} runs ({names}{', ...' * (len(found) > 4)}); name one of them")
    return found[0]


def run(given: str, root: Path) -> SavedRun:
    """The one run that is meant."""
    return read_run(folder(given, root))


def existing(root: Path) -> Path:
    """A root that is there; FileNotFoundError if it is not."""
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}; runs are in runs/logs of the folder they were started in")
    return root


def _folders(given: str, root: Path) -> list[Path]:
    if (root / given / RUN).is_file():
        return [root / given]
    if any(letter in given for letter in "*?[") and not Path(given).exists():
        named = [(folder, folder.relative_to(root).as_posix()) for folder in catalogue.find_runs(existing(root))]
        found = [f for f, name in named if fnmatchcase(name, given) or fnmatchcase(name.rpartition("/")[2], given)]
        if not found:
            raise FileNotFoundError(f"no run below {root} is called {given}; there are {len(named)}: hfopt list")
        return found
    path = run_folder(given) if root == catalogue.LOGS or Path(given).name != given else root / given
    if not (path / RUN).is_file():
        near = catalogue.near_misses(given, root)
        said = f"there is no run at {path / RUN}"
        raise FileNotFoundError(f"{said}; did you mean {' or '.join(near)}?" if near else said)
    return [path]
