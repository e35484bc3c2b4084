"""The cells of a table: one run each, and what its file tells about it."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hfopt.experiment.store.reader import SavedRun, read_run

ROOT = Path(__file__).resolve().parents[1]
"""Where `python -m runs...` is typed."""
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Cell:
    """One run: `python -m runs.<module> <words> --seed <seed>`."""

    module: str
    words: tuple[str, ...]
    seed: int

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return "-".join([self.module, *(word.lstrip("-") for word in self.words), f"seed{self.seed}"])

    @property
    def arguments(self) -> list[str]:
        """What is typed after `python`."""
        return ["-m", f"runs.{self.module}", *self.words, "--seed", str(self.seed)]

    @property
    def command(self) -> str:
        """The line that repeats the run."""
        return shlex.join(["python", *self.arguments])


@dataclass(frozen=True)
class Result:
    """What has become of a cell.

    Attributes:
        state: "solved"; "not solved", which is for good; "unfinished", which more time may change.
        steps, cg_iterations, products: of the optimizer, in all.
        seconds: wall-clock time of all steps, tests included.
        cpu_seconds: processor time of the same, all threads together; nan if the run's log has none.
        loss, error: of the last test; the error is the first metric.
        lowest: the lowest error of all tests.
        curve: (seconds, error) of every test; processor seconds where the run was on the CPU.
        on_cpu: whether it ran there.
        versions: what it ran on and with.
    """

    state: str
    steps: int
    cg_iterations: int
    products: int
    seconds: float
    cpu_seconds: float
    loss: float
    error: float
    lowest: float
    curve: tuple[Array, Array]
    on_cpu: bool
    versions: dict[str, str]

    @property
    def spent(self) -> float:
        """Seconds that count: of the processor, where the run was on one and logged them, else of the clock."""
        return self.cpu_seconds if self.on_cpu and np.isfinite(self.cpu_seconds) else self.seconds


def environment() -> dict[str, str]:
    """The environment variables of a cell: one thread, and this checkout first."""
    path = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(path))


def result(folder: Path) -> Result | None:
    """What the run in a folder has come to; None if there is no run, or none with a finished step."""
    try:
        run = read_run(folder)
    except FileNotFoundError:
        return None
    return summary(run) if len(run.steps) else None


def summary(run: SavedRun) -> Result:
    """A run in numbers."""
    rows, judge = run.steps, run.metrics[0].column
    tests = rows[np.isfinite(rows[judge])]
    updates = rows[rows["updated"]]
    on_cpu = str(run.versions["device"]).startswith("cpu")
    processor = rows["cpu_seconds"]
    clock = processor if on_cpu and np.isfinite(processor).all() else rows["seconds"]
    total = np.cumsum(clock)[np.isfinite(rows[judge])]
    return Result(
        state=_state(run),
        steps=len(updates),
        cg_iterations=int(np.maximum(updates["cg_iterations"], 0).sum()),
        products=int(np.maximum(updates["products"], 0).sum()),
        seconds=float(rows["seconds"].sum()),
        cpu_seconds=float(processor.sum()),
        loss=float(tests["test_loss"][-1]) if len(tests) else np.nan,
        error=float(tests[judge][-1]) if len(tests) else np.nan,
        lowest=float(tests[judge].min()) if len(tests) else np.nan,
        curve=(np.asarray(total, np.float64), np.asarray(tests[judge], np.float64)),
        on_cpu=on_cpu,
        versions={name: str(value) for name, value in run.versions.items()},
    )


def _state(run: SavedRun) -> str:
    """A closing row, which was tested but not updated, ends a run; so does a loss that is not a number."""
    last, driver = run.steps[-1], run.configuration["driver"]
    if not last["updated"] and last[run.metrics[0].column] < driver["threshold"]:
        return "solved"
    over = not last["updated"] and last["step"] >= driver["max_steps"]
    return "not solved" if over or np.isnan(last["train_loss"]) else "unfinished"
