"""Music, slots and sequential images beside what was published about them: the cells, and their page."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import numpy as np

from hfopt.experiment.store.reader import SavedRun, read_run
from runs.cells import ROOT, Cell, environment
from runs.tables import Row, Table
from runs.validated import BEST, read_report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BEGIN, END = "<!-- written by python -m runs.reproduce music -->", "<!-- end of what is written -->"
_SHOWN = ("counterpoint", "jsb-nade")
"""Presets whose new music the page shows."""
SAMPLE = "sample.png"
"""The picture of new music in a run's folder."""


@dataclass(frozen=True)
class Judged(Row):
    """A row with the measure that it is judged by.

    Attributes:
        measure: a column of the run's report.
        factor: what its values are multiplied by.
        group: rows of one group share a figure.
    """

    measure: str = "nats_per_frame"
    factor: float = 1.0
    group: str = ""


def _music(collection: str, published: dict[str, str], seeds: int = 1) -> tuple[Judged, ...]:
    kinds = {
        "RNN, hf": (collection, ()),
        "RNN, adam": (collection, ("--optimizer", "adam")),
        "RNN-NADE, hf": (f"{collection}-nade", ()),
        "RNN-NADE, adam": (f"{collection}-nade", ("--optimizer", "adam")),
    }
    return tuple(
        Judged(f"{collection}: {kind}", (preset, *words), published[kind], module="music", seeds=seeds, group=preset)
        for kind, (preset, words) in kinds.items()
        if kind in published
    )


# Boulanger-Lewandowski, Bengio & Vincent (ICML 2012), table 1: nats per test frame, without the sign.
JSB = {"RNN, hf": "8.58", "RNN, adam": "8.71 (SGD)", "RNN-NADE, hf": "5.56", "RNN-NADE, adam": "5.83 (SGD)"}
NOTTINGHAM = {"RNN, hf": "3.89", "RNN, adam": "4.46 (SGD)"}
PIANO = {"RNN, hf": "7.66", "RNN, adam": "8.37 (SGD)"}
_F1: dict[str, Any] = {"module": "slots", "measure": "F1", "factor": 100.0, "seeds": 3, "group": "slots"}
_WRONG: dict[str, Any] = {"module": "pixels", "measure": "error_rate", "factor": 100.0, "group": "pixels"}
ROWS: tuple[Judged, ...] = (
    Judged("counterpoint: RNN-NADE, hf", ("counterpoint",), "-", module="music", group="counterpoint"),
    *_music("jsb", JSB, seeds=3),
    *_music("nottingham", NOTTINGHAM),
    *_music("piano-midi", PIANO),
    Judged("ATIS: hf", ("window",), "94.7", **_F1),
    Judged("ATIS: adam", ("window", "--optimizer", "adam"), "94.7", **_F1),
    Judged("ATIS, both directions: adam", ("bidirectional", "--optimizer", "adam"), "-", **_F1),
    Judged("MNIST by rows: hf", ("rows",), "-", **_WRONG),
    Judged("MNIST by rows: adam", ("rows", "--optimizer", "adam"), "-", **_WRONG),
    Judged("MNIST, permuted pixels: hf", ("permuted",), "-", **_WRONG),
)
TABLE = Table("Music, slots and sequential images", "", ROWS, seeds=1)
MEASURES = {
    "nats_per_frame": "nats per frame",
    "F1": "F1 of spans, per cent",
    "error_rate": "wrong images, per cent",
}


@dataclass(frozen=True)
class Found:
    """What a cell has come to: its run, and the report on its best parameters."""

    row: Judged
    cell: Cell
    run: SavedRun
    report: dict[str, Any] | None

    def value(self, role: str, measure: str | None = None) -> float:
        """The row's measure, or another one, of a role; nan if there is no report."""
        values = (self.report or {}).get(role, {})
        return self.row.factor * float(values.get(measure or self.row.measure, np.nan))

    @property
    def minutes(self) -> float:
        """Minutes of the processor."""
        return float(np.nansum(self.run.steps["cpu_seconds"])) / 60


def ended(cell: Cell, folder: Path) -> bool:
    """Whether training is over for good: validation, or the last step, has ended it."""
    try:
        rows = read_run(folder / cell.name).steps
    except FileNotFoundError:
        return False
    return bool(len(rows)) and not rows["updated"][-1]


def results(folder: Path, rows: Iterable[Judged] = ROWS, most_seeds: int = 20) -> list[Found]:
    """The cells that have run, in the table's order."""
    found = []
    for row in rows:
        for cell in row.cells(most_seeds):
            try:
                run = read_run(folder / cell.name)
            except FileNotFoundError:
                continue
            if len(run.steps):
                found.append(Found(row, cell, run, read_report(folder / cell.name)))
    return found


def report(found: Iterable[Found], folder: Path) -> None:
    """Let runs report on their best parameters where a budget ended them before they did."""
    for one in found:
        best = next((c.step for c in one.run.checkpoints if c.key == BEST), None)
        if best is not None and (one.report is None or one.report["step"] != best):
            words = [*one.cell.arguments, "--name", str((folder / one.cell.name).resolve()), "--report"]
            subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL, cwd=ROOT, env=environment())


