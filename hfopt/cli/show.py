"""`hfopt show`: what a run was, how it went, what it saved, and the checks of one step."""

from __future__ import annotations

import argparse
import math
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from hfopt.cli import choose
from hfopt.cli.tables import clean, console, row_of, table
from hfopt.experiment import report
from hfopt.experiment.metrics import Metric
from hfopt.experiment.store.format import RUN
from hfopt.experiment.store.reader import SavedRun
from hfopt.experiment.store.sealed import reading
from hfopt.experiment.summary import facts


def add(commands: choose.Commands) -> None:
    """Add the command."""
    made = choose.command(commands, "show", "print what a run was, how it went and what it saved")
    made.add_argument("path", help=choose.NAMES)
    made.add_argument("-n", "--steps", type=int, default=10, metavar="N", help="show the last N steps (default 10)")
    made.add_argument("-c", "--checks", type=int, metavar="STEP", help="show the CG checks of this step as well")
    made.set_defaults(run=show)


def show(chosen: argparse.Namespace) -> None:
    """Print a run."""
    run = choose.run(chosen.path, chosen.root)
    terminal = console()
    head = Text(clean(run.name), "bold")
    head.append(f"   begun {clean(run.created)}   seed {'-' if run.seed is None else run.seed}", "not bold")
    lines = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    lines.add_column(style="dim")
    lines.add_column(overflow="fold")
    # What is missing or of another kind in what a file says about itself is told like any other damage.
    with reading(run.path / RUN):
        for name, text in facts(run).items():
            lines.add_row(clean(name), clean(text))
    terminal.print(head)
    terminal.print(lines)
    if len(run.steps):
        terminal.print()
        terminal.print(_steps(run, chosen.steps, terminal.width))
    if chosen.checks is not None:
        rows = [row_of(row) for row in run.checks[run.checks["step"] == chosen.checks]]
        if not rows:
            raise ValueError(f"{run.path} has no CG checks of step {chosen.checks}")
        terminal.print(f"\nCG checks of step {chosen.checks}")
        terminal.print("\n".join(report.check_table(rows)), soft_wrap=True)


def _steps(run: SavedRun, count: int, width: int) -> Table:
    """The last steps; columns that the run does not have, or that find no room, are left out."""
    rows = run.steps[-count:] if count > 0 else run.steps[:0]
    first, *others = run.metrics
    columns: list[tuple[str, str, str | Metric]] = [
        ("step", "step", "d"),
        ("train loss", "train_loss", ".4e"),
        ("test loss", "test_loss", ".4e"),
        (first.title, first.column, first),
        *((metric.title, metric.column, metric) for metric in others),
        ("λ", "damping", ".2e"),
        ("ρ", "rho", "ratio"),
        ("taken", "backtracked", "d"),
        ("/CG", "cg_iterations", "/"),
        ("length", "step_length", ".3g"),
        ("seconds", "seconds", "seconds"),
    ]
    shown = [column for column in columns if _known(run.steps[column[1]]).any()]
    cells = [[_text(row[name], form) for _, name, form in shown] for row in rows]
    drop = ("taken", "length", *(metric.title for metric in reversed(others)), "seconds", "ρ", "λ")
    return table([title for title, _, _ in shown], cells, width, drop=drop, words=0)


def _known(values: Any) -> Any:
    """Which values of a column are there."""
    return np.isfinite(values) if values.dtype.kind == "f" else values >= 0


def _text(value: Any, form: str | Metric) -> str:
    """A number as text; empty if it is absent."""
    if isinstance(form, Metric):
        return form.number(float(value))
    if form in ("d", "/"):
        return "" if value < 0 else f"{'/' if form == '/' else ''}{int(value)}"
    if math.isnan(value):
        return ""
    if form in ("ratio", "seconds"):
        number = float(value)
        return report.ratio(number).strip() if form == "ratio" else report.seconds(number, 2).strip()
    return format(float(value), form)
