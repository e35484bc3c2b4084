"""A kill or a full disk at any moment: between any two changes of the disk, and in the middle of any write.

What a kill leaves is a copy of the folder as it was at that moment. The longer form with all moments, and with real
kills in tests/hfopt/experiment/test_crash.py, runs where HFOPT_LONG=1 is set.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import hfopt
from hfopt.experiment.driver import HF
from hfopt.experiment.store.format import WriteError
from hfopt.experiment.store.reader import read_run
from tests.hfopt.tiny import bits, experiment

LONG = os.environ.get("HFOPT_LONG") == "1"
STEPS = 7
COLUMNS = ("step", "updated", "train_loss", "test_loss", "error_rate", "gradient_norm")


def built(folder: Path) -> HF:
    record = [hfopt.HiddenStates(every=2, sequences=2)]
    return experiment(folder, save_freq=2, keep_checkpoints=2, max_steps=STEPS, record=record)


@contextmanager
def changes(monkeypatch: pytest.MonkeyPatch, folder: Path, before: Callable[[str], int | None]) -> Iterator[None]:
    """Call `before` at each change of the folder, with its kind; a number is how many bytes are written first."""
    real = {name: getattr(os, name) for name in ("write", "replace", "unlink", "open", "mkdir", "rename", "ftruncate")}

    def inside(path: Any) -> bool:
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        return str(path).startswith(str(folder))

    def wrapped(name: str) -> Callable[..., Any]:
        def change(first: Any, *rest: Any, **options: Any) -> Any:
            creating = name != "open" or (rest and rest[0] & (os.O_CREAT | os.O_TRUNC))
            if creating and inside(first):
                count = before(name)
                if count is not None and name == "write":
                    real["write"](first, bytes(rest[0])[:count])
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real[name](first, *rest, **options)

        return change

    with monkeypatch.context() as patched:
        for name in real:
            patched.setattr(os, name, wrapped(name))
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Bits, rows and frames of the run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    hf = built(folder)
    hf.optimize()
    return bits(hf), read_run(folder)


def same(folder: Path, hf: HF, whole: Any) -> None:
    """The run in a folder ended as the undisturbed one."""
    expected, other = whole
    assert bits(hf) == expected
    run = read_run(folder)
    for column in COLUMNS:
        assert run.steps[column].tobytes() == other.steps[column].tobytes(), column
    frames, others = run.recorded["hidden_states"], other.recorded["hidden_states"]
    assert frames.steps.tolist() == others.steps.tolist()
    for step in frames.steps.tolist():
        for name, array in others.frame(step).items():
            assert frames.frame(step)[name].tobytes() == array.tobytes()


def test_what_a_kill_at_any_moment_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Any) -> None:
    folder, copies = tmp_path / "run", tmp_path / "copies"
    moments: list[tuple[Path, int, int]] = []
    acknowledged, complete = [-1], [-1]
    chance = random.Random(0)

    def before(kind: str) -> None:
        place = copies / f"{len(moments):04d}"
        if folder.exists() and (LONG or chance.random() < 0.2):
            shutil.copytree(folder, place, ignore=shutil.ignore_patterns("lock"))
            moments.append((place, acknowledged[0], complete[0]))

    hf = built(folder)
    record, save = hf._record, hf._save

    def recorded(row: dict[str, Any], *rest: Any) -> None:
        record(row, *rest)
        acknowledged[0] = max(acknowledged[0], row["step"])

    def saved(*given: Any) -> None:
        save(*given)
        complete[0] = hf.step

    hf._record, hf._save = recorded, saved  # type: ignore[method-assign]
    with changes(monkeypatch, folder, before):
        hf.optimize()
    begun = [(place, row, step) for place, row, step in moments if (place / "run.h5").exists()]
    assert len(begun) > (60 if LONG else 8)
    kinds = 0
    for place, row, step in begun:
        # The last write was torn in the middle, in every second copy.
        torn = [p for p in place.rglob("*") if p.name.startswith("journal-") and p.stat().st_size > 40]
        if torn and chance.random() < 0.5 and row < len(read_run(place).steps) - 1:
            data = torn[0].read_bytes()
            torn[0].write_bytes(data[: -chance.randrange(1, 30)])
            kinds += 1
        run = read_run(place)
        assert run.steps["step"].tolist() == list(range(len(run.steps)))
        assert len(run.steps) > row, f"{place.name}: a row that was shown is lost"
        assert run.find().step >= step, f"{place.name}: a complete checkpoint is lost"
        assert run.checkpoint()["step"] == run.find().step
        for frames in run.recorded.values():
            for at in frames.steps.tolist():
                frames.frame(at)
    assert kinds > 0 or not LONG
    continued = begun if LONG else chance.sample(begun, 3)
    for place, _, _ in continued:
        again = built(place)
        again.load()
        again.optimize()
        same(place, again, whole)


def test_a_disk_that_fills_up_at_random_moments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Any) -> None:
    trials = 20 if LONG else 4
    said = [filled(tmp_path / str(trial), random.Random(trial), monkeypatch, whole) for trial in range(trials)]
    assert sum(map(bool, said)) >= 0.6 * trials
    for sentence in (sentence for sentences in said for sentence in sentences):
        assert "No space left on device" in sentence
        assert "\n" not in sentence


def filled(folder: Path, chance: random.Random, monkeypatch: pytest.MonkeyPatch, whole: Any) -> list[str]:
    """A run whose disk has no room for three changes in a row, and that goes on in the same process; what was said."""
    full_from, count = chance.randrange(5, 120), [0]

    def before(kind: str) -> int | None:
        count[0] += 1
        if not full_from <= count[0] < full_from + 3:
            return None
        if kind in ("open", "mkdir"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return chance.choice([0, 1, 7]) if kind == "write" else None

    hf = built(folder)
    shown, said, outcome = [], [], ""
    record = hf._record

    def recorded(row: dict[str, Any], *rest: Any) -> None:
        record(row, *rest)
        shown.append(row["step"])

    hf._record = recorded  # type: ignore[method-assign]
    while not outcome:
        with changes(monkeypatch, folder, before):
            try:
                outcome = hf.optimize()
            except WriteError as error:
                said.append(str(error))
        if shown:
            assert read_run(folder).steps["step"].tolist()[: len(shown)] == list(range(len(shown)))
    same(folder, hf, whole)
    return said
