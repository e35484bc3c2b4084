"""The command `hfopt`: look at runs from the terminal."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hfopt.experiment import report
from hfopt.experiment.metrics import Metric
from hfopt.experiment.store.format import RunError
from hfopt.experiment.store.reader import Run, read_run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="hfopt", description="Look at the runs of hfopt experiments.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    path = "folder of a run, its run.h5, or its name under runs/logs"
    show = commands.add_parser("show", help="print what a run was, how it went and what it saved")
    show.add_argument("path", help=path)
    show.add_argument("-n", "--steps", type=int, default=10, metavar="N", help="show the last N steps (default 10)")
    show.add_argument("-c", "--checks", type=int, metavar="STEP", help="show the CG checks of this step as well")
    plot = commands.add_parser("plot", help="draw the curves of one or several runs into a picture")
    plot.add_argument("path", nargs="+", help=path)
    plot.add_argument("-o", "--output", type=Path, help="the picture (default: curves.png in the first run's folder)")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.command == "show":
            _show(read_run(chosen.path), chosen.steps, chosen.checks)
        else:
            _plot([read_run(given) for given in chosen.path], chosen.output)
    except (RunError, OSError, ValueError) as error:
        print(f"hfopt {chosen.command}: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        print("hfopt plot: pictures need matplotlib; pip install matplotlib", file=sys.stderr)
        return 1
    return 0


def _plot(runs: Sequence[Run], output: Path | None) -> None:
    from hfopt.experiment.visualize import plot_runs

    output = runs[0].path / "curves.png" if output is None else output
    plot_runs(runs).savefig(output, dpi=130)
    print(report.short(output))


def _show(run: Run, count: int, checks_of: int | None) -> None:
    console = Console(highlight=False)
    console.print(f"[bold]{run.name}[/bold]   begun {run.created}   seed {'-' if run.seed is None else run.seed}")
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    facts.add_column(style="dim")
    facts.add_column(overflow="fold")
    for name, text in _facts(run).items():
        facts.add_row(name, text)
    console.print(facts)
    if len(run.steps):
        console.print()
        console.print(_steps(run, count))
    if checks_of is not None:
        rows = [_row(row) for row in run.checks[run.checks["step"] == checks_of]]
        if not rows:
            raise ValueError(f"{run.path} has no CG checks of step {checks_of}")
        console.print(f"\nCG checks of step {checks_of}")
        console.print("\n".join(report.check_table(rows)), soft_wrap=True)


def _facts(run: Run) -> dict[str, str]:
    """The lines above the table of steps."""
    c, v = run.configuration, run.versions
    shapes = c["model"]["parameters"]
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
        "checkpoints": ", ".join(p.key if p.named else str(p.step) for p in run.checkpoints),
    }
    if len(run.steps):
        last, tested = run.steps[-1], run.steps[~_nan(run.steps["error_rate"])]
        facts["so far"] = f"{int(run.steps['updated'].sum())} updates, {report.duration(float(last['total_seconds']))}"
        if len(tested):
            best = tested[tested["error_rate"].argmin()]
            measure = run.metrics[0]
            facts[measure.name or "wrong"] = (
                f"{measure.quantity(tested[-1]['error_rate'])} at step {tested[-1]['step']}, "
                f"least {measure.quantity(best['error_rate'])} at step {best['step']}"
            )
    else:
        facts["so far"] = "no step has ended"
    return facts


def _steps(run: Run, count: int) -> Table:
    """The last steps; columns that the run does not have are left out."""
    rows = run.steps[-count:] if count > 0 else run.steps[:0]
    measure = run.metrics[0]
    columns: list[tuple[str, str, str | Metric]] = [
        ("step", "step", "d"),
        ("train loss", "train_loss", ".4e"),
        ("test loss", "test_loss", ".4e"),
        (measure.title, "error_rate", measure),
        ("λ", "damping", ".2e"),
        ("ρ", "rho", ".3f"),
        ("taken", "backtracked", "d"),
        ("/CG", "cg_iterations", "/"),
        ("length", "step_length", ".3g"),
        ("seconds", "seconds", ".2f"),
    ]
    shown = [column for column in columns if any(_text(row[column[1]], column[2]) for row in run.steps)]
    table = Table(box=None, padding=(0, 0, 0, 1), header_style="bold")
    for title, _, _ in shown:
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(_text(row[name], form) for _, name, form in shown))
    return table


def _text(value: Any, form: str | Metric) -> str:
    """A number as text; empty if it is absent."""
    if isinstance(form, Metric):
        return form.number(float(value))
    if form in ("d", "/"):
        return "" if value < 0 else f"{'/' if form == '/' else ''}{int(value)}"
    return "" if math.isnan(value) else format(float(value), form)


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
