"""Networks of long memory beside what was published about them: the cells, and their page."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hfopt.experiment.store.reader import SavedRun, read_run
from runs.cells import Cell
from runs.tables import Row, Table
from runs.validated import read_report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BEGIN, END = "<!-- written by python -m runs.reproduce long-memory -->", "<!-- end of what is written -->"


@dataclass(frozen=True)
class Judged(Row):
    """A row with the column of a run's log, or of its report, that it is judged by; rows of a group share a figure."""

    group: str = ""
    measure: str = "test_loss"


_HF = ("--optimizer", "hf", "--hf-batch", "100", "--gradient-batches", "8", "--cg-iterations", "100")
_TANH = (
    "--onehot",
    "--net-type",
    "RNN",
    "--nonlin",
    "tanh",
    "--rinit",
    "random",
    "--structural",
    "0.3",
    "--damping",
    "0.1",
)


def _copy(T: int, *kinds: str) -> tuple[Judged, ...]:
    rows = {
        "RNN": (("--preset", "rnn-copy"), "fails"),
        "RNN-orth": (("--preset", "rnn-orth-copy"), "near 0 within 200 to 400 updates"),
        "EURNN": (("--preset", "eurnn-copy"), "near 0 within 200 to 400 updates"),
        "expRNN": (("--preset", "exprnn-copy"), "near 0 within 200 to 400 updates"),
        "nnRNN": (("--preset", "nnrnn-copy"), "near 0 within 200 to 400 updates"),
        "LSTM": (("--preset", "lstm-copy"), "stays at the loss without memory"),
        "tanh RNN, hf": ((*_TANH, *_HF, "--updates", "300"), "-"),
        "nnRNN, hf": (("--preset", "nnrnn-copy", *_HF, "--updates", "300"), "-"),
    }
    return tuple(
        Judged(
            f"copy, T = {T}: {kind}",
            (*words, "--T", str(T)),
            claim if T == 200 else "-",
            module="copytask",
            group=f"copy-{T}",
        )
        for kind, (words, claim) in rows.items()
        if not kinds or kind in kinds
    )


# Validation accuracies of the paper's figure, read off, at 512 units and about 70 epochs.
_PIXELS = {"rnn": "70 to 82", "rnn-orth": "95", "eurnn": "91.5", "exprnn": "96", "nnrnn": "94.5", "lstm": "90.5"}
# Bits per character and accuracy on the test part: the README of the released program, fixed numbers of parameters.
_CHARACTERS = {
    "rnn": (256, "2.89, 40.0%"),
    "rnn-orth": (256, "1.62, 66.3%"),
    "exprnn": (326, "1.43, 69.0%"),
    "nnrnn": (256, "1.40, 69.9%"),
    "lstm": (104, "-"),
}
ROWS: tuple[Judged, ...] = (
    *_copy(20, "RNN", "RNN-orth", "EURNN", "expRNN", "nnRNN", "LSTM", "tanh RNN, hf"),
    *_copy(200),
    *(row for T in (500, 1000) for row in _copy(T, "expRNN", "nnRNN", "RNN-orth", "nnRNN, hf")),
    *(
        Judged(
            f"permuted pixels, 128 units: {name}",
            ("--preset", f"{name}-psmnist", "--nhid", "128", "--epochs", "3"),
            f"{claim}% right (512 units)",
            module="smnist",
            group="pixels",
            measure="error_rate",
        )
        for name, claim in _PIXELS.items()
    ),
    *(
        Judged(
            f"PTB characters, {nhid} units: {name}",
            ("--preset", f"{name}-ptb-150", "--nhid", str(nhid), "--emsize", "50", "--epochs", "3"),
            f"{claim} (1024 units)",
            module="ptb_characters",
            group="characters",
            measure="bits per character",
        )
        for name, (nhid, claim) in _CHARACTERS.items()
    ),
)
TABLE = Table("Long memory", "", ROWS, seeds=1)
MEASURES = {
    "test_loss": "test loss, nats per step",
    "error_rate": "validation, share wrong",
    "bits per character": "validation, bits per character",
}


