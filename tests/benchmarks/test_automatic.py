"""The benchmark of the preconditioner that is taken by itself runs, and tells what was taken."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import automatic
from benchmarks.automatic import Row, table


@pytest.mark.slow
def test_it_measures_and_writes(tmp_path: Path) -> None:
    automatic.main(["--problems", "logistic", "addition", "--time", "0", "--out", str(tmp_path)])
    lines = (tmp_path / "automatic.md").read_text("utf-8").splitlines()
    found = {line.split(" | ")[0].strip("| "): line.split(" | ")[-1].strip(" |") for line in lines if "/" in line}
    assert found["logistic"] == "kfac"
    assert found["addition"] == "none"


def test_the_table_shows_every_share() -> None:
    text = table([Row("digits", 6.0, (0.5, 0.25, 0.125), (0.4, 0.2, 0.01), "kfac")])
    assert "| digits | 6 | 0.5 / 0.25 / 0.125 | 0.4 / 0.2 / 0.01 | kfac |" in text
