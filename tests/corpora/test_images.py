"""Images as a data object: minibatches, losses, errors, and a driver on top."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from corpora import Images
from hfopt.cli import main
from hfopt.experiment.driver import HF
from hfopt.experiment.store.reader import read_run
from models import FNN


def images(train: int = 23, test: int = 7, **options: Any) -> Images:
    """Images of 2 x 3 pixels whose first pixel tells them apart."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 11, size=(train + test, 6), dtype=np.uint8)
    pixels[:, 0] = np.arange(train + test)
    return Images("tiny", pixels[:train], pixels[train:], white=100, shape=(2, 3), **{"batch_size": 5, **options})


def first_pixels(problem: Images, indices: Any) -> list[list[int]]:
    return [(problem(i).inputs[:, 0] * 100).round().int().tolist() for i in indices]


def test_minibatches_are_all_images_once() -> None:
    problem = images()
    parts = first_pixels(problem, problem.train_batches)
    assert sorted(map(len, parts)) == [4, 4, 5, 5, 5]
    assert sorted(chain(*parts)) == list(range(23))
    assert list(chain(*parts)) != list(range(23))
    assert first_pixels(problem, problem.test_batches) == [[23, 24, 25], [26, 27, 28, 29]]
    assert [problem.size(problem(i)) for i in (*problem.train_batches, -1)] == [len(p) for p in parts] + [3]
    assert sorted(problem.train_mem) == [0, 1, 2, 3, 4]
    assert sorted(problem.test_mem) == [-2, -1]
    assert problem(3) is problem(3)
    assert problem.V == problem.O == 6
    assert len(images(batch_size=None).train_batches) == 1


def test_grey_levels_are_from_black_to_white() -> None:
    problem = Images(
        "two", np.array([[0, 16, 4, 8]], np.uint8), np.array([[16, 16, 0, 0]], np.uint8), white=16, shape=(2, 2)
    )
    assert problem(0).inputs.tolist() == [[0, 1, 0.25, 0.5]]
    assert problem(-1).targets.tolist() == [[1, 1, 0, 0]]
    assert problem(0).inputs.dtype == torch.float32
    assert images(dtype=torch.float64)(0).inputs.dtype == torch.float64


def test_forgetting_makes_a_new_order() -> None:
    problem = images()
    test = problem(-1)
    problem.forget()
    first = first_pixels(problem, problem.train_batches)
    problem.forget()
    assert problem.train_mem == {}
    second = first_pixels(problem, problem.train_batches)
    assert first != second
    assert sorted(chain(*second)) == list(range(23))
    assert problem(-1) is test
    # A minibatch depends on seed, index and the number of calls alone.
    again = images()
    again.forget()
    again.forget()
    assert first_pixels(again, [4, 2]) == [second[4], second[2]]
    assert first_pixels(images(seed=1), [0]) != first_pixels(images(), [0])
    assert first_pixels(images(seed=1), [-1]) == first_pixels(images(), [-1])


def test_one_minibatch_a_step_sees_every_image_once_a_pass() -> None:
    problem = images(shuffle_every=None)
    passes: list[list[int]] = []
    for step in range(15):
        problem.forget()
        if step % 5 == 0:
            passes.append([])
        passes[-1] += first_pixels(problem, [step % 5])[0]
    assert [sorted(seen) for seen in passes] == [list(range(23))] * 3
    assert passes[0] != passes[1] != passes[2]


def test_state_goes_on_from_where_it_was() -> None:
    problem = images(seed=4, shuffle_every=2)
    for _ in range(5):
        problem.forget()
    state = problem.state_dict()
    assert all(isinstance(value, int | str) for value in state.values())
    other = images(seed=9, shuffle_every=2)
    first_pixels(other, [0])
    other.load_state_dict(state)
    for _ in range(3):
        assert first_pixels(other, range(5)) == first_pixels(problem, range(5))
        other.forget()
        problem.forget()
    with pytest.raises(ValueError, match="batch_size = 5, but Images has 6"):
        images(batch_size=6).load_state_dict(state)


def test_evaluating_on_training_images() -> None:
    problem = images(evaluate_on="train")
    assert list(chain(*first_pixels(problem, problem.test_batches))) == list(range(23))
    held_out = problem.evaluated_on("test")
    assert list(chain(*first_pixels(held_out, held_out.test_batches))) == list(range(23, 30))
    assert len(problem.test_batches) == 5
    with pytest.raises(ValueError, match="role is 'validation'; choose 'test' or 'train'"):
        problem.evaluated_on("validation")