@dataclass(frozen=True)
class Found:
    """What a cell has come to: its run, and the numbers of its report by role."""

    row: Judged
    cell: Cell
    run: SavedRun
    reported: dict[str, float]

    @property
    def minutes(self) -> float:
        """Minutes of the processor."""
        return float(np.nansum(self.run.steps["cpu_seconds"])) / 60

    @property
    def best(self) -> float:
        """The best value of the measure in all tests."""
        return float(np.nanmin(self.run.steps[self.row.measure]))

    @property
    def over(self) -> bool:
        """Whether the last update has been made."""
        return not self.run.steps["updated"][-1]


def ended(cell: Cell, folder: Path) -> bool:
    """Whether training is over for good: the last update has been made, or the loss was not finite."""
    try:
        rows = read_run(folder / cell.name).steps
    except FileNotFoundError:
        return False
    return bool(len(rows)) and not (rows["updated"][-1] and np.isfinite(rows["train_loss"][-1]))


def results(folder: Path, rows: Sequence[Judged] | None = None, most_seeds: int = 10) -> list[Found]:
    """The cells that have run, in the table's order."""
    found = []
    for row in ROWS if rows is None else rows:
        for cell in row.cells(most_seeds):
            try:
                run = read_run(folder / cell.name)
            except FileNotFoundError:
                continue
            if len(run.steps) and np.isfinite(run.steps[row.measure]).any():
                reported = (read_report(folder / cell.name) or {}).get("test", {})
                found.append(Found(row, cell, run, reported))
    return found


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
    found = results(folder)
    images = document.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    lines: list[str] = [] if found else ["No cell has run yet."]
    for group in dict.fromkeys(one.row.group for one in found):
        some = [one for one in found if one.row.group == group]
        lines += [*table(some), "", f"![Tests of {group} over processor seconds](images/long-memory-{group}.png)", ""]
        draw(some).savefig(images / f"long-memory-{group}.png", dpi=110)
    missing = [row.title for row in ROWS if row not in {one.row for one in found}]
    if missing:
        lines += ["", f"Not run here yet: {'; '.join(missing)}."]
    new = document.with_suffix(".new")
    new.write_text("\n".join([f"{before}{BEGIN}", "", *lines, "", f"{END}{after}"]), encoding="utf-8")
    os.replace(new, document)


def table(found: Sequence[Found]) -> list[str]:
    """The runs of one group."""
    measure = found[0].row.measure
    lines = [
        f"| row | seed | published | updates | best {MEASURES[measure]} | test, best parameters | minutes | ended |",
        "|---|--:|---|--:|--:|---|--:|---|",
    ]
    for one in found:
        test = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in one.reported.items())
        numbers = f"{int(one.run.steps['updated'].sum())} | {one.best:.4f} | {test or '-'} | {one.minutes:.1f}"
        over = "by itself" if one.over else "by the budget"
        lines.append(f"| {one.row.title} | {one.cell.seed} | {one.row.claim} | {numbers} | {over} |")
    return [*lines, "", *(f"- `{one.cell.command}`" for one in found)]


def draw(found: Sequence[Found]) -> Figure:
    """The measure in all tests of a group's runs, over processor seconds."""
    from matplotlib import pyplot as plt

    plt.close("all")
    figure, axes = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    for number, row in enumerate(dict.fromkeys(one.row for one in found)):
        for k, one in enumerate(one for one in found if one.row == row):
            steps = one.run.steps
            seconds, tested = np.cumsum(np.nan_to_num(steps["cpu_seconds"])), np.isfinite(steps[row.measure])
            label = row.title.partition(": ")[2] if k == 0 else None
            axes.plot(seconds[tested], steps[row.measure][tested], color=f"C{number}", label=label)
    axes.set(xlabel="processor seconds", ylabel=MEASURES[found[0].row.measure], xscale="log", yscale="log")
    axes.set_title(found[0].row.group, fontsize="medium")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    return figure
