"""TensorBoard's events have the numbers of the run."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from hfopt.cli import main
from hfopt.experiment.store.reader import read_run
from hfopt.experiment.tensorboard import TensorBoard
from tests.hfopt.tiny import experiment

pytest.importorskip("tensorboard")


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages that tensorboard uses
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    found = EventAccumulator(str(folder))
    found.Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def expected(run: Any, column: str) -> list[tuple[int, Any]]:
    rows = run.steps[run.steps[column] == run.steps[column]]
    return [(int(row["step"]), pytest.approx(row[column], rel=1e-6)) for row in rows]


def test_while_it_runs_and_after_a_resumption(tmp_path: Path) -> None:
    def built() -> Any:
        return experiment(tmp_path / "run", callbacks=[TensorBoard()], save_freq=4, max_steps=8)

    hf = built()
    hf.optimize(6)
    hf = built()
    hf.load(4)
    hf.optimize(8)
    run, found = read_run(tmp_path / "run"), events(tmp_path / "run" / "tensorboard")
    assert found["loss/test"] == expected(run, "test_loss")
    assert found["test/error_rate"] == expected(run, "error_rate")
    assert found["loss/train"] == expected(run, "train_loss")[:-1]  # of the closing row nothing was updated
    assert "step/cg_iterations" not in found


def test_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiment(tmp_path / "run", max_steps=3).optimize()
    for status in (0, 1):  # events that are there are not mixed with others
        assert main(["export", str(tmp_path / "run"), "--tensorboard"]) == status
    assert "has events already; choose another folder" in capsys.readouterr().err
    run, found = read_run(tmp_path / "run"), events(tmp_path / "run" / "tensorboard")
    for tag, column in (("loss/train", "train_loss"), ("test/error_rate", "error_rate"), ("step/seconds", "seconds")):
        assert found[tag] == expected(run, column)
    assert not any("rho" in tag for tag in found)
