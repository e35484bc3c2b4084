"""The command `hfopt` and its pictures."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib import pyplot as plt

from hfopt.cli import main
from hfopt.damping import LevenbergMarquardt
from hfopt.experiment import report
from hfopt.experiment.store.reader import read_run
from hfopt.experiment.store.runh5 import write_run
from hfopt.experiment.visualize import draw_sequence, plot_runs
from hfopt.linalg.cg import CG
from hfopt.optimizer import HessianFree
from tests.hfopt.tiny import OPTIMIZERS, experiment

ROOT = Path(__file__).resolve().parents[3]


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
    assert [axes.get_ylabel() for axes in figure.axes[::2]] == [
        "loss", "wrong (%)", "λ, damping", "ρ, decrease over\npredicted", "CG iterations",
    ]  # fmt: skip
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
    assert labels[:3] == ["input", "hidden unit", "class"]
    (points,) = [line for line in figure.axes[2].get_lines() if line.get_label() == "target"]
    assert np.array_equal(points.get_xdata(), [3, 4])
    assert np.array_equal(points.get_ydata(), [2, 1])


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("hfopt ")


def test_near_misses_are_named(runs: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    assert main(["show", str(runs["adam"].parent / "adm")]) == 1
    assert f"did you mean {runs['adam']}?" in capsys.readouterr().err
    assert main(["plot", str(runs["adam"].parent / "something else")]) == 1
    assert "did you mean" not in capsys.readouterr().err
    root = runs["adam"].parent / "root"
    for name in ("multiplication-T30-hf-seed0", "multiplication-T30-hf-seed1", "xor"):
        experiment(root / "runs" / "logs" / name, max_steps=0).optimize()
    monkeypatch.chdir(root)
    assert main(["show", "multiplication"]) == 1
    said = capsys.readouterr().err
    assert "did you mean multiplication-T30-hf-seed" in said
    assert "xor" not in said
    assert main(["show", "xor"]) == 0


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_list(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(runs["hf"].parent)
    found = {name: read_run(runs[name]) for name in ("hf", "adam")}
    assert main(["list", folder, "-w", "name!=root", "-w", "step>0", "--sort", "loss"]) == 0
    heading, *lines = lines_of(capsys)
    assert heading == ["name", "model", "problem", "optimizer", "step", "loss", "error", "state"]
    by_loss = sorted(found, key=lambda name: found[name].steps["test_loss"][-1])
    assert [line[0] for line in lines] == by_loss
    for name, *fields in lines:
        last = found[name].steps[-1]
        optimizer = {"hf": "HessianFree", "adam": "Adam"}[name]
        loss, error = f"{last['test_loss']:.3g}", f"{100 * last['error_rate']:.2f}%"
        assert fields == ["Running", "Sums", optimizer, "8", loss, error, "finished"]
    for conditions, names in (
        (["optimizer=Adam", "step>0"], ["adam"]),
        (["optimizer.groups.0.lr=0.01", "step=8"], ["adam"]),
        (["optimizer~Hess"], ["hf"]),
        (["nothing=1"], []),
        (["state=killed", "problem.T=3"], ["new"]),
    ):
        assert main(["list", folder, *(word for c in conditions for word in ("-w", c))]) == 0
        assert [line[0] for line in lines_of(capsys)[1:]] == names
    assert main(["list", folder, "-w", "step>0", "-s", "loss", "-r"]) == 0
    assert [line[0] for line in lines_of(capsys)[1:3]] == by_loss[::-1]
    for wrong in (["-w", "step"], ["-s", "nothing"]):
        assert main(["list", folder, *wrong]) == 1
    assert main(["list", folder + "/nowhere"]) == 1
    assert capsys.readouterr().err.count("\n") == 3


def test_a_damaged_run_does_not_hide_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("good", "bad"):
        experiment(tmp_path / name, max_steps=1).optimize()
    (tmp_path / "bad" / "run.h5").write_bytes(b"nothing")
    assert main(["list", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert [line.split()[-1] for line in captured.out.splitlines()[1:]] == ["damaged", "finished"]
    assert str(tmp_path / "bad") in captured.err


def test_compare(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(runs["hf"]), str(runs["adam"])]) == 0
    rows = {line[0]: line[1:] for line in lines_of(capsys) if line}
    assert rows["optimizer.class"] == ["HessianFree", "Adam"]
    assert rows["optimizer.groups.0.betas"][0] == "-"
    assert rows["step"] == ["8", "8"]
    assert not any(name.startswith(("problem", "model")) for name in rows)


def test_export(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = read_run(runs["hf"])
    assert main(["export", str(runs["hf"])]) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert list(rows[0]) == list(run.steps.dtype.names or ())
    assert [float(row["train_loss"]) for row in rows] == run.steps["train_loss"].tolist()
    assert rows[-1]["rho"] == ""
    target = tmp_path / "run.json"
    assert main(["export", str(runs["hf"]), "--json", "-o", str(target)]) == 0
    found = json.loads(target.read_text())
    assert [row["rho"] for row in found["steps"]][:-1] == run.steps["rho"].tolist()[:-1]
    assert found["steps"][-1]["rho"] is None
    assert found["configuration"] == run.configuration
    assert main(["export", str(runs["hf"]), "--checks"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(run.checks)
    assert main(["export", str(runs["hf"]), "-o", str(tmp_path / "no" / "where")]) == 1


@pytest.mark.slow
def test_a_reader_that_goes_away(runs: dict[str, Path]) -> None:
    """`hfopt show run | head`, and a run whose output nobody reads any more: no traceback, and all is saved."""
    program = f"import sys; from hfopt.cli import main; sys.exit(main(['export', {str(runs['hf'])!r}]))"
    training = (
        "import pathlib; from tests.hfopt.tiny import experiment; "
        f"experiment(pathlib.Path({str(runs['hf'].parent / 'piped')!r}), quiet=False, max_steps=10**5).optimize()"
    )
    for line in (program, training):
        with subprocess.Popen(
            [sys.executable, "-c", line], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.close()
            assert process.stderr.read() == ""
    run = read_run(runs["hf"].parent / "piped")
    assert run.outcome == "stopped"
    assert run.find().step == run.steps["step"][-1]


def test_the_table_fits_a_terminal_whatever_the_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiment(tmp_path / "run", max_steps=2).optimize()
    run = read_run(tmp_path / "run")
    wide = np.repeat(run.steps[:1], 3)
    wide["step"] = [0, 50_000, 1_234_567]
    for name, value in (("rho", -12345.678), ("damping", 1e-10), ("step_length", 1.5e-5), ("seconds", 123456.789)):
        wide[name] = value
    for name, value in (("cg_iterations", 1000), ("backtracked", 1000), ("error_rate", 1.0)):
        wide[name] = value
    write_run(tmp_path / "run" / "run.h5", run.header, wide, run.checks, run.checkpoints)
    assert main(["show", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    assert "…" not in printed
    assert max(map(len, printed.splitlines())) <= 80
    assert "1234567" in printed
    progress = report.Progress(run.metrics[0], second_order=True)
    row = {name: wide[1][name].item() for name in wide.dtype.names or ()} | {"updated": True, "total_seconds": 123456.7}
    assert all(len(line) <= 80 for line in progress.line(row).splitlines())
