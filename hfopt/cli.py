"""The command `hfopt`: look at runs from the terminal."""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hfopt.experiment import report
from hfopt.experiment.metrics import Metric
from hfopt.experiment.store import catalogue
from hfopt.experiment.store.format import RUN, RunError
from hfopt.experiment.store.reader import Run, read_run
from hfopt.experiment.store.sealed import reading

_PATH = "folder of a run, its run.h5, or its name under runs/logs"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    chosen = _parser().parse_args(arguments)
    try:
        _COMMANDS[chosen.command](chosen)
        sys.stdout.flush()
    except BrokenPipeError:  # hfopt show run | head
        report.close_output()
        return 1
    except KeyboardInterrupt:
        print(f"\nhfopt {chosen.command}: stopped", file=sys.stderr)
        return 130
    except (RunError, OSError, ValueError, KeyError) as error:
        said = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"hfopt {chosen.command}: {_clean(str(said))}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        print("hfopt plot: pictures need matplotlib; pip install matplotlib", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hfopt", description="Look at the runs of hfopt experiments.")
    parser.add_argument("--version", action="version", version=f"hfopt {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    show = commands.add_parser("show", help="print what a run was, how it went and what it saved")
    show.add_argument("path", help=_PATH)
    show.add_argument("-n", "--steps", type=int, default=10, metavar="N", help="show the last N steps (default 10)")
    show.add_argument("-c", "--checks", type=int, metavar="STEP", help="show the CG checks of this step as well")
    plot = commands.add_parser("plot", help="draw the curves of one or several runs into a picture")
    plot.add_argument("path", nargs="+", help=_PATH)
    plot.add_argument("-o", "--output", type=Path, help="the picture (default: curves.png in the first run's folder)")
    listing = commands.add_parser("list", help="list the runs that there are")
    listing.add_argument("folder", nargs="?", type=Path, default=catalogue.LOGS, help="where (default: runs/logs)")
    listing.add_argument(
        "-w", "--where", action="append", default=[], metavar="CONDITION", help="such as 'error<0.01' or 'problem.T=30'"
    )
    listing.add_argument("-s", "--sort", metavar="COLUMN", help="a column, such as error")
    listing.add_argument("-r", "--reverse", action="store_true", help="the largest first")
    compare = commands.add_parser("compare", help="show in what runs differ, and how they went")
    compare.add_argument("path", nargs="+", help=_PATH)
    export = commands.add_parser("export", help="write the table of steps for other programs")
    export.add_argument("path", help=_PATH)
    form = export.add_mutually_exclusive_group()
    form.add_argument("--csv", action="store_true", help="comma-separated values (default)")
    form.add_argument("--json", action="store_true", help="JSON, with settings and versions")
    export.add_argument("--checks", action="store_true", help="the CG checks in place of the steps")
    export.add_argument("-o", "--output", type=Path, help="the file (default: the terminal)")
    return parser


def _version() -> str:
    try:
        return importlib.metadata.version("hfopt")
    except importlib.metadata.PackageNotFoundError:
        return "of a checkout"


def _read(given: str) -> Run:
    """A run; if there is none, FileNotFoundError with the names of those that may have been meant."""
    try:
        return read_run(given)
    except FileNotFoundError as error:
        near = catalogue.near_misses(given)
        raise FileNotFoundError(f"{error}; did you mean {' or '.join(near)}?" if near else str(error)) from error


def _plot(chosen: argparse.Namespace) -> None:
    runs = [_read(given) for given in chosen.path]
    from hfopt.experiment.visualize import plot_runs

    output = runs[0].path / "curves.png" if chosen.output is None else chosen.output
    plot_runs(runs).savefig(output, dpi=130)
    print(report.short(output))


def _list(chosen: argparse.Namespace) -> None:
    folder: Path = chosen.folder
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there is no folder {folder}; runs are in runs/logs of the folder they were started in"
        )
    entries = [catalogue.entry(run, folder) for run in catalogue.find_runs(folder)]
    found = catalogue.select(entries, chosen.where, chosen.sort, reverse=chosen.reverse)
    rows = [[_cell(e, column) for column in catalogue.COLUMNS] for e in found]
    console = _console()
    console.print(_table(list(catalogue.COLUMNS), rows, console.width, drop=("model", "optimizer", "problem", "loss")))
    for damaged in (e for e in found if e.said):
        print(_clean(damaged.said), file=sys.stderr)


