"""Callbacks: when they are called, what the ready-made ones do, and that they resume with the run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import hfopt
from hfopt.experiment.driver import HF
from hfopt.experiment.hooks import Callback, ClipGradient, KeepBest, LowerOnPlateau, Project, Schedule, StopWithout
from hfopt.experiment.store.format import RunError
from hfopt.experiment.store.reader import read_run
from tests.hfopt.tiny import Running, Sums, bits, experiment


class Told(Callback):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.told_of: list[str] = []

    def attach(self, hf: HF) -> None:
        self.told_of.append("attach")

    def before_update(self, hf: HF) -> None:
        self.told_of.append(f"before {hf.step}")

    def after_gradient(self, hf: HF) -> None:
        self.told_of.append(f"gradient {hf.step}")

    def after_update(self, hf: HF, row: Mapping[str, Any]) -> None:
        self.told_of.append(f"after {hf.step} {row['updated']}")

    def after_test(self, hf: HF, row: Mapping[str, Any]) -> None:
        assert row["step"] == hf.step
        self.told_of.append(f"test {hf.step} {sorted(row)}")

    def after_save(self, hf: HF, key: str) -> None:
        self.told_of.append(f"save {key}")


def test_the_moments(tmp_path: Path) -> None:
    told = Told()
    hf = experiment(tmp_path / "run", callbacks=[told], test_freq=2, save_freq=2, max_steps=3)
    hf.optimize()
    test = "['error_rate', 'step', 'test_loss']"
    assert told.told_of == [
        "attach",
        *(f"test 0 {test}", "before 0", "gradient 0", "after 0 True"),
        *("before 1", "gradient 1", "after 1 True", "save 00000002"),
        *(f"test 2 {test}", "before 2", "gradient 2", "after 2 True"),
        *(f"test 3 {test}", "save 00000003"),
    ]
    told.told_of.clear()
    hf.save("mine")
    assert told.told_of == ["save mine"]


def schedules() -> list[Callback]:
    half = Schedule(lambda o: torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.5))
    return [half, ClipGradient(0.05), Project(lambda m: m.readout.bias.zero_()), KeepBest(), StopWithout(99)]


def test_callbacks_resume_to_the_same_bits(tmp_path: Path) -> None:
    whole = experiment(tmp_path / "whole", optimizer="sgd", callbacks=schedules(), save_freq=2)
    whole.optimize()
    parts = experiment(tmp_path / "parts", optimizer="sgd", callbacks=schedules(), save_freq=2)
    parts.optimize(5)
    parts = experiment(tmp_path / "parts", optimizer="sgd", callbacks=schedules(), save_freq=2)
    parts.load(4)
    parts.optimize()
    assert bits(parts) == bits(whole)
    assert whole.optimizer.param_groups[0]["lr"] == parts.optimizer.param_groups[0]["lr"] == 0.1 * 0.5**6
    assert not whole.model.get_parameter("readout.bias").any()
    runs = [read_run(tmp_path / name) for name in ("whole", "parts")]
    best = [run.find("best-test").step for run in runs]
    steps = runs[0].steps
    assert best == [min(range(13), key=lambda k: (steps["error_rate"][k], steps["test_loss"][k]))] * 2
    assert runs[0].checkpoint()["callbacks"].keys() == {"Schedule", "KeepBest", "StopWithout"}


def test_clipping_limits_the_step(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Running()
    before = [p.detach().clone() for p in model.parameters()]
    hf = HF(
        tmp_path / "run",
        model,
        Sums(),
        optimizer=lambda p: torch.optim.SGD(p, lr=1.0),
        callbacks=[ClipGradient(0.01)],
        threshold=0.0,
        quiet=True,
    )
    hf.optimize(1)
    moved = sum(float((p.detach() - q).square().sum()) for p, q in zip(model.parameters(), before, strict=True)) ** 0.5
    # torch divides by the norm plus 1e-6.
    assert moved == pytest.approx(0.01, rel=1e-3)
    assert read_run(tmp_path / "run").steps["gradient_norm"][0] > 0.01
    with pytest.raises(ValueError, match="HessianFree is no gradient"):
        HF(tmp_path / "hf", Running(), Sums(), callbacks=[ClipGradient(1.0)])


def test_stopping(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Pruned(Callback):
        def after_test(self, hf: HF, row: Mapping[str, Any]) -> None:
            if hf.step == 3:
                hf.stop("others are better")

    hf = experiment(tmp_path / "run", callbacks=[Pruned()], quiet=False)
    assert hf.optimize() == "stopped"
    assert "stopped after 3 steps" in (out := capsys.readouterr().out)
    assert "others are better" in out
    run = read_run(tmp_path / "run")
    assert (run.outcome, run.find().step, len(run.steps)) == ("stopped", 3, 4)
    still = experiment(tmp_path / "still", callbacks=[StopWithout(2, "error rate")], optimizer="sgd")
    for group in still.optimizer.param_groups:
        group["lr"] = 0.0
    assert still.optimize() == "stopped"
    assert still.step == 2


def test_settings_of_callbacks_are_compared_and_others_may_come(tmp_path: Path) -> None:
    experiment(tmp_path / "run", optimizer="sgd", callbacks=[ClipGradient(0.5)]).optimize(5)
    with pytest.raises(RunError, match=r"callbacks\.ClipGradient\.norm was 0\.5 and is 1\.0"):
        experiment(tmp_path / "run", optimizer="sgd", callbacks=[ClipGradient(1.0)]).load()
    hf = experiment(tmp_path / "run", optimizer="sgd", callbacks=[ClipGradient(0.5), KeepBest()])
    hf.load()
    hf.optimize(6)
    assert read_run(tmp_path / "run").find("best-test").step >= 5


def test_what_is_no_callback_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="a function is no"):
        experiment(tmp_path / "run", callbacks=[lambda hf: None])
    with pytest.raises(ValueError, match="no metric 'nothing'"):
        experiment(tmp_path / "run", callbacks=[KeepBest("nothing")])
    assert hfopt.HF is HF


def test_the_learning_rate_is_lowered_on_a_plateau_and_that_is_resumed(tmp_path: Path) -> None:
    def run(path: Path, steps: int) -> HF:
        torch.manual_seed(0)
        return HF(
            path,
            Running(),
            Sums(),
            optimizer=lambda p: torch.optim.SGD(p, lr=1e-9),  # too small for progress
            callbacks=[LowerOnPlateau(2, factor=0.1)],
            threshold=0.0,
            max_steps=steps,
            quiet=True,
        )

    whole = run(tmp_path / "whole", 9)
    whole.optimize()
    metric = read_run(tmp_path / "whole").steps["error_rate"]
    best, worse, expected = math.inf, 0, 1e-9
    for value in metric:
        best, worse = (value, 0) if value < best else (best, worse + 1)
        if worse == 2:
            worse, expected = 0, expected * 0.1
    assert expected < 1e-9
    assert whole.optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-12, abs=0)
    run(tmp_path / "parts", 4).optimize()
    again = run(tmp_path / "parts", 9)
    again.load()
    again.optimize()
    assert again.optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-12, abs=0)
    with pytest.raises(ValueError, match="patience=0"):
        LowerOnPlateau(0)
