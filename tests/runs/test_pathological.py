"""The runs of the pathological problems, typed and imported: presets, roles of batches, resumption, pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import runs.pathological as p
from hfopt.experiment.store.reader import read_run
from pathological import PROBLEMS
from runs.presets import PATHOLOGICAL

ROOT = Path(__file__).resolve().parents[2]
RUN = "pathological"
SMALL = ("--T", "10", "--hidden", "20", "--batch-size", "100", "--gradient-batches", "6", "--test-sequences", "300")


@pytest.mark.slow
def test_it_learns_and_goes_on(tmp_path: Path, typed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    name = ("--name", str(tmp_path / "run"), "--threshold", "0.25")
    assert typed("addition", *SMALL, *name, "--max-steps", "3") == 1
    assert "python -m runs.pathological addition" in capsys.readouterr().out
    assert typed("addition", *SMALL, *name, "--max-steps", "80", "--resume") == 0
    run = read_run(tmp_path / "run")
    assert run.steps["step"].tolist() == list(range(run.find().step + 1))
    assert run.steps["error_rate"][-1] < 0.25 < run.steps["error_rate"][0]
    assert run.configuration["settings"]["problem"] == "addition"
    assert typed("addition", *SMALL, *name, "--picture", str(tmp_path / "hidden.png")) == 0
    assert (tmp_path / "hidden.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.quick(where=lambda name: name in ("addition", "memorization_5bit", "xor"))
@pytest.mark.parametrize("name", sorted(PROBLEMS))
def test_every_problem_takes_a_step(tmp_path: Path, typed: Any, name: str) -> None:
    arguments = ("--hidden", "10", "--batch-size", "20", "--test-sequences", "50", "--T", "12", "--max-steps", "1")
    assert typed(name, "--name", str(tmp_path / "run"), *arguments) == 1
    run = read_run(tmp_path / "run")
    assert run.configuration["problem"]["class"].endswith(PROBLEMS[name].__name__)
    assert run.configuration["problem"]["form"] == "paper"
    assert len(run.configuration["problem"]["test_batches"]) == 3
    assert run.steps["accepted"][0]
    assert run.steps["structural"][0] == PATHOLOGICAL[name].structural


def test_roles_have_their_batches(tmp_path: Path, typed: Any) -> None:
    name = ("--name", str(tmp_path / "run"), "--max-steps", "1", "--curvature-batches", "2")
    assert typed("xor", *SMALL, *name, "--evaluation-batches", "3", "--overwrite") == 1
    batches = read_run(tmp_path / "run").configuration["batches"]
    assert batches["gradient"] == [0, 1, 2, 3, 4, 5]
    assert batches["curvature"] == [0, 1]
    assert batches["evaluation"] == [0, 1, 2]
    fresh = ("--evaluation-batches", "3", "--fresh-evaluation", "--overwrite")
    assert typed("xor", *SMALL, *name, *fresh) == 1
    assert read_run(tmp_path / "run").configuration["batches"]["evaluation"] == [6, 7, 8]
    assert typed("xor", *SMALL, *name, *fresh, "--debias-batches", "2") == 1
    batches = read_run(tmp_path / "run").configuration["batches"]
    assert (batches["evaluation"], batches["debias"]) == ([6, 7, 8], [9, 10])


def test_only_memory_bits(tmp_path: Path, typed: Any) -> None:
    name = ("--name", str(tmp_path / "run"), "--max-steps", "0", "--only-memory-bits")
    assert typed("memorization_5bit", *SMALL, *name) == 1
    assert read_run(tmp_path / "run").configuration["problem"]["only_memory_bits"]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adam", "nag", "lbfgs"])
def test_other_optimizers(tmp_path: Path, typed: Any, optimizer: str) -> None:
    arguments = ("--optimizer", optimizer, "--minibatch", "30", "--max-steps", "2", "--name", str(tmp_path / "run"))
    assert typed("multiplication", *SMALL, *arguments) == 1
    run = read_run(tmp_path / "run")
    assert run.steps["updated"].tolist() == [True, True, False]
    stochastic = optimizer != "lbfgs"
    assert run.configuration["problem"]["batch_size"] == (30 if stochastic else 100)
    assert run.configuration["batches"]["gradient"] == ([0] if stochastic else [0, 1, 2, 3, 4, 5])


def test_presets() -> None:
    assert set(PATHOLOGICAL) == set(PROBLEMS) | {f"{name}-2011" for name in PROBLEMS}
    for name, settings in PATHOLOGICAL.items():
        assert settings.problem == name.removesuffix("-2011")
        assert settings.hidden == 100
        assert settings.nonlinearity == "tanh"
        assert settings.threshold == 0.01
        assert settings.test_sequences == 10_000
        assert settings.structural > 0
        if name.endswith("-2011"):
            assert settings.batch_size * settings.gradient_batches == 10_000
            assert settings.batch_size * settings.curvature_batches == 1000
            assert (settings.cg_iterations, settings.damping, settings.cg_tolerance) == (300, 0.1, 5e-4)
            assert settings.structural == pytest.approx(1 / 30)


def test_the_default_is_the_multiplication_problem() -> None:
    assert isinstance(p.problem, PROBLEMS["multiplication"])
    assert p.problem.T == 30
    assert p.hf.path == ROOT / "runs" / "logs" / "pathological-multiplication-T30-hf-seed0"
    assert len(p.problem.test_batches) * p.problem.batch_size == 10_000


def test_the_net_is_told_where_sequences_end() -> None:
    batch, told = p.problem(-1), []

    class Listener(torch.nn.Module):
        def forward(self, inputs: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
            told.append((inputs, lengths))
            return inputs

    p.hf.forward(Listener(), batch)
    assert told == [(batch.inputs, batch.lengths)]
    assert int(batch.lengths.min()) < p.problem.steps


def test_errors_are_sentences(tmp_path: Path, typed: Any) -> None:
    assert "there is no problem 'nothing'; choose from addition" in typed("nothing")
    assert "there is no run at" in typed("xor", "--name", str(tmp_path / "run"), "--resume")
