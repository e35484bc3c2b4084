"""The autoencoders, typed and imported: they learn, resume, and show their reconstructions."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import runs.autoencoder as a
from hfopt.experiment.store.reader import read_run

ROOT = Path(__file__).resolve().parents[2]
RUN = "autoencoder"
SMALL = ("--sizes", "64", "30", "6", "--batch-size", "750")


def principal_components(train: torch.Tensor, test: torch.Tensor, count: int) -> float:
    """The squared error of `count` principal components, the best linear autoencoder."""
    mean = train.mean(0)
    directions = torch.linalg.svd(train - mean, full_matrices=False).Vh[:count]
    rest = (test - mean) - (test - mean) @ directions.T @ directions
    return float(rest.square().sum(1).mean())


@pytest.mark.slow
def test_it_learns(tmp_path: Path, typed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Beyond what a linear code of the same size could do, on images that it has not seen."""
    folder = tmp_path / "run"
    arguments = ("--name", str(folder), *SMALL, "--nonlinearity", "tanh")
    assert typed(*arguments, "--max-steps", "2") == 0  # there is no threshold that it could miss
    assert "ended after 2 steps" in capsys.readouterr().out
    problem = a.problem
    linear = principal_components(
        torch.cat([problem(i).inputs for i in problem.train_batches]),
        torch.cat([problem(i).inputs for i in problem.test_batches]),
        6,
    )
    threshold = ("--threshold", f"{linear:.3f}", "--max-steps", "40")
    assert typed(*arguments, *threshold, "--resume") == 0
    printed = capsys.readouterr().out
    assert "success after" in printed
    run = read_run(folder)
    error = run.steps["error_rate"][-1]
    assert error < linear < run.steps["error_rate"][2]
    assert f"{error:.4g} on test images" in printed
    assert typed(*arguments, "--picture", str(tmp_path / "images.png")) == 0
    assert (tmp_path / "images.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.quick(where=lambda optimizer: optimizer in ("adam", "lbfgs"))
@pytest.mark.parametrize("optimizer", ["adam", "rmsprop", "sgd", "nag", "lbfgs"])
def test_other_optimizers(tmp_path: Path, typed: Any, optimizer: str) -> None:
    arguments = ("--name", str(tmp_path / "run"), "--optimizer", optimizer, *SMALL)
    assert typed(*arguments, "--max-steps", "40" if optimizer != "lbfgs" else "2", "--threshold", "0.01") == 1
    run = read_run(tmp_path / "run")
    stochastic = optimizer != "lbfgs"
    assert run.configuration["optimizer"]["class"].lower() == {"nag": "nesterov"}.get(optimizer, optimizer)
    assert run.configuration["problem"]["batch_size"] == (100 if stochastic else 750)
    assert run.configuration["problem"]["shuffle_every"] == (15 if stochastic else 1)
    assert run.configuration["batches"]["per_step"] == (1 if stochastic else 2)
    assert run.steps["error_rate"][-1] < 0.8 * run.steps["error_rate"][0]


def test_presets_are_the_published_nets() -> None:
    assert a.PRESETS["mnist"].sizes == (784, 1000, 500, 250, 30)
    assert a.PRESETS["curves"].sizes == (784, 400, 200, 100, 50, 25, 6)
    assert [a.PRESETS[name].data for name in a.PRESETS] == ["digits", "mnist", "curves", "mnist", "curves"]
    for name, images in (("mnist", 60_000), ("curves", 20_000)):
        ours = a.PRESETS[name]
        assert ours.gradient_batches is not None
        assert ours.gradient_batches * ours.batch_size <= images
        assert (ours.evaluation_batches or 0) <= ours.first_batches < ours.gradient_batches
        assert ours.minibatch == 200
    for name, batch_size in (("mnist-2010", 7500), ("curves-2010", 5000)):
        published = a.PRESETS[name]
        assert published.sizes == a.PRESETS[name.removesuffix("-2010")].sizes
        assert (published.gradient_batches, published.curvature_batches, published.batch_size) == (None, 1, batch_size)
        assert (published.cg_iterations, published.cg_tolerance, published.cg_decay) == (250, 5e-4, 0.95)
        assert (published.lambda_by, published.preconditioner) == ("rho", "empirical-fisher")
    assert a.model.sizes == (64, 100, 50, 10, 50, 100, 64)
    assert a.model.nonlinearities.count("logistic") == 4
    assert a.hf.path == ROOT / "runs" / "logs" / "autoencoder-digits-hf-seed0"
    (group,) = a.hf.optimizer.param_groups
    assert group["weight_decay"] == 2e-5


def test_roles_of_batches(tmp_path: Path, typed: Any) -> None:
    """The gradient's batches are the first ones, the others' the first of these; tests are as far apart as asked."""
    small = ("--sizes", "64", "10", "4", "--batch-size", "300", "--max-steps", "3")
    three = ("--gradient-batches", "3", "--evaluation-batches", "2", "--test-every", "2")
    for words, gradient, curvature, evaluation in (
        ((), 5, 1, 5),
        (("--curvature-batches", "None"), 5, 5, 5),
        (three, 3, 1, 2),
        ((*three, "--held-out"), 3, 1, 2),
    ):
        folder = tmp_path / f"run{len(words)}"
        assert typed("--name", str(folder), *small, *words) == 0
        run = read_run(folder)
        chosen = run.configuration["batches"]
        found = [chosen["gradient"], chosen["curvature"], chosen["evaluation"]]
        first = 3 if "--held-out" in words else 0
        assert found == [list(range(gradient)), list(range(curvature)), list(range(first, first + evaluation))]
        tested = np.isfinite(run.steps["error_rate"][:3])
        assert tested.tolist() == ([True, False, True] if "--test-every" in words else [True] * 3)


def test_growing_gradients_and_averaged_factors(tmp_path: Path, typed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    words = ("--gradient-batches", "3", "--growth", "2", "--preconditioner", "kfac", "--factor-average", "0.9")
    assert (
        typed("--name", str(folder), "--sizes", "64", "10", "4", "--batch-size", "300", "--max-steps", "3", *words) == 0
    )
    assert "batches: 1 to 3 gradient, 1 curvature, 1 to 3 evaluation" in capsys.readouterr().out
    found = read_run(folder).configuration
    taken = found["batches"]["per_step"]
    assert (taken["first"], taken["last"], taken["steps"]) == (1, 3, 2)
    assert found["optimizer"]["preconditioner"]["average"] == 0.9


def test_settings_for_minibatches(tmp_path: Path, typed: Any) -> None:
    """Full steps, lambda by the average of rho from where it is said to start, and momentum that rises."""
    folder = tmp_path / "run"
    words = ("--lambda-by", "average", "--damping", "0.02", "--full-steps")
    decay = ("--cg-decay", "0.95", "--rising-decay", "60", "--cg-iterations", "3")
    small = ("--sizes", "64", "10", "4", "--batch-size", "300", "--max-steps", "4")
    assert typed("--name", str(folder), *small, *words, *decay) == 0
    run = read_run(folder)
    found = run.configuration["optimizer"]
    assert (found["damping"]["class"], found["damping"]["initial"]) == ("AverageRatio", 0.02)
    assert (found["line_search"]["class"], found["backtracking"]) == ("FullStep", "none")
    assert [found["cg"]["decay"][name] for name in ("first", "last", "steps")] == [0.3, 0.95, 60]
    assert set(run.steps["step_length"][:4]) <= {0.0, 1.0}


def test_preset_by_word(typed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert typed("curves", "--help") == 0
    shown = capsys.readouterr().out
    assert "python -m runs.autoencoder curves" in shown
    assert "784 400 200 100 50 25 6" in " ".join(shown.replace("│", " ").split())


def test_missing_files_are_a_sentence(tmp_path: Path, typed: Any) -> None:
    said = typed("mnist", "--folder", str(tmp_path))
    assert "runs.autoencoder: there is no train-images-idx3-ubyte.gz in" in said
    assert "there is no run at" in typed("--name", str(tmp_path / "run"), "--resume")


HERE = os.environ.get("HFOPT_DATA")


@pytest.mark.slow
@pytest.mark.skipif(not HERE or not Path(HERE, "mnist").is_dir(), reason="HFOPT_DATA has no MNIST")
def test_mnist(tmp_path: Path, typed: Any) -> None:
    """A small net takes twenty steps of Adam on MNIST."""
    sizes = ("--sizes", "784", "20", "5")
    optimizer = ("--optimizer", "adam", "--lr", "0.01", "--max-steps", "20")
    assert typed("mnist", "--name", str(tmp_path / "run"), *sizes, *optimizer) == 0
    run = read_run(tmp_path / "run")
    assert run.configuration["problem"]["train_images"] == 60_000
    assert len(run.configuration["problem"]["test_batches"]) == 50
    assert run.steps["error_rate"][-1] < 0.7 * run.steps["error_rate"][0]


def test_visualize_batch() -> None:
    batch = a.problem(-1)
    figure = a.visualize_batch(batch, count=3)
    above, below = (axes.get_images()[0].get_array() for axes in figure.axes)
    with torch.no_grad():
        outputs = a.model(batch.inputs).sigmoid()
    for shown, expected in ((above, batch.inputs), (below, outputs)):
        assert shown.shape == (8, 3 * 8 + 2)
        assert np.array_equal(shown[:, 9:17], expected[1].view(8, 8).numpy())
    error = float((outputs - batch.inputs).square().sum(1).mean())
    assert f"squared error {error:.4g}" in figure.get_suptitle()
    assert [axes.get_ylabel() for axes in figure.axes] == ["input", "reconstruction"]


def test_errors_are_those_of_both_sets() -> None:
    errors = a.errors()
    train = torch.cat([a.problem(i).inputs for i in a.problem.train_batches])
    with torch.no_grad():
        reconstructed = a.model(train).sigmoid()
    assert errors["train"] == pytest.approx(float((reconstructed - train).square().sum(1).mean()), rel=1e-5)
    assert list(errors) == ["train", "test"]
