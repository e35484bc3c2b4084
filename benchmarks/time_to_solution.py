"""How long the multiplication problem takes to solve: ``python -m benchmarks.time_to_solution``.

The settings of this project run against those of 2011 (no preconditioner, at most 300 CG iterations, gradient of 10,000
sequences, curvature of 1,000, lambda 0.1 at the start, weight decay 2e-5; Martens & Sutskever, ICML 2011) in the same
program, from the same parameters, on one thread each. Both go through fast products, so the ratio is that of the
settings alone.

Measured are processor seconds, tests included, until fewer than 1% of 10,000 test sequences are answered wrongly. Of
each seed ours runs first; the other is stopped when it has spent ``--factor`` times as much: a ratio is then measured,
or has a lower bound. Runs are those of ``python -m runs.reproduce``: finished ones are read, unfinished ones go on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch

from benchmarks import machine
from runs.cells import ROOT, Cell, Result, result
from runs.reproduce import run_cells

OURS, OLD = "hfopt", "2011"
RESULTS = Path(__file__).parent / "results" / "time-to-solution"


@dataclass(frozen=True)
class Run:
    """One run: processor seconds spent, whether it solved the problem with them, and the share wrong at the end."""

    T: int
    seed: int
    settings: str
    solved: bool
    seconds: float
    steps: int
    products: int
    error: float
    command: str
    curve: tuple[tuple[float, ...], tuple[float, ...]]

    @classmethod
    def of(cls, T: int, settings: str, cell: Cell, found: Result) -> Run:
        """What a cell has come to."""
        times, errors = (tuple(float(x) for x in np.asarray(part)) for part in found.curve)
        return cls(
            T, cell.seed, settings, found.state == "solved", found.spent, found.steps, found.products, found.error,
            cell.command, (times, errors),
        )  # fmt: skip


def cells(T: int, seed: int, more: Sequence[str] = ()) -> dict[str, Cell]:
    """The two runs of a seed."""
    names = {OURS: "multiplication", OLD: "multiplication-2011"}
    return {key: Cell("pathological", (name, "--T", str(T), *more), seed) for key, name in names.items()}


def pair(T: int, seed: int, folder: Path, factor: float, minutes: float, more: Sequence[str] = ()) -> list[Run]:
    """Ours for so many minutes at most, then the other for so many times as long as ours took.

    Raises:
        RuntimeError: a run broke down; the message names the file of what it printed.
    """
    found: list[Run] = []
    budget = 60 * minutes
    for settings, cell in cells(T, seed, more).items():
        if run_cells([cell], folder, budget=budget):
            raise RuntimeError(f"{cell.name} broke down, see {folder / cell.name}.txt")
        outcome = result(folder / cell.name)
        if outcome is None:
            raise RuntimeError(f"{cell.name} finished no step, see {folder / cell.name}.txt")
        found.append(Run.of(T, settings, cell, outcome))
        budget = factor * outcome.spent
    return found


def ratio(ours: Run, old: Run) -> str:
    """How many times as long the settings of 2011 took."""
    value = old.seconds / ours.seconds
    if ours.solved and old.solved:
        return f"{value:.1f}"
    if ours.solved:
        return f"> {value:.1f}"
    return f"< {value:.1f}" if old.solved else "neither"


def table(runs: Sequence[Run]) -> str:
    """Markdown: a line for each seed, then the medians of each length and the commands."""
    by_key = {(run.T, run.seed, run.settings): run for run in runs}
    keys = list(dict.fromkeys((run.T, run.seed) for run in runs))

    def told(run: Run) -> str:
        wrong = "" if run.solved else f", {100 * run.error:.0f}% wrong"
        return f"{run.seconds:.0f}{wrong} | {run.steps} | {run.products}"

    lines = ["| T | seed | hfopt, s | steps | products | 2011, s | steps | products | ratio |"]
    lines += ["|--:|--:|--:|--:|--:|--:|--:|--:|--:|"]
    for T, seed in keys:
        ours, old = by_key[T, seed, OURS], by_key[T, seed, OLD]
        lines.append(f"| {T} | {seed} | {told(ours)} | {told(old)} | {ratio(ours, old)} |")
    lines.append("")
    for T in dict.fromkeys(T for T, _ in keys):
        both = [(by_key[T, s, OURS], by_key[T, s, OLD]) for t, s in keys if t == T]
        middle = median(old.seconds / ours.seconds for ours, old in both)
        bound = "" if all(ours.solved and old.solved for ours, old in both) else " (a bound where a run was stopped)"
        ours_solved, old_solved = (sum(run.solved for run in side) for side in zip(*both, strict=True))
        counts = f"hfopt solved {ours_solved} of {len(both)}, the settings of 2011 {old_solved} in the time given"
        lines.append(f"T = {T}: {counts}; median ratio {middle:.1f}{bound}.")
    lines += ["", *(f"- `{run.command}`" for run in runs)]
    return "\n".join(lines) + "\n"


def plot(runs: Sequence[Run], path: Path) -> None:
    """The share of wrong test sequences over processor seconds, a panel for each length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lengths = list(dict.fromkeys(run.T for run in runs))
    figure, axes = plt.subplots(1, len(lengths), figsize=(5 * len(lengths), 3.6), squeeze=False, layout="constrained")
    for ax, T in zip(axes[0], lengths, strict=True):
        for settings, colour in ((OURS, "C0"), (OLD, "C1")):
            shown = [run for run in runs if (run.T, run.settings) == (T, settings)]
            for i, run in enumerate(shown):
                label = f"settings of {settings}" if settings == OLD else settings
                ax.plot(*run.curve, color=colour, lw=1.2, label=None if i else label)
                if run.solved:
                    ax.plot(run.curve[0][-1], run.curve[1][-1], "o", color=colour, ms=4)
        ax.axhline(0.01, color="0.5", lw=0.8, ls=":")
        ax.set(xscale="log", yscale="log", title=f"multiplication, T = {T}", xlabel="processor seconds")
        ax.set_ylabel("share of wrong test sequences")
        ax.legend(frameon=False)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main(args: Sequence[str] | None = None) -> None:
    """Run what is missing, print, and write the table, the numbers and the plot."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.time_to_solution", description=__doc__)
    parser.add_argument("--T", type=int, nargs="+", default=[30, 100], help="lengths of the sequences")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each length")
    parser.add_argument("--factor", type=float, default=4.0, help="the other's time, in times of ours")
    parser.add_argument("--minutes", type=float, default=30.0, help="of the processor, for ours at most")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "logs" / "reproduce", help="where the runs lie")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the table")
    parser.add_argument("--setting", nargs="*", default=[], help="more settings of both runs, as hidden=50")
    given = parser.parse_args(args)
    more = [word for s in given.setting for word in ("--" + s.partition("=")[0], s.partition("=")[2])]
    runs: list[Run] = []
    for T in given.T:
        for seed in range(given.seeds):
            runs += pair(T, seed, given.folder, given.factor, given.minutes, more)
            about = machine.describe(torch.device("cpu")) | {"threads": "1 a run"}
            text = "\n".join(f"- {key}: {value}" for key, value in about.items()) + "\n\n" + table(runs)
            given.out.mkdir(parents=True, exist_ok=True)
            (given.out / "time_to_solution.md").write_text(text, "utf-8")
            numbers = json.dumps([asdict(run) for run in runs], indent=1)
            (given.out / "time_to_solution.json").write_text(numbers + "\n", "utf-8")
            plot(runs, given.out / "time_to_solution.png")
    print(text, flush=True)


if __name__ == "__main__":
    main()
