"""TensorBoard's event files, while an experiment runs or from a finished run; the package is imported when needed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfopt.experiment.hooks import Callback, Experiment
from hfopt.experiment.store.format import STEP_COLUMNS, RunError
from hfopt.experiment.store.reader import SavedRun

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_LEFT_OUT = ("step", "updated", "accepted", "cg_reason", "linearisation", "total_seconds", "finished")
_TAGS = {
    "train_loss": "loss/train",
    "test_loss": "loss/test",
    "evaluation_loss": "loss/before",
    "new_loss": "loss/after",
}


class TensorBoard(Callback):
    """Write the rows of an experiment as TensorBoard events; needs the package `tensorboard`.

    Args:
        folder: of the events; default `tensorboard` in the run's folder. A resumed run continues there, and TensorBoard
            drops the events of the steps that are computed again.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self._folder = None if folder is None else Path(folder)
        self._writer: SummaryWriter | None = None

    def attach(self, hf: Experiment) -> None:
        """Find the folder."""
        _summary_writer()  # what is missing is said before the first step
        self._folder = self._folder or hf.path / "tensorboard"

    def after_test(self, hf: Experiment, row: Mapping[str, Any]) -> None:
        """Write the losses and metrics of the test."""
        self._write(hf, row)
        assert self._writer is not None
        self._writer.flush()

    def after_update(self, hf: Experiment, row: Mapping[str, Any]) -> None:
        """Write the row of the update."""
        self._write(hf, row)

    def _write(self, hf: Experiment, row: Mapping[str, Any]) -> None:
        if self._writer is None:  # an earlier run has been moved aside by now
            self._writer = _summary_writer()(str(self._folder), purge_step=hf.step or None)
        for name, value in _scalars(row):
            self._writer.add_scalar(_tag(name), value, hf.step)


def write_events(run: SavedRun, folder: Path) -> None:
    """Write all rows of a run as TensorBoard events into a new folder.

    Raises:
        RunError: there are events in the folder already.
        ModuleNotFoundError: the package `tensorboard` is missing.
    """
    if folder.is_dir() and any(folder.glob("events.out.tfevents.*")):
        raise RunError(f"{folder} has events already; choose another folder")
    columns = run.steps.dtype.names or ()
    with _summary_writer()(str(folder)) as writer:
        for record in run.steps:
            row = {name: record[name].item() for name in columns}
            for name, value in _scalars(row):
                writer.add_scalar(_tag(name), value, row["step"], walltime=row["finished"])


def _summary_writer() -> type[SummaryWriter]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "TensorBoard's events need a package: pip install tensorboard", name="tensorboard"
        ) from error
    return SummaryWriter


def _scalars(row: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The numbers of a row that are there."""
    numbers = [
        (name, float(value))
        for name, value in row.items()
        if name not in _LEFT_OUT and isinstance(value, (int, float)) and not isinstance(value, bool)
    ]
    absent = {name for name, (kind, _) in STEP_COLUMNS.items() if kind == "i8"}
    return [(name, value) for name, value in numbers if math.isfinite(value) and not (name in absent and value < 0)]


def _tag(name: str) -> str:
    """Where TensorBoard shows a column."""
    if name in _TAGS:
        return _TAGS[name]
    return f"step/{name}" if name in STEP_COLUMNS and name != "error_rate" else f"test/{name}"
