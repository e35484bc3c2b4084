"""Experiments that are rebuilt from what a run recorded."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hfopt
from hfopt.experiment import loading
from hfopt.experiment.store.reader import read_run
from tests.hfopt.tiny import experiment
from tests.runs.conftest import Typed

RUN = "demo"
SMALL = ["--T", "12", "--hidden", "7", "--batch-size", "20", "--test-batches", "2", "--max-steps", "6", "--seed", "5"]


@pytest.fixture
def made(typed: Typed, tmp_path: Path) -> Path:
    assert typed(*SMALL, "--name", str(tmp_path / "run"), "--cg-iterations", "9", "--problem", "addition") == 1
    return tmp_path / "run"


def test_model_problem_and_optimizer(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["something", "--else"])
    before = sys.modules.get("runs.demo")
    hf = hfopt.load_run(made)
    assert sys.modules.get("runs.demo") is before
    assert hf.step == 6
    assert hf.path == made
    assert (hf.problem.name, hf.problem.T, hf.problem.seed) == ("addition", 12, 5)
    assert isinstance(hf.optimizer, hfopt.HessianFree)
    assert hf.optimizer.cg.max_iterations == 9
    for name, value in read_run(made).parameters("last").items():
        assert torch.equal(hf.model.state_dict()[name], value), name
    assert hfopt.load_run(made, 5).step == 5
    with pytest.raises(KeyError, match="no checkpoint 4"):
        hfopt.load_run(made, 4)


def test_it_goes_on_with_the_bits_of_an_uninterrupted_run(made: Path, tmp_path: Path, typed: Typed) -> None:
    hf = hfopt.load_run(made, 5)
    hf.optimize(max_steps=8)
    words = [*SMALL, "--cg-iterations", "9", "--problem", "addition", "--name", str(tmp_path / "whole")]
    words[words.index("--max-steps") + 1] = "8"
    assert typed(*words) == 1
    one, other = read_run(made), read_run(tmp_path / "whole")
    assert one.steps["train_loss"].tobytes() == other.steps["train_loss"].tobytes()
    frames = [
        {step: frame["hidden"].tobytes() for step, frame in run.recorded["hidden_states"].frames()}
        for run in (one, other)
    ]
    assert frames[0] == frames[1]
    assert len(frames[0]) == 9


def test_a_run_that_moved(made: Path, tmp_path: Path) -> None:
    moved = made.rename(tmp_path / "elsewhere")
    hf = hfopt.load_run(moved)
    assert hf.path == moved


def test_sequences_and_images(typed: Typed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import runpy

    folder = tmp_path / "images"
    words = ["digits", "--sizes", "64", "9", "3", "--max-steps", "1", "--name", str(folder), "--cg-iterations", "3"]
    monkeypatch.setattr(sys, "argv", ["autoencoder", *words])
    with pytest.raises(SystemExit):
        runpy.run_path(str(Path(__file__).parents[2] / "runs" / "autoencoder.py"), run_name="__main__")
    hf = hfopt.load_run(folder)
    assert tuple(next(iter(hf.model.parameters())).shape) == (9, 64)
    assert hf.step == 1


def test_a_run_of_an_earlier_version_tells_by_its_command_line(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = read_run(made)
    run.configuration["settings"].pop("run_file")
    run.sessions[0]["command"] = "python -m runs.demo --T 12"
    monkeypatch.setattr(loading, "read_run", lambda path: run)
    assert hfopt.load_run(made).problem.T == 12


@pytest.mark.parametrize("named", ["os", "runs.demo; import os", "runs.nonsense", "runs", "../runs.demo", 3, None])
def test_files_name_nothing_but_files_of_runs(made: Path, monkeypatch: pytest.MonkeyPatch, named: Any) -> None:
    run = read_run(made)
    run.configuration["settings"]["run_file"] = named
    run.sessions[0]["command"] = "python train.py"
    monkeypatch.setattr(loading, "read_run", lambda path: run)
    with pytest.raises(hfopt.RunError, match=r"does not say which file of runs/ made it|is not here; call this in the"):
        hfopt.load_run(made)


def test_runs_of_other_programs(tmp_path: Path) -> None:
    experiment(tmp_path / "run", max_steps=1).optimize()
    with pytest.raises(hfopt.RunError, match=r"does not say which file of runs/ made it.*parameters\(\)"):
        hfopt.load_run(tmp_path / "run")
    with pytest.raises(FileNotFoundError):
        hfopt.load_run(tmp_path / "nonsense")


def test_settings_that_have_become_impossible(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = read_run(made)
    run.configuration["settings"]["problem"] = "nonsense"
    monkeypatch.setattr(loading, "read_run", lambda path: run)
    with pytest.raises(hfopt.RunError, match=r"runs\.demo cannot make the run in .* any more: .*no problem 'nonsense'"):
        hfopt.load_run(made)


def test_what_is_recorded_of_the_settings(made: Path) -> None:
    settings = read_run(made).configuration["settings"]
    assert settings["run_file"] == "runs.demo"
    assert settings["T"] == 12
    assert json.loads(json.dumps(settings)) == settings
    assert np.array_equal(read_run(made).recorded["spectrum"].steps, [0, 5, 6])
