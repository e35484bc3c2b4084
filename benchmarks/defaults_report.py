"""Results of :mod:`benchmarks.defaults`, their table, page and picture."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

OURS = "HessianFree"
COLOURS = {OURS: "C3", "Adam": "C0", "LBFGS": "C2", "LBFGS, Wolfe": "C1", "SGD": "0.5"}
ROUNDING = 1 + 8 * 2.0**-23
"""Losses that differ by less, a few roundings of float32, are the same."""
_KEPT = 300


@dataclass(frozen=True)
class Run:
    """One run: ``seconds`` and ``losses`` are the times at which the least loss fell, and it; ``loss`` the last."""

    optimizer: str
    rate: float
    seed: int
    steps: int
    loss: float
    seconds: tuple[float, ...]
    losses: tuple[float, ...]

    @classmethod
    def of(
        cls, optimizer: str, rate: float, seed: int, steps: int, first: float, seen: Sequence[tuple[float, float]],
        budget: float,
    ) -> Run:  # fmt: skip
        """From all that was ``seen`` up to ``budget``; of thousands of falls some hundred are kept, with the last."""
        falls, least = [(0.0, first)], first
        for t, f in seen:
            if t <= budget and f < least:
                least = f
                falls.append((t, f))
        if len(falls) > _KEPT:
            grid = np.geomspace(falls[1][0], falls[-1][0], _KEPT)
            kept = np.unique(np.searchsorted([t for t, _ in falls], grid, side="right") - 1)
            falls = [falls[0], *(falls[i] for i in kept if i), *([] if kept[-1] == len(falls) - 1 else falls[-1:])]
        return cls(
            optimizer, rate, seed, steps, least, tuple(round(t, 5) for t, _ in falls), tuple(f for _, f in falls)
        )

    def reached(self, level: float) -> float:
        """The first time at which the loss was at most ``level``, rounding aside; infinite if it never was."""
        return next((t for t, f in zip(self.seconds, self.losses, strict=True) if f <= level * ROUNDING), math.inf)

    def __str__(self) -> str:
        return f"{self.optimizer:12s} lr {self.rate:<7g} seed {self.seed} loss {self.loss:.4g} after {self.steps} steps"


@dataclass(frozen=True)
class Result:
    """All runs of a problem."""

    problem: str
    about: str
    parameters: int
    budget: float
    machine: dict[str, str]
    runs: list[Run]

    @classmethod
    def read(cls, path: Path) -> Result:
        """What :meth:`write` wrote."""
        found = json.loads(path.read_text("utf-8"))
        runs = [Run(**{**r, "seconds": tuple(r["seconds"]), "losses": tuple(r["losses"])}) for r in found.pop("runs")]
        return cls(**found, runs=runs)

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(asdict(self)) + "\n", "utf-8")

    def optimizers(self) -> list[str]:
        """The names, in order."""
        return list(dict.fromkeys(r.optimizer for r in self.runs))

    def seeds(self) -> list[int]:
        """The seeds, in order; the first one's runs have chosen the rates."""
        return list(dict.fromkeys(r.seed for r in self.runs if r.optimizer == OURS))

    def rate(self, optimizer: str) -> float:
        """The learning rate of the least loss for the first seed."""
        tried = [r for r in self.runs if r.optimizer == optimizer and r.seed == self.seeds()[0]]
        return min(tried, key=lambda r: r.loss).rate

    def best(self, optimizer: str) -> list[Run]:
        """Its runs at its best learning rate, one a seed."""
        rate = self.rate(optimizer)
        return [r for r in self.runs if r.optimizer == optimizer and r.rate == rate and r.seed in self.seeds()]

    def loss(self, optimizer: str) -> float:
        """Median over seeds of the losses at its best rate."""
        return statistics.median(r.loss for r in self.best(optimizer))

    def rival(self) -> str:
        """The optimizer of the least loss but ours."""
        return min((n for n in self.optimizers() if n != OURS), key=self.loss)

    def wins(self) -> bool:
        """Whether our median is at most that of the best rival, rounding aside."""
        return self.loss(OURS) <= self.loss(self.rival()) * ROUNDING

    def seeds_won(self) -> int:
        """For how many seeds our loss is at most that of every rival at its best rate."""
        others = [r for n in self.optimizers() if n != OURS for r in self.best(n)]
        return sum(
            all(ours.loss <= r.loss * ROUNDING for r in others if r.seed == ours.seed) for ours in self.best(OURS)
        )

    def time_reached(self) -> float:
        """Median over seeds of the seconds after which we had the best rival's last loss."""
        last = {r.seed: r.loss for r in self.best(self.rival())}
        return statistics.median(r.reached(last[r.seed]) for r in self.best(OURS))


