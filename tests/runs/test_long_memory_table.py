"""The table of long memory: its cells are runs that there are, and its page has what they came to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import runs.copytask as c
import runs.long_memory_table as t
import runs.ptb_characters as p
import runs.reproduce as r
import runs.smnist as s
from hfopt.experiment.store.reader import read_run
from runs.cells import Cell
from runs.long_memory import parsed
from runs.long_memory_presets import SMNIST, CopyTask, PTBCharacters
from runs.tables import Table

RUN = "copytask"
SMALL = (
    "--T",
    "4",
    "--c-length",
    "2",
    "--nhid",
    "6",
    "--log-interval",
    "2",
    "--test-sequences",
    "20",
    "--updates",
    "6",
)
ROW = t.Judged("copy, T = 4: nnRNN", SMALL, "0", module="copytask", group="copy-4")


def test_every_row_is_a_command() -> None:
    known = {
        "copytask": (CopyTask(), c.PRESETS),
        "smnist": (SMNIST(), s.PRESETS),
        "ptb_characters": (PTBCharacters(), p.PRESETS),
    }
    for row in t.ROWS:
        (cell,) = row.cells(1)
        default, presets = known[row.module]
        found = parsed(default, presets, [*cell.words, "--seed", "3"], cell.module)  # type: ignore[type-var]
        assert found.seed == 3
        assert found.optimizer == ("hf" if "hf" in row.title else "RMSprop") or found.preset == "nnrnn-ptb-150"
        assert (found.net_type.lower() in row.title.lower()) is True
    names = [cell.name for row in t.ROWS for cell in row.cells(1)]
    assert len(set(names)) == len(names)


def test_the_page(typed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(t, "ROWS", (ROW, t.Judged("another", ("--T", "5"), "-", module="copytask")))
    folder, page = tmp_path / "cells", tmp_path / "docs" / "long_memory.md"
    page.parent.mkdir()
    page.write_text(f"before\n{t.BEGIN}\nold\n{t.END}\nafter\n")
    t.write(folder, page)
    assert "No cell has run yet." in page.read_text()
    cell = Cell("copytask", SMALL, 0)
    assert not t.ended(cell, folder)
    assert typed(*cell.arguments[2:], "--name", str(folder / cell.name)) == 0
    assert t.ended(cell, folder)
    t.write(folder, page)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    best = min(x for x in read_run(folder / cell.name).steps["test_loss"] if x == x)
    assert f"| copy, T = 4: nnRNN | 0 | 0 | 6 | {best:.4f} |" in text
    assert "Not run here yet: another." in text
    assert (page.parent / "images" / "long-memory-copy-4.png").stat().st_size > 5_000
    page.write_text("no marks")
    with pytest.raises(ValueError, match=r"long_memory\.md has no lines"):
        t.write(folder, page)


@pytest.mark.slow
def test_cells_go_on_where_they_were_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(t, "TABLE", Table("", "", (ROW,), seeds=1))
    command = r.CommandLine(table="long-memory", folder=tmp_path, document=tmp_path / "page.md")
    assert r.main(command) == 0
    (cell,) = ROW.cells(1)
    size = (tmp_path / cell.name / "run.h5").stat().st_size
    assert r.main(command) == 0
    assert (tmp_path / cell.name / "run.h5").stat().st_size == size
