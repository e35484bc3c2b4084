"""What a run says while it goes on: a line per step on the terminal, blocks in the two text logs."""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfopt.experiment.metrics import Metric, metrics_in
from hfopt.experiment.store.format import CHECK_TYPE, DETAILED, RESULTS, RUN, STEP_TYPE, Row, complete

if TYPE_CHECKING:
    import torch

_HEADING_EVERY = 20
# Together 80 columns, as wide as a terminal at least is.
_PLAIN = f"{'step':>5} {'train loss':>10} {'test loss':>10}"
_CURVED = f" {'lambda':>8} {'rho':>6} {'CG':>7} {'length':>6}"
_TIMES = f" {'sec.':>6} {'total':>6}"


class Progress:
    """Aligned lines, one a step; `second_order` adds lambda, rho, CG iterations and step length."""

    def __init__(self, measure: Metric, *, second_order: bool) -> None:
        self._measure, self._second_order = measure, second_order
        self._width = max(7, len(measure.title))
        self._lines = 0

    def heading(self) -> str:
        """The titles of the columns."""
        return f"{_PLAIN} {self._measure.title:>{self._width}}" + (_CURVED if self._second_order else "") + _TIMES

    def line(self, row: Row) -> str:
        """The line of one step, preceded by the heading when it is due."""
        value = row.get(self._measure.column, math.nan)
        row = complete(row, STEP_TYPE)
        heading = self.heading() + "\n" if self._lines % _HEADING_EVERY == 0 else ""
        self._lines += 1
        line = f"{row['step']:5d} {_loss(row['train_loss'])} {_loss(row['test_loss'])}"
        line += f" {self._measure.number(value):>{self._width}}"
        if self._second_order:
            line += self._second(row) if row["updated"] else " " * len(_CURVED)
        return heading + line + f" {seconds(row['seconds'], 2)} {seconds(row['total_seconds'], 1)}"

    @staticmethod
    def _second(row: Row) -> str:
        if math.isnan(row["damping"]):
            return " " * len(_CURVED)
        iterations = f"{row['backtracked']}/{row['cg_iterations']}"
        iterations = iterations if len(iterations) <= 7 else str(row["cg_iterations"])
        length = _short(row["step_length"]) if row["accepted"] else "none"
        return f" {row['damping']:8.2e} {ratio(row['rho'])} {iterations:>7} {length:>6}"


def introduction(
    model: torch.nn.Module, problem: Any, optimizer: Any, configuration: Mapping[str, Any], where: str
) -> str:
    """Two lines that say what begins: problem, model, optimizer, batches, threshold and place of the logs."""
    count = sum(p.numel() for p in model.parameters())
    device = next(model.parameters()).device
    what = getattr(problem, "name", type(problem).__name__)
    length = f" T={problem.T}" if hasattr(problem, "T") else ""
    batches, threshold = configuration["batches"], configuration["driver"]["threshold"]
    taken = batches["per_step"]
    if isinstance(taken, Mapping):
        taken = f"{taken['first']} to {taken['last']}"
    roles = f"{taken} gradient"
    if len(batches["roles"]) > 1:
        judges = taken if batches["evaluation"] == batches["gradient"] else len(batches["evaluation"])
        roles += f", {len(batches['curvature'])} curvature, {judges} evaluation"
    if "debias" in batches["roles"]:
        roles += f", {len(batches['debias'])} for step lengths"
    if threshold == 0:  # which no error is below
        goal = "no threshold"
    else:
        bound = metrics_in(configuration)[0].bound
        beyond = "above" if metrics_in(configuration)[0].better == "higher" else "below"
        goal = f"success {beyond} {bound(threshold)}" if isinstance(threshold, float) else f"success by {threshold}"
    return (
        f"{what}{length}: {type(model).__name__} with {count:,} parameters on {device}, "
        f"{type(optimizer).__name__}\n"
        f"batches: {roles}, {len(problem.test_batches)} test; {goal}; logs in {where}"
    )


def ending(outcome: str, step: int, seconds: float, wrong: str, saved_step: int | None, why: str = "") -> str:
    """One sentence on how a run ended; `wrong` is what the last test said, `why` what stopped it."""
    took = f"{step} steps, {duration(seconds)}"
    return {
        "success": f"success after {took}{wrong}",
        "max_steps": f"no success within {took}{wrong}",
        "no threshold": f"ended after {took}{wrong}",
        "interrupted": f"interrupted and saved after {took}",
        "stopped": f"stopped after {took}, {why}{wrong}",
        "diverged": f"{why}: given up after {took}; the last checkpoint is that of step {saved_step}",
    }[outcome]


def hints(path: Path, more: Mapping[str, str]) -> list[str]:
    """Where the logs are and what to type next, as aligned lines; `more` adds to them or replaces them."""
    where = short(path)
    known = {
        "logs": f"{where}: {RESULTS}, {DETAILED}, {RUN}",
        "table": f"{command('hfopt')} show {where}",
        "curves": f"{command('hfopt')} plot {where}",
        "to go on": "hf.load(); hf.optimize(max_steps=...)",
    }
    return [f"  {what:<14} {line}" for what, line in {**known, **more}.items()]


