"""`hfopt export`: the tables of a run for other programs."""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from pathlib import Path
from typing import Any, TextIO

from hfopt.cli import choose
from hfopt.cli.tables import row_of
from hfopt.experiment import report
from hfopt.experiment.store.reader import SavedRun


def add(commands: choose.Commands) -> None:
    """Add the command."""
    made = choose.command(commands, "export", "write the table of steps for other programs")
    made.add_argument("path", help=choose.NAMES)
    form = made.add_mutually_exclusive_group()
    form.add_argument("--csv", action="store_true", help="comma-separated values (default)")
    form.add_argument("--json", action="store_true", help="JSON, with settings and versions")
    form.add_argument("--tensorboard", action="store_true", help="TensorBoard's event files, into a new folder")
    made.add_argument("--checks", action="store_true", help="the CG checks in place of the steps")
    made.add_argument("-o", "--output", type=Path, help="the file or folder (default: the terminal; <run>/tensorboard)")
    made.set_defaults(run=export)


def export(chosen: argparse.Namespace) -> None:
    """Write a table."""
    run = choose.run(chosen.path, chosen.root)
    if chosen.tensorboard:
        from hfopt.experiment.tensorboard import write_events

        output = run.path / "tensorboard" if chosen.output is None else chosen.output
        write_events(run, output)
        print(report.short(output))
    elif chosen.output is None:
        _write(run, chosen, sys.stdout)
    else:
        with chosen.output.open("w", encoding="utf-8", newline="") as file:
            _write(run, chosen, file)
        print(report.short(chosen.output))


def _write(run: SavedRun, chosen: argparse.Namespace, file: TextIO) -> None:
    table = run.checks if chosen.checks else run.steps
    rows = [{name: _plain(value) for name, value in row_of(row).items()} for row in table]
    if chosen.json:
        facts = {"name": run.name, "seed": run.seed, "created": run.created, "outcome": run.outcome}
        described = {"configuration": run.configuration, "versions": run.versions}
        json.dump({**facts, **described, "checks" if chosen.checks else "steps": rows}, file, indent=1)
        file.write("\n")
        return
    writer = csv.DictWriter(file, list(table.dtype.names or ()), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: "" if value is None else value for name, value in row.items()} for row in rows)


def _plain(value: Any) -> Any:
    """A value for other programs; None for what is absent."""
    if isinstance(value, bytes):
        return value.decode("ascii", "replace")
    return None if isinstance(value, float) and not math.isfinite(value) else value
