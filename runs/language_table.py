"""Optimizers on characters of the Penn Treebank at equal parameters and equal time: the cells, and their page."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from hfopt.experiment.store.reader import SavedRun, read_run
from runs.cells import ROOT, Cell, environment
from runs.tables import Row, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MINUTES = (2.0, 10.0, 60.0)
"""The times that methods are compared at, in minutes of one processor: a first look, and the two that count."""
CHOICE = 10.0
"""The time after which each method's best setting is chosen, which alone goes on for longer."""
BEGIN, END = "<!-- written by python -m runs.reproduce language -->", "<!-- end of what is written -->"
PUBLISHED = 1.41
"""Bits per character on the test part: the multiplicative RNN trained Hessian-free, Mikolov et al. 2012."""
_METRIC = "bits per character"
_RATES = ("0.001", "0.002", "0.004", "0.008", "0.016")


def _rows(method: str, words: tuple[str, ...], settings: Sequence[tuple[str, ...]]) -> tuple[Row, ...]:
    common = ("ptb", "--sample-every", "0", "--max-steps", "1000000", "--stop-after", "1000000")
    return tuple(Row(f"{method}, {' '.join(s).replace('--', '')}", (*common, *words, *s), "") for s in settings)


def _rates(method: str, optimizer: str, cell: str) -> tuple[Row, ...]:
    words = ("--optimizer", optimizer, "--cell", cell, *(("--no-sparse",) if cell == "lstm" else ()))
    return _rows(method, words, [("--lr", rate) for rate in _RATES])


# For Hessian-free, what a rate is for the others: how much of a step's time goes into its direction.
_HF = [
    ("--gradient-batches", str(batches), "--cg-iterations", str(iterations))
    for batches, iterations in ((10, 10), (10, 20), (20, 20), (20, 40), (40, 20))
]

TABLE = Table(
    "Characters of the Penn Treebank",
    "",
    tuple(
        Row(row.title, row.words, row.claim, module="characters")
        for row in (
            *_rows("HF-MRNN", (), _HF),
            *_rates("Adam-MRNN", "adam", "mrnn"),
            *_rates("Adam-LSTM", "adam", "lstm"),
            *_rates("Muon-MRNN", "muon", "mrnn"),
        )
    ),
    seeds=1,
)


@dataclass(frozen=True)
class Curve:
    """What a cell found: processor minutes and validation bits of every test.

    Attributes:
        cell, title: the cell, and what its row is called.
        minutes, bits: of the tests (N,).
        spent: minutes of the whole run so far.
        parameters: of the network.
        test: bits on the test part of the parameters that are best by validation, and the step that they are of.
    """

    cell: Cell
    title: str
    minutes: npt.NDArray[np.float64]
    bits: npt.NDArray[np.float64]
    spent: float
    parameters: int
    test: tuple[float, int] | None

    @property
    def method(self) -> str:
        """The part of the title before the comma."""
        return self.title.partition(", ")[0]

    def best(self, minutes: float) -> float:
        """The lowest validation bits of the tests up to a time; nan if the cell did not get that far."""
        there = self.bits[self.minutes <= minutes]
        return float(there.min()) if self.spent >= minutes and len(there) else float("nan")


def curves(folder: Path, table: Table = TABLE) -> list[Curve]:
    """The cells that have run, in the table's order."""
    found = []
    for row in table.rows:
        for cell in row.cells(table.seeds):
            try:
                run = read_run(folder / cell.name)
            except FileNotFoundError:
                continue
            if np.isfinite(run.steps[_METRIC]).any():
                found.append(_curve(cell, row.title, run, folder / cell.name / "scores.json"))
    return found


def _curve(cell: Cell, title: str, run: SavedRun, scores: Path) -> Curve:
    rows = run.steps
    tested = np.isfinite(rows[_METRIC])
    minutes = np.cumsum(rows["cpu_seconds"]) / 60
    sizes = [p.numel() for p in run.parameters().values()]
    test = None
    if scores.is_file():
        read = json.loads(scores.read_text(encoding="utf-8"))["scores"]
        test = float(read["test"]), int(read["step"])
    bits = np.asarray(rows[_METRIC][tested], np.float64)
    return Curve(cell, title, minutes[tested], bits, float(minutes[-1]), sum(sizes), test)


