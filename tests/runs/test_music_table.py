"""The table of music: cells end for good by validation, reports are made where a budget ended a run, and the page."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import runs.music_table as t
import runs.reproduce as r
from runs.cells import Cell
from runs.music_presets import PRESETS
from runs.tables import Table

RUN = "music"
SMALL = ("--pieces", "20", "--optimizer", "adam", "--hidden", "5", "--nade", "0", "--minibatch", "8")
ROW = t.Judged("counterpoint: RNN, adam", ("counterpoint", *SMALL), "7.5", module="music", group="counterpoint")


def run_of(typed: Any, folder: Path, *more: str, seed: int = 0) -> Cell:
    """A cell that has run in this process."""
    cell = ROW.cells(seed + 1)[seed]
    words = cell.arguments[2:]
    assert typed(*words, "--name", str(folder / cell.name), *more) == 0
    return cell


def test_the_page_has_what_the_runs_reported(typed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(t, "ROWS", (ROW,))
    monkeypatch.setattr(t.results, "__defaults__", ((ROW,), 20))
    folder, page = tmp_path / "cells", tmp_path / "docs" / "music.md"
    page.parent.mkdir()
    page.write_text(f"before\n{t.BEGIN}\nold\n{t.END}\nafter\n")
    first = run_of(typed, folder, "--max-steps", "8")
    assert t.ended(first, folder)
    assert not t.ended(ROW.cells(2)[1], folder)
    report = json.loads((folder / first.name / "report.json").read_text())
    t.write(folder, page)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    values = [report[role]["nats_per_frame"] for role in ("valid", "test")]
    later = report["test"]["nats_per_later_frame"]
    row = next(line for line in text.splitlines() if line.startswith("| counterpoint: RNN, adam"))
    numbers = [cell.strip() for cell in row.strip("|").split("|")]
    assert numbers[1:6] == ["7.5", "1", *(f"{v:.3f}" for v in (*values, later))]
    detail = next(line for line in text.splitlines() if first.command in line)
    assert f"| {report['parameters']:,} | 8 | {report['step']} | by itself |" in detail
    assert (page.parent / "images" / "music-counterpoint.png").stat().st_size > 5_000
    t.write(folder, page)
    assert page.read_text() == text
    page.write_text("no marks")
    with pytest.raises(ValueError, match=r"music\.md has no lines"):
        t.write(folder, page)


@pytest.mark.slow
def test_a_budget_ends_a_cell_and_a_larger_one_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In processes of their own: the report of a cell that was ended early is made for the page."""
    monkeypatch.setattr(r, "_LOOK_EVERY", 0.5)
    row = t.Judged(ROW.title, (*ROW.words, "--patience", "3", "--max-steps", "3000"), "7.5", module="music", group="c")
    monkeypatch.setattr(t.results, "__defaults__", ((row,), 20))
    monkeypatch.setattr(t, "TABLE", Table("t", "", (row,), seeds=1))
    words = ["music", "--folder", str(tmp_path), "--seeds", "1"]

    def main(*more: str) -> int:
        monkeypatch.setattr(sys, "argv", ["reproduce", *words, *more])
        import tyro

        return r.main(tyro.cli(r.CommandLine, config=(tyro.conf.FlagCreatePairsOff,)))

    assert main("--budget-minutes", "0.001") == 0
    (found,) = t.results(tmp_path)
    assert not t.ended(found.cell, tmp_path)
    assert "by the budget" in (tmp_path / "music.md").read_text()
    assert found.report is not None
    before = found.report["step"]
    assert main() == 0
    (found,) = t.results(tmp_path)
    assert t.ended(found.cell, tmp_path)
    assert found.report is not None
    assert found.report["step"] > before
    assert "by itself" in (tmp_path / "music.md").read_text()
    times = (tmp_path / found.cell.name / "run.h5").stat().st_mtime_ns
    assert main() == 0  # nothing is left to do
    assert (tmp_path / found.cell.name / "run.h5").stat().st_mtime_ns == times


def test_every_row_names_a_preset_and_a_measure() -> None:
    import runs.pixels
    import runs.slots

    presets: dict[str, Any] = {"music": PRESETS, "slots": runs.slots.PRESETS, "pixels": runs.pixels.PRESETS}
    for row in t.ROWS:
        assert row.words[0] in presets[row.module]
        assert row.measure in t.MEASURES
    titles = [row.title for row in t.ROWS]
    assert len(set(titles)) == len(titles)
    assert [row.claim for row in t.ROWS if row.title == "jsb: RNN-NADE, hf"] == ["5.56"]
    seeds = {row.title: row.seeds for row in t.ROWS}
    assert (seeds["jsb: RNN, hf"], seeds["nottingham: RNN, hf"], seeds["ATIS: hf"]) == (3, 1, 3)
