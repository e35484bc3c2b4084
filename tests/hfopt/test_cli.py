"""The command `hfopt` and its pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib import pyplot as plt

from hfopt.cli import main
from hfopt.damping import LevenbergMarquardt
from hfopt.experiment.store.reader import read_run
from hfopt.experiment.visualize import draw_sequence, plot_runs
from hfopt.linalg.cg import CG
from hfopt.optimizer import HessianFree
from tests.hfopt.tiny import OPTIMIZERS, experiment


@pytest.fixture(autouse=True)
def no_windows() -> Iterator[None]:
    mpl.use("agg")
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    cg = CG(max_iterations=12, tolerance=5e-4, decay=0.95)
    OPTIMIZERS["hf"] = lambda parameters: HessianFree(parameters, damping=LevenbergMarquardt(), cg=cg)
    for name in ("hf", "adam"):
        experiment(folder / name, optimizer=name, max_steps=8).optimize()
    experiment(folder / "new", optimizer="adam").save()
    return {name: folder / name for name in ("hf", "adam", "new")}


def test_show(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(runs["hf"]), "--steps", "3", "--checks", "2"]) == 0
    printed = capsys.readouterr().out
    run = read_run(runs["hf"])
    lines = printed.splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert "HessianFree" in printed
    assert "max_iterations=12" in printed
    assert "…" not in printed
    table = [line.split() for line in lines if line.strip()[:1] in ("6", "7", "8") and "e-" in line]
    assert [int(fields[0]) for fields in table] == [6, 7, 8]
    for fields in table:
        row = run.steps[int(fields[0])]
        assert float(fields[1]) == pytest.approx(row["train_loss"], rel=1e-4)
        assert float(fields[2]) == pytest.approx(row["test_loss"], rel=1e-4)
        assert float(fields[3]) == pytest.approx(100 * row["error_rate"], abs=0.005)
    assert len(table[0]) > len(table[2])  # the closing row has no step
    checks = run.checks[run.checks["step"] == 2]
    after = lines[lines.index("CG checks of step 2") + 2 :]
    assert [int(line.split()[0]) for line in after if line.strip()] == checks["iteration"].tolist()


def test_show_leaves_out_what_a_run_does_not_have(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(runs["adam"])]) == 0
    printed = capsys.readouterr().out
    assert "lr=0.01" in printed
    assert "λ" not in printed
    assert main(["show", str(runs["new"])]) == 0
    assert "no step has ended" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [["show", "nowhere"], ["plot", "nowhere"], ["show", "{new}", "-c", "3"], ["plot", "{new}"]]
)
def test_errors_are_one_line(
    runs: dict[str, Path], arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([argument.format(**runs) for argument in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(f"hfopt {arguments[0]}: ")
    assert captured.err.count("\n") == 1


def test_plot(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", str(runs["hf"])]) == 0
    written = runs["hf"] / "curves.png"
    assert capsys.readouterr().out.strip().endswith("curves.png")
    assert written.read_bytes()[1:4] == b"PNG"
    assert main(["plot", str(runs["hf"]), str(runs["adam"]), "-o", str(tmp_path / "both.pdf")]) == 0
    assert (tmp_path / "both.pdf").read_bytes()[:4] == b"%PDF"


def test_the_curves(runs: dict[str, Path]) -> None:
    run = read_run(runs["hf"])
    figure = plot_runs([run])
    assert [axes.get_ylabel() for axes in figure.axes[::2]] == ["loss", "wrong (%)", "λ", "ρ", "CG iterations"]
    for column, time in enumerate((run.steps["step"], run.steps["total_seconds"] - run.steps["seconds"])):
        training, test = figure.axes[column].get_lines()
        assert np.array_equal(training.get_xdata(), time)
        assert np.array_equal(training.get_ydata(), run.steps["train_loss"])
        assert np.array_equal(test.get_ydata(), run.steps["test_loss"])
        (wrong,) = figure.axes[2 + column].get_lines()
        assert np.array_equal(wrong.get_ydata(), 100 * run.steps["error_rate"])
        (damping,) = figure.axes[4 + column].get_lines()
        assert np.array_equal(damping.get_ydata(), run.steps["damping"][:-1])  # the closing row has none
    both = plot_runs([run, read_run(runs["adam"])])
    assert [len(axes.get_lines()) for axes in both.axes] == [4, 4, 2, 2, 1, 1, 1, 1, 2, 2]  # Adam has no curvature
    assert len(plot_runs([read_run(runs["adam"])]).axes) == 4


def test_a_sequence_of_classes() -> None:
    T, O = 6, 3
    targets, scored = np.array([0, 0, 0, 2, 1, 0]), np.array([False, False, False, True, True, False])
    chance = np.random.default_rng(0)
    figure = draw_sequence(
        inputs=np.eye(T),
        hidden=chance.normal(size=(T, 7)),
        predictions=chance.uniform(size=(T, O)),
        targets=targets,
        scored=scored,
        length=5,
    )
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert labels[:3] == ["input", "hidden unit", "class (○ target)"]
    (points,) = [line for line in figure.axes[2].get_lines() if line.get_label() == "target"]
    assert np.array_equal(points.get_xdata(), [3, 4])
    assert np.array_equal(points.get_ydata(), [2, 1])
