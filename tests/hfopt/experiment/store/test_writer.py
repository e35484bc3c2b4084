"""The run log: what was acknowledged can be read, whatever happens and whenever it is read."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from hfopt.experiment.store import format as runfile
from hfopt.experiment.store.format import RunError
from hfopt.experiment.store.reader import read_run
from hfopt.experiment.store.writer import RunLog

ODD = [math.nan, math.inf, -math.inf, 0.1, -0.0, 5e-324, 1.7976931348623157e308, 2 / 3]


def row(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "updated": True, "train_loss": ODD[step % len(ODD)], "cg_reason": "progress", **more}


def checks(step: int) -> list[dict[str, Any]]:
    return [
        {"step": step, "iteration": i, "model": -0.1 * i, "residual": ODD[i], "norm": 1 / 3} for i in range(step % 3)
    ]


def state(step: int) -> dict[str, Any]:
    return {"step": step, "parameters": {"w": torch.full((2,), float(step))}}


def header(**more: Any) -> dict[str, Any]:
    return {
        "name": "run",
        "created": "today",
        "seed": 7,
        "configuration": {"a": [1, 2]},
        "versions": {"b": "3"},
        **more,
    }


def started(folder: Path, *, keep: int | None = None, overwrite: bool = False) -> RunLog:
    log, _ = RunLog.start(folder, header(), state(0), keep=keep, overwrite=overwrite)
    return log


def append(log: RunLog, *steps: int) -> None:
    for step in steps:
        log.append(row(step), checks(step), f"block {step}\n", f"detailed {step}\n")


def test_rows_come_back_to_the_bit(tmp_path: Path) -> None:
    with started(tmp_path / "run") as log:
        append(log, *range(5))
        log.save(state(5))
        append(log, 5, 6, 7)
        run = read_run(tmp_path / "run")  # three rows are in the journal only
    expected = np.array([ODD[i % len(ODD)] for i in range(8)])
    assert run.steps["train_loss"].tobytes() == expected.tobytes()
    assert run.steps["step"].tolist() == list(range(8))
    assert set(run.steps["cg_reason"]) == {b"progress"}
    assert np.isnan(run.steps["rho"]).all()
    assert (run.steps["products"] == -1).all()
    every = [check for i in range(8) for check in checks(i)]
    for name in ("step", "iteration", "model", "residual", "norm"):
        assert run.checks[name].tobytes() == np.array([c[name] for c in every]).tobytes()
    assert (run.name, run.seed, run.created) == ("run", 7, "today")
    assert run.configuration == {"a": [1, 2]}
    assert run.versions == {"b": "3"}


def test_text_logs_are_written_at_once(tmp_path: Path) -> None:
    with started(tmp_path / "run") as log:
        append(log, 0, 1)
        log.note("a note")
        assert (tmp_path / "run" / "results").read_text() == "block 0\nblock 1\na note\n"
        assert (tmp_path / "run" / "detailed_results").read_text() == "detailed 0\ndetailed 1\na note\n"


def test_any_hdf5_reader_can_read_the_file(tmp_path: Path) -> None:
    with started(tmp_path / "run") as log:
        append(log, 0, 1, 2)
        log.save(state(3))
        log.finish("max_steps")
    with h5py.File(tmp_path / "run" / "run.h5", "r") as file:
        assert file["steps"].dtype.names[:3] == ("step", "updated", "train_loss")
        assert "before the update" in file["steps"].attrs["train_loss"]
        assert file["checks"]["iteration"].tolist() == [0, 0, 1]
        assert file["checkpoints"]["key"].tolist() == [b"00000000", b"00000003"]
        assert json.loads(file["configuration"][()].tobytes()) == {"a": [1, 2]}
        assert file.attrs["seed"] == 7
        assert file.attrs["outcome"] == "max_steps"
    with h5py.File(tmp_path / "run" / "checkpoints" / "00000003.h5", "r") as file:
        assert file["parameters/w"][()].tolist() == [3.0, 3.0]


@pytest.mark.parametrize("torn", [b'{"step":{"step":3,"upd', b"\x00\x00", b'{"step":{"step":3},"checks":[]}'])
def test_a_torn_last_line_is_left_out(tmp_path: Path, torn: bytes) -> None:
    folder = tmp_path / "run"
    with started(folder) as log:
        append(log, 0, 1, 2)
    with runfile.journal_path(folder, 1).open("ab") as journal:
        journal.write(torn)
    assert read_run(folder).steps["step"].tolist() == [0, 1, 2]
    with RunLog.resume(folder, 1, 1, keep=None) as log:
        append(log, 3)
    assert read_run(folder).steps["step"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("damaged", ["{", "[]", '{"step": 1}', "3"])
def test_a_damaged_line_in_the_middle_is_an_error(tmp_path: Path, damaged: str) -> None:
    folder = tmp_path / "run"
    with started(folder) as log:
        append(log, 0)
    with runfile.journal_path(folder, 1).open("a") as journal:
        journal.write(damaged + "\n" + runfile.journal_line(row(1), []))
    with pytest.raises(RunError, match=r"journal-1\.jsonl is damaged.*delete it"):
        read_run(folder)


def test_a_row_replaces_all_of_its_step_and_later(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with started(folder) as log:
        append(log, 0, 1, 2)
        log.save(state(3))
        append(log, 3, 4)
    with RunLog.resume(folder, 2, 2, keep=None) as log:  # back to step 3
        assert read_run(folder).steps["step"].tolist() == [0, 1, 2, 3, 4]
        log.append(row(3, seconds=9.0), [], "", "")
        run = read_run(folder)
        assert run.steps["step"].tolist() == [0, 1, 2, 3]
        assert run.steps["seconds"][3] == 9.0
        assert run.checks["step"].tolist() == [1, 2, 2]
        append(log, 1)
        assert read_run(folder).steps["step"].tolist() == [0, 1]
        log.save(None)
        assert read_run(folder).steps["step"].tolist() == [0, 1]


@pytest.mark.slow
def test_every_moment_of_a_save_is_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process killed at any of these moments would leave behind holds all acknowledged rows."""
    folder, moments, acknowledged = tmp_path / "run", [], [0]
    replace, unlink = os.replace, Path.unlink

    def snapshot() -> None:
        if (folder / "run.h5").exists():
            copy = tmp_path / f"moment{len(moments)}"
            shutil.copytree(folder, copy)
            moments.append((copy, acknowledged[0]))

    def watched_replace(old: Any, new: Any) -> None:
        snapshot()
        replace(old, new)
        snapshot()

    def watched_unlink(path: Path, **options: Any) -> None:
        snapshot()
        unlink(path, **options)
        snapshot()

    monkeypatch.setattr(os, "replace", watched_replace)
    monkeypatch.setattr(Path, "unlink", watched_unlink)
    with started(folder, keep=2) as log:
        for step in range(7):
            append(log, step)
            acknowledged[0] = step + 1
            snapshot()
            if step % 2:
                log.save(state(step + 1))
    monkeypatch.undo()
    assert len(moments) > 15
    for copy, count in moments:
        run = read_run(copy)
        assert run.steps["step"].tolist() == list(range(count))
        assert max(0, count - 2) <= run.checkpoint()["step"] <= count
        with RunLog.resume(copy, run.checkpoints[-1].serial, run.checkpoints[-1].serial, keep=2) as log:
            append(log, count)
        assert read_run(copy).steps["step"].tolist() == list(range(count + 1))
        assert not list(copy.glob(".*"))