def write(folder: Path, document: Path) -> None:
    """Write the results between the marks of the document, and the figures into the folder images beside it.

    Raises:
        ValueError: the document has no marks.
    """
    text = document.read_text(encoding="utf-8") if document.is_file() else f"{BEGIN}\n{END}\n"
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{document} has no lines {BEGIN} and {END}, between which the results go")
    report(results(folder), folder)
    found = results(folder)
    images = document.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    lines = tables(found) if found else ["No cell has run yet."]
    for group in dict.fromkeys(one.row.group for one in found):
        figure = draw([one for one in found if one.row.group == group])
        figure.savefig(images / f"music-{group}.png", dpi=110)
        lines += ["", f"![Validation of {group} over processor minutes](images/music-{group}.png)"]
    for one in (one for one in found if one.cell.seed == 0 and one.row.words[0] in _SHOWN):
        lines += shown(one, folder / one.cell.name / SAMPLE, images / f"music-sample-{one.row.words[0]}.png")
    new = document.with_suffix(".new")
    new.write_text("\n".join([f"{before}{BEGIN}", "", *lines, "", f"{END}{after}"]), encoding="utf-8")
    os.replace(new, document)


def shown(one: Found, picture: Path, copy: Path) -> list[str]:
    """New music of a run, and how often it obeys the rules of counterpoint, as lines."""
    lines: list[str] = []
    rules: dict[str, dict[str, float]] = (one.report or {}).get("rules", {})
    if rules:
        names = list(next(iter(rules.values())))
        lines += ["", "Shares in which new pieces obey the rules of counterpoint, in per cent:", ""]
        lines += [f"| pieces of | {' | '.join(names)} |", "|---|" + "--:|" * len(names)]
        lines += [f"| {who} | {' | '.join(f'{100 * r[n]:.1f}' for n in names)} |" for who, r in rules.items()]
    if picture.is_file():
        shutil.copyfile(picture, copy)
        lines += ["", f"New music of `{one.cell.command}`:", "", f"![Piano rolls](images/{copy.name})"]
    return lines


def tables(found: Sequence[Found]) -> list[str]:
    """One table for each measure, then every run."""
    lines = [f"{len(found)} runs of one thread; values are means over seeds."]
    for measure, name in MEASURES.items():
        there = [one for one in found if one.row.measure == measure]
        if not there:
            continue
        second = measure == "nats_per_frame"
        head = [
            "row",
            "published",
            "seeds",
            "validation",
            "test",
            *(["test from 2nd frame"] if second else []),
            "minutes",
        ]
        lines += ["", f"In {name}:", "", f"| {' | '.join(head)} |", "|---|---|" + "--:|" * (len(head) - 2)]
        for row in dict.fromkeys(one.row for one in there):
            of_row = [one for one in there if one.row == row]
            numbers = [_mean(one.value("valid") for one in of_row), _mean(one.value("test") for one in of_row)]
            if second:
                numbers.append(_mean(one.value("test", "nats_per_later_frame") for one in of_row))
            minutes = f"{mean(one.minutes for one in of_row):.1f}"
            lines.append(f"| {' | '.join([row.title, row.claim, str(len(of_row)), *numbers, minutes])} |")
    lines += ["", "Every run, with its best parameters by validation:", ""]
    lines += [
        "| command | parameters | steps | best step | ended | validation | test |",
        "|---|--:|--:|--:|---|--:|--:|",
    ]
    for one in found:
        told = one.report or {}
        over = "by itself" if not one.run.steps["updated"][-1] else "by the budget"
        sizes = f"{told.get('parameters', 0):,} | {int(one.run.steps['updated'].sum())} | {told.get('step', '-')}"
        values = " | ".join(_mean([one.value(role)]) for role in ("valid", "test"))
        lines.append(f"| `{one.cell.command}` | {sizes} | {over} | {values} |")
    return lines


def _mean(values: Iterable[float]) -> str:
    there = [v for v in values if np.isfinite(v)]
    return f"{mean(there):.3f}" if there else "-"


def draw(found: Sequence[Found]) -> Figure:
    """The validation measure of a group's runs over processor minutes."""
    from matplotlib import pyplot as plt

    plt.close("all")
    figure, axes = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    for number, row in enumerate(dict.fromkeys(one.row for one in found)):
        for one in (one for one in found if one.row == row):
            rows = one.run.steps
            minutes = np.cumsum(np.nan_to_num(rows["cpu_seconds"])) / 60
            tested = np.isfinite(rows[row.measure])
            label = row.title if one.cell.seed == 0 else None
            axes.plot(minutes[tested], row.factor * rows[row.measure][tested], color=f"C{number}", label=label)
    values = np.concatenate([one.row.factor * one.run.steps[one.row.measure] for one in found])
    values = values[np.isfinite(values)]
    low, high = float(values.min()), float(values.max())
    higher = found[0].run.metrics[0].better == "higher"
    best, usual = (high, np.quantile(values, 0.1)) if higher else (low, np.quantile(values, 0.9))
    margin = 0.05 * abs(best - usual) + 1e-9
    axes.set_ylim(*((usual, best + margin) if higher else (best - margin, usual)))
    axes.set(xlabel="processor minutes", ylabel=f"validation, {MEASURES[found[0].row.measure]}")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    return figure
