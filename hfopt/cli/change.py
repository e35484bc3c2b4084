"""`hfopt rm` and `hfopt resume`: what changes runs, and asks or refuses before it does."""

from __future__ import annotations

import argparse
import sys
from contextlib import suppress
from pathlib import Path

from hfopt.cli import choose
from hfopt.cli.tables import clean
from hfopt.experiment import report
from hfopt.experiment.store import catalogue
from hfopt.experiment.store.format import RunError
from hfopt.experiment.store.lock import LOCK, Lock, is_held
from hfopt.experiment.store.writer import clear


def add(commands: choose.Commands) -> None:
    """Add the commands."""
    remove_ = choose.command(commands, "rm", "remove runs, after asking; what else lies in their folders stays")
    remove_.add_argument("path", nargs="+", help=choose.NAMES)
    remove_.add_argument("-y", "--yes", action="store_true", help="do not ask")
    remove_.set_defaults(run=remove)
    resume_ = choose.command(commands, "resume", "continue a run of a file in runs/ from its last checkpoint")
    resume_.add_argument("path", help=choose.NAMES)
    resume_.add_argument("-n", "--max-steps", type=int, metavar="N", help="updates in all (default: the run's own)")
    resume_.set_defaults(run=resume)


def remove(chosen: argparse.Namespace) -> int:
    """Remove runs one by one; 1 if one is left because the answer was no."""
    left = 0
    for folder in choose.folders(chosen.path, chosen.root):
        what = _described(folder)
        lock = Lock(folder)  # refuses a run that is being written, and nobody begins one meanwhile
        try:
            if not chosen.yes and not _confirmed(what):
                left = 1
                continue
            clear(folder)
        finally:
            lock.release()
        with suppress(OSError):  # pictures, or whatever else somebody has put there
            (folder / LOCK).unlink()
            folder.rmdir()
        rest = ", ".join(sorted(path.name for path in folder.iterdir())) if folder.is_dir() else ""
        print(f"removed {report.short(folder)}{f'; {clean(rest)} stays there' if rest else ''}")
    return left


def resume(chosen: argparse.Namespace) -> int:
    """Continue a run here; 0 if it came to its end, 130 after Ctrl-C, otherwise 1."""
    folder = choose.folder(chosen.path, chosen.root)
    if is_held(folder):
        raise RunError(f"the run in {report.short(folder)} is running; hfopt watch follows it")
    from hfopt.experiment.loading import load_run

    sys.path.insert(0, "")  # runs/ is found where `python -m runs.demo` finds it
    outcome = load_run(folder).optimize(chosen.max_steps)
    return {"success": 0, "max_steps": 0, "interrupted": 130}.get(outcome, 1)


def _described(folder: Path) -> str:
    entry = catalogue.entry(folder, folder)
    size = sum(path.lstat().st_size for path in folder.rglob("*"))
    return f"{report.short(folder)}: {entry.state}, {max(entry.step, 0)} steps, {size / 1e6:.1f} MB"


def _confirmed(what: str) -> bool:
    """Ask on the terminal; RunError where nobody can answer."""
    if not sys.stdin.isatty():
        raise RunError(f"{what}; nobody is there to be asked: add --yes to remove it")
    return input(f"remove {clean(what)}? [y/N] ").strip().lower() in ("y", "yes")
