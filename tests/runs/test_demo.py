"""The demo, typed and imported: it learns, resumes, and shows what the net does."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import runs.autoencoder as a
import runs.demo as d
from hfopt.experiment.store.reader import read_run
from pathological import PROBLEMS
from runs.settings import run_name

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


def test_settings_that_do_not_fit_are_sentences(typed: Any) -> None:
    assert typed("--T", "3") == "runs.demo: T is 3; multiplication in the paper form needs an integer of at least 10"
    assert "device" in typed("--device", "nowhere")
    if not torch.cuda.is_available():
        assert "there is no CUDA device here" in typed("--device", "cuda")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-m", "runs.demo", "--T", "3"], "runs.demo: T is 3;"),
        (["-m", "runs.demo", "--hidden", "0"], "runs.demo: "),
        (["-m", "runs.demo", "--name", ".."], "runs.demo: "),
        (["-m", "runs.demo", "--curvature-batches", "7"], "runs.demo: curvature_batches="),
        (["-m", "runs.pathological", "xor", "--T", "1"], "runs.pathological: T is 1;"),
        (["-m", "runs.demo", "--name", "{file}/run"], "cannot be written (Not a directory)"),
        (["{root}/runs/demo.py"], "type python -m runs.demo in the folder of the checkout"),
    ],
)
def test_no_traceback_is_typed_at_anyone(tmp_path: Path, words: list[str], said: str) -> None:
    (tmp_path / "file").write_text("")
    words = [word.format(root=ROOT, file=tmp_path / "file") for word in words]
    elsewhere = words[0] != "-m"
    done = subprocess.run(
        # Without what an installation for development puts in the way: only the interpreter's own packages and hfopt.
        [sys.executable, *words],
        cwd=tmp_path if elsewhere else ROOT,
        env={**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode not in (0, None)
    assert "Traceback" not in done.stderr
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_second_ctrl_c_is_a_sentence(tmp_path: Path, typed: Any, monkeypatch: Any, capfd: Any) -> None:
    def interrupted(self: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("hfopt.experiment.driver.HF.optimize", interrupted)
    assert typed("--name", str(tmp_path / "run"), *SMALL) == 130
    assert "stopped at once; what was saved last is in" in capfd.readouterr().err


def test_names_carry_what_differs() -> None:
    plain = d.CommandLine()

    def named(**options: Any) -> str:
        chosen = replace(plain, **options)
        return run_name(f"{chosen.problem}-T{chosen.T}", chosen, plain, known=("problem", "T"))

    assert named() == "multiplication-T30-hf-seed0"
    assert named(hidden=20) == "multiplication-T30-hf-seed0-hidden-20"
    assert named(T=50, seed=3, optimizer="adam", lr=0.01) == "multiplication-T50-adam-seed3-lr-0.01"
    for same in (
        {"device": "cuda"},
        {"max_steps": 7},
        {"threshold": 0.5},
        {"resume": True},
        {"name": "x"},
        {"threads": 2},
    ):
        assert named(**same) == named()
    changed = {f.name: getattr(plain, f.name) for f in fields(plain) if isinstance(getattr(plain, f.name), float)}
    longest = named(**{name: value + 1 for name, value in changed.items()}, form="release", nonlinearity="sigmoid")
    assert len(longest) <= 100
    assert longest != named(
        **{name: value + 2 for name, value in changed.items()}, form="release", nonlinearity="sigmoid"
    )
    assert auto_name(a.PRESETS["mnist-2010"], "mnist-2010") != auto_name(a.PRESETS["mnist"], "mnist")
    assert auto_name(replace(a.BASE, sizes=(64, 10)), "digits") == "autoencoder-digits-hf-seed0-sizes-64-10"


def auto_name(settings: Any, preset: str) -> str:
    return run_name(f"autoencoder-{preset}", settings, a.PRESETS[preset])


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
    (text,) = outputs.texts
    target = float(batch.targets[last, b, 0])
    off = abs(expected[last] - target)
    assert text.get_text() == f"predicted {expected[last]:.3f}, target {target:.3f}, error {off:.3f}"
    assert f"sequence {b}" in figure.get_suptitle()


def test_visualize_batch_without_arguments() -> None:
    figure = d.visualize_batch()
    shown = figure.axes[0].get_images()[0].get_array()
    assert np.array_equal(shown, d.problem(-1).inputs[:, 0].T.numpy())
    with pytest.raises(IndexError):
        d.visualize_batch(b=1000)