def command(name: str) -> str:
    """How to call `python` or `hfopt` of this environment from here: by name if the shell would find them."""
    folder = Path(sys.executable).parent
    found = shutil.which(name)
    if found is not None and Path(found).parent == folder:
        return name
    if (folder / name).exists():
        return short(folder / name)
    return f"{short(Path(sys.executable))} -m {name}" if name != "python" else short(Path(sys.executable))


def short(path: Path) -> str:
    """`path` as one would type it: relative where it lies below the current folder."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def block(
    row: Row,
    totals: Mapping[str, float],
    checks: Iterable[Row] | None = None,
    metrics: Sequence[Metric] = (),
) -> str:
    """One step for the text logs; `totals` are those of the run up to it, `checks` adds the table of CG checks."""
    values = {metric: row.get(metric.column, math.nan) for metric in metrics}
    row = complete(row, STEP_TYPE)
    lines = [f"step {row['step']}"]

    def say(name: str, value: str) -> None:
        lines.append(f"    {name:<20} {value}")

    say("train loss", f"{row['train_loss']:.6e}")
    if math.isfinite(row["test_loss"]) or any(map(math.isfinite, values.values())):
        say("test loss", f"{row['test_loss']:.6e}  (test - train {row['test_loss'] - row['train_loss']:+.3e})")
        for metric, value in values.items():
            say(metric.name, metric.quantity(value, 3))
    if not row["updated"]:
        say("seconds", f"{row['seconds']:.3f}")
        return "\n".join([*lines, ""]) + "\n"
    say("gradient norm", f"{row['gradient_norm']:.6e}")
    if math.isfinite(row["damping"]):
        say(
            "lambda",
            f"{row['damping']:.6e}, next {row['new_damping']:.6e}; structural mu {row['structural']:.4g}",
        )
        if checks is not None:
            lines += check_table(checks)
        say(
            "CG",
            f"{row['cg_iterations']} iterations, stopped by {row['cg_reason']}; {row['backtracked']} taken",
        )
        say("evaluation loss", f"{row['evaluation_loss']:.6e} -> {row['new_loss']:.6e}")
        say("model decrease", f"{row['quadratic']:.6e}  (undamped quadratic at the step)")
        say("rho", f"{row['rho']:.4f}")
        say("line search", f"step length {row['step_length']:.6g} after {row['line_search_tries']} tries")
        say("norms", f"last iterate {row['solution_norm']:.6e}, step {row['update_norm']:.6e}")
        say(
            "work",
            f"{row['gradients']} gradients, {row['products']} products ({row['linearisation']}), "
            f"{row['evaluations']} evaluations",
        )
    say("parameter norm", f"{row['parameter_norm']:.6e}")
    if not row["accepted"]:
        say("step", "rejected, the parameters are unchanged")
    say("seconds", f"{row['seconds']:.3f}, optimizer {row['optimizer_seconds']:.3f}")
    work = f"; {totals['cg_iterations']} CG iterations, {totals['products']} products" if totals["products"] else ""
    say("in all", f"{row['step'] + 1} steps, {duration(totals['seconds'])}{work}")
    return "\n".join([*lines, ""]) + "\n"


def check_table(checks: Iterable[Row]) -> list[str]:
    """The CG checks of one step as aligned lines."""
    lines = [f"    {'iteration':>9} {'damped model':>15} {'|residual|':>13} {'|iterate|':>13} {'loss change':>14}"]
    for check in checks:
        check = complete(check, CHECK_TYPE)
        change = check["evaluation"]
        loss = "" if math.isnan(change) else f"{change:14.6e}"
        numbers = f"{check['model']:15.6e} {check['residual']:13.6e} {check['norm']:13.6e}"
        lines.append(f"    {check['iteration']:9d} {numbers} {loss}".rstrip())
    return lines


def say(text: str) -> bool:
    """Print at once; False if the reader of a pipe has gone, after which nothing is printed any more."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        close_output()
        return False
    return True


def close_output() -> None:
    """Let what is still printed go nowhere, after the reader of a pipe has gone: Python would complain at its end."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def duration(seconds: float) -> str:
    """Seconds as people read them: `48 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _loss(value: float) -> str:
    return " " * 10 if math.isnan(value) else f"{value:10.4e}" if value >= 0 else f"{value:10.3e}"


def ratio(value: float) -> str:
    """A reduction ratio in six columns."""
    size = abs(value)
    return f"{value:6.3f}" if size < 10 else f"{value:6.1f}" if size < 1000 else f"{value:6.0e}"


def _short(value: float) -> str:
    return f"{value:.2g}" if value >= 1e-4 or value == 0 else f"{value:.0e}"


def seconds(value: float, digits: int) -> str:
    """Seconds in six columns, with digits as far as there is room."""
    return f"{value:6.{digits}f}" if value < 10 ** (5 - digits) - 1 else f"{value:6.0f}"
