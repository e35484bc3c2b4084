"""A run is followed while it goes on."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

import hfopt
from hfopt.cli.main import main
from tests.hfopt.cli.conftest import Write


def steps(printed: str) -> list[int]:
    return [int(line.split()[0]) for line in printed.splitlines() if line.strip()[:1].isdigit()]


def test_rows_come_until_the_run_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ready = threading.Event()

    def train() -> None:
        with hfopt.Run(tmp_path / "run") as run:
            for step in range(8):
                run.log(step, loss=1.0 / (step + 1))
                if step == 3:
                    ready.set()
                time.sleep(0.02 if step < 4 else 0.1)

    thread = threading.Thread(target=train)
    thread.start()
    assert ready.wait(20)
    assert main(["watch", str(tmp_path / "run"), "-n", "2", "--every", "0.02"]) == 0
    thread.join()
    printed = capsys.readouterr().out
    shown = steps(printed)
    assert shown == list(range(shown[0], 8))
    assert shown[0] in (2, 3, 4)
    assert ", running" in printed.splitlines()[0]
    assert printed.splitlines()[-1] == "finished (finished) at step 7"


def test_one_that_has_ended(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write("run", 12)
    assert main(["watch", str(folder)]) == 0
    assert steps(capsys.readouterr().out) == list(range(2, 12))
    assert main(["watch", str(folder), "-n", "0"]) == 0
    assert steps(capsys.readouterr().out) == []
    assert main(["watch", str(folder), "-n", "99"]) == 0
    assert steps(capsys.readouterr().out) == list(range(12))
    assert main(["watch", str(folder), "--every", "0"]) == 1
    assert "must be above 0" in capsys.readouterr().err
