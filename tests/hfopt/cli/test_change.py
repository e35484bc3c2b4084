"""Runs are removed after a question, and a live one is not; runs of runs/ are continued."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import hfopt
from hfopt.cli import change
from hfopt.cli.main import main
from tests.hfopt.cli.conftest import Write


def answer(monkeypatch: pytest.MonkeyPatch, words: str) -> list[str]:
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or words)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    return asked


def test_a_run_is_removed_if_the_answer_is_yes(
    write: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, other = write("one"), write("two")
    asked = answer(monkeypatch, "")
    assert main(["rm", str(folder)]) == 1
    assert (folder / "run.h5").is_file()
    assert asked[0].startswith(f"remove {folder}: finished, 2 steps, 0.0 MB? ")
    answer(monkeypatch, "y")
    assert main(["rm", "o*", "--root", str(folder.parent)]) == 0
    assert not folder.exists()
    assert (other / "run.h5").is_file()
    assert capsys.readouterr().out == f"removed {folder}\n"


def test_nobody_to_ask_and_what_is_not_the_runs(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write("run")
    elsewhere = tmp_path / "kept"
    elsewhere.mkdir()
    (elsewhere / "00000002.h5").write_text("kept")
    for path in (folder / "checkpoints").iterdir():
        path.unlink()
    (folder / "checkpoints").rmdir()
    (folder / "checkpoints").symlink_to(elsewhere)
    (folder / "notes.txt").write_text("mine")
    assert main(["rm", str(folder)]) == 1
    assert "nobody is there to be asked: add --yes" in capsys.readouterr().err
    assert main(["rm", str(folder), "--yes"]) == 0
    assert capsys.readouterr().out == f"removed {folder}; notes.txt stays there\n"
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    assert (elsewhere / "00000002.h5").read_text() == "kept"


def test_a_live_run_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with hfopt.Run(tmp_path / "run") as run:
        run.log(0, loss=1.0)
        assert main(["rm", str(tmp_path / "run"), "--yes"]) == 1
        assert "is writing the run in" in capsys.readouterr().err
        assert main(["resume", str(tmp_path / "run")]) == 1
        assert "hfopt watch follows it" in capsys.readouterr().err
        run.log(1, loss=0.5)
    assert len(hfopt.read_run(tmp_path / "run").steps) == 2


def test_resume_continues_what_load_run_makes(
    write: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write("run")
    assert main(["resume", str(folder)]) == 1
    assert "does not say which file of runs/ made it" in capsys.readouterr().err
    given: list[object] = []
    outcomes = {"success": 0, "max_steps": 0, "interrupted": 130, "diverged": 1}
    coming = list(outcomes)

    class Loaded:
        def optimize(self, max_steps: int | None) -> str:
            given.append(max_steps)
            return coming.pop(0)

    monkeypatch.setattr("hfopt.experiment.loading.load_run", lambda path: given.append(path) or Loaded())
    monkeypatch.setattr(sys, "path", list(sys.path))
    for status in outcomes.values():
        given.clear()
        assert main(["resume", str(folder), "-n", "7"]) == status
        assert given == [folder, 7]
    assert change.is_held(folder) is False