def table(results: Sequence[Result]) -> str:
    """Markdown, a line a problem."""
    heads = ("problem", "parameters", "seconds", "best rival, its rate", "its loss", OURS, "ratio", "reached after, s")
    lines = [f"| {' | '.join(heads)} | seeds |", "|---|--:|--:|---|--:|--:|--:|--:|--:|"]
    for r in results:
        name = r.rival()
        t = r.time_reached()
        lines.append(
            f"| {r.problem} | {r.parameters:,} | {r.budget:g} | {name}, {r.rate(name):g} | {r.loss(name):.3g} | "
            f"{'**' if r.wins() else ''}{r.loss(OURS):.3g}{'**' if r.wins() else ''} | "
            f"{r.loss(OURS) / r.loss(name):.2g} | {f'{t:.1f}' if math.isfinite(t) else 'not'} | "
            f"{r.seeds_won()} of {len(r.seeds())} |"
        )
    return "\n".join(lines) + "\n"


def rivals_table(results: Sequence[Result]) -> str:
    """Markdown: every optimizer's loss at its best rate."""
    names = list(dict.fromkeys(n for r in results for n in r.optimizers()))
    lines = [f"| problem | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for r in results:
        cells = [f"{r.loss(n):.3g}" + ("" if n == OURS else f" ({r.rate(n):g})") for n in names]
        lines.append(f"| {r.problem} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(results: Sequence[Result], path: Path) -> None:
    """Loss against seconds, a panel a problem: the first seed in bold, the others thin."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = min(4, len(results))
    rows = math.ceil(len(results) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.4 * columns, 2.9 * rows), squeeze=False, layout="constrained")
    for ax in axes.flat[len(results) :]:
        ax.axis("off")
    for ax, r in zip(axes.flat, results, strict=False):
        for name in r.optimizers():
            for run in r.best(name):
                bold = run.seed == r.seeds()[0]
                ax.plot(
                    [*run.seconds[1:], r.budget],
                    [*run.losses[1:], run.loss],
                    drawstyle="steps-post",
                    color=COLOURS[name],
                    lw=1.6 if bold else 0.6,
                    label=name if bold else None,
                    zorder=3 if name == OURS else 2,
                )
        ax.set(xscale="log", yscale="log")
        ax.set_title(r.problem, fontsize=10)
    for ax in axes[-1]:
        ax.set_xlabel("seconds")
    for ax in axes[:, 0]:
        ax.set_ylabel("least loss so far")
    axes.flat[0].legend(fontsize=8)
    figure.savefig(path, dpi=90)
    plt.close(figure)


PAGE = """# Defaults compared with Adam, LBFGS and SGD

This page compares optimizers on eight small problems. On each problem, all of them train on all the data at once, from
the same initial parameters and for the same time. `HessianFree(model.parameters())` runs with default settings. Adam,
SGD (Nesterov momentum 0.9) and LBFGS (without line search, and with strong Wolfe line search) try six learning rates on
the first of {seeds} seeds and use the best one for the others. A loss is the lowest value up to a given time; for the
rivals, every evaluation counts. All computations are in float32, and losses that differ by less than 8 rounding units
count as equal. Times are those spent inside `step`.

`python -m benchmarks.defaults` runs the comparison and writes this page, the figure, and the numbers in
`benchmarks/results/defaults`. With `--page-only` it regenerates the page from the numbers.

HessianFree reaches the loss of the best rival in the same time on {wins} of {count} problems (bold):

{table}
*Ratio* is the loss of HessianFree divided by that of the best rival, both medians over seeds. *Reached after* is the
time at which HessianFree reached the final loss of the best rival. *Seeds* counts the seeds for which the loss of
HessianFree is no higher than that of any rival.

![Loss against time on every problem](images/{picture})

The figure shows every optimizer at its best learning rate, bold for the first seed and thin for the others.

## All rivals

The table shows final losses (medians over seeds), with the learning rates in brackets:

{rivals}
## The problems

{problems}

## Machine

{machine}
"""


def write(results: Sequence[Result], page: Path, picture: Path) -> None:
    """The page and the picture."""
    for path in (page, picture):
        path.parent.mkdir(parents=True, exist_ok=True)
    plot(results, picture)
    keys = ("date", "processor", "cores", "threads", "clock", "load average", "system", "Python", "torch", "hfopt")
    text = PAGE.format(
        seeds=len(results[0].seeds()),
        wins=sum(r.wins() for r in results),
        count=len(results),
        table=table(results),
        rivals=rivals_table(results),
        picture=picture.name,
        problems="\n".join(f"- {r.problem}: {r.about}." for r in results),
        machine="\n".join(f"- {k}: {results[-1].machine[k]}" for k in keys),
    )
    page.write_text(text, "utf-8")
