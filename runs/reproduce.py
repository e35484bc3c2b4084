"""Runs a whole table of published results, cell by cell, and writes what came of it into a document beside its logs.

    python -m runs.reproduce pathological                 what is missing of the table; then the document
    python -m runs.reproduce pathological --jobs 2 --budget-minutes 10
    python -m runs.reproduce pathological-long --device cuda --seeds 1
    python -m runs.reproduce pathological --only "addition*" "xor*"
    python -m runs.reproduce --write                      the document alone, from what is there
    python -m runs.reproduce --write --document docs/reproduction.md
    python -m runs.reproduce music --budget-minutes 10    music, slots and sequential images, and their page
    python -m runs.reproduce long-memory --only "copy, T = 20:*"   networks of long memory, and their page
    python -m runs.reproduce language --budget-minutes 10 language models, and their page; then with --best for longer

A cell is one run: a problem, its length, its settings, a seed. Cells that are finished are read from their run.h5;
unfinished ones go on where they were last saved, also after a kill. A cell that has used up its budget counts as not
solved, until a larger budget takes it further. Ctrl-C ends the cells after the step in progress and saves them.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Any

import tyro

from hfopt.experiment.report import duration
from runs import language_table, long_memory_table, music_table
from runs.cells import ROOT, Cell, Result, environment, result
from runs.reproduction import write_document
from runs.tables import TABLES, Table

_LOOK_EVERY = 5.0
"""Seconds between two looks at what the cells have spent."""


@dataclass(frozen=True)
class CommandLine:
    """Run the missing cells of a table, or of all tables, and write the document."""

    table: Annotated[str, tyro.conf.Positional] = "all"
    """Name of the table: pathological, pathological-long, memorization-damping, time-to-solution, or all of these;
    or language, music or long-memory."""
    only: tuple[str, ...] = ()
    """Rows to run, by their titles; * stands for anything."""
    seeds: int | None = None
    """Seeds of each row; by default as many as the table has."""
    first_seed: int = 0
    """The first of them that is run; earlier ones are still read."""
    jobs: int = 1
    """Cells at a time, of one thread each."""
    budget_minutes: float | None = None
    """Minutes after which a cell counts as not solved: of the processor, on a GPU of the clock. By default no limit."""
    device: str = "cpu"
    """Where to compute: cpu, cuda, cuda:1, ..."""
    folder: Path = ROOT / "runs" / "logs" / "reproduce"
    """Where the runs lie."""
    document: Path | None = None
    """The document, by default reproduction.md (or language.md, music.md, long-memory.md) in that folder; figures go to
    images beside it. Of these, what stands outside two marks is left alone."""
    best: bool = False
    """Of language: only the best setting so far of each method."""
    write: bool = False
    """Run nothing: write the document from the runs that are there."""


@dataclass
class Job:
    """A cell that is running."""

    cell: Cell
    process: subprocess.Popen[bytes]
    stopped: bool = False

    def stop(self) -> None:
        """Let it finish its step, save and end; once."""
        if not self.stopped and self.process.poll() is None:
            self.stopped = True
            with suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGINT)


def start(cell: Cell, folder: Path, device: str) -> Job:
    """Start or resume a cell in a process of its own, safe from the terminal's Ctrl-C; it prints to <name>.txt."""
    run = folder / cell.name
    words = [*cell.arguments, "--name", str(run.resolve()), "--device", device]
    if (run / "run.h5").exists():
        words.append("--resume")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{cell.name}.txt").open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, *words],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment(),
            cwd=ROOT,
            start_new_session=True,
        )
    return Job(cell, process)


def due(found: Result | None, budget: float) -> bool:
    """Whether a cell has still something to do."""
    return found is None or (found.state == "unfinished" and found.spent < budget)


