"""The table of language models: which setting is best when, what is written, and that nothing else is touched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import runs.language_table as t
import runs.reproduce as r
from hfopt.experiment.data import Samples
from hfopt.experiment.driver import HF
from hfopt.experiment.hooks import KeepBest
from hfopt.experiment.metrics import Metric
from hfopt.experiment.store.reader import read_run
from runs.cells import Cell


def curve(title: str, minutes: list[float], bits: list[float], test: tuple[float, int] | None = None) -> t.Curve:
    cell = Cell("characters", tuple(title.split()), 0)
    return t.Curve(cell, title, np.array(minutes), np.array(bits), minutes[-1], 1000, test)


FOUND = [
    curve("A, lr 1", [1, 5, 10], [3.0, 2.5, 2.4], (2.45, 7)),
    curve("A, lr 2", [1, 5, 60], [2.9, 2.6, 2.0]),
    curve("B, lr 1", [1, 5, 9], [2.0, 1.9, 1.8]),
]


def test_the_best_setting_is_that_of_a_time() -> None:
    assert [c.title for c in t.chosen(FOUND, 1)] == ["A, lr 2", "B, lr 1"]
    assert [c.title for c in t.chosen(FOUND, 10)] == ["A, lr 1"]  # B ended too early, A, lr 2 was at 2.6
    assert FOUND[1].best(10) == 2.6
    assert [c.title for c in t.chosen(FOUND, 60)] == ["A, lr 2"]
    assert t.chosen([], 10) == []
    assert not np.isfinite(FOUND[2].best(10))


def test_every_method_has_five_settings_and_one_size() -> None:
    methods = [row.title.partition(", ")[0] for row in t.TABLE.rows]
    assert {m: methods.count(m) for m in methods} == {"HF-MRNN": 5, "Adam-MRNN": 5, "Adam-LSTM": 5, "Muon-MRNN": 5}
    assert all(row.words[0] == "ptb" and "--parameters" not in row.words for row in t.TABLE.rows)
    names = [cell.name for row in t.TABLE.rows for cell in row.cells(1)]
    assert len(set(names)) == 20


def a_run(folder: Path, cell: Cell) -> HF:
    """A run with the metric of characters, of a linear model."""
    torch.manual_seed(0)
    x, y = torch.randn(20, 3), torch.randint(0, 2, (20,))

    def bits(outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(outputs, batch.targets, reduction="none") / np.log(2)

    problem = Samples((x, y), (x, y), torch.nn.CrossEntropyLoss(), metrics=[Metric("bits per character", bits)])
    return HF(
        folder / cell.name,
        torch.nn.Linear(3, 2),
        problem,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        callbacks=[KeepBest("bits per character")],
        threshold=0,
        quiet=True,
    )


def test_results_go_between_the_marks_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = t.TABLE.rows[0].cells(1)[0]
    a_run(tmp_path, cell).optimize(3)
    run = read_run(tmp_path / cell.name)
    spent = float(run.steps["cpu_seconds"].sum()) / 60
    monkeypatch.setattr(t, "MINUTES", (0.9 * spent, 1000.0))
    asked = []

    def scored(words: list[str], **_: Any) -> None:
        asked.append(words)
        content = {"scores": {"test": 1.234, "step": run.find("best-test").step}}
        (tmp_path / cell.name / "scores.json").write_text(json.dumps(content), encoding="utf-8")

    monkeypatch.setattr("runs.language_table.subprocess.run", scored)
    page = tmp_path / "page.md"
    page.write_text(f"Before.\n\n{t.BEGIN}\nold\n{t.END}\n\nAfter.\n", encoding="utf-8")
    for _ in range(2):
        t.write(tmp_path, page)
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"Before.\n\n{t.BEGIN}\n")
    assert text.endswith(f"{t.END}\n\nAfter.\n")
    assert "old" not in text
    assert "1 of 20 cells have run" in text
    so_far = np.cumsum(run.steps["cpu_seconds"]) / 60 <= 0.9 * spent
    lowest = run.steps["bits per character"][so_far].min()
    assert f"| {t.TABLE.rows[0].title} | 8 | {lowest:.3f} | 1.234 |" in text
    assert "No cell has run for 1000 minutes yet." in text
    assert cell.command in text
    assert (tmp_path / "images" / "language.png").stat().st_size > 10_000
    # What has been scored is not scored again.
    assert len(asked) == 1
    assert asked[0][-1] == "--score"


def test_a_page_without_marks_is_left_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("Mine.\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"page\.md has no lines <!-- written by"):
        t.write(tmp_path, page)
    with pytest.raises(SystemExit, match="has no lines <!-- written by"):
        r.main(r.CommandLine("language", write=True, folder=tmp_path, document=page))
    assert page.read_text(encoding="utf-8") == "Mine.\n"


def test_what_has_not_run_is_said(tmp_path: Path) -> None:
    assert r.main(r.CommandLine("language", write=True, folder=tmp_path)) == 0
    assert "No cell has run yet." in (tmp_path / "language.md").read_text(encoding="utf-8")
    with pytest.raises(SystemExit, match="no cell has run for 10 minutes yet; run without --best"):
        r.main(r.CommandLine("language", best=True, folder=tmp_path))
    with pytest.raises(SystemExit, match=r"there is no table 'languages'; choose from all, pathological, .*language"):
        r.main(r.CommandLine("languages", write=True, folder=tmp_path))
