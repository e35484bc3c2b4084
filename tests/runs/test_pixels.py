"""Sequential images, typed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import runs.pixels as p
from hfopt.experiment.store.reader import read_run

RUN = "pixels"
SMALL = ("--hidden", "20", "--cg-iterations", "15")


def test_rows_of_digits(tmp_path: Path, typed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("digits", "--name", str(tmp_path / "run"), *SMALL)
    assert typed(*words, "--max-steps", "8") == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["valid"]["error_rate"] < 0.12
    assert report["test"]["error_rate"] < 0.25
    assert "test: error rate" in capsys.readouterr().out
    assert typed(*words, "--picture", str(tmp_path / "rows.png")) == 0
    assert (tmp_path / "rows.png").stat().st_size > 5_000


@pytest.mark.parametrize("order", ["pixels", "permuted"])
def test_other_orders(tmp_path: Path, typed: Any, order: str) -> None:
    words = ("digits", "--name", str(tmp_path / "run"), *SMALL, "--order", order, "--max-steps", "3")
    assert typed(*words) == 0
    run = read_run(tmp_path / "run")
    assert run.steps["test_loss"][-1] < run.steps["test_loss"][0]
    assert run.configuration["problem"]["order"] == order
    assert typed(*words, "--picture", str(tmp_path / "a.png")) == 0


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("name", ["adam", "muon"])
def test_first_order_optimizers(tmp_path: Path, typed: Any, name: str, cell: str) -> None:
    words = ("digits", "--name", str(tmp_path / "run"), "--optimizer", name, "--cell", cell, "--lr", "0.01")
    assert typed(*words, "--max-steps", "60") == 0
    error = read_run(tmp_path / "run").steps["error_rate"]
    assert error[-1] < 0.5 < error[0]


def test_presets_and_refusals(tmp_path: Path, typed: Any) -> None:
    assert p.settings == p.PRESETS["digits"]
    assert p.PRESETS["permuted"].permutation == 1234
    assert "there is no preset 'columns'; choose from rows, pixels, permuted, digits" in typed("columns")
    assert "there is no train-images-idx3-ubyte in" in typed("rows", "--folder", str(tmp_path))
    assert "optimizer nag has no settings here" in typed("digits", "--optimizer", "nag")
