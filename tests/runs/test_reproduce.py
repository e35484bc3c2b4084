"""Tables: their cells run, stop at a budget, go on, and are written down as their files have them."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import runs.reproduce as r
from hfopt.experiment.store.reader import read_run
from pathological import PROBLEMS
from runs.cells import Cell, result, summary
from runs.presets import PATHOLOGICAL
from runs.reproduction import write_document
from runs.tables import TABLES, Row, Table

SMALL = (
    *("--hidden", "20", "--batch-size", "100", "--gradient-batches", "6", "--test-sequences", "300"),
    *("--threshold", "0.3", "--test-every", "1"),
)
EASY = Row("addition, T = 10", ("addition", "--T", "10", *SMALL, "--max-steps", "100"), "solved", "addition, T = 11")
LONG = Row("addition, T = 11", ("addition", "--T", "11", *SMALL, "--threshold", "0"), "open")
SHORT = Row("xor, T = 10", ("xor", "--T", "10", *SMALL, "--max-steps", "1"), "never")
WRONG = Row("xor, T = 1", ("xor", "--T", "1", *SMALL), "refused")


def numbers(line: str) -> list[str]:
    return [part.strip() for part in line.strip("|").split("|")]


@pytest.mark.slow
def test_cells_run_stop_go_on_and_are_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(r, "_LOOK_EVERY", 0.5)
    folder, said = tmp_path / "cells", list[str]()
    easy, long, short, wrong = (row.cells(1)[0] for row in (EASY, LONG, SHORT, WRONG))

    # A budget of next to nothing: the cell without a threshold is stopped and saved, the others may finish.
    broken = r.run_cells([easy, long, short, wrong], folder, jobs=4, budget=1e-3, say=said.append)
    assert broken == [wrong]
    assert "T is 1; xor in the paper form needs" in (folder / f"{wrong.name}.txt").read_text()
    stopped, ended = result(folder / long.name), result(folder / short.name)
    assert stopped is not None
    assert ended is not None
    assert stopped.state == "unfinished"
    assert 0 < stopped.steps < 500
    assert (ended.state, ended.steps) == ("not solved", 1)
    assert not r.due(stopped, 1e-3)
    assert r.due(stopped, 1e6)
    assert not r.due(ended, 1e6)
    assert any(line.startswith(f"{long.name}: unfinished, ") for line in said)

    # Nothing is left to do for that budget; with a larger one the easy cell is solved, from where it was.
    assert r.run_cells([long, short], folder, budget=1e-3) == []
    before = result(folder / easy.name)
    assert r.run_cells([easy], folder, say=said.append) == []
    solved = result(folder / easy.name)
    assert solved is not None
    assert solved.state == "solved"
    assert before is not None
    assert solved.steps >= before.steps
    run = read_run(folder / easy.name)
    assert run.steps["step"].tolist() == list(range(solved.steps + 1))
    assert solved.products == run.steps["products"][:-1].sum()
    assert solved.cg_iterations == run.steps["cg_iterations"][:-1].sum()
    assert solved.cpu_seconds == pytest.approx(run.steps["cpu_seconds"].sum())
    assert solved.spent == solved.cpu_seconds
    assert solved.error == run.steps["error_rate"][-1] < 0.3

    # Every number of the document is that of the files.
    document = tmp_path / "docs" / "reproduction.md"
    table = Table("Small problems", "Nothing new.", (EASY, LONG, SHORT, WRONG), shown="addition, T = 10")
    write_document({"small": table, "empty": Table("Not run", "", (WRONG,))}, folder, document)
    text = document.read_text()
    assert "1 of 3 runs solved. `python -m runs.reproduce small`" in text
    assert "## Not run" not in text
    lines = {numbers(line)[0]: numbers(line)[1:] for line in text.splitlines() if line.startswith("|")}
    steps, cg, products, seconds = solved.steps, solved.cg_iterations, solved.products, f"{solved.spent:.0f}"
    assert lines["addition, T = 10"] == ["solved", "1 of 1", str(steps), str(cg), str(products), seconds]
    assert lines["xor, T = 10"] == ["never", "0 of 1", "-", "-", "-", "-"]
    assert lines["xor, T = 1"] == ["refused", "not run", "-", "-", "-", "-"]
    command = f"`python -m runs.pathological {' '.join(EASY.words)} --seed 0`"
    assert lines[command][:4] == ["solved", str(steps), str(cg), str(products)]
    assert lines[command][-2:] == [f"{100 * solved.error:.2f}%", f"{100 * solved.lowest:.2f}%"]
    ratio = stopped.spent / solved.spent
    assert f"addition, T = 10: more than {ratio:.1f} times as fast" in text
    assert f"torch {run.versions['torch']}" in text
    images = re.findall(r"\]\((images/.*?)\)", text)
    assert images == [f"images/reproduction-{what}.png" for what in ("small", "curves", "hidden")]
    assert all((document.parent / image).read_bytes()[1:4] == b"PNG" for image in images)


@pytest.mark.slow
def test_an_interrupt_saves_what_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(r, "_LOOK_EVERY", 0.0)
    (cell,) = LONG.cells(1)
    looks = itertools.count()

    def looking(folder: Path) -> Any:
        found = result(folder)
        if found is not None and next(looks) >= 1:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(r, "result", looking)
    with pytest.raises(KeyboardInterrupt):
        r.run_cells([cell], tmp_path)
    run = read_run(tmp_path / cell.name)
    assert run.find().step == len(run.steps)
    assert "interrupted and saved" in (tmp_path / f"{cell.name}.txt").read_text()


def test_tables_hold_what_was_published() -> None:
    rows = {row.title: row for row in TABLES["pathological"].rows}
    assert len(rows) == len(TABLES["pathological"].rows) == 15
    assert {f"{name}, T = 30" for name in PROBLEMS} < set(rows)
    assert "xor, T = 50" not in rows
    assert "random_permutation, T = 200" in {row.title for row in TABLES["pathological-long"].rows}
    for table in TABLES.values():
        titles = {row.title for row in table.rows}
        assert {row.against for row in table.rows if row.against} <= titles
        for row in table.rows:
            assert row.words[0] in PATHOLOGICAL
    with_, without = TABLES["memorization-damping"].rows[:2]
    assert without.words == (*with_.words, "--structural", "0")


def test_a_cell_is_a_command() -> None:
    cell = Cell("pathological", ("xor", "--T", "30"), 2)
    assert cell.command == "python -m runs.pathological xor --T 30 --seed 2"
    assert cell.name == "pathological-xor-T-30-seed2"
    names = [c.name for table in TABLES.values() for row in table.rows for c in row.cells(3)]
    commands = [c.command for table in TABLES.values() for row in table.rows for c in row.cells(3)]
    assert len(set(names)) == len(set(commands))


def test_seeds_come_one_after_the_other() -> None:
    table = TABLES["pathological"]
    cells = r.chosen(table, r.CommandLine(only=("xor*", "add*"), seeds=2))
    assert [(cell.words[0], cell.words[2], cell.seed) for cell in cells] == [
        *[("addition", "30", 0), ("xor", "30", 0), ("addition", "50", 0)],
        *[("addition", "30", 1), ("xor", "30", 1), ("addition", "50", 1)],
    ]
    assert {cell.seed for cell in r.chosen(table, r.CommandLine(first_seed=1))} == {1, 2}


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="no table 'nothing'; choose from all, pathological,"):
        r.main(r.CommandLine(table="nothing"))
    with pytest.raises(SystemExit, match="no row is called nothing"):
        r.main(r.CommandLine(only=("nothing",)))
    document = tmp_path / "reproduction.md"
    assert r.main(r.CommandLine(write=True, folder=tmp_path / "cells", document=document)) == 0
    assert "There are no runs yet." in document.read_text()
    assert str(document) in capsys.readouterr().out
    # Unless it is told otherwise, it writes beside the runs: never over what the repository publishes.
    published = (r.ROOT / "docs" / "reproduction.md").read_bytes()
    for only in ((), ("addition*",)):
        assert r.main(r.CommandLine(write=True, folder=tmp_path / "cells", only=only)) == 0
        assert (tmp_path / "cells" / "reproduction.md").read_text() == document.read_text()
    assert (r.ROOT / "docs" / "reproduction.md").read_bytes() == published


class TestSummary:
    """A made-up run, so that devices and lengths of logs can be varied."""

    @staticmethod
    def run(device: str = "cpu", **columns: Any) -> Any:
        from types import SimpleNamespace

        from hfopt.experiment.store.format import STEP_TYPE, table

        rows = [
            {"step": 0, "updated": True, "error_rate": 0.9, "seconds": 4.0, "cpu_seconds": 2.0, "train_loss": 1.0},
            {"step": 1, "updated": True, "seconds": 4.0, "cpu_seconds": 3.0, "train_loss": 0.5},
            {"step": 2, "error_rate": 0.005, "seconds": 1.0, "cpu_seconds": 0.5, "train_loss": 0.1},
        ]
        rows[0] |= {"cg_iterations": 10, "products": 12}
        rows[1] |= {"cg_iterations": 20, "products": 22}
        rows[-1] |= columns
        driver = {"threshold": 0.01, "max_steps": 2}
        return SimpleNamespace(
            steps=table(rows, STEP_TYPE),
            versions={"device": device},
            configuration={"driver": driver},
            metrics=[SimpleNamespace(column="error_rate")],
        )

    def test_numbers(self) -> None:
        found = summary(self.run())
        assert (found.state, found.steps, found.cg_iterations, found.products) == ("solved", 2, 30, 34)
        assert (found.seconds, found.cpu_seconds, found.spent) == (9.0, 5.5, 5.5)
        assert (found.error, found.lowest) == (0.005, 0.005)
        assert found.curve[0].tolist() == [2.0, 5.5]
        assert found.curve[1].tolist() == [0.9, 0.005]

    def test_the_clock_counts_on_a_gpu_and_in_logs_without_processor_time(self) -> None:
        assert summary(self.run("cuda:0")).spent == 9.0
        assert summary(self.run("cuda:0")).curve[0].tolist() == [4.0, 9.0]
        old = summary(self.run(cpu_seconds=np.nan))
        assert old.spent == 9.0
        assert old.curve[0].tolist() == [4.0, 9.0]

    def test_states(self) -> None:
        assert summary(self.run(error_rate=0.5)).state == "not solved"
        assert summary(self.run(error_rate=0.5, step=1)).state == "unfinished"
        assert summary(self.run(updated=True, error_rate=0.5)).state == "unfinished"
        assert summary(self.run(updated=True, error_rate=0.5, train_loss=np.nan)).state == "not solved"
