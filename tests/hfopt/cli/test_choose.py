"""Names, patterns and roots: which runs are meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from hfopt.cli import choose
from hfopt.cli.main import main
from tests.hfopt.cli.conftest import Write


def test_names_patterns_and_folders(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "root"
    for name in ("a-1", "a-2", "b", "deep/a-3"):
        write(name)

    def names(*given: str) -> list[str]:
        return [folder.relative_to(root).as_posix() for folder in choose.folders(given, root)]

    assert names("a-1") == ["a-1"]
    assert names("a-*") == ["a-1", "a-2", "deep/a-3"]
    assert names("a-[12]", "a-1", "b") == ["a-1", "a-2", "b"]
    assert names("deep/*") == ["deep/a-3"]
    assert names("deep/a-3") == ["deep/a-3"]
    assert names(str(root / "b"), str(root / "a-1" / "run.h5")) == ["b", "a-1"]
    with pytest.raises(ValueError, match=r"a-\* fits 3 runs \(a-1, a-2, a-3\); name one of them"):
        choose.folder("a-*", root)
    with pytest.raises(FileNotFoundError, match=r"no run below .* is called x\*; there are 4"):
        choose.folder("x*", root)
    with pytest.raises(FileNotFoundError, match=r"did you mean .*a-1"):
        choose.folder("a-", root)
    with pytest.raises(FileNotFoundError, match=r"did you mean deep/a-3\?"):
        choose.folder("deep/a-4", root)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        choose.folder("a*", tmp_path / "nowhere")
    logs = tmp_path / "runs" / "logs"
    logs.parent.mkdir()
    root.rename(logs)
    monkeypatch.chdir(tmp_path)
    assert choose.folder("b", choose.catalogue.LOGS) == Path("runs/logs/b")


def test_a_run_whose_name_has_pattern_letters(write: Write, tmp_path: Path) -> None:
    folder = write("lr[1]")
    assert choose.folder("lr[1]", tmp_path / "root") == folder


def test_conditions_are_joined_and_settings_found_by_their_last_word(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write("one", problem="Multiplication", T=60, a={"lr": 1}, b={"lr": 2})
    write("two", problem="Multiplication", T=30, a={"lr": 1}, b={"lr": 1})
    write("three", problem="Addition", T=60)
    root = str(tmp_path / "root")
    for condition, names in (
        ("problem=multiplication and T>50", ["one"]),
        ("problem=multiplication and T<=60", ["one", "two"]),
        ("T=60", ["one", "three"]),
        ("lr=1", ["two"]),  # of the first, two settings are called so
    ):
        assert main(["list", "--root", root, "-w", condition]) == 0
        assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == sorted(names)
    assert main(["list", "t*", "--root", root]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == ["three", "two"]
