"""The demo, typed and imported: it learns, resumes, and shows what the net does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import runs.demo as d
from hfopt.experiment.store.reader import read_run
from pathological import PROBLEMS

ROOT = Path(__file__).resolve().parents[2]
RUN = "demo"
SMALL = [
    "--T",
    "10",
    "--hidden",
    "20",
    "--batch-size",
    "200",
    "--gradient-batches",
    "5",
    "--curvature-batches",
    "2",
    "--evaluation-batches",
    "5",
    "--test-batches",
    "2",
    "--threshold",
    "0.1",
]


@pytest.mark.slow
@pytest.mark.parametrize("problem", ["addition", "multiplication"])
def test_it_learns(tmp_path: Path, typed: Any, capsys: pytest.CaptureFixture[str], problem: str) -> None:
    folder = tmp_path / "run"
    arguments = ("--problem", problem, "--name", str(folder), *SMALL)
    assert typed(*arguments, "--max-steps", "4") == 1  # not yet
    assert "--resume" in capsys.readouterr().out
    assert typed(*arguments, "--max-steps", "60", "--resume") == 0
    printed = capsys.readouterr().out
    assert "success after" in printed
    run = read_run(folder)
    assert run.steps["step"].tolist() == list(range(run.find().step + 1))
    assert run.steps["error_rate"][-1] < 0.1 <= run.steps["error_rate"][-2]
    assert run.configuration["settings"]["problem"] == problem
    assert typed(*arguments, "--picture", str(tmp_path / "hidden.png")) == 0
    assert (tmp_path / "hidden.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop", "sgd", "nag", "lbfgs"])
def test_other_optimizers(tmp_path: Path, typed: Any, optimizer: str) -> None:
    assert typed("--name", str(tmp_path / "run"), "--optimizer", optimizer, "--max-steps", "2", *SMALL) == 1
    run = read_run(tmp_path / "run")
    assert run.steps["updated"].tolist() == [True, True, False]
    assert run.configuration["optimizer"]["class"].lower() == {"nag": "nesterov"}.get(optimizer, optimizer)


def test_errors_are_sentences(tmp_path: Path, typed: Any) -> None:
    assert "no problem 'nothing'; choose from addition" in typed("--problem", "nothing")
    assert "there is no run at" in typed("--name", str(tmp_path / "run"), "--resume")
    name = ("--name", str(tmp_path / "run"), "--max-steps", "0", *SMALL)
    assert typed(*name) == 1
    assert "problem.T was 10 and is 11" in typed(*name, "--resume", "--T", "11")


@pytest.mark.slow
def test_as_one_types_it(tmp_path: Path) -> None:
    program = (
        "import runs.demo as d, pathlib; "
        f"d.hf.path = pathlib.Path({str(tmp_path / 'run')!r}); "
        "print(d.hf.optimize(max_steps=0))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] == "max_steps"
    assert "no success within 0 steps" in done.stdout


def test_the_default_is_the_multiplication_problem() -> None:
    assert isinstance(d.problem, PROBLEMS["multiplication"])
    assert d.problem.T == 30
    assert d.model.hidden == 100
    assert d.model.nonlinearity == "tanh"
    assert d.hf.path == ROOT / "runs" / "logs" / "multiplication-T30-hf-seed0"


@pytest.mark.parametrize("b", [0, 7])
def test_visualize_batch(b: int) -> None:
    batch = d.problem(-2)
    figure = d.visualize_batch(batch, b)
    inputs, hidden, outputs = figure.axes[:3]
    assert [axes.get_ylabel() for axes in figure.axes[:3]] == ["input", "hidden unit", "output"]
    assert np.array_equal(inputs.get_images()[0].get_array(), batch.inputs[:, b].T.numpy())
    with torch.no_grad():
        expected = d.model(batch.inputs)[:, b, 0].numpy()
    shown = hidden.get_images()[0].get_array()
    assert shown.shape == (100, d.problem.steps)
    assert np.array_equal(shown, d.model.hidden_states(batch.inputs)[:, b].T.numpy())
    lines = {line.get_label(): line for line in outputs.get_lines()}
    assert np.array_equal(lines["prediction"].get_ydata(), expected)
    last = int(batch.lengths[b]) - 1
    assert lines["target"].get_xdata() == [last]
    assert lines["target"].get_ydata() == [float(batch.targets[last, b, 0])]
    (text,) = figure.axes[5].texts
    assert text.get_text() == f"predicted {expected[last]:.3f}\ntarget {float(batch.targets[last, b, 0]):.3f}"
    assert f"sequence {b}" in figure.get_suptitle()


def test_visualize_batch_without_arguments() -> None:
    figure = d.visualize_batch()
    shown = figure.axes[0].get_images()[0].get_array()
    assert np.array_equal(shown, d.problem(-1).inputs[:, 0].T.numpy())
    with pytest.raises(IndexError):
        d.visualize_batch(b=1000)
