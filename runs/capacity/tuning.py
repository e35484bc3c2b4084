"""The tuner: Gaussian-process optimization of hyperparameters, one study shared by any number of workers."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from hfopt.experiment.store.format import RunError
from hfopt.experiment.store.lock import Lock
from runs.capacity.hyperparameters import Choice, Hyperparameters, Range, space
from runs.capacity.table import Table, table
from runs.capacity.training import Outcome

_WAIT = 0.5
"""Seconds between two looks at what other workers do."""
_BEAT = 30
"""Seconds between two signs of life in a database; after four times that, a worker counts as dead."""


@dataclass(frozen=True)
class Study:
    """What a study is about, and where it is.

    Attributes:
        folder: of the study: its journal, its workers' locks, and the runs of its trials.
        task, architecture, layers, max_params: of the networks.
        optimizers: that are searched.
        train_steps: of every trial.
        settings: others that all trials have in common; workers with other ones are refused.
        storage: URL of a database, as Optuna has it (`sqlite:///..`, `postgresql://..`); None for the journal.
        seed: of the search.
    """

    folder: Path
    task: str
    architecture: str
    layers: int
    max_params: int
    optimizers: Choice
    train_steps: int
    settings: Mapping[str, Any]
    storage: str | None = None
    seed: int = 0

    @property
    def name(self) -> str:
        """The name of the study in its storage."""
        return f"{self.task}-{self.architecture}-{self.layers}-{self.max_params}-{'-'.join(self.optimizers)}"

    @property
    def identity(self) -> str:
        """All that trials have in common, as text."""
        common = {"train_steps": self.train_steps, **self.settings}
        return json.dumps({"name": self.name, **common}, sort_keys=True, default=str)

    def run(self, number: int) -> Path:
        """The folder of a trial's run."""
        return self.folder / f"trial-{number:05d}"


Objective = Callable[[int, Hyperparameters], Outcome]


def storage_of(folder: Path, url: str | None) -> BaseStorage:
    """The storage of a study: a journal in its folder, or a database.

    A worker that was killed while it wrote to the journal left a lock there, which others break after 30 seconds. In
    a database, workers give signs of life.

    Raises:
        ValueError: the database cannot be opened.
    """
    if url is None:
        folder.mkdir(parents=True, exist_ok=True)
        return JournalStorage(JournalFileBackend(str(folder / "journal.log")))
    try:
        with _quiet():
            return RDBStorage(url, heartbeat_interval=_BEAT, grace_period=4 * _BEAT)
    except Exception as error:  # of SQLAlchemy, of its drivers, or their absence
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"the storage {url} cannot be opened ({reason}); give one as in sqlite:///study.db") from error


def tune(
    study: Study, trials: int, objective: Objective, *, say: Callable[[str], None] = lambda _: None
) -> optuna.study.Study:
    """Work on a study until it has so many finished trials, those of other workers included.

    Any number of processes may do so at the same time, on any machines that share the folder. Each proposes with
    Optuna's GPSampler: a Gaussian process with the Matern 5/2 kernel, a length scale for each hyperparameter, and
    expected improvement, where trials that run elsewhere count as pending. A trial whose training diverged is
    infeasible: it counts, and its region is avoided. A trial whose worker has died is marked as failed, does not count,
    and another takes its place; nobody takes a trial over, so that none counts twice.

    Args:
        study: what it is about.
        trials: number of finished trials.
        objective: trains with hyperparameters; the number is the trial's.
        say: takes a line about each trial.

    Raises:
        ValueError: the study was begun with other settings.
        KeyboardInterrupt: Ctrl-C; the trial in progress is marked as failed.

    Source of the method: Collins, Sohl-Dickstein & Sussillo, ICLR 2017, section 1.3; Snoek, Larochelle & Adams, 2012.
    """
    ranges = space(study.architecture, study.optimizers, study.train_steps)
    searched = {key: _distribution(what) for key, what in ranges.items()}
    worker = _Worker(study.folder)
    try:
        shared = _open(study, worker)
        while (trial := _ask(shared, searched, trials, worker)) is not None:
            say(f"trial {trial.number} begins")
            hparams: Hyperparameters = dict(trial.params)
            try:
                with _signs_of_life(shared, trial):
                    outcome = objective(trial.number, hparams)
            except BaseException:
                shared.tell(trial, state=TrialState.FAIL)
                raise
            if outcome.ended == "interrupted":
                shared.tell(trial, state=TrialState.FAIL)
                raise KeyboardInterrupt
            say(_record(study, shared, trial, hparams, outcome))
        return shared
    finally:
        worker.close()


def _record(
    study: Study, shared: optuna.study.Study, trial: optuna.Trial, hparams: Hyperparameters, outcome: Outcome
) -> str:
    row = {
        "architecture": study.architecture,
        "eval_loss": outcome.eval_loss,
        "hparams": hparams,
        "max_params": study.max_params,
        "n_layers": study.layers,
        "num_params": outcome.num_params,
        "task_type": study.task,
        "train_loss": outcome.train_loss,
        "valid_loss": outcome.valid_loss,
        "hyper_iter": trial.number,
    }
    trial.set_user_attr("row", row)
    trial.set_user_attr("more", {"ended": outcome.ended, "seconds": outcome.seconds, "units": outcome.units})
    trial.set_constraint("diverged", 0.0 if outcome.feasible else 1.0)
    # The worst value so far in place of infinity: the objective's model is told nothing by a trial that diverged.
    known = [t.value for t in _finished(shared) if t.value is not None]
    shared.tell(trial, outcome.valid_loss if outcome.feasible else max(known, default=0.0))
    what = f"valid_loss {outcome.valid_loss:.6g}" if outcome.feasible else "infeasible (diverged)"
    return f"trial {trial.number}: {what}, {len(_finished(shared))} finished"


