"""The shell completes commands, options and names of runs."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from hfopt.cli.main import main


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_bash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    (tmp_path / "runs" / "logs" / "multiplication").mkdir(parents=True)

    def completed(*words: str) -> list[str]:
        line = " ".join(f"'{word}'" for word in words)
        program = (
            f"source ./script; f=$(complete -p hfopt | sed 's/.*-F \\([^ ]*\\) .*/\\1/'); COMP_WORDS=({line}); "
            f"COMP_CWORD={len(words) - 1}; $f; printf '%s\\n' \"${{COMPREPLY[@]}}\""
        )
        done = subprocess.run(["bash", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.split()

    assert completed("hfopt", "re") == ["report", "resume"]
    assert "--checks" in completed("hfopt", "show", "--")
    assert completed("hfopt", "show", "mult") == ["multiplication"]


def test_zsh(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "zsh"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("#compdef hfopt")
    assert "_hfopt_names" in printed