def _cell(found: catalogue.Entry, column: str) -> str:
    value = getattr(found, column)
    if column == "error" and found.run is not None:
        return "" if math.isnan(value) else found.run.metrics[0].quantity(value)
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.3g}"
    return "" if value == -1 else str(value)


def _compare(chosen: argparse.Namespace) -> None:
    runs = [_read(given) for given in chosen.path]
    rows: list[list[str]] = []
    with reading(runs[0].path / RUN):
        for name, values in catalogue.differing(runs).items():
            rows.append([name, *("-" if value is None else _brief(value) for value in values)])
        found = [catalogue.entry(run.path, run.path.parent) for run in runs]
        rows += [[column, *(_cell(e, column) for e in found)] for column in ("state", "step", "loss", "error")]
        rows.append(["seconds", *(f"{run.steps['seconds'].sum():.1f}" for run in runs)])
    console = _console()
    console.print(_table(["", *(run.name for run in runs)], rows, console.width, words=1 + len(runs)))


def _brief(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 30 else text[:27] + "..."


def _export(chosen: argparse.Namespace) -> None:
    run = _read(chosen.path)
    if chosen.output is None:
        _write(run, chosen, sys.stdout)
    else:
        with chosen.output.open("w", encoding="utf-8", newline="") as file:
            _write(run, chosen, file)
        print(report.short(chosen.output))


def _write(run: Run, chosen: argparse.Namespace, file: TextIO) -> None:
    table = run.checks if chosen.checks else run.steps
    rows = [{name: _plain(value) for name, value in _row(row).items()} for row in table]
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


def _show(chosen: argparse.Namespace) -> None:
    run = _read(chosen.path)
    console = _console()
    head = Text(_clean(run.name), "bold")
    head.append(f"   begun {_clean(run.created)}   seed {'-' if run.seed is None else run.seed}", "not bold")
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    facts.add_column(style="dim")
    facts.add_column(overflow="fold")
    # What is missing or of another kind in what a file says about itself is told like any other damage.
    with reading(run.path / RUN):
        for name, text in _facts(run).items():
            facts.add_row(_clean(name), _clean(text))
    console.print(head)
    console.print(facts)
    if len(run.steps):
        console.print()
        console.print(_steps(run, chosen.steps, console.width))
    if chosen.checks is not None:
        rows = [_row(row) for row in run.checks[run.checks["step"] == chosen.checks]]
        if not rows:
            raise ValueError(f"{run.path} has no CG checks of step {chosen.checks}")
        console.print(f"\nCG checks of step {chosen.checks}")
        console.print("\n".join(report.check_table(rows)), soft_wrap=True)


def _console() -> Console:
    """The terminal; nothing that a file says is taken for markup."""
    return Console(highlight=False, markup=False, emoji=False)


def _clean(text: str) -> str:
    """Text without what would control a terminal."""
    return "".join(c if c.isprintable() else " " if c in "\n\t" else "\ufffd" for c in text)


def _table(
    titles: Sequence[str],
    rows: Iterable[Sequence[str]],
    width: int,
    *,
    drop: Sequence[str] = (),
    words: int = 1,
) -> Table:
    """Aligned columns without lines; the first so many are `words`. Of too wide ones those to `drop` are left out."""
    rows = [[_clean(cell) for cell in row] for row in rows]
    titles = [_clean(title) for title in titles]
    widths = {
        title: 1 + max(len(title), *(len(row[i]) for row in rows)) if rows else len(title)
        for i, title in enumerate(titles)
    }
    left_out: set[str] = set()
    for title in drop:
        if sum(w for t, w in widths.items() if t not in left_out) > width:
            left_out.add(title)
    table = Table(box=None, padding=(0, 0, 0, 1), header_style="bold")
    for i, title in enumerate(titles):
        if title not in left_out:
            side: Literal["left", "right"] = "left" if i < words else "right"
            table.add_column(title, justify=side, no_wrap=words < len(titles), overflow="fold")
    for row in rows:
        table.add_row(*(cell for title, cell in zip(titles, row, strict=True) if title not in left_out))
    return table


def _facts(run: Run) -> dict[str, str]:
    """The lines above the table of steps."""
    c, v = run.configuration, run.versions
    shapes = c["model"]["parameters"]
    session = run.sessions[-1] if run.sessions else {}
    batches = ", ".join(f"{role} {len(c['batches'][role])}" for role in c["batches"]["roles"])
    problem = {key: value for key, value in c["problem"].items() if key not in ("class", "test_batches")}
    optimizer = {key: value for key, value in c["optimizer"].items() if key not in ("class", "groups")}
    group = {key: value for key, value in c["optimizer"]["groups"][0].items() if key != "tensors"}
    facts = {
        "problem": f"{c['problem']['class']}  {_pairs(problem)}",
        "model": f"{c['model']['printed'].splitlines()[0].rstrip('(')}  {len(shapes)} tensors",
        "optimizer": f"{c['optimizer']['class']}  {_pairs({**group, **optimizer})}",
        "batches": f"{batches}, test {len(c['problem']['test_batches'])}",
        "versions": _pairs({key: v[key] for key in ("hfopt", "torch", "numpy", "python", "device", "threads")}),
        **({"commit": str(session["versions"]["commit"])} if session else {}),
        **({"command": f"{session['command']}  on {session['versions']['host']}"} if session else {}),
        "state": f"{catalogue.state_of(run)}{f' ({run.outcome})' if run.outcome else ''}",
        "checkpoints": ", ".join(p.key if p.named else str(p.step) for p in run.checkpoints),
    }
    if len(run.steps):
        last, tested = run.steps[-1], run.steps[~_nan(run.steps["error_rate"])]
        facts["so far"] = f"{int(run.steps['updated'].sum())} updates, {report.duration(float(last['total_seconds']))}"
        if len(tested):
            best = tested[tested["error_rate"].argmin()]
            measure = run.metrics[0]
            facts["wrong" if measure.counted else measure.name] = (
                f"{measure.quantity(tested[-1]['error_rate'])} at step {tested[-1]['step']}, "
                f"least {measure.quantity(best['error_rate'])} at step {best['step']}"
            )
    else:
        facts["so far"] = "no step has ended"
    return facts


def _steps(run: Run, count: int, width: int) -> Table:
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
    shown = [column for column in columns if any(_text(row[column[1]], column[2]) for row in run.steps)]
    cells = [[_text(row[name], form) for _, name, form in shown] for row in rows]
    drop = ("taken", "length", *(metric.title for metric in reversed(others)), "seconds", "ρ", "λ")
    return _table([title for title, _, _ in shown], cells, width, drop=drop, words=0)


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


def _nan(values: Any) -> Any:
    return values != values


def _row(row: Any) -> dict[str, Any]:
    return {name: row[name].item() for name in row.dtype.names}


def _pairs(settings: Mapping[str, Any]) -> str:
    """`name=value` of settings that are given, nested ones by their class."""
    parts = []
    for name, value in settings.items():
        if value is None or value is False:
            continue
        if isinstance(value, Mapping):
            value = f"{value.get('class', '')}({_pairs({k: v for k, v in value.items() if k != 'class'})})"
        parts.append(f"{name}={value}")
    return ", ".join(parts)


_COMMANDS = {"show": _show, "plot": _plot, "list": _list, "compare": _compare, "export": _export}
