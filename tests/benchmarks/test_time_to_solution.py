"""Ours runs to the end, the other for so many times as long; the table tells a measured ratio from a bound."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import runs.reproduce
from benchmarks import time_to_solution as t

SMALL = ["hidden=20", "batch-size=100", "gradient-batches=4", "evaluation-batches=2", "test-sequences=300"]


@pytest.mark.slow
def test_a_pair_is_run_and_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs.reproduce, "_LOOK_EVERY", 0.5)
    options = [
        "--T",
        "10",
        "--seeds",
        "1",
        "--factor",
        "0.01",
        "--folder",
        str(tmp_path / "cells"),
        "--out",
        str(tmp_path),
    ]
    t.main([*options, "--setting", *SMALL, "threshold=0.5", "test-every=1"])
    ours, old = json.loads((tmp_path / "time_to_solution.json").read_text("utf-8"))
    assert (ours["settings"], old["settings"]) == (t.OURS, t.OLD)
    assert ours["solved"]
    assert ours["error"] < 0.5
    assert ours["seconds"] > 0
    assert ours["curve"][1][-1] == ours["error"]
    # The other was given a hundredth of that, and stopped after the step in progress.
    assert not old["solved"]
    assert 1 <= old["steps"] < 20
    text = (tmp_path / "time_to_solution.md").read_text("utf-8")
    assert ours["command"] in text
    assert "(a bound where a run was stopped)" in text
    assert (tmp_path / "time_to_solution.png").stat().st_size > 1000


def test_ratios_and_their_bounds() -> None:
    ours = t.Run(30, 0, t.OURS, True, 50.0, 30, 1000, 0.005, "ours", ((50.0,), (0.005,)))
    old = replace(ours, settings=t.OLD, seconds=200.0, command="old")
    assert t.ratio(ours, old) == "4.0"
    assert t.ratio(ours, replace(old, solved=False, error=0.3)) == "> 4.0"
    assert t.ratio(replace(ours, solved=False), old) == "< 4.0"
    assert t.ratio(replace(ours, solved=False), replace(old, solved=False)) == "neither"
    text = t.table([ours, old])
    assert "| 30 | 0 | 50 | 30 | 1000 | 200 | 30 | 1000 | 4.0 |" in text
    assert "median ratio 4.0." in text
    assert "200, 30% wrong" in t.table([ours, replace(old, solved=False, error=0.3)])


@pytest.mark.slow
def test_a_run_that_breaks_down_is_named(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="pathological-multiplication-T-1-seed0 broke down, see"):
        t.pair(1, 0, tmp_path, 1.0, 1.0)
