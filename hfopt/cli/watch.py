"""`hfopt watch`: follow a run in the terminal while another process writes it."""

from __future__ import annotations

import argparse
import time

import numpy as np

from hfopt.cli import choose
from hfopt.cli.tables import clean, row_of
from hfopt.experiment import report
from hfopt.experiment.store import catalogue
from hfopt.experiment.store.format import RUN
from hfopt.experiment.store.reader import SavedRun, read_run
from hfopt.experiment.store.sealed import reading


def add(commands: choose.Commands) -> None:
    """Add the command."""
    made = choose.command(commands, "watch", "follow a running run in the terminal; Ctrl-C leaves it alone")
    made.add_argument("path", help=choose.NAMES)
    made.add_argument(
        "-n", "--steps", type=int, default=10, metavar="N", help="begin with the last N steps (default 10)"
    )
    made.add_argument("--every", type=float, default=1.0, metavar="SECONDS", help="look again after (default 1)")
    made.set_defaults(run=watch)


def watch(chosen: argparse.Namespace) -> None:
    """Print rows as they come, until the run ends."""
    if not chosen.every > 0:
        raise ValueError(f"--every {chosen.every}: must be above 0 seconds")
    folder = choose.folder(chosen.path, chosen.root)
    run = read_run(folder)
    with reading(folder / RUN):
        progress = report.Progress(run.metrics[0], second_order=bool(np.isfinite(run.steps["damping"]).any()))
        seen = (
            run.steps[-chosen.steps - 1 : -chosen.steps]["finished"] if chosen.steps > 0 else run.steps["finished"][-1:]
        )
        latest = float(seen[-1]) if len(seen) else -np.inf
    if not report.say(clean(f"{run.name}, begun {run.created}, {catalogue.state_of(run)}")):
        return
    while True:
        state = catalogue.state_of(run)  # before the rows: what ends in between has its last rows already
        run = read_run(folder)
        for row in _later(run, latest):
            latest = float(row["finished"])
            if not report.say(progress.line(row_of(row))):
                return
        if state != "running":
            state = catalogue.state_of(run)
            report.say(clean(f"{state}{f' ({run.outcome})' if run.outcome else ''} at step {_last(run)}"))
            return
        time.sleep(chosen.every)


def _later(run: SavedRun, latest: float) -> np.ndarray:
    """The rows that were finished after a moment."""
    found: np.ndarray = run.steps[run.steps["finished"] > latest]
    return found


def _last(run: SavedRun) -> int:
    return int(run.steps["step"][-1]) if len(run.steps) else 0
