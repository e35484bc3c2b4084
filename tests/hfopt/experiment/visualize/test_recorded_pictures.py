"""Pictures of recordings show the recorded numbers."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import hfopt
from hfopt.experiment import visualize
from hfopt.experiment.store.reader import read_run
from hfopt.experiment.visualize.recorded import _sequence


def test_hidden_states(folder: Path) -> None:
    frame = read_run(folder).recorded["hidden_states"].frame(3)
    figure = visualize.draw_hidden_states(folder, 3, sequence=2)
    inputs, hidden, output = figure.axes[:3]
    assert np.array_equal(inputs.get_images()[0].get_array(), frame["inputs"][..., 2].T)
    assert np.array_equal(hidden.get_images()[0].get_array(), frame["hidden"][..., 2].T)
    lines: dict[Any, Any] = {line.get_label(): line for line in output.get_lines()}
    assert np.array_equal(lines["prediction"].get_ydata(), frame["outputs"][:, 0, 2])
    assert lines["target"].get_xdata().tolist() == [int(frame["lengths"][2]) - 1]
    title = figure.get_suptitle()
    assert title.startswith("multiplication, test sequence 2, after 3 steps: ")
    assert title.endswith("% wrong")
    assert "after 5 steps" in visualize.draw_hidden_states(folder).get_suptitle()
    assert "after 5 steps" in visualize.draw_hidden_states(folder, 99).get_suptitle()
    with pytest.raises(IndexError, match="sequence=3: hidden_states has 3 sequences, 0 to 2"):
        visualize.draw_hidden_states(folder, sequence=3)


def test_what_was_not_recorded(adam: Path) -> None:
    for draw in (
        visualize.draw_hidden_states,
        visualize.draw_gradient_by_lag,
        visualize.draw_spectrum,
        visualize.draw_curvature_density,
    ):
        with pytest.raises(KeyError, match=r"has no frames of .*; recorded was nothing \(see HF\(record="):
            draw(adam)


def test_a_film(folder: Path, tmp_path: Path) -> None:
    made = visualize.animate_hidden_states(folder, tmp_path / "film.gif", 1, frames_per_second=4, dpi=30)
    assert made == tmp_path / "film.gif"
    with Image.open(made) as film:
        assert film.size == (258, 186)
        assert film.n_frames in (6, 7)  # a last frame that stays may be one that lasts longer
        length, pictures = 0, []
        for i in range(film.n_frames):
            film.seek(i)
            length += film.info["duration"]
            pictures.append(np.asarray(film.convert("RGB"), int))
        assert length == pytest.approx(1000 * (6 / 4 + 2), abs=60)
    # The hidden units change, the inputs do not.
    assert all((one != other).any() for one, other in pairwise(pictures[:6]))
    top = slice(14, 30), slice(30, 220)
    assert (np.abs(pictures[0][top] - pictures[5][top]) < 40).all()
    assert list(tmp_path.iterdir()) == [made]
    for name, said in (("film.avi", "films are .gif or .mp4"), ("film", "file without suffix")):
        with pytest.raises(ValueError, match=said):
            visualize.animate_hidden_states(folder, tmp_path / name)


def test_mp4_needs_ffmpeg(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib import animation

    monkeypatch.setattr(animation.writers, "is_available", lambda name: False)
    with pytest.raises(ValueError, match=r"MP4 needs the program ffmpeg, which is not installed; write a \.gif"):
        visualize.animate_hidden_states(folder, tmp_path / "film.mp4")


def test_gradients_by_lag(folder: Path) -> None:
    recorded = read_run(folder).recorded["gradient_by_lag"]
    figure = visualize.draw_gradient_by_lag(folder, [1, 4])
    lines = figure.axes[0].get_lines()
    assert len(lines) == 2
    for line, step in zip(lines, (1, 4), strict=True):
        frame = recorded.frame(step)
        known = frame["norm"] > 0
        assert np.array_equal(line.get_xdata(), frame["lag"][known])
        assert np.array_equal(line.get_ydata(), frame["norm"][known])
    assert figure.axes[0].get_yscale() == "log"
    assert len(visualize.draw_gradient_by_lag(folder).axes[0].get_lines()) == 6


def test_the_spectrum(folder: Path) -> None:
    recorded = read_run(folder).recorded["spectrum"]
    axes = visualize.draw_spectrum(folder).axes[0]
    for points, step in zip(axes.collections, recorded.steps.tolist(), strict=True):
        frame = recorded.frame(step)
        assert np.array_equal(points.get_offsets(), np.stack([frame["real"], frame["imag"]], 1))
    circle = axes.get_lines()[0]
    assert np.hypot(*circle.get_data()) == pytest.approx(np.ones(400))
    assert axes.get_aspect() == 1.0


def test_the_curvature(folder: Path) -> None:
    run = read_run(folder)
    axes = visualize.draw_curvature_density(folder, [2]).axes[0]
    curve, damping = axes.get_lines()
    frame = run.recorded["curvature_density"].frame(2)
    assert np.array_equal(curve.get_xdata(), frame["grid"])
    assert np.array_equal(curve.get_ydata(), frame["density"])
    assert damping.get_xdata() == [run.steps["damping"][2]]


def test_an_experiment_as_it_is_now(folder: Path) -> None:
    import models
    import pathological

    problem = pathological.multiplication(10, batch_size=40, train_batches=1, test_batches=1, seed=1)
    model = models.RNN(problem.V, 12, problem.O).sparse_init(1)
    hf = hfopt.HF(folder.parent / "other", model, problem, max_steps=1, quiet=True)
    figure = visualize.draw_hidden_states(hf, sequence=30)
    expected = model.hidden_states(problem(-1).inputs)[:, 30].T.numpy()
    np.testing.assert_allclose(figure.axes[1].get_images()[0].get_array(), expected, rtol=1e-5, atol=1e-6)
    assert figure.get_suptitle() == "multiplication, test sequence 30, after 0 steps"


def test_what_batches_may_lack() -> None:
    """Neither mask nor lengths, an output of the last step alone, class indices, no targets at all."""
    T, S = 5, 2
    base = {"hidden": np.zeros((T, 3, S)), "inputs": np.zeros((T, 2, S)), "outputs": np.ones((T, 1, S))}
    whole = _sequence("x", {**base, "targets": np.zeros((T, S))}, 0)
    assert whole["scored"].all()
    assert whole["targets"].shape == (T, 1)
    last = _sequence("x", {**base, "outputs": np.ones((4, S)), "targets": np.arange(S)}, 1)
    assert last["scored"].tolist() == [False] * 4 + [True]
    assert last["predictions"].shape == (T, 4)
    assert np.isnan(last["predictions"][:-1]).all()
    assert last["targets"].tolist() == [1] * T
    assert not _sequence("x", base, 0)["scored"].any()
    for parts in (whole, last, _sequence("x", base, 0)):
        visualize.SequencePicture(**parts).figure.canvas.draw()
