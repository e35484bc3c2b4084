"""What writing costs, what a full disk, a power cut and a second process do, and what is said about them."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from hfopt.experiment.store import appender, sealed
from hfopt.experiment.store.format import RunError, WriteError
from hfopt.experiment.store.lock import Lock, is_held
from hfopt.experiment.store.reader import read_run
from tests.hfopt.tiny import bits, experiment

ROOT = Path(__file__).parents[4]


def written(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts the bytes written to sealed files, by name."""
    counts: dict[str, int] = {}
    write = sealed.write_sealed

    def counted(path: Path, facts: Any, pieces: Any, *rest: Any) -> bool:
        pieces = list(pieces)
        counts[path.name] = counts.get(path.name, 0) + sum(len(memoryview(p).cast("B")) for p in pieces)
        return write(path, facts, pieces, *rest)

    monkeypatch.setattr(sealed, "write_sealed", counted)
    return counts


def test_a_save_writes_one_checkpoint_and_no_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows and checkpoints there are."""
    counts = written(monkeypatch)
    hf = experiment(tmp_path / "run", save_freq=1, keep_checkpoints=None, max_steps=40)
    hf.optimize()
    one = counts["00000001.h5"]
    assert sorted(counts) == sorted([*(f"{k:08d}.h5" for k in range(41)), "run.h5"])
    assert all(abs(size - one) <= 1024 for name, size in counts.items() if name not in ("run.h5", "00000000.h5"))
    size = (tmp_path / "run" / "run.h5").stat().st_size
    assert counts["run.h5"] < 3 * size  # at the start and at the end
    assert len(read_run(tmp_path / "run").steps) == 41


def test_rewriting_all_rows_stays_a_few_times_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfopt.experiment.store.writer._MANY", 8)
    counts = written(monkeypatch)
    hf = experiment(tmp_path / "run", optimizer="sgd", save_freq=1, max_steps=300, test_freq=100)
    versions = []
    save = hf._save

    def saving(*given: Any) -> None:
        save(*given)
        versions.append(read_run(tmp_path / "run").header.journal)

    hf._save = saving  # type: ignore[method-assign]
    hf.optimize()
    assert len(set(versions)) < 20  # of 300 saves
    assert counts["run.h5"] < 20 * (tmp_path / "run" / "run.h5").stat().st_size


def test_rows_are_flushed_before_they_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With steps that take longer than a flush, each; with quicker ones, as often as that takes a small share."""
    events: list[str] = []
    sync, clock = os.fsync, [0.0]

    def flush(handle: int) -> None:
        name = os.readlink(f"/proc/self/fd/{handle}")
        if "journal" in name:
            events.append("flush")
            clock[0] += 0.002
        sync(handle)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(sealed.time, "perf_counter", lambda: clock[0])
    hf = experiment(tmp_path / "run", save_freq=100, max_steps=30)

    def say(text: str) -> None:
        if re.search(r"^ +\d+ \d\.", text, re.MULTILINE):
            events.append("row")

    hf._say = say  # type: ignore[method-assign]
    forget = hf.problem.forget

    def step() -> None:
        clock[0] += 0.1 if hf.step < 10 else 0.001
        forget()

    hf.problem.forget = step  # type: ignore[method-assign]
    hf.optimize(10)
    assert events[:20] == ["flush", "row"] * 10
    del events[:]
    hf.load()
    hf.optimize()
    assert 1 <= events.count("flush") < 10
    assert events.count("row") >= 20