def _open(study: Study, worker: _Worker) -> optuna.study.Study:
    """The study in its storage, made by whoever comes first."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with _quiet():
        # Workers with the same seed would propose the same at the beginning.
        seed = int.from_bytes(hashlib.blake2b(f"{study.seed} {worker.name}".encode(), digest_size=4).digest(), "little")
        sampler = optuna.samplers.GPSampler(seed=seed, warn_independent_sampling=False)
        with worker.turn():
            shared = optuna.create_study(
                storage=storage_of(study.folder, study.storage),
                sampler=sampler,
                study_name=study.name,
                direction="minimize",
                load_if_exists=True,
            )
            before = shared.user_attrs.get("identity")
            if before is None:
                shared.set_user_attr("identity", study.identity)
            elif before != study.identity:
                raise ValueError(
                    f"the study {study.name} in {study.folder} was begun with other settings ({before}); use those, or "
                    "another folder"
                )
    return shared


def _ask(shared: optuna.study.Study, searched: dict[str, Any], trials: int, worker: _Worker) -> optuna.Trial | None:
    """The next trial, once one is missing; None when there are enough finished ones."""
    while True:
        with worker.turn():  # between counting and asking, nobody else asks
            _bury(shared, worker)
            finished = len(_finished(shared))
            running = len(shared.get_trials(deepcopy=False, states=(TrialState.RUNNING,)))
            if finished >= trials:
                return None
            if finished + running < trials:
                with _quiet():
                    trial = shared.ask(searched)
                trial.set_user_attr("worker", worker.name)
                return trial
        time.sleep(_WAIT)


@contextmanager
def _signs_of_life(shared: optuna.study.Study, trial: optuna.Trial) -> Iterator[None]:
    """In a database, note now and then that the trial's worker is alive: others may not see its lock."""
    storage: Any = shared._storage
    if not _is_database(shared):
        yield
        return
    over = threading.Event()

    def beat() -> None:
        while True:
            storage.record_heartbeat(trial._trial_id)
            if over.wait(_BEAT):
                return

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what Optuna says of features that may change, and of databases."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _finished(shared: optuna.study.Study) -> list[FrozenTrial]:
    return shared.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def _is_database(shared: optuna.study.Study) -> bool:
    return hasattr(shared._storage, "record_heartbeat")


def _bury(shared: optuna.study.Study, worker: _Worker) -> None:
    """Mark the trials of dead workers as failed."""
    database = _is_database(shared)
    for trial in shared.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        name = trial.user_attrs.get("worker")
        if name is None:
            # Its worker died between asking and leaving its name: it had the turn, which is ours now. In a database it
            # may have the turn in a folder of its own.
            started = trial.datetime_start
            dead = not database or started is None or (datetime.datetime.now() - started).total_seconds() > 600
        else:
            dead = worker.is_dead(name)
        if dead:
            with suppress(optuna.exceptions.UpdateFinishedTrialError, ValueError):  # another one was quicker
                shared.tell(trial.number, state=TrialState.FAIL)
    if database:
        with _quiet():
            optuna.storages.fail_stale_trials(shared)


def _distribution(what: Range | Choice) -> optuna.distributions.BaseDistribution:
    if not isinstance(what, Range):
        return optuna.distributions.CategoricalDistribution(what)
    if what.whole:
        return optuna.distributions.IntDistribution(int(what.low), int(what.high), log=what.log)
    return optuna.distributions.FloatDistribution(what.low, what.high, log=what.log)


class _Worker:
    """A process's place in a study's folder: a lock that the system releases however the process ends."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "workers"
        self.name = f"{socket.gethostname()}-{os.getpid()}-{time.time_ns()}"
        self._lock = Lock(self._folder / self.name)

    def is_dead(self, name: str) -> bool:
        """Whether another worker's lock is free."""
        if name == self.name or sys.platform == "win32" or not (self._folder / name).is_dir():
            return False  # one without a lock here is on another machine, with a folder of its own
        try:
            Lock(self._folder / name).release()
        except RunError:
            return False
        return True

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait until no other worker of the folder is here."""
        while True:
            try:
                lock = Lock(self._folder / "turn")
                break
            except RunError:
                time.sleep(0.02)
        try:
            yield
        finally:
            lock.release()

    def close(self) -> None:
        """Release the lock."""
        self._lock.release()


def load(folder: Path, url: str | None = None) -> list[optuna.study.Study]:
    """All studies of a folder's journal, or of a database.

    Raises:
        FileNotFoundError: there is no journal.
    """
    if url is None and not (folder / "journal.log").is_file():
        raise FileNotFoundError(f"there is no study in {folder}: it has no journal.log")
    storage = storage_of(folder, url)
    names = optuna.get_all_study_names(storage)
    return [optuna.load_study(study_name=name, storage=storage) for name in names]


def rows(studies: list[optuna.study.Study]) -> Table:
    """The finished trials of studies as a table; those that diverged have infinite losses."""
    return table(t.user_attrs["row"] for study in studies for t in _finished(study) if "row" in t.user_attrs)
