"""The document on the tables: every number in it is read from the runs' files."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from hfopt.experiment.store.reader import read_run
from hfopt.experiment.visualize import plot_runs
from runs.cells import ROOT, Cell, Result, environment, result
from runs.tables import Row, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INTRODUCTION = """# Published results, reproduced

`python -m runs.reproduce` generates this page from the files of the runs. The command in each row repeats the run.
Seconds are processor seconds (of all threads, including tests) for runs on a CPU, and wall-clock seconds for runs on a
GPU. A product is one multiplication of a vector by the curvature matrix. Medians are taken over the seeds that solved
the problem. An *unfinished* run was stopped before its last step and can be continued.
"""


@dataclass(frozen=True)
class Entry:
    """A row with those of its cells that have run."""

    row: Row
    cells: list[tuple[Cell, Result]]

    @property
    def solved(self) -> list[Result]:
        """The results of the seeds that solved it."""
        return [found for _, found in self.cells if found.state == "solved"]

    @property
    def seconds(self) -> float:
        """The median time to solution."""
        return median(found.spent for found in self.solved)


def entries(table: Table, folder: Path, most_seeds: int = 20) -> list[Entry]:
    """The rows of a table and what lies in the folder of their runs."""
    read = []
    for row in table.rows:
        looked_for = ((cell, result(folder / cell.name)) for cell in row.cells(most_seeds))
        read.append(Entry(row, [(cell, found) for cell, found in looked_for if found is not None]))
    return read


def write_document(tables: Mapping[str, Table], folder: Path, document: Path) -> None:
    """Write the document, and a figure per table into the folder images beside it."""
    parts, machines = [INTRODUCTION], set()
    for name, table in tables.items():
        found = entries(table, folder)
        ran = [result for entry in found for _, result in entry.cells]
        if not ran:
            continue
        machines |= {machine(result) for result in ran}
        images = document.parent / "images"
        images.mkdir(parents=True, exist_ok=True)
        figure = images / f"reproduction-{name}.png"
        _save(draw(found), figure)
        parts.append(section(name, table, found, os.path.relpath(figure, document.parent)))
        inside = [
            cell for entry in found if entry.row.title == table.shown for cell, r in entry.cells if r in entry.solved
        ]
        if inside:
            parts.append(show(inside[0], folder, images, table.shown or ""))
    if len(parts) == 1:
        parts.append("There are no runs yet.\n")
    parts.insert(1, "".join(f"Ran on: {machine}.\n" for machine in sorted(machines)))
    document.parent.mkdir(parents=True, exist_ok=True)
    document.write_text("\n".join(part for part in parts if part), encoding="utf-8")


def show(cell: Cell, folder: Path, images: Path, title: str) -> str:
    """A run from inside: its curves, and its hidden units on a test sequence."""
    run = folder / cell.name
    curves, hidden = (images / f"reproduction-{what}.png" for what in ("curves", "hidden"))
    _save(plot_runs([read_run(run)]), curves)
    words = [*cell.arguments, "--name", str(run.resolve()), "--picture", str(hidden.resolve())]
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL, cwd=ROOT, env=environment())
    return "\n".join(
        [
            f"### Inside a solved run: {title}",
            "",
            f"`{cell.command}`: losses, errors, damping, CG iterations, and the hidden units on a test sequence.",
            "Seconds are wall-clock seconds, including time that the machine spent on other work.",
            "",
            f"![Losses, share of wrong sequences, lambda, rho and CG iterations](images/{curves.name})",
            "",
            f"![Inputs, hidden units, outputs and target of a test sequence](images/{hidden.name})",
            "",
        ]
    )


def machine(found: Result) -> str:
    """What a run ran on and with."""
    v = found.versions
    where = (
        f"{v['threads']} thread{'s' * (v['threads'] != '1')} of {v['device_name'] or 'a CPU'}"
        if found.on_cpu
        else v["device_name"]
    )
    return f"{where}, {v['platform']}, Python {v['python']}, torch {v['torch']}"


def section(name: str, table: Table, found: list[Entry], figure: str) -> str:
    """One table: its rows, its comparisons, its figure, and every run."""
    solved, tried = (sum(map(len, part)) for part in zip(*((e.solved, e.cells) for e in found), strict=True))
    lines = [
        f"## {table.title}",
        "",
        table.text,
        "",
        f"{solved} of {tried} runs solved. `python -m runs.reproduce {name}` executes the missing runs.",
        "",
        *_markdown(
            ("row", "published", "solved", "steps", "CG iterations", "products", "seconds"), map(overview, found)
        ),
        "",
        *comparisons(found),
        f"![Share of wrong test sequences over time]({figure})",
        "",
        *_markdown(
            ("command", "outcome", "steps", "CG", "products", "seconds", "clock", "test loss", "wrong", "lowest"),
            (detail(cell, result) for entry in found for cell, result in entry.cells),
        ),
        "",
    ]
    return "\n".join(lines)


def overview(entry: Entry) -> list[str]:
    """The line of a row: medians over the seeds that solved it."""
    head = [entry.row.title, entry.row.claim or "-"]
    if not entry.cells:
        return [*head, "not run", *["-"] * 4]
    if not entry.solved:
        return [*head, f"0 of {len(entry.cells)}", *["-"] * 4]
    numbers = [
        f"{median(getattr(found, what) for found in entry.solved):.0f}"
        for what in ("steps", "cg_iterations", "products", "spent")
    ]
    return [*head, f"{len(entry.solved)} of {len(entry.cells)}", *numbers]


def detail(cell: Cell, found: Result) -> list[str]:
    """The line of a run."""
    return [
        f"`{cell.command}`",
        found.state,
        str(found.steps),
        str(found.cg_iterations),
        str(found.products),
        f"{found.spent:.0f}",
        f"{found.seconds:.0f}",
        f"{found.loss:.3g}",
        f"{100 * found.error:.2f}%",
        f"{100 * found.lowest:.2f}%",
    ]


def comparisons(found: list[Entry]) -> list[str]:
    """How many times faster one row is than another, for the rows that ask for it."""
    by_title = {entry.row.title: entry for entry in found}
    lines = []
    for entry in found:
        other = by_title.get(entry.row.against or "")
        if other is None or not entry.solved or not other.cells:
            continue
        if other.solved:
            said = f"{other.seconds / entry.seconds:.1f} times as fast"
        else:
            longest = max(result.spent for _, result in other.cells)
            said = f"more than {longest / entry.seconds:.1f} times as fast (none of the other's runs is solved)"
        lines += [f"{entry.row.title}: {said} as {other.row.title}, by the medians of the solved seeds.", ""]
    return lines


def _markdown(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    heads = list(heads)
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)]


def draw(found: list[Entry]) -> Figure:
    """Share of wrong test sequences over seconds: a panel per problem, a colour per row, a line per seed."""
    from matplotlib import pyplot as plt

    panels: dict[str, list[Entry]] = {}
    for entry in found:
        if entry.cells:
            panels.setdefault(entry.row.title.partition(", ")[0], []).append(entry)
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(3.2 * columns, 2.7 * rows), sharey=True, squeeze=False, layout="constrained"
    )
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (problem, inside) in zip(grid.flat, panels.items(), strict=False):
        for i, entry in enumerate(inside):
            label: str | None = entry.row.title.partition(", ")[2] or None
            for _, found_here in entry.cells:
                seconds, error = found_here.curve
                # A test without an error stands at the lowest share that 10,000 sequences can have.
                shown = np.maximum(100 * error, 0.01)
                axes.plot(seconds, shown, color=f"C{i}", label=label, linewidth=1)
                ending = "o" if found_here.state == "solved" else "x"
                axes.plot(seconds[-1:], shown[-1:], ending, color=f"C{i}", markersize=4)
                label = None
        axes.axhline(1, color="0.6", linewidth=0.8, linestyle=":")
        axes.set(title=problem, yscale="log")
        axes.set_xlim(left=0)
        axes.legend(fontsize="x-small", loc="upper right")
    for axes in grid[-1]:
        axes.set_xlabel("seconds")
    for row in grid:
        row[0].set_ylabel("wrong (%)")
    return figure


def _save(figure: Figure, path: Path) -> None:
    from matplotlib import pyplot as plt

    figure.savefig(path, dpi=100)
    plt.close(figure)