PROGRAM = """
import errno, json, os, resource, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import hfopt
from tests.hfopt.tiny import bits, experiment
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder, limit = Path(sys.argv[1]), int(sys.argv[2])
hf = experiment(folder, save_freq=2, max_steps=12)
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
said, tries = [], 0
hf.optimize(1)
while True:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit if tries % 2 == 0 and tries < 8 else most, most))
    tries += 1
    try:
        outcome = hf.optimize()
        break
    except hfopt.RunError as error:
        said.append(str(error))
print(json.dumps({"outcome": outcome, "said": said, "bits": {k: v.hex() for k, v in bits(hf).items()}}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("limit", [100, 3000, 12000])
def test_a_full_disk_is_a_sentence_and_the_run_goes_on(tmp_path: Path, limit: int) -> None:
    """Files cannot grow beyond a limit: the journal at 100 bytes, then a text log, then run.h5 or a checkpoint."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(PROGRAM), str(tmp_path / "run"), str(limit)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr  # not a segmentation fault in HDF5 either
    assert done.stderr == ""
    found = json.loads(done.stdout)
    assert found["outcome"] == "max_steps"
    assert found["said"]
    assert all("cannot be written (File too large); nothing that was computed is lost" in s for s in found["said"])
    whole = experiment(tmp_path / "whole", save_freq=2, max_steps=12)
    whole.optimize()
    assert found["bits"] == {name: value.hex() for name, value in bits(whole).items()}
    run, other = read_run(tmp_path / "run"), read_run(tmp_path / "whole")
    for column in ("step", "train_loss", "test_loss", "error_rate"):
        assert run.steps[column].tobytes() == other.steps[column].tobytes()
    assert run.find().step == 12
    assert not list((tmp_path / "run").rglob(".*"))
    text = (tmp_path / "run" / "results").read_text()
    assert [text.count(f"step {k}\n") for k in range(2, 12)] == [1] * 10


def test_what_an_appender_could_not_write_comes_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, write, room = tmp_path / "file", os.write, [5]

    def little(handle: int, data: Any) -> int:
        if room[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = write(handle, bytes(data)[: room[0]])
        room[0] -= taken
        return taken

    file = appender.Appender(path)
    monkeypatch.setattr(os, "write", little)
    file.write("one\n")
    for _ in range(2):
        room[0] = 2
        with pytest.raises(WriteError, match=r"file cannot be written \(No space left on device\)"):
            file.write("two\n")
        assert path.read_text() == "one\n"
    room[0] = 100
    file.write("three\n")
    assert path.read_text() == "one\ntwo\ntwo\nthree\n"
    assert not file.waits


@pytest.mark.parametrize("place", ["file/run", "file"])
def test_a_folder_that_cannot_be(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    hf = experiment(tmp_path / place)
    with pytest.raises(RunError, match=r"file.* cannot be written \((Not a directory|File exists)\)"):
        hf.optimize()


# -- two processes ------------------------------------------------------------------------------------------

HOLDER = """
import sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.hfopt.tiny import experiment
hf = experiment(Path(sys.argv[1]), max_steps=10**6, test_freq=1000, quiet=True)
forget = hf.problem.forget
def slow():
    time.sleep(0.01)
    forget()
hf.problem.forget = slow
hf.optimize()
"""


@pytest.mark.slow
def test_a_live_run_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLDER), str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        deadline = time.monotonic() + 120
        while not ((folder / "run.h5").exists() and len(read_run(folder).steps) > 2):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert is_held(folder)
        for overwrite in (False, True):
            second = experiment(folder, overwrite=overwrite)
            with pytest.raises(RunError, match=f"process {holder.pid} is writing the run in .*, since 20.*-c") as error:
                second.optimize()
            assert "choose another name" in str(error.value)
        assert [p.name for p in tmp_path.iterdir()] == ["run"]
        before = len(read_run(folder).steps)
        time.sleep(0.3)
        assert len(read_run(folder).steps) > before
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert not is_held(folder)
    experiment(folder, max_steps=1).optimize()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "run.1"]


def test_a_lock_taken_while_the_folder_is_moved_is_not_of_the_new_one(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = Lock(folder)
    folder.rename(tmp_path / "aside")
    second = Lock(folder)  # another folder
    with pytest.raises(RunError, match="is writing"):
        Lock(folder)
    with pytest.raises(RunError, match="is writing"):
        Lock(tmp_path / "aside")
    first.release()
    second.release()
    Lock(folder).release()


def test_looking_at_a_lock_does_not_keep_a_run_from_starting(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    Lock(folder).release()
    for _ in range(50):
        assert not is_held(folder)
    Lock(folder).release()
