"""The driver of an experiment: draws batches by role, logs, saves, stops, and resumes to the same bits."""

from __future__ import annotations

import inspect
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hfopt.experiment import identity, report
from hfopt.experiment.data import (
    Forward,
    Growth,
    Problem,
    averaged,
    chosen_batches,
    closure,
    evaluate,
    in_turn,
    norm,
    on_inputs,
)
from hfopt.experiment.interrupt import Interrupt
from hfopt.experiment.metrics import Measure
from hfopt.experiment.store import format as runfile
from hfopt.experiment.store.format import Row, RunError
from hfopt.experiment.store.reader import read_run
from hfopt.experiment.store.writer import RunLog


class HF:
    """An experiment: a model trained on a problem, by `hfopt.HessianFree` or any torch optimizer.

    Each step drops the training draws, evaluates the test batches, stops with success if their error rate is
    below the threshold, and otherwise updates the parameters once. The loss is the mean over scored outputs
    of all batches of a role: batch i weighs `size(i) / sum of sizes`.

    Args:
        path: name of the run, then its folder is `runs/logs/<name>`; or the folder, as a Path or with a
            separator.
        model: returns what the problem's losses take.
        problem: the data object. Its errors are counted (`zero_one_loss`), or measured (`errors`, `error_name`): then
            "error rate" is the mean error of the test cases here.
        forward: outputs of (model, batch); default `model(batch.inputs)`.
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
        threshold: success is an error rate below it, 0 for none; or a function of (test loss, error rate) that says.
        max_steps: updates in all, those before `load()` included.
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
        ValueError: for batches that the problem does not have, a role that the optimizer does not have, and frequencies
            below 1.
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
        threshold: float | Callable[[float, float], bool] = 0.01,
        max_steps: int = 500,
        test_freq: int = 1,
        save_freq: int = 5,
        keep_checkpoints: int | None = 3,
        seed: int | None = None,
        settings: Any = None,
        overwrite: bool = False,
        hints: Mapping[str, str] | None = None,
        quiet: bool = False,
    ) -> None:
        name_only = isinstance(path, str) and Path(path).name == path
        self.path = Path("runs", "logs", path) if name_only else Path(path)
        self.model, self.problem, self.forward = model, problem, forward
        if optimizer is None:
            from hfopt.optimizer import HessianFree

            optimizer = HessianFree
        self.optimizer = optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer(model.parameters())
        taken = set(inspect.signature(self.optimizer.step).parameters)
        if debias_batches is not None and "debias" not in taken:
            raise ValueError(f"debias_batches: the step of {type(self.optimizer).__name__} takes no debias=")
        self._roles = taken & {"curvature", "evaluation", *(["debias"] if debias_batches is not None else [])}
        train = problem.train_batches
        self.gradient_batches = chosen_batches("gradient_batches", gradient_batches, train, list(train))
        self.curvature_batches = chosen_batches(
            "curvature_batches", curvature_batches, train, self.gradient_batches[:1]
        )
        self.debias_batches = chosen_batches("debias_batches", debias_batches, train, self.gradient_batches)
        judges = self.gradient_batches if debias_batches is None else self.debias_batches
        self.evaluation_batches = chosen_batches("evaluation_batches", evaluation_batches, train, judges)
        roles = {"curvature": curvature_batches, "evaluation": evaluation_batches}
        self._given = {role for role, batches in roles.items() if batches is not None}
        most = len(self.gradient_batches)
        self.batches_per_step: int | Growth = most if batches_per_step is None else batches_per_step
        n = self.batches_per_step
        if not all(1 <= count <= most for count in ((n.first, n.last) if isinstance(n, Growth) else (n,))):
            raise ValueError(f"batches_per_step={n}: choose from 1 to {most}")
        self._averaged = None if average is None else averaged(model, average)
        for name, value in (("test_freq", test_freq), ("save_freq", save_freq), ("keep_checkpoints", keep_checkpoints)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        self.threshold: float | Callable[[float, float], bool] = threshold
        self.max_steps, self.test_freq, self.save_freq = max_steps, test_freq, save_freq
        self.keep_checkpoints, self.seed, self.overwrite, self.quiet = keep_checkpoints, seed, overwrite, quiet
        self.hints = hints or {}
        self.step = 0
        self.totals: dict[str, float] = {"seconds": 0.0, "cg_iterations": 0, "products": 0, "evaluations": 0}
        self._error_rate = math.nan  # the latest
        self._log: RunLog | None = None
        self._serial: int | None = None  # the checkpoint that the present state goes on from; None before a run
        self._newest = 0
        self._saved_step: int | None = None
        self._broken: str | None = None
        self._compared = {
            "model": identity.describe_model(model),
            "problem": identity.describe_problem(problem),
            "optimizer": identity.describe_optimizer(self.optimizer),
            "batches": {
                "gradient": self.gradient_batches,
                "curvature": self.curvature_batches,
                "evaluation": self.evaluation_batches,
                **({"debias": self.debias_batches} if "debias" in self._roles else {}),
                "per_step": identity.describe(self.batches_per_step),
                "roles": ["gradient", *sorted(self._roles)],
            },
            "average": average,
        }
        self._measure = Measure.of(self._compared)
        self._configuration = {
            **self._compared,
            "driver": identity.describe(
                {
                    "threshold": threshold,
                    "max_steps": max_steps,
                    "test_freq": test_freq,
                    "save_freq": save_freq,
                }
            ),
            "settings": identity.describe(settings),
        }

    @property
    def tested(self) -> nn.Module:
        """The model whose errors are tested, with the averaged parameters where an average is kept."""
        return self.model if self._averaged is None else self._averaged.module

    def optimize(self, max_steps: int | None = None) -> str:
        """Go on until success or until `max_steps` updates have been made in all, and say which it was.

        Returns `"success"`, `"max_steps"`, `"interrupted"` (Ctrl-C: the step in progress was finished and
        everything saved) or `"diverged"` (the training loss is nan; nothing can come of it).

        Raises RunError if another process writes to the same run, or if the last call ended in the middle of
        a step.
        """
        self._check_state()
        self._begin()
        assert self._log is not None
        try:
            with Interrupt("step") as interrupt:
                outcome = self._loop(self.max_steps if max_steps is None else max_steps, interrupt)
                self._finish(outcome)
                interrupt.pass_on()
            return outcome
        except BaseException as error:
            self._broken = f"step {self.step} ended in the middle ({type(error).__name__})"
            self._log.note(f"{self._broken}; the last checkpoint is that of step {self._saved_step}")
            if not isinstance(error, KeyboardInterrupt):
                self._log.note(traceback.format_exc())
            with suppress(Exception):  # the journal has the rows anyway; the error that counts is the first
                self._log.save(None)
            raise
        finally:
            self._close()

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
            RunError: the file is damaged or foreign, or model, problem, optimizer, batches or seed are not
                those of the run; the message lists what differs.
            KeyError: there is no such checkpoint.
        """
        run = read_run(self.path)
        saved = {**{key: run.configuration.get(key) for key in self._compared}, "seed": run.seed}
        differing = identity.differences(saved, {**self._compared, "seed": self.seed})
        if differing:
            raise RunError(
                f"the run in {self.path} was made with other settings: {'; '.join(differing)}. Use its "
                "settings, or start a run under another name; its parameters alone are "
                "hfopt.read_run(path).parameters()"
            )
        found = run.find(checkpoint)
        state = run.checkpoint(found.key)
        self.problem.load_state_dict(state["problem"])
        self.model.load_state_dict(state["parameters"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self._averaged is not None:
            self._averaged.load_state_dict(state["average"])
        identity.set_generators(state["generators"])
        self.step, self.totals = state["step"], dict(state["totals"])
        self._serial, self._newest, self._saved_step = found.serial, run.checkpoints[-1].serial, self.step
        self._broken = None
        self._say(f"loaded step {self.step} of {report.short(self.path)}")

    def _loop(self, limit: int, interrupt: Interrupt) -> str:
        """Steps until something ends them."""
        progress = report.Progress(self._measure, second_order=bool(self._roles))
        while True:
            started = (time.perf_counter(), time.process_time())
            last = self.step >= limit
            tested = last or self.step % self.test_freq == 0
            test_loss, error_rate = (
                evaluate(self.tested, self.problem, self.problem.test_batches, self.forward)
                if tested
                else (math.nan, math.nan)
            )
            success = tested and self._succeeded(test_loss, error_rate)
            self._error_rate = error_rate if tested else self._error_rate
            row: Row = {"step": self.step, "test_loss": test_loss, "error_rate": error_rate}
            if last or success:
                row |= {"updated": False, "train_loss": self._closing_train_loss()}
                self._record(row, [], started, progress)
                self._save_rest()
                return "success" if success else "max_steps"
            update, checks = self._update()
            self._record(row | update, checks, started, progress)
            self.step += 1
            if math.isnan(update["train_loss"]):
                return "diverged"
            if self.step % self.save_freq == 0:
                self._save()
            if interrupt.requested is not None:
                self._save_rest()
                return "interrupted"

    def _update(self) -> tuple[Row, list[Row]]:
        """One step of the optimizer on new training draws: its row and the rows of its CG checks."""
        self.problem.forget()
        chosen = in_turn(self.gradient_batches, self.batches_per_step, self.step)
        gradient = closure(self.model, self.problem, chosen, self.forward, self.optimizer)
        judges = self.debias_batches if "debias" in self._roles else chosen
        others = {
            "curvature": (self.curvature_batches if "curvature" in self._given else chosen[:1], chosen),
            "evaluation": (self.evaluation_batches if "evaluation" in self._given else judges, judges),
            "debias": (self.debias_batches, None),
        }
        roles = {
            role: None if batches == default else closure(self.model, self.problem, batches, self.forward)
            for role, (batches, default) in others.items()
            if role in self._roles
        }
        norms: list[float] = []

        def noting_the_norm() -> Tensor:
            loss = gradient()
            if not norms:  # of the first evaluation: optimizers may make several
                norms.append(norm(p.grad for p in self.model.parameters() if p.grad is not None))
            return loss

        stats = getattr(self.optimizer, "stats", None)
        before = stats[-1] if stats else None
        started = time.perf_counter()
        loss: Any = self.optimizer.step(gradient if self._roles else noting_the_norm, **roles)  # type: ignore[arg-type]
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

    def _closing_train_loss(self) -> float:
        """The training loss on the draws that the next step would see; the generators stay as they were."""
        problem, generators = self.problem.state_dict(), identity.generators()
        self.problem.forget()
        chosen = in_turn(self.gradient_batches, self.batches_per_step, self.step)
        loss, _ = evaluate(self.model, self.problem, chosen, self.forward)
        self.problem.load_state_dict(problem)
        identity.set_generators(generators)
        return loss

    def _succeeded(self, test_loss: float, error_rate: float) -> bool:
        if callable(self.threshold):
            return bool(self.threshold(test_loss, error_rate))
        return error_rate < self.threshold

    def _record(self, row: Row, checks: list[Row], started: tuple[float, float], progress: report.Progress) -> None:
        """Complete a row, log it, and only then show it."""
        assert self._log is not None
        row["seconds"], row["cpu_seconds"] = time.perf_counter() - started[0], time.process_time() - started[1]
        self.totals["seconds"] += row["seconds"]
        for name in ("cg_iterations", "products", "evaluations"):
            self.totals[name] += max(0, row.get(name, 0))
        row |= {"total_seconds": self.totals["seconds"], "finished": time.time()}
        shown = self.step % self.test_freq == 0 or not row["updated"]
        block = report.block(row, self.totals, measure=self._measure) if shown else ""
        detailed = report.block(row, self.totals, checks, self._measure) if shown else ""
        self._log.append(row, checks, block, detailed)
        if shown:
            self._say(progress.line(row))

    def _save(self, name: str | None = None) -> None:
        assert self._log is not None
        self._log.save(self._state(), name)
        self._serial = self._newest = self._log.serial
        self._saved_step = self.step

    def _save_rest(self) -> None:
        """Save what the last save does not have: the state if it is newer, else the rows alone."""
        assert self._log is not None
        if self._saved_step == self.step:
            self._log.save(None)
        else:
            self._save()

    def _state(self) -> dict[str, Any]:
        """All that the next step depends on."""
        return {
            "step": self.step,
            "totals": self.totals,
            "parameters": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "problem": self.problem.state_dict(),
            "generators": identity.generators(),
            **({} if self._averaged is None else {"average": self._averaged.state_dict()}),
        }

    def _begin(self) -> None:
        """Open the run's log, new or continued."""
        if self._log is not None:
            return
        device = next(self.model.parameters()).device
        versions = identity.versions(device)
        if self._serial is not None:
            self._log = RunLog.resume(self.path, self._serial, self._newest, keep=self.keep_checkpoints)
            self._log.note(f"resumed at step {self.step}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
            for change in identity.differences(read_run(self.path).versions, versions):
                self._log.note(f"since the run began, {change}; the bits may differ\n")
            return
        header = {
            "name": self.path.name,
            "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "seed": self.seed,
            "configuration": self._configuration,
            "versions": versions,
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
        if outcome == "diverged":
            self._log.save(None)
            self._broken = "the training loss is nan"
        wrong = "" if math.isnan(self._error_rate) else f": {self._measure.sentence(self._error_rate)}"
        said = "no threshold" if outcome == "max_steps" and self.threshold == 0 else outcome
        sentence = report.ending(said, self.step, self.totals["seconds"], wrong, self._saved_step)
        self._log.note(sentence + "\n")
        self._say("\n".join([sentence, *report.hints(self.path, self.hints)]))

    def _check_state(self) -> None:
        if self._broken is not None:
            raise RunError(f"{self._broken}; call load() to go back to the last checkpoint")

    def _close(self) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None

    def _say(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stdout, flush=True)
