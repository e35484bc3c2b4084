"""The driver of an experiment: draws batches by role, logs, saves, stops, and resumes to the same bits."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hfopt.experiment import identity, report
from hfopt.experiment.data import Problem, check_data
from hfopt.experiment.generators import generators, set_generators
from hfopt.experiment.hooks import Callback, Callbacks
from hfopt.experiment.interrupt import Interrupt
from hfopt.experiment.metrics import Metric, metrics_of
from hfopt.experiment.progress import Bar, shown
from hfopt.experiment.recorders.base import Recorder, Recorders
from hfopt.experiment.roles import (
    Drawn,
    Forward,
    Growth,
    Roles,
    averaged,
    closure,
    evaluate,
    loss_of_next,
    norm,
    on_inputs,
)
from hfopt.experiment.store import format as runfile
from hfopt.experiment.store.format import Row, RunError, WriteError
from hfopt.experiment.store.reader import read_run, run_path
from hfopt.experiment.store.writer import RunLog


class HF:
    """An experiment: a model trained on a problem, by `hfopt.HessianFree` or any torch optimizer.

    Each step drops the training draws, evaluates the test batches, stops with success if their error rate is
    below the threshold, and otherwise updates the parameters once. The loss is the mean over scored outputs
    of all batches of a role: batch i weighs `size(i) / sum of sizes`. A batch is asked of the problem once a step.

    Args:
        path: name of the run, then its folder is `runs/logs/<name>`; or the folder, as a Path or with a
            separator.
        model: returns what the problem's losses take.
        problem: the data object (`hfopt.experiment.data`). Its errors are counted (`zero_one_loss`), or measured
            (`errors`, `error_name`): then "error rate" is the mean error of the test cases here; or it has `metrics`.
        forward: outputs of (model, batch), default `model(batch.inputs)`; or `Carried` (`hfopt.experiment.carried`).
        optimizer: over the model's parameters, or a function that makes one of them (`torch.optim.Adam`,
            say); default `hfopt.HessianFree`.
        gradient_batches: training batches of the gradient; default all.
        curvature_batches: those of the curvature products; default the first of the gradient's at the step.
        evaluation_batches: those that judge the step (backtracking, line search, rho); default the
            gradient's at the step, or those of `debias_batches`. These two concern optimizers whose `step` takes
            `curvature=` and `evaluation=`.
        debias_batches: those that step lengths along CG's directions are taken from, for optimizers whose `step` takes
            `debias=`; default none.
        batches_per_step: take only so many of the gradient batches at a step, in turn (stochastic optimizers); a
            `Growth` takes more and more of them.
        average: test the running average of the parameters over updates, ``a <- s a + (1 - s) theta`` with
            ``s = min(1 - 1/n, average)`` at the nth, in place of the parameters, whose last noise it lacks (Polyak &
            Juditsky, SIAM J. Control Optim. 1992; Martens & Grosse, arXiv:1503.05671, section 13): `tested` is the
            model that has it. Default none.
        metrics: further metrics of the test batches (`hfopt.experiment.metrics`).
        callbacks: what else happens at each step (`hfopt.experiment.hooks`): schedules, clipping, projections, ...
        record: recorders of hidden states, gradients, eigenvalues, ... over training (`hfopt.experiment.recorders`).
        threshold: success is a first metric better than it (an error rate below it), 0 for none; or a function of
            (test loss, first metric) that says.
        max_steps: updates in all, those before `load()` included.
        max_skipped: the run is given up after so many steps in a row whose loss was not finite. The optimizer
            must have skipped them: parameters that are not finite end the run at once.
        test_freq: evaluate the test batches before every so many updates. The terminal and the text logs
            show these steps; run.h5 has all.
        save_freq: save after every so many updates.
        keep_checkpoints: how many numbered checkpoints stay besides the best; None keeps all.
        seed: the seed that the run file used; recorded, and compared by `load()`.
        settings: anything else worth recording, such as the run file's settings: a mapping or a dataclass.
        overwrite: a new run deletes an earlier one in the same folder; by default the earlier one is moved
            aside.
        hints: what else to tell at the end, as `{"to ...": "command"}`.
        quiet: print nothing.

    Raises:
        TypeError: for a data object that lacks members; all of them are named.
        ValueError: for a name that is none, batches that the problem does not have, a role that the optimizer does not
            have, and frequencies below 1.
    """

    def __init__(
        self,
        path: str | Path,
        model: nn.Module,
        problem: Problem,
        *,
        optimizer: torch.optim.Optimizer | Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
        forward: Forward = on_inputs,
        gradient_batches: Sequence[int] | None = None,
        curvature_batches: Sequence[int] | None = None,
        evaluation_batches: Sequence[int] | None = None,
        debias_batches: Sequence[int] | None = None,
        batches_per_step: int | Growth | None = None,
        average: float | None = None,
        metrics: Iterable[Metric] = (),
        callbacks: Iterable[Callback] = (),
        record: Iterable[Recorder] = (),
        threshold: float | Callable[[float, float], bool] = 0.01,
        max_steps: int = 500,
        max_skipped: int = 10,
        test_freq: int = 1,
        save_freq: int = 5,
        keep_checkpoints: int | None = 3,
        seed: int | None = None,
        settings: Any = None,
        overwrite: bool = False,
        hints: Mapping[str, str] | None = None,
        quiet: bool = False,
    ) -> None:
        check_data(problem)
        self.path = run_path(path)
        self.model, self.problem, self.forward = model, problem, forward
        if optimizer is None:
            from hfopt.optimizer import HessianFree

            optimizer = HessianFree
        self.optimizer = optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer(model.parameters())
        self.roles = Roles(
            self.optimizer,
            problem.train_batches,
            gradient=gradient_batches,
            curvature=curvature_batches,
            evaluation=evaluation_batches,
            debias=debias_batches,
            per_step=batches_per_step,
        )
        self._averaged = None if average is None else averaged(model, average)
        counts = {"test_freq": test_freq, "save_freq": save_freq, "keep_checkpoints": keep_checkpoints}
        for name, value in {**counts, "max_skipped": max_skipped}.items():
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        self.metrics = metrics_of(problem, metrics)
        taken = [m.column for m in self.metrics if m.column in runfile.STEP_COLUMNS and m.column != "error_rate"]
        if taken:
            raise ValueError(f"a metric is called {taken[0]!r}, as a column of every run is; give it another name")
        self.callbacks, self.recorders = Callbacks(callbacks), Recorders(record)
        self.threshold: float | Callable[[float, float], bool] = threshold
        self.max_steps, self.max_skipped, self.test_freq, self.save_freq = max_steps, max_skipped, test_freq, save_freq
        self.keep_checkpoints, self.seed, self.overwrite, self.quiet = keep_checkpoints, seed, overwrite, quiet
        self.hints = hints or {}
        self.step = 0
        self.totals: dict[str, float] = {"seconds": 0.0, "cg_iterations": 0, "products": 0, "evaluations": 0}
        self._error_rate = math.nan  # the latest
        self._skipped = 0  # steps in a row whose loss was not finite
        self._stop = ""
        self._log: RunLog | None = None
        self._serial: int | None = None  # the checkpoint that the present state goes on from; None before a run
        self._newest = 0
        self._saved_step: int | None = None
        self._save_due = False
        self._broken: str | None = None
        self._compared = identity.describe_experiment(
            model, problem, self.optimizer, self.roles, average, self.metrics[0], self.callbacks.named
        )
        self._configuration = {
            **self._compared,
            "driver": identity.describe(
                {"threshold": threshold, "max_steps": max_steps, "test_freq": test_freq, "save_freq": save_freq}
            ),
            "settings": identity.describe(settings),
            "metrics": [metric.describe() for metric in self.metrics],
        }
        for callback in self.callbacks:
            callback.attach(self)
        self.recorders.attach(self)

    @property
    def tested(self) -> nn.Module:
        """The model whose errors are tested, with the averaged parameters where an average is kept."""
        return self.model if self._averaged is None else self._averaged.module

    @property
    def second_order(self) -> bool:
        """Whether the optimizer's steps are more than gradients, as `curvature=` or `evaluation=` of its step tell."""
        return bool(self.roles.names)

    # -- what a user calls ------------------------------------------------------------------------------

    def optimize(self, max_steps: int | None = None) -> str:
        """Go on until success or until `max_steps` updates have been made in all, and say which it was.

        Returns `"success"`, `"max_steps"`, `"stopped"` (by a callback), `"interrupted"` (Ctrl-C: the step in progress
        was finished and everything saved) or `"diverged"` (the training loss is nan; nothing can come of it).

        Raises RunError if another process writes to the same run, or if the last call ended in the middle of
        a step; and WriteError if a file cannot be written: nothing is lost, and the next call goes on.
        """
        self._check_state()
        self._begin()
        assert self._log is not None
        closing = True
        try:
            with Interrupt("step") as interrupt:
                self._log.retry()
                with shown(Bar(limited=bool(self.threshold)), quiet=self.quiet) as bar:
                    outcome = self._loop(self.max_steps if max_steps is None else max_steps, interrupt, bar)
                self._finish(outcome)
                interrupt.pass_on()
            return outcome
        except WriteError:
            closing = False  # the log has what could not be written
            raise
        except BaseException as error:
            self._broken = f"step {self.step} ended in the middle ({type(error).__name__})"
            with suppress(Exception):  # the journal has the rows anyway; the error that counts is the first
                self._log.note(f"{self._broken}; the last checkpoint is that of step {self._saved_step}")
                if not isinstance(error, KeyboardInterrupt):
                    self._log.note(traceback.format_exc())
                self._log.finish("broken off")
            raise
        finally:
            if closing:
                self._close()

    def stop(self, why: str) -> None:
        """End the run before its next update; for callbacks."""
        self._stop = why

    def save(self, name: str | None = None) -> None:
        """Save the present state; with a `name` it stays, while numbered ones make room for newer."""
        self._check_state()
        opened = self._log is None
        self._begin()
        try:
            self._save(name)
        finally:
            if opened:
                self._close()

    def load(self, checkpoint: int | str = "last") -> None:
        """Restore a checkpoint of this run: `"last"`, `"best"`, the number of a step, or a name.

        `optimize()` then continues to the bits that an uninterrupted run would have had.

        Raises:
            FileNotFoundError: there is no run in the folder.
            RunError: a file is damaged or foreign, or model, problem, optimizer, batches or seed are not
                those of the run; the message lists what differs.
            KeyError: there is no such checkpoint.
        """
        run = read_run(self.path)
        identity.refuse_another(run, {**self._compared, "seed": self.seed})
        found = run.find(checkpoint)
        state = run.checkpoint(found.key)
        self._close()
        parts: dict[str, Any] = {"problem": self.problem, "parameters": self.model, "optimizer": self.optimizer}
        if self._averaged is not None:
            parts["average"] = self._averaged
        name = ""
        try:
            for name, part in parts.items():
                part.load_state_dict(state[name])
        except (KeyError, ValueError, RuntimeError, TypeError) as error:
            raise RunError(f"checkpoint {found.key} of {self.path}: its {name} cannot be loaded: {error}") from error
        notes = self.callbacks.load_state_dict(state.get("callbacks", {}))
        set_generators(state["generators"])
        self.step, self.totals = state["step"], dict(state["totals"])
        self._skipped = int(self.totals.pop("skipped", 0))
        self._serial, self._newest, self._saved_step = found.serial, run.serial, self.step
        self._broken, self._stop, self._save_due = None, "", False
        self._say("; ".join([f"loaded step {self.step} of {report.short(self.path)}", *notes]))

    # -- steps ------------------------------------------------------------------------------------------

    def _loop(self, limit: int, interrupt: Interrupt, bar: Bar) -> str:
        """Steps until something ends them."""
        progress = report.Progress(self.metrics[0], second_order=self.second_order)
        if self._save_due:
            self._save()
        while True:
            assert self._log is not None
            bar.at(self.step, limit)
            self.recorders.keep(self, self._log.frames)
            started = (time.perf_counter(), time.process_time())
            last = self.step >= limit
            tested = last or self.step % self.test_freq == 0
            row: Row = {"step": self.step, "test_loss": math.nan, "error_rate": math.nan}
            success = False
            if tested:
                found = evaluate(self.tested, self.problem, self.problem.test_batches, self.forward, self.metrics)
                row |= {"test_loss": found.loss, **found.values}
                self._error_rate = found.error
                success = self._succeeded(found.loss, found.error)
                for callback in self.callbacks:
                    callback.after_test(self, row)
            if last or success or self._stop:
                row["updated"] = False
                row["train_loss"] = loss_of_next(self.model, self.problem, self.roles, self.step, self.forward)
                self._record(row, [], started, progress)
                self.recorders.keep(self, self._log.frames, closing=True)
                self._save_rest()
                return "success" if success else "stopped" if self._stop else "max_steps"
            for callback in self.callbacks:
                callback.before_update(self)
            update, checks = self._update()
            for callback in self.callbacks:
                callback.after_update(self, update)
            try:
                self._record(row | update, checks, started, progress)
            finally:  # where a full disk does not take the row, the update has been made all the same
                self.step += 1
            if self._is_lost(update):
                return "diverged"
            if self.step % self.save_freq == 0:
                self._save()
            if interrupt.requested is not None:
                self._save_rest()
                return "interrupted"

    def _update(self) -> tuple[Row, list[Row]]:
        """One step of the optimizer on new training draws: its row and the rows of its CG checks."""
        self.problem.forget()
        drawn = Drawn(self.problem)
        chosen, others = self.roles.of(self.step)
        gradient = closure(self.model, self.problem, chosen, self.forward, self.optimizer, drawn)
        roles = {
            role: None if batches is None else closure(self.model, self.problem, batches, self.forward, drawn=drawn)
            for role, batches in others.items()
        }
        norms: list[float] = []

        def noting_the_norm() -> Tensor:
            loss = gradient()
            if not norms:  # of the first evaluation: optimizers may make several
                norms.append(norm(p.grad for p in self.model.parameters() if p.grad is not None))
            for callback in self.callbacks:
                callback.after_gradient(self)
            return loss

        stats = getattr(self.optimizer, "stats", None)
        before = stats[-1] if stats else None
        started = time.perf_counter()
        loss: Any = self.optimizer.step(gradient if roles else noting_the_norm, **roles)  # type: ignore[arg-type]
        loss = float(loss.detach() if isinstance(loss, Tensor) else loss)
        row: Row = {"train_loss": loss, "updated": True, "accepted": True}
        row["optimizer_seconds"] = time.perf_counter() - started
        if self._averaged is not None:
            self._averaged.update_parameters(self.model)
        row["parameter_norm"] = norm(self.model.parameters())
        checks: list[Row] = []
        if norms:
            row["gradient_norm"] = norms[0]
        if stats and stats[-1] is not before:
            row |= runfile.row_of(stats[-1], runfile.STEP_TYPE, without=("step", "seconds", *row.keys() - {"accepted"}))
            checks = [runfile.row_of(check, runfile.CHECK_TYPE, without=("step",)) for check in stats[-1].checks]
            checks = [{"step": self.step, **check} for check in checks]
        return row, checks

    def _is_lost(self, update: Row) -> bool:
        """Whether nothing can come of the run any more: the parameters are gone, or no batch has a finite loss."""
        if math.isfinite(update["train_loss"]):
            self._skipped = 0
            return False
        self._skipped += 1
        if not math.isfinite(update["parameter_norm"]):
            self._broken = f"the training loss is {update['train_loss']}, and so are parameters"
            return True
        if self._skipped >= self.max_skipped:
            self._broken = f"the training loss was not finite in {self._skipped} steps in a row (max_skipped)"
            return True
        self._note_and_say(
            f"step {self.step - 1} was skipped: its training loss is {update['train_loss']}; the run goes on, and is "
            f"given up after {self.max_skipped} such steps in a row ({self._skipped} so far)"
        )
        return False

    def _succeeded(self, test_loss: float, value: float) -> bool:
        if callable(self.threshold):
            return bool(self.threshold(test_loss, value))
        return self.threshold != 0 and self.metrics[0].reaches(value, self.threshold)

    # -- recording --------------------------------------------------------------------------------------

    def _record(self, row: Row, checks: list[Row], started: tuple[float, float], progress: report.Progress) -> None:
        """Complete a row, log it, and only then show it."""
        assert self._log is not None
        row["seconds"], row["cpu_seconds"] = time.perf_counter() - started[0], time.process_time() - started[1]
        self.totals["seconds"] += row["seconds"]
        for name in ("cg_iterations", "products", "evaluations"):
            self.totals[name] += max(0, row.get(name, 0))
        row |= {"total_seconds": self.totals["seconds"], "finished": time.time()}
        shown = self.step % self.test_freq == 0 or not row["updated"]
        block = report.block(row, self.totals, metrics=self.metrics) if shown else ""
        detailed = report.block(row, self.totals, checks, self.metrics) if shown else ""
        self._log.append(row, checks, block, detailed)
        if shown:
            self._say(progress.line(row))

    def _save(self, name: str | None = None) -> None:
        assert self._log is not None
        self._save_due = name is None  # until it is done: a full disk may have room again later
        self._log.save(self._state(), name)
        self._save_due = False
        self._serial = self._newest = self._log.serial
        self._saved_step = self.step
        for callback in self.callbacks:
            callback.after_save(self, name or f"{self.step:08d}")

    def _save_rest(self) -> None:
        """Save the state if it is newer than the last save's."""
        if self._saved_step != self.step:
            self._save()

    def _state(self) -> dict[str, Any]:
        """All that the next step depends on."""
        states = self.callbacks.state_dict()
        return {
            "step": self.step,
            "totals": {**self.totals, "skipped": self._skipped},
            "parameters": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "problem": self.problem.state_dict(),
            "generators": generators(),
            **({} if self._averaged is None else {"average": self._averaged.state_dict()}),
            **({"callbacks": states} if states else {}),
        }

    def _begin(self) -> None:
        """Open the run's log, new or continued."""
        if self._log is not None:
            return
        versions = identity.versions(next(self.model.parameters()).device)
        session = identity.session(self.step, versions)
        metrics = self._configuration["metrics"]
        if self._serial is not None:
            self._log = RunLog.resume(
                self.path, self._serial, self._newest, keep=self.keep_checkpoints, metrics=metrics, session=session
            )
            self._log.note(f"resumed at step {self.step}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
            for change in identity.version_changes(self._log.earlier_versions, versions):
                self._note_and_say(f"since the run was last continued, {change}; the bits may differ")
            return
        header = {
            "name": self.path.name,
            "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "seed": self.seed,
            "configuration": self._configuration,
            "versions": versions,
            "metrics": metrics,
            "session": session,
        }
        self._log, moved = RunLog.start(
            self.path, header, self._state(), keep=self.keep_checkpoints, overwrite=self.overwrite
        )
        self._serial = self._newest = self._log.serial
        self._saved_step = self.step
        if moved is not None:
            earlier, now = report.short(self.path), report.short(moved)
            self._say(f"the earlier run in {earlier} is now {now} (to continue a run, load() first)")
        introduction = report.introduction(
            self.model, self.problem, self.optimizer, self._configuration, report.short(self.path)
        )
        self._log.note(f"{self.path.name}, {header['created']}\n{introduction}\n")
        self._say(introduction)

    def _finish(self, outcome: str) -> None:
        """Say how the run ended, where it is, and what to type next."""
        assert self._log is not None
        last = "" if math.isnan(self._error_rate) else f": {self.metrics[0].sentence(self._error_rate)}"
        said = "no threshold" if outcome == "max_steps" and self.threshold == 0 else outcome
        why = self._broken if outcome == "diverged" else self._stop
        sentence = report.ending(said, self.step, self.totals["seconds"], last, self._saved_step, why or "")
        self._stop = ""
        self._log.note(sentence + "\n")
        self._log.finish(outcome)
        self._say("\n".join([sentence, *report.hints(self.path, self.hints)]))

    def _check_state(self) -> None:
        if self._broken is not None:
            raise RunError(f"{self._broken}; call load() to go back to the last checkpoint")

    def _close(self) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None

    def _note_and_say(self, sentence: str) -> None:
        assert self._log is not None
        self._log.note(sentence + "\n")
        self._say(sentence)

    def _say(self, text: str) -> None:
        if not self.quiet and not report.say(text):  # python -m runs.demo | head
            self.quiet = True
            self.stop("nobody reads its output any more")
