"""Runs that a loop of one's own writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hfopt
from hfopt.cli import main
from hfopt.experiment.metrics import Metric
from hfopt.experiment.store.format import WriteError
from hfopt.experiment.store.lock import is_held

CONFIG = {"model": "Linear", "problem": "noise", "optimizer": "SGD", "lr": 0.1}


def train(folder: Path, steps: int, *, fail_at: int | None = None, **options: Any) -> nn.Linear:
    torch.manual_seed(3)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with hfopt.Run(folder, CONFIG, seed=3, resume=True, **options) as run:
        if run.state is not None:
            model.load_state_dict(run.state["parameters"])
            optimizer.load_state_dict(run.state["optimizer"])
        for step in range(run.step, steps):
            loss = model(torch.randn(8, 3)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(step, loss=loss, accuracy=1 - float(loss.detach()))
            if step == fail_at:
                raise RuntimeError("the power went")
            if step % 4 == 3:
                run.save(model.state_dict(), optimizer=optimizer.state_dict())
    return model


def test_a_resumed_loop_has_the_bits_of_an_uninterrupted_one(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the power went"):
        train(tmp_path / "broken", 20, fail_at=10)
    broken = hfopt.read_run(tmp_path / "broken")
    assert broken.outcome == "broken off"
    assert len(broken.steps) == 11
    assert not is_held(broken.path)
    one, other = train(tmp_path / "broken", 20), train(tmp_path / "whole", 20)
    assert torch.equal(one.weight, other.weight)
    runs = [hfopt.read_run(tmp_path / name) for name in ("broken", "whole")]
    for run in runs:
        assert run.steps["step"].tolist() == list(range(20))
        assert run.outcome == "finished"
        assert [c.step for c in run.checkpoints][-3:] == [12, 16, 20]
        assert torch.equal(run.parameters()["weight"], one.weight)
    for column in ("train_loss", "accuracy"):
        assert runs[0].steps[column].tobytes() == runs[1].steps[column].tobytes()
    assert (runs[0].steps["accuracy"] == 1 - runs[0].steps["train_loss"]).all()


def test_columns_units_and_the_best_checkpoint(tmp_path: Path) -> None:
    metrics = [Metric("accuracy", unit="%", better="higher")]
    with hfopt.Run(tmp_path / "run", {"lr": 1}, metrics=metrics) as run:
        for step, accuracy in enumerate((0.1, 0.9, 0.4, 0.3, 0.2, 0.1)):
            run.save({"at": torch.tensor(step)})
            run.log(step, loss=1.0, test_loss=2.0, accuracy=accuracy, rho=0.25, products=7)
            run.log(step, later=step + 0.5)
            assert run.step == step + 1
            assert len(hfopt.read_run(tmp_path / "run").steps) == step + 1  # at once
    found = hfopt.read_run(tmp_path / "run")
    assert found.steps["later"].tolist() == [0.5, 1.5, 2.5, 3.5, 4.5, 5.5]
    assert found.steps["accuracy"][1] == 0.9
    assert found.steps["products"].tolist() == [7] * 6
    assert [m.name for m in found.metrics] == ["accuracy", "later"]
    assert found.metrics[0].better == "higher"
    assert found.parameters("best")["at"] == 1
    assert (found.steps["total_seconds"] >= found.steps["seconds"].cumsum() - 1e-9).all()


def test_the_command_takes_it_like_any_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "one", 5)
    with hfopt.Run(tmp_path / "two", {**CONFIG, "lr": 0.2}) as run:
        run.log(0, loss=0.5)
    assert main(["list", str(tmp_path), "-w", "model=Linear"]) == 0
    printed = capsys.readouterr().out
    assert [line.split()[:5] for line in printed.splitlines()[1:]] == [
        [name, "Linear", "noise", "SGD", steps] for name, steps in (("one", "5"), ("two", "1"))
    ]
    assert main(["compare", str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    assert "settings.lr" in capsys.readouterr().out
    assert main(["show", str(tmp_path / "one")]) == 0
    printed = capsys.readouterr().out
    assert "lr=0.1" in printed
    assert "finished" in printed
    assert "accuracy" in printed


def test_what_is_refused(tmp_path: Path) -> None:
    run = hfopt.Run(tmp_path / "run", CONFIG)
    with pytest.raises(hfopt.RunError, match="is not open"):
        run.log(0, loss=1.0)
    with run:
        run.log(3, loss=1.0)
        with pytest.raises(ValueError, match="step 2 is logged after step 3"):
            run.log(2, loss=1.0)
        with pytest.raises(ValueError, match="seconds= is a column that the run fills in"):
            run.log(4, seconds=1.0)
        with pytest.raises(TypeError, match="loss=Tensor is not a number"):
            run.log(4, loss=torch.ones(2))
        with pytest.raises(TypeError, match=r"products=0.5: .* whole numbers"):
            run.log(4, products=0.5)
        with pytest.raises(ValueError, match="its name begins with a letter"):
            run.log(4, **{"1st": 1.0})
        with pytest.raises(ValueError, match="generators= is saved by the run itself"):
            run.save({}, generators=1)
        with pytest.raises(hfopt.RunError, match="is writing the run in"), hfopt.Run(tmp_path / "run", CONFIG):
            pass
    with (
        pytest.raises(hfopt.RunError, match=r"settings.lr was 0.1 and is 0.3"),
        hfopt.Run(tmp_path / "run", {**CONFIG, "lr": 0.3}, resume=True),
    ):
        pass
    with pytest.raises(TypeError, match="must be a mapping"):
        hfopt.Run("x", 3)
    with pytest.raises(ValueError, match="as a column of every run is"):
        hfopt.Run("x", metrics=[Metric("rho")])
    assert len(hfopt.read_run(tmp_path / "run").steps) == 1


def test_an_earlier_run_is_moved_aside(tmp_path: Path) -> None:
    for loss in (1.0, 2.0):
        with hfopt.Run(tmp_path / "run") as run:
            run.log(0, loss=loss)
    assert hfopt.read_run(tmp_path / "run").steps["train_loss"][0] == 2.0
    assert hfopt.read_run(tmp_path / "run.1").steps["train_loss"][0] == 1.0


def test_a_full_disk_keeps_the_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hfopt.Run(tmp_path / "run") as run:
        run.log(0, loss=1.0)
        with monkeypatch.context() as full:

            def refuse(*_: Any) -> None:
                raise OSError(28, "No space left on device")

            full.setattr("hfopt.experiment.store.appender.write_all", refuse)
            with pytest.raises(WriteError, match="No space left"):
                run.log(1, loss=2.0)
        run.log(2, loss=3.0)
    assert hfopt.read_run(tmp_path / "run").steps["train_loss"].tolist() == [1.0, 2.0, 3.0]