@pytest.mark.parametrize("loss", ["cross-entropy", "squared-error"])
def test_losses_and_errors_are_sums_over_pixels_and_means_over_images(loss: str) -> None:
    problem = images(dtype=torch.float64, loss=loss)
    batch = problem(0)
    z = torch.randn(batch.inputs.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y, n = batch.inputs.numpy(), len(batch.inputs)
    p = 1 / (1 + np.exp(-z.numpy())) if loss == "cross-entropy" else z.numpy()
    losses = -y * np.log(p) - (1 - y) * np.log(1 - p) if loss == "cross-entropy" else (p - y) ** 2
    assert float(problem.loss(z, batch)) == pytest.approx(losses.sum() / n, rel=1e-12)
    assert problem.errors(z, batch).numpy() == pytest.approx(((p - y) ** 2).sum(1), rel=1e-12)
    assert problem.predictions(z).numpy() == pytest.approx(p, rel=1e-12)


def test_an_output_that_is_nan_is_no_small_error() -> None:
    problem = images()
    outputs = torch.zeros_like(problem(0).inputs)
    outputs[1, 2] = torch.nan
    errors = problem.errors(outputs, problem(0))
    assert errors.isinf().tolist() == [i == 1 for i in range(len(errors))]


class Brightness(torch.nn.Module):
    """One output for all pixels of all images: a problem small enough to solve by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.z = torch.nn.Parameter(torch.zeros(6, dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.z.expand_as(inputs)


@pytest.mark.parametrize("evaluate_on", ["test", "train"])
def test_the_driver_reports_the_error(tmp_path: Path, capsys: pytest.CaptureFixture[str], evaluate_on: str) -> None:
    problem = images(dtype=torch.float64, evaluate_on=evaluate_on)
    model = Brightness()
    hf = HF(tmp_path / "run", model, problem, max_steps=12, threshold=0.0)
    assert hf.optimize() == "max_steps"
    run = read_run(tmp_path / "run")
    pixels = torch.cat([problem(i).inputs for i in problem.test_batches])
    assert run.steps["error_rate"][0] == pytest.approx(float((pixels - 0.5).square().sum(1).mean()), rel=1e-12)
    # The best constant is the mean of the training images.
    mean = torch.cat([problem(i).inputs for i in problem.train_batches]).mean(0)
    torch.testing.assert_close(model.z.detach().sigmoid(), mean, rtol=1e-4, atol=1e-6)
    last = float((pixels - mean).square().sum(1).mean())
    assert run.steps["error_rate"][-1] == pytest.approx(last, rel=1e-4)
    printed = capsys.readouterr().out
    assert "squared error" in printed.splitlines()[2]
    assert "no threshold" in printed
    assert "ended after 12 steps" in printed
    assert f"squared error {run.steps['error_rate'][-1]:.4g} per test case" in printed
    assert "%" not in printed
    assert f"squared error        {run.steps['error_rate'][0]:.5g}" in (tmp_path / "run" / "results").read_text()


def test_the_driver_resumes_and_stops(tmp_path: Path) -> None:
    def run(name: str) -> HF:
        torch.manual_seed(0)
        model = FNN.autoencoder([6, 5, 2], dtype=torch.float64).sparse_init(0)
        problem = images(dtype=torch.float64, shuffle_every=None)
        sgd = torch.optim.SGD(model.parameters(), lr=0.01)
        return HF(tmp_path / name, model, problem, optimizer=sgd, batches_per_step=1, threshold=0.0, quiet=True)

    whole, part = run("whole"), run("part")
    whole.optimize(max_steps=13)
    part.optimize(max_steps=7)
    rest = run("part")
    rest.load()
    rest.optimize(max_steps=13)
    for own, other in zip(whole.model.parameters(), rest.model.parameters(), strict=True):
        assert torch.equal(own, other)
    rows = read_run(tmp_path / "whole").steps["error_rate"], read_run(tmp_path / "part").steps["error_rate"]
    assert np.array_equal(*rows)
    easy = run("easy")
    easy.threshold = 100.0
    assert easy.optimize(max_steps=3) == "success"


def test_pictures_and_tables_of_a_measured_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import matplotlib as mpl
    from matplotlib import pyplot as plt

    from hfopt.experiment.visualize import plot_runs

    mpl.use("agg")
    HF(tmp_path / "run", Brightness(), images(dtype=torch.float64), max_steps=3, threshold=0.0, quiet=True).optimize()
    run = read_run(tmp_path / "run")
    assert main(["show", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    assert f"{run.steps['error_rate'][-1]:.4g} at step 3" in shown
    figure = plot_runs([run])
    (axes,) = [axes for axes in figure.axes[::2] if axes.get_ylabel() == "squared error"]
    assert axes.get_yscale() == "log"
    assert np.array_equal(axes.get_lines()[0].get_ydata(), run.steps["error_rate"])
    plt.close("all")


def test_plot() -> None:
    import matplotlib as mpl
    from matplotlib import pyplot as plt

    mpl.use("agg")
    problem = images()
    figure = problem.plot(count=3)
    shown = figure.axes[0].get_images()[0].get_array()
    assert shown.shape == (2, 3 * 3 + 2)  # with a line of background between two images
    assert np.array_equal(shown[:, 4:7], problem(0).inputs[1].view(2, 3).numpy())
    plt.close("all")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; choose an integer of at least 1"),
        ({"seed": -1}, "seed is -1"),
        ({"shuffle_every": 0}, "shuffle_every is 0"),
        ({"loss": "hinge"}, "loss is 'hinge'; choose 'cross-entropy' or 'squared-error'"),
        ({"evaluate_on": "both"}, "evaluate_on is 'both'"),
        ({"dtype": torch.int64}, "dtype is torch.int64"),
        ({"train": 0}, r"train has shape \(0, 6\) and dtype uint8; it is \(N, 6\) uint8"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        images(**options)


def test_more_refusals() -> None:
    problem = images()
    with pytest.raises(IndexError, match="no minibatch 5: training has 0 to 4, test -1 to -2"):
        problem(5)
    for judge in (problem.loss, problem.errors):
        with pytest.raises(ValueError, match=r"outputs have shape \(5, 5\), but the images \(4, 6\)"):
            judge(torch.zeros(5, 5), problem(0))
