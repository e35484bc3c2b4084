"""`hfopt list` and `hfopt compare`: many runs, a line or a column each."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from hfopt.cli import choose
from hfopt.cli.tables import clean, console, table
from hfopt.experiment import report
from hfopt.experiment.store import catalogue
from hfopt.experiment.store.format import RUN
from hfopt.experiment.store.sealed import reading


def add(commands: choose.Commands) -> None:
    """Add the commands."""
    made = choose.command(commands, "list", "list the runs that there are")
    made.add_argument(
        "path", nargs="*", help="names or patterns of runs (default: all), or a folder in place of --root"
    )
    made.add_argument(
        "-w",
        "--where",
        action="append",
        default=[],
        metavar="CONDITION",
        help="such as 'error<0.01' or 'problem=Multiplication and T>50'",
    )
    made.add_argument("-s", "--sort", metavar="COLUMN", help="a column, such as error")
    made.add_argument("-r", "--reverse", action="store_true", help="the largest first")
    made.set_defaults(run=listing)
    compared = choose.command(commands, "compare", "show in what runs differ, and how they went")
    compared.add_argument("path", nargs="+", help=choose.NAMES)
    compared.add_argument("-o", "--output", type=Path, help="draw test curves against steps, seconds and products too")
    compared.set_defaults(run=compare)


def listing(chosen: argparse.Namespace) -> None:
    """Print a line per run."""
    root, patterns = chosen.root, list(chosen.path)
    if len(patterns) == 1 and not (root / patterns[0] / RUN).is_file() and not (Path(patterns[0]) / RUN).is_file():
        here = Path(patterns[0])
        if here.is_dir() or ("/" in patterns[0] and not any(letter in patterns[0] for letter in "*?[")):
            root, patterns = here, []
    choose.existing(root)
    folders = choose.folders(patterns, root) if patterns else catalogue.find_runs(root)
    entries = [catalogue.entry(run, root) for run in folders]
    found = catalogue.select(entries, chosen.where, chosen.sort, reverse=chosen.reverse)
    rows = [[_cell(e, column) for column in catalogue.COLUMNS] for e in found]
    terminal = console()
    terminal.print(table(list(catalogue.COLUMNS), rows, terminal.width, drop=("model", "optimizer", "problem", "loss")))
    for damaged in (e for e in found if e.said):
        print(clean(damaged.said), file=sys.stderr)


def _cell(found: catalogue.Entry, column: str) -> str:
    value = getattr(found, column)
    if column == "error" and found.run is not None:
        return "" if math.isnan(value) else found.run.metrics[0].quantity(value)
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.3g}"
    return "" if value == -1 else str(value)


def compare(chosen: argparse.Namespace) -> None:
    """Print a column per run."""
    runs = choose.runs(chosen.path, chosen.root)
    rows: list[list[str]] = []
    with reading(runs[0].path / RUN):
        for name, values in catalogue.differing(runs).items():
            rows.append([name, *("-" if value is None else _brief(value) for value in values)])
        found = [catalogue.entry(run.path, run.path.parent) for run in runs]
        rows += [[column, *(_cell(e, column) for e in found)] for column in ("state", "step", "loss", "error")]
        rows.append(["seconds", *(f"{run.steps['seconds'].sum():.1f}" for run in runs)])
    terminal = console()
    terminal.print(table(["", *(run.name for run in runs)], rows, terminal.width, words=1 + len(runs)))
    if chosen.output is not None:
        from hfopt.experiment.visualize import compare_runs

        compare_runs(runs).savefig(chosen.output, dpi=130)
        print(report.short(chosen.output))


def _brief(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 30 else text[:27] + "..."
