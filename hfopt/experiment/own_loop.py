"""Runs of loops that are not `HF`'s: the same folder, written by whoever has a loop."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from hfopt.experiment import identity
from hfopt.experiment.generators import generators, set_generators
from hfopt.experiment.metrics import ERROR_RATE, Metric
from hfopt.experiment.store.format import OWN_LOOP, STEP_COLUMNS, Row, RunError
from hfopt.experiment.store.reader import SavedRun, read_run, run_path
from hfopt.experiment.store.writer import RunLog

_OWN = ("step", "updated", "seconds", "total_seconds", "cpu_seconds", "finished")
_SHORT = {"loss": "train_loss", "error": ERROR_RATE, "lambda": "damping"}


class Run:
    """A run that your own training loop writes: a context manager that holds the run's folder.

    The folder has the format of the runs of :class:`HF`: the command ``hfopt`` lists, compares, shows and exports it,
    and :func:`read_run` reads it while it is written.

    Args:
        path: name of the run, then its folder is ``runs/logs/<name>``; or the folder, as a Path or with a separator.
        config: settings worth recording, a mapping or a dataclass. Lists show the strings ``model``, ``problem`` and
            ``optimizer`` among them.
        metrics: what is logged besides losses, for a unit or a direction: ``Metric("accuracy", unit="%",
            better="higher")``. The first judges which checkpoint is the best. Names that are logged without being
            declared here become metrics without a unit, of which lower is better.
        seed: the seed that the loop used.
        resume: continue the run of this name from its last checkpoint, if there is one. Otherwise an earlier run of
            this name is moved aside.
        keep_checkpoints: how many numbered checkpoints stay besides the best; None keeps all.

    Attributes:
        step: the number of the next step.
        state: what the last checkpoint holds, after `resume`; None if there is none.

    Raises:
        RunError: another process writes the run, or the run to be resumed has other settings.
    """

    def __init__(
        self,
        path: str | Path,
        config: Any = None,
        *,
        metrics: Iterable[Metric] = (),
        seed: int | None = None,
        resume: bool = False,
        keep_checkpoints: int | None = 3,
    ) -> None:
        self.path = run_path(path)
        self.step = 0
        self.state: dict[str, Any] | None = None
        self._metrics = list(metrics)
        for metric in self._metrics:
            if metric.column in STEP_COLUMNS and metric.column != ERROR_RATE:
                raise ValueError(f"a metric is called {metric.column!r}, as a column of every run is; rename it")
        settings = identity.describe(config)
        if settings is not None and not isinstance(settings, dict):
            raise TypeError(f"config={config!r}: must be a mapping or a dataclass")
        self._configuration = {"driver": {"class": OWN_LOOP}, "settings": settings or {}}
        self._seed, self._resume, self._keep = seed, resume, keep_checkpoints
        self._log: RunLog | None = None
        self._last: Row = {}
        self._seconds = 0.0

    def __enter__(self) -> Run:
        versions = identity.versions(torch.device("cpu"))
        earlier = self._earlier()
        if earlier is None:
            header = {
                "name": self.path.name,
                "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "seed": self._seed,
                "configuration": self._configuration,
                "versions": versions,
                "metrics": [metric.describe() for metric in self._metrics],
                "session": identity.session(0, versions),
            }
            self._log, _ = RunLog.start(self.path, header, None, keep=self._keep, overwrite=False)
        else:
            self._take(earlier, versions)
        self._began = self._ended = time.perf_counter(), time.process_time()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._log is None:
            return
        log, self._log = self._log, None
        try:
            if kind is None:
                log.finish("finished")
            elif issubclass(kind, (KeyboardInterrupt, SystemExit)):
                log.finish("interrupted")
            else:
                log.note(f"broken off: {kind.__name__}: {error}")
                log.finish("broken off")
        finally:
            log.close()

    def log(self, step: int, **values: Any) -> None:
        """Record values of a step; once this returns, they survive a kill.

        Args:
            step: its number. Steps rise; values that are logged later for the same step are added to its row.
            values: numbers by name: ``loss`` (the training loss), ``test_loss``, ``error`` (a share of wrong cases,
                0 to 1), any column of docs/run_format.md such as ``rho`` or ``gradient_norm``, or names of your own.

        Raises:
            ValueError: a step before the last one, or a name that the run uses itself.
            TypeError: a value that is not one number.
            ~hfopt.experiment.store.format.WriteError: there is no room; the row is kept and written by the next call.
        """
        log = self._opened()
        last = self._last.get("step", -1)
        if step < last or step < 0:
            raise ValueError(f"step {step} is logged after step {last}; steps rise, beginning with 0")
        now = time.perf_counter(), time.process_time()
        row: Row = {"step": int(step), "updated": True, "accepted": True}
        if step == last:
            row, self._seconds = dict(self._last), self._seconds - self._last["seconds"]
        else:
            self._began = self._ended
        for name, value in values.items():
            column = _SHORT.get(name, name)
            if column in _OWN:
                raise ValueError(f"{name}= is a column that the run fills in itself; log it under another name")
            row[column] = _number(name, value, STEP_COLUMNS.get(column, ("f8",))[0])
        self._measure([name for name in row if name not in STEP_COLUMNS or name == ERROR_RATE])
        row["seconds"], row["cpu_seconds"] = (end - begin for end, begin in zip(now, self._began, strict=True))
        self._seconds += row["seconds"]
        row |= {"total_seconds": self._seconds, "finished": time.time()}
        self._last, self._ended, self.step = row, now, int(step) + 1
        told = {name: row[_SHORT.get(name, name)] for name in values}
        block = "\n".join([f"step {step}", *(f"    {name:<20} {_told(value)}" for name, value in told.items()), "\n"])
        log.append(row, [], block, block)

    def save(self, parameters: Mapping[str, Any], *, name: str | None = None, **state: Any) -> None:
        """Write a checkpoint of the state before step `self.step`, with the states of torch's generators.

        Args:
            parameters: the model's ``state_dict()``, which :meth:`SavedRun.parameters` returns.
            name: of a checkpoint that stays; numbered ones make room for newer ones.
            state: what else the loop continues from, such as ``optimizer=optimizer.state_dict()``: dicts, lists,
                tensors, arrays, strings, numbers, booleans and None.
        """
        taken = {"step", "totals", "parameters", "generators"} & state.keys()
        if taken:
            raise ValueError(f"{min(taken)}= is saved by the run itself; save it under another name")
        totals = {"seconds": self._seconds}
        whole = {"step": self.step, "totals": totals, "parameters": dict(parameters)}
        self._opened().save({**whole, "generators": generators(), **state}, name)

    # -- parts ------------------------------------------------------------------------------------------

    def _opened(self) -> RunLog:
        if self._log is None:
            raise RunError(f"the run in {self.path} is not open: write `with hfopt.Run(...) as run:` around the loop")
        return self._log

    def _earlier(self) -> SavedRun | None:
        """The run to be continued; RunError if it is another's."""
        if not self._resume:
            return None
        try:
            run = read_run(self.path)
        except FileNotFoundError:
            return None
        saved = {key: run.configuration.get(key) for key in self._configuration}
        differing = identity.differences({**saved, "seed": run.seed}, {**self._configuration, "seed": self._seed})
        if differing:
            raise RunError(
                f"the run in {self.path} was made with other settings: {'; '.join(differing)}. Use its settings, or "
                "choose another name"
            )
        return run

    def _take(self, earlier: SavedRun, versions: Mapping[str, Any]) -> None:
        """Continue a run from its last checkpoint; without one from the start, its rows staying until they are new."""
        serial = 0
        if earlier.checkpoints or earlier.missing:
            found = earlier.find()
            self.state, serial = earlier.checkpoint(found.key), found.serial
            self.step, self._seconds = found.step, float(self.state["totals"]["seconds"])
        metrics = [metric.describe() for metric in self._metrics]
        self._log = RunLog.resume(
            self.path,
            serial,
            earlier.serial,
            keep=self._keep,
            metrics=metrics,
            session=identity.session(self.step, versions),
        )
        known = {metric.column for metric in self._metrics}
        if len(earlier.steps):
            self._metrics += [metric for metric in earlier.metrics if metric.column not in known]
        self._log.note(f"resumed at step {self.step}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        if self.state is not None:
            set_generators(self.state["generators"])

    def _measure(self, columns: Iterable[str]) -> None:
        """Have a column for every name that is logged."""
        known = {metric.column for metric in self._metrics}
        new = [
            Metric("error rate", unit="%", column=ERROR_RATE) if name == ERROR_RATE else Metric(name)
            for name in columns
            if name not in known
        ]
        if new:
            self._opened().measure([metric.describe() for metric in [*self._metrics, *new]])
            self._metrics += new


def _number(name: str, value: Any, kind: str) -> Any:
    """A value as what its column takes."""
    if kind.startswith("S"):
        return str(value)
    try:
        number = float(value.item() if isinstance(value, (torch.Tensor, np.ndarray, np.generic)) else value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}={type(value).__name__} is not a number: {str(error).splitlines()[0]}") from error
    if kind in ("i8", "?"):
        if number != int(number):
            raise TypeError(f"{name}={number}: this column of every run holds whole numbers")
        return bool(number) if kind == "?" else int(number)
    return number


def _told(value: Any) -> str:
    """A value for the text logs."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