def chosen(found: Sequence[Curve], minutes: float) -> list[Curve]:
    """Of every method the setting that is best by validation at a time, among those that got that far."""
    there = [c for c in found if np.isfinite(c.best(minutes))]
    methods = dict.fromkeys(c.method for c in found)
    return [
        min((c for c in there if c.method == m), key=lambda c: c.best(minutes))
        for m in methods
        if any(c.method == m for c in there)
    ]


def score(found: Sequence[Curve], folder: Path) -> int:
    """Score the parameters that are best by validation on the whole test part; how many had not been scored yet."""
    scored = 0
    for c in found:
        run = read_run(folder / c.cell.name)
        if c.test is None or c.test[1] != run.find("best-test").step:
            words = [*c.cell.arguments, "--name", str((folder / c.cell.name).resolve()), "--score"]
            subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL, cwd=ROOT, env=environment())
            scored += 1
    return scored


def write(folder: Path, document: Path) -> None:
    """Write the results between the marks of the document, and its figure into the folder images beside it.

    Raises:
        ValueError: the document has no marks.
    """
    found = curves(folder)
    best = {c.cell: c for minutes in MINUTES for c in chosen(found, minutes)}
    if score(list(best.values()), folder):
        found = curves(folder)
    text = document.read_text(encoding="utf-8") if document.is_file() else f"{BEGIN}\n{END}\n"
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{document} has no lines {BEGIN} and {END}, between which the results go")
    images = document.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    lines = results(found)
    if found:
        from matplotlib import pyplot as plt

        figure = draw(found)
        figure.savefig(images / "language.png", dpi=110)
        plt.close(figure)
        lines += ["", "![Validation bits per character over processor minutes](images/language.png)"]
    new = document.with_suffix(".new")
    new.write_text("\n".join([f"{before}{BEGIN}", "", *lines, "", f"{END}{after}"]), encoding="utf-8")
    os.replace(new, document)


def results(found: Sequence[Curve]) -> list[str]:
    """The tables, as lines."""
    if not found:
        return ["No cell has run yet."]
    ran = f"{len(found)} of {sum(len(row.cells(TABLE.seeds)) for row in TABLE.rows)} cells have run"
    lines = [f"{ran}, the longest for {max(c.spent for c in found):.1f} processor minutes of one thread."]
    for minutes in MINUTES:
        best = chosen(found, minutes)
        if not best:
            lines += ["", f"No cell has run for {minutes:g} minutes yet."]
            continue
        lines += ["", f"After {minutes:g} minutes, with the best setting of each method by validation:", ""]
        lines += [
            "| method and setting | parameters | validation | test, best parameters so far |",
            "|---|--:|--:|--:|",
        ]
        for c in sorted(best, key=lambda c: c.best(minutes)):
            test = "-" if c.test is None else f"{c.test[0]:.3f}"
            lines.append(f"| {c.title} | {c.parameters:,} | {c.best(minutes):.3f} | {test} |")
    lines += ["", "Every cell that has run, with bits per character on validation:", ""]
    lines += ["| cell | processor minutes | lowest | last test |", "|---|--:|--:|--:|"]
    lines += [f"| `{c.cell.command}` | {c.spent:.1f} | {c.bits.min():.3f} | {c.bits[-1]:.3f} |" for c in found]
    return lines


def draw(found: Sequence[Curve]) -> Figure:
    """Validation bits over processor minutes: a colour for each method, its best setting strong, the others thin."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    strong = {
        min((c for c in found if c.method == m), key=lambda c: float(c.bits.min())).cell
        for m in {c.method for c in found}
    }
    colours = {m: f"C{i}" for i, m in enumerate(dict.fromkeys(row.title.partition(", ")[0] for row in TABLE.rows))}
    for c in found:
        shown = c.cell in strong
        axes.plot(
            c.minutes,
            c.bits,
            color=colours[c.method],
            linewidth=1.8 if shown else 0.7,
            alpha=1.0 if shown else 0.5,
            label=c.title if shown else None,
        )
    axes.axhline(PUBLISHED, color="0.4", linestyle=":", linewidth=1, label=f"published, on the test part: {PUBLISHED}")
    low = min(PUBLISHED, *(float(c.bits.min()) for c in found))
    axes.set(xlabel="processor minutes", ylabel="validation, bits per character", ylim=(low - 0.1, 3.5), xscale="log")
    axes.set_xlim(left=0.1)
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    return figure