def test_a_failed_save_leaves_the_old_version(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with started(folder) as log:
        append(log, 0)
        with pytest.raises(TypeError, match="cannot be saved"):
            log.save({"step": 1, "parameters": {"w": object()}})
        append(log, 1)
    run = read_run(folder)
    assert run.steps["step"].tolist() == [0, 1]
    assert [c.step for c in run.checkpoints] == [0]
    assert not list(folder.glob(".*"))


def test_which_checkpoints_stay(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    errors = [0.9, 0.2, 0.5, 0.1, 0.4, 0.4, 0.3, 0.3, 0.3]
    with started(folder, keep=2) as log:
        for step, error in enumerate(errors):
            log.append(row(step, test_loss=1.0, error_rate=error), [], "", "")
            log.save(state(step + 1), "mine" if step == 1 else None)
    run = read_run(folder)
    assert [c.key for c in run.checkpoints] == ["mine", "00000003", "00000008", "00000009"]
    assert run.find("best").step == 3
    assert run.find("last").step == run.find(-1).step == 9
    assert run.find(8).key == "00000008"
    assert run.find("mine").step == 2
    assert run.parameters("mine")["w"].tolist() == [2.0, 2.0]
    for missing in (7, "other", -5):
        with pytest.raises(KeyError, match="mine, 3, 8, 9"):
            run.find(missing)
    with started(tmp_path / "all") as log:
        for step in range(6):
            log.save(state(step))
    assert [c.step for c in read_run(tmp_path / "all").checkpoints] == list(range(6))


@pytest.mark.parametrize("name", ["last", "best", "1", "a/b", "", ".x"])
def test_names_of_checkpoints(tmp_path: Path, name: str) -> None:
    with started(tmp_path / "run") as log, pytest.raises(ValueError, match="name="):
        log.save(state(1), name)


def test_resuming_at_an_earlier_checkpoint_drops_the_later_ones(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with started(folder) as log:
        for step in (1, 2, 3):
            log.save(state(step), "kept" if step == 2 else None)
    with pytest.raises(RunError, match="gone on elsewhere"):
        RunLog.resume(folder, 2, 3, keep=None)
    RunLog.resume(folder, 2, 4, keep=None).close()
    assert [c.key for c in read_run(folder).checkpoints] == ["00000000", "00000001", "kept"]


def test_only_one_writer(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with started(folder) as log:
        append(log, 0)
        with pytest.raises(RunError, match=f"process {os.getpid()} is writing"):
            started(folder)
        with pytest.raises(RunError, match="is writing"):
            RunLog.resume(folder, 1, 1, keep=None)
    assert read_run(folder).steps["step"].tolist() == [0]
    RunLog.resume(folder, 1, 1, keep=None).close()


def test_a_new_run_moves_an_earlier_one_aside(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for _ in range(2):  # the first has not finished a step: nothing is lost with it
        started(folder).close()
        assert list(tmp_path.iterdir()) == [folder]
    for number in (1, 2):
        with RunLog.resume(folder, 1, 1, keep=None) as log:
            append(log, *range(number))
        log, moved = RunLog.start(folder, header(), state(0), keep=None, overwrite=False)
        log.close()
        assert moved == tmp_path / f"run.{number}"
        assert len(read_run(moved).steps) == number
    with RunLog.resume(folder, 1, 1, keep=None) as log:
        append(log, 0)
    (folder / "notes").write_text("mine")
    started(folder, overwrite=True).close()
    assert len(read_run(folder).steps) == 0
    assert (folder / "results").read_text() == ""
    assert (folder / "notes").exists()
    assert not (tmp_path / "run.3").exists()


def test_a_damaged_run_is_moved_aside_too(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.h5").write_bytes(b"no HDF5")
    started(folder).close()
    assert (tmp_path / "run.1" / "run.h5").read_bytes() == b"no HDF5"


def test_a_stale_journal_is_not_taken_for_the_new_runs(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with started(folder) as log:
        append(log, 0, 1)
    (folder / "run.h5").unlink()
    started(folder).close()
    assert len(read_run(folder).steps) == 0


def test_what_cannot_be_read_is_told_plainly(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no run at .*nothing"):
        read_run(tmp_path / "nothing")
    folder = tmp_path / "run"
    with started(folder) as log:
        append(log, 0, 1)
        log.save(state(2))
    whole = (folder / "run.h5").read_bytes()
    for length in (0, 10, 1000, len(whole) // 2, len(whole) - 1):
        (folder / "run.h5").write_bytes(whole[:length])
        with pytest.raises(RunError, match="truncated, damaged"):
            read_run(folder)
    (folder / "run.h5").unlink()
    with h5py.File(folder / "run.h5", "w") as file:
        file["steps"] = [1, 2, 3]
    with pytest.raises(RunError, match="no run of hfopt wrote it"):
        read_run(folder)
    (folder / "run.h5").write_bytes(whole.replace(b'"version":2', b'"version":3', 1))
    with pytest.raises(RunError, match="use a newer hfopt"):
        read_run(folder)


def test_reading_while_the_run_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save between the reading of run.h5 and of its journal is noticed."""
    folder = tmp_path / "run"
    read, saved = runfile.read_journal, []
    with started(folder) as log:
        append(log, 0, 1)

        def read_late(path: Path, version: int) -> Any:
            if not saved:
                saved.append(True)
                log.finish("max_steps")
            return read(path, version)

        monkeypatch.setattr(runfile, "read_journal", read_late)
        assert read_run(folder).steps["step"].tolist() == [0, 1]


def test_a_run_is_found_by_folder_file_and_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    started(Path("runs", "logs", "one")).close()
    for path in ("one", "runs/logs/one", Path("runs/logs/one/run.h5"), tmp_path / "runs/logs/one"):
        assert read_run(path).name == "run"


def test_journal_lines_are_json() -> None:
    line = runfile.journal_line({"step": 1, "rho": math.nan}, [])
    assert line.endswith("\n")
    assert json.loads(line)["step"] == {"step": 1, "rho": pytest.approx(math.nan, nan_ok=True)}