def run_cells(
    cells: Sequence[Cell],
    folder: Path,
    *,
    jobs: int = 1,
    budget: float = float("inf"),
    device: str = "cpu",
    say: Callable[[str], None] = print,
    ended: Callable[[Cell, Path], bool] = lambda cell, folder: False,
) -> list[Cell]:
    """Run what is due, so many cells at a time, each for `budget` seconds in all; returns the cells that broke down.

    `ended` says of a cell whether it has ended for good in a way that its state does not tell.

    KeyboardInterrupt is passed on after every running cell has saved itself.
    """
    waiting = [cell for cell in cells if due(result(folder / cell.name), budget) and not ended(cell, folder)]
    running: list[Job] = []
    broken: list[Cell] = []
    looked = 0.0
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(start(waiting.pop(0), folder, device))
            time.sleep(0.2)
            if time.monotonic() - looked >= _LOOK_EVERY:
                looked = time.monotonic()
                for job in running:
                    found = result(folder / job.cell.name)
                    if found is not None and not due(found, budget):
                        job.stop()
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                found = result(folder / job.cell.name)
                if job.stopped or (found is not None and found.state != "unfinished") or ended(job.cell, folder):
                    say(line(job.cell, found))
                else:
                    broken.append(job.cell)
                    say(f"{job.cell.name}: broke down, see {folder / job.cell.name}.txt")
    finally:
        for job in running:
            job.stop()
        for job in running:
            job.process.wait()
    return broken


def line(cell: Cell, found: Result | None) -> str:
    """One line on a cell that has ended."""
    if found is None:
        return f"{cell.name}: no step finished"
    if cell.module in ("characters", "words", "music", "ptb_characters"):
        error = f"{found.error:.3f}"
    else:
        error = f"F1 {100 * found.error:.2f}%" if cell.module == "slots" else f"{100 * found.error:.2f}% wrong"
    return f"{cell.name}: {found.state}, {found.steps} steps, {duration(found.spent)}, {error}"


def chosen(table: Table, settings: CommandLine) -> list[Cell]:
    """The cells of a table that were asked for, seed by seed, so that early cells give an overview."""
    rows = [row for row in table.rows if not settings.only or any(fnmatch(row.title, o) for o in settings.only)]
    counts = {row: settings.seeds or row.seeds or table.seeds for row in rows}
    seeds = range(settings.first_seed, max(counts.values(), default=0))
    return [row.cells(seed + 1)[seed] for seed in seeds for row in rows if seed < counts[row]]


def main(settings: CommandLine) -> int:
    """The exit status: 0, 1 if a cell broke down, 130 after Ctrl-C."""
    pages = {"language": language_table, "music": music_table, "long-memory": long_memory_table}
    known = {**TABLES, **{name: page.TABLE for name, page in pages.items()}}
    if settings.table != "all" and settings.table not in known:
        sys.exit(f"runs.reproduce: there is no table {settings.table!r}; choose from all, {', '.join(known)}")
    page = pages.get(settings.table)
    language = page is language_table
    names = list(TABLES) if settings.table == "all" else [settings.table]
    cells = list(dict.fromkeys(cell for name in names for cell in chosen(known[name], settings)))
    if settings.best and language:
        first = language_table.chosen(language_table.curves(settings.folder), language_table.CHOICE)
        cells = [curve.cell for curve in first if curve.cell in cells]
        if not cells:
            sys.exit(f"runs.reproduce: no cell has run for {language_table.CHOICE:g} minutes yet; run without --best")
    if not cells:
        sys.exit(f"runs.reproduce: no row is called {' or '.join(settings.only)}")
    status = 0
    if not settings.write:
        budget = float("inf") if settings.budget_minutes is None else 60 * settings.budget_minutes
        # A shell lets what it starts in the background ignore SIGINT, and the cells would inherit that.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)
        try:
            options: dict[str, Any] = {"jobs": settings.jobs, "budget": budget, "device": settings.device}
            if page in (music_table, long_memory_table):
                options["ended"] = page.ended
            status = int(bool(run_cells(cells, settings.folder, **options)))
        except KeyboardInterrupt:
            status = 130
    default = settings.folder / ("reproduction.md" if page is None else f"{settings.table}.md")
    document = default if settings.document is None else settings.document
    if page is not None:
        try:
            page.write(settings.folder, document)
        except ValueError as error:
            sys.exit(f"runs.reproduce: {error}")
    else:
        write_document(TABLES, settings.folder, document)
    print(document)
    return status


if __name__ == "__main__":
    sys.exit(main(tyro.cli(CommandLine, prog="python -m runs.reproduce", config=(tyro.conf.FlagCreatePairsOff,))))
