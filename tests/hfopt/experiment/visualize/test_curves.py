"""Curves: what stands on which axis, and that legends cover none of them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import pyplot as plt

from hfopt.experiment.store.reader import read_run
from hfopt.experiment.visualize import compare_runs, draw_cg_table, plot_runs
from hfopt.experiment.visualize.style import COLOURS


def test_columns_are_drawn_against_what_was_asked_for(folder: Path) -> None:
    run = read_run(folder)
    figure = plot_runs(folder, ["products", "step", "seconds"])
    products = np.maximum(run.steps["products"], 0)
    expected = [
        np.cumsum(products) - products,
        run.steps["step"],
        run.steps["total_seconds"] - run.steps["seconds"],
    ]
    for axes, x in zip(figure.axes[:3], expected, strict=True):
        assert np.array_equal(axes.get_lines()[1].get_xdata(), x)
        assert np.array_equal(axes.get_lines()[1].get_ydata(), run.steps["test_loss"])
    assert [axes.get_xlabel() for axes in figure.axes[-3:]] == ["curvature products", "step", "seconds of training"]
    with pytest.raises(ValueError, match="against=\\['time'\\]: choose from 'step', 'seconds', 'products'"):
        plot_runs(folder, ["time"])  # type: ignore[list-item]


def test_ticks_threshold_and_scales(folder: Path) -> None:
    figure = plot_runs(folder)
    figure.canvas.draw()
    steps = figure.axes[-2]
    assert all(float(tick).is_integer() for tick in steps.get_xticks())
    loss, wrong = figure.axes[0], figure.axes[2]
    assert loss.get_yscale() == wrong.get_yscale() == "log"
    (threshold,) = [
        line for line in wrong.get_lines() if len(set(line.get_ydata())) == 1 and len(line.get_ydata()) == 2
    ]
    assert threshold.get_ydata()[0] == pytest.approx(1.0)  # per cent
    assert [text.get_text() for text in wrong.texts] == ["threshold 1%"]
    assert all("$" not in label.get_text() for label in wrong.get_yticklabels())
    iterations = figure.axes[-2].get_yticks()
    assert all(float(tick).is_integer() for tick in iterations)
    assert {line.get_color() for line in loss.get_lines()} == {COLOURS[0]}


def test_legends_lie_outside_the_panels(folder: Path) -> None:
    for figure in (plot_runs(folder), draw_cg_table(folder), compare_runs([folder, folder])):
        figure.canvas.draw()
        legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes)]
        found = [legend.get_window_extent() for legend in legends if legend is not None]
        assert found
        panels = [axes.get_window_extent() for axes in figure.axes]
        for legend in found:
            assert not any(
                legend.x0 < panel.x1 and legend.x1 > panel.x0 and legend.y0 < panel.y1 - 2 and legend.y1 > panel.y0 + 2
                for panel in panels
            )
        plt.close(figure)


def test_an_error_of_zero_stands_at_the_lower_edge(folder: Path) -> None:
    run = read_run(folder)
    steps = run.steps.copy()
    steps["error_rate"] = [0.5, 0.2, 0.0, 0.1, 0.0, 0.02]
    figure = plot_runs(replace(run, steps=steps))
    marks, curve = figure.axes[2].get_lines()[:2]
    assert marks.get_marker() == "v"
    assert marks.get_xdata().tolist() == [2, 4]
    assert curve.get_ydata() == pytest.approx([50, 20, 1, 10, 1, 2])


def test_several_runs(folder: Path, adam: Path) -> None:
    figure = compare_runs([folder, adam])
    assert [axes.get_xlabel() for axes in figure.axes[3:]] == ["step", "seconds of training", "curvature products"]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["recorded", "adam"]
    one, other = figure.axes[0].get_lines()
    assert (one.get_color(), other.get_color()) == COLOURS[:2]
    assert len(figure.axes[2].get_lines()) == 1  # Adam needs no products
    assert len(compare_runs([adam]).axes) == 4


def test_many_runs_differ_in_colour_or_dashes(folder: Path) -> None:
    figure = compare_runs([folder] * 16)
    looks = {(line.get_color(), line.get_linestyle(), str(line._dash_pattern)) for line in figure.axes[0].get_lines()}
    assert len(looks) == 16


def test_runs_without_a_step(folder: Path) -> None:
    run = read_run(folder)
    with pytest.raises(ValueError, match="no run has finished a step"):
        plot_runs(replace(run, steps=run.steps[:0]))
    with pytest.raises(ValueError, match="no run has finished a step"):
        compare_runs([replace(run, steps=run.steps[:0])])
    with pytest.raises(FileNotFoundError):
        plot_runs("nonsense")


def test_the_cg_table(folder: Path) -> None:
    run = read_run(folder)
    step = 2
    checks, row = run.checks[run.checks["step"] == step], run.steps[step]
    figure = draw_cg_table(folder, step)
    above, below = figure.axes
    lines: dict[Any, Any] = {line.get_label(): line for line in above.get_lines()}
    assert np.array_equal(lines["damped model"].get_xdata(), checks["iteration"])
    assert np.array_equal(lines["damped model"].get_ydata(), checks["model"])
    looked = np.isfinite(checks["evaluation"])
    assert np.array_equal(lines["loss"].get_ydata(), checks["evaluation"][looked])
    taken = lines[f"taken: {row['backtracked']}"]
    assert list(taken.get_xdata()) == [row["backtracked"]]
    # Without weight decay, that is the difference of the two losses.
    assert list(taken.get_ydata()) == [pytest.approx(row["new_loss"] - row["evaluation_loss"], rel=1e-6)]
    assert [line.get_label() for line in below.get_lines()] == ["norm of the residual", "norm of the iterate"]
    assert f"step {step}: λ = {row['damping']:.2e}" in figure.get_suptitle()
    assert "step 4" in draw_cg_table(folder).get_suptitle()  # the last one that has checks
    with pytest.raises(ValueError, match="no CG checks of step 77; there are those of steps 0 to 4"):
        draw_cg_table(folder, 77)


def test_an_optimizer_without_checks(adam: Path, tmp_path: Path) -> None:
    shutil.copytree(adam, tmp_path / "run")
    with pytest.raises(ValueError, match="has no CG checks; its optimizer has none"):
        draw_cg_table(tmp_path / "run")
