"""Recorded frames: what was written is read, in pieces of bounded size, after kills, full disks and damage."""

from __future__ import annotations

import errno
import io
import multiprocessing
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from hfopt.experiment.store import recorded, sealed
from hfopt.experiment.store.format import RECORDED, RunError, WriteError
from hfopt.experiment.store.recorded import MOST_BYTES, MOST_FRAMES, FrameWriter, Recordings

RUN = "a" * 32
ABOUT = {"title": "a title", "arrays": {"x": {"label": "x", "unit": "m", "axes": ["place"]}}}


def frame(step: int) -> dict[str, Any]:
    return {"x": np.arange(6.0).reshape(2, 3) + step, "flag": np.array([step % 2 == 0]), "number": np.array(step)}


def write(folder: Path, steps: range, name: str = "waves") -> FrameWriter:
    writer = FrameWriter(folder, RUN)
    for step in steps:
        writer.write(name, step, frame(step), {"inputs": np.arange(4)}, ABOUT)
    return writer


def contents(folder: Path) -> dict[str, dict[int, dict[str, bytes]]]:
    """All frames, to be compared."""
    return {
        name: {step: {k: v.tobytes() for k, v in arrays.items()} for step, arrays in found.frames()}
        for name, found in Recordings(folder, RUN).items()
    }


def test_frames_are_read_as_they_were_written(tmp_path: Path) -> None:
    write(tmp_path, range(0, 30, 10))
    found = Recordings(tmp_path, RUN)
    assert list(found) == ["waves"]
    assert found["waves"].steps.tolist() == [0, 10, 20]
    assert found["waves"].about == ABOUT
    for step in (0, 10, 20):
        arrays = found["waves"].frame(step)
        assert set(arrays) == {"x", "flag", "number", "inputs"}
        assert np.array_equal(arrays["x"], frame(step)["x"])
        assert arrays["x"].dtype == np.float64
        assert arrays["flag"].dtype == np.bool_
        assert arrays["number"].shape == ()
        assert int(arrays["number"]) == step
        assert arrays["inputs"].tolist() == [0, 1, 2, 3]
    assert [found["waves"].nearest(step) for step in (-5, 4, 5, 6, 99)] == [0, 0, 0, 10, 20]
    with pytest.raises(KeyError, match="waves has no frame of step 3; the nearest is that of step 0"):
        found["waves"].frame(3)
    with pytest.raises(KeyError, match="no frames of 'tides'; recorded was waves"):
        found["tides"]


def test_other_programs_read_them(tmp_path: Path) -> None:
    write(tmp_path, range(3))
    (path,) = (tmp_path / RECORDED).glob("*.h5")
    with h5py.File(path) as file:
        assert file["step"][:].tolist() == [0, 1, 2]
        assert file["x"].shape == (3, 2, 3)
        assert np.array_equal(file["x"][1], frame(1)["x"])


def test_files_and_memory_stay_small(tmp_path: Path) -> None:
    writer = write(tmp_path, range(2 * MOST_FRAMES + 1))
    pieces = recorded.list_pieces(tmp_path, RUN)["waves"]
    assert [piece.count for piece in pieces] == [MOST_FRAMES, MOST_FRAMES, 1]
    assert len(writer._open["waves"].frames) == 1
    large = np.zeros(MOST_BYTES // 8 // 3)  # three make it too large for a fourth
    for step in range(8):
        writer.write("large", step, {"x": large}, {}, {})
    assert [piece.count for piece in recorded.list_pieces(tmp_path, RUN)["large"]] == [4, 4]


def test_what_does_not_fit_in_begins_a_file(tmp_path: Path) -> None:
    writer = write(tmp_path, range(0, 6, 2))
    writer.write("waves", 5, frame(5), {"inputs": np.arange(4)}, ABOUT)  # another stride
    writer.write("waves", 6, {"x": np.zeros(2)}, {"inputs": np.arange(4)}, ABOUT)  # other arrays
    writer.write("waves", 7, {"x": np.ones(2)}, {"inputs": np.ones(4)}, ABOUT)  # another constant
    found = Recordings(tmp_path, RUN)["waves"]
    assert found.steps.tolist() == [0, 2, 4, 5, 6, 7]
    assert len(list((tmp_path / RECORDED).glob("*.h5"))) == 4
    assert found.frame(6)["x"].tolist() == [0, 0]
    assert found.frame(7)["inputs"].tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("back", [0, 3, MOST_FRAMES, MOST_FRAMES + 7, 200])
def test_frames_that_are_computed_again_are_dropped(tmp_path: Path, back: int) -> None:
    write(tmp_path, range(100))
    write(tmp_path, range(0, 100, 50), "tides")
    writer = FrameWriter(tmp_path, RUN)  # of another process, which has loaded a checkpoint
    writer.drop_from(back)
    found = Recordings(tmp_path, RUN)
    assert found["waves"].steps.tolist() == list(range(min(back, 100))) if back else "waves" not in found
    assert (found["tides"].steps.tolist() if "tides" in found else []) == [s for s in (0, 50) if s < back]
    for step in range(back, 100):
        writer.write("waves", step, frame(step), {"inputs": np.arange(4)}, ABOUT)
    whole = tmp_path / "whole"
    whole.mkdir()
    write(whole, range(100))
    assert contents(tmp_path)["waves"] == contents(whole)["waves"]


def test_arrays_that_cannot_be_kept(tmp_path: Path) -> None:
    writer = FrameWriter(tmp_path, RUN)
    for name, value, said in (
        ("x y", np.zeros(2), "'x y' cannot be the name"),
        ("step", np.zeros(2), "'step' cannot be the name"),
        ("x", np.array(["a"]), "x must be an array of numbers, not of <U1"),
        ("x", np.array([{}]), "x must be an array of numbers, not of object"),
    ):
        with pytest.raises(TypeError, match=said):
            writer.write("waves", 0, {name: value}, {}, {})
    assert not list(tmp_path.rglob("*.h5"))


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = write(tmp_path, range(3))

    def full(handle: int, data: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(sealed, "write_all", full)
        with pytest.raises(WriteError, match=r"waves-000001\.h5 cannot be written \(No space left on device\)"):
            writer.write("waves", 3, frame(3), {"inputs": np.arange(4)}, ABOUT)
    assert Recordings(tmp_path, RUN)["waves"].steps.tolist() == [0, 1, 2]
    writer.write("waves", 3, frame(3), {"inputs": np.arange(4)}, ABOUT)
    assert Recordings(tmp_path, RUN)["waves"].steps.tolist() == [0, 1, 2, 3]
    assert not list((tmp_path / RECORDED).glob(".*"))


def test_a_changed_byte_is_told_or_makes_no_difference(tmp_path: Path) -> None:
    write(tmp_path, range(5))
    (path,) = (tmp_path / RECORDED).glob("*.h5")
    whole, expected, chance = path.read_bytes(), contents(tmp_path), np.random.default_rng(0)
    told = []
    for place in [*range(0, 512, 4), *chance.integers(512, len(whole), size=150).tolist()]:
        changed = bytearray(whole)
        changed[place] ^= 1 << int(chance.integers(8))
        path.write_bytes(changed)
        try:
            assert contents(tmp_path) == expected
        except RunError as error:
            told.append(str(error))
    assert len(told) > 270
    assert all("waves-000001.h5" in sentence and "\n" not in sentence for sentence in told)


def test_truncated_files(tmp_path: Path) -> None:
    write(tmp_path, range(5))
    (path,) = (tmp_path / RECORDED).glob("*.h5")
    whole = path.read_bytes()
    for length in np.linspace(100, len(whole) - 1, 30).astype(int).tolist():
        path.write_bytes(whole[:length])
        with pytest.raises(RunError, match=r"waves-000001\.h5"):
            contents(tmp_path)
    for nothing in (b"", bytes(512)):  # as a power cut leaves a file that was just written
        path.write_bytes(nothing)
        assert contents(tmp_path) == {}


def test_pieces_that_do_not_follow_each_other(tmp_path: Path) -> None:
    write(tmp_path, range(5))
    path = tmp_path / RECORDED / "waves-000001.h5"
    shutil.copy(path, path.with_name("waves-000002.h5"))
    with pytest.raises(RunError, match=r"waves-000002\.h5 has frames of waves from step 0, but .* go to step 4"):
        Recordings(tmp_path, RUN)
    path.with_name("waves-000002.h5").rename(path.with_name("tides-000001.h5"))
    with pytest.raises(RunError, match=r"tides-000001\.h5 has no frames of tides"):
        Recordings(tmp_path, RUN)


def crafted(path: Path, change: Any, **other: Any) -> None:
    """Change a sealed file and seal it again, as somebody who knows the format could."""
    data = path.read_bytes()
    with sealed.open_sealed(path) as (facts, _):
        pass
    buffer = io.BytesIO(data)
    with h5py.File(buffer, "r+") as file:
        change(file)
    facts = {**facts, **other}
    facts["crc"] = recorded._checksum(facts)
    sealed.write_sealed(path, facts, [buffer.getvalue()[sealed.BLOCK :]])


def put(name: str, value: Any, **options: Any) -> Any:
    def change(file: Any) -> None:
        del file[name]
        if isinstance(value, (h5py.ExternalLink, h5py.SoftLink)):
            file[name] = value
        elif value is not None:
            file.create_dataset(name, data=value, **options)
        elif options:
            file.create_dataset(name, **options)

    return change


CHANGES = {
    "no steps": put("step", None),
    "no about": put("about", None),
    "no constants": put("constant", None),
    "steps of another shape": put("step", np.zeros((5, 5), np.int64)),
    "other steps": put("step", np.arange(1, 6)),
    "fewer frames": put("x", np.zeros((2, 2, 3))),
    "one number": put("x", 3.0),
    "huge": put("x", None, shape=(10**12,), dtype="f8", chunks=(1024,)),
    "a bomb": put("x", np.zeros((5, 10**6)), compression="gzip"),
    "another file": put("x", h5py.ExternalLink("/etc/passwd", "/")),
    "another name": put("x", h5py.SoftLink("/step")),
    "outside": put("x", None, shape=(64,), dtype="u1", external=[("/etc/passwd", 0, 64)]),
    "objects": put("x", np.array(["a"] * 5, dtype=h5py.string_dtype())),
    "about a number": put("about", 3.0),
    "about a list": put("about", np.frombuffer(b"[]", np.uint8)),
    "about too deep": put("about", np.frombuffer(b"[" * 50_000, np.uint8)),
    "constant is no group": put("constant", np.zeros(3)),
}


@pytest.mark.parametrize("change", list(CHANGES), ids=lambda name: name.replace(" ", "-"))
def test_crafted_files(tmp_path: Path, change: str) -> None:
    write(tmp_path, range(5))
    path = tmp_path / RECORDED / "waves-000001.h5"
    crafted(path, CHANGES[change])
    began = time.perf_counter()
    with pytest.raises(RunError, match=r"waves-000001\.h5") as error:
        contents(tmp_path)
    assert time.perf_counter() - began < 5
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("facts", [{"count": 10**15}, {"first": -1}, {"stride": 0}, {"count": "5"}, {"recorder": "x"}])
def test_crafted_facts(tmp_path: Path, facts: dict[str, Any]) -> None:
    write(tmp_path, range(5))
    crafted(tmp_path / RECORDED / "waves-000001.h5", lambda file: None, **facts)
    with pytest.raises(RunError, match=r"waves-000001\.h5 has no frames of waves"):
        Recordings(tmp_path, RUN)


def child(folder: Path, written: Any) -> None:
    """A process that records until it is killed; it says which frames it has written, and goes back now and then."""
    chance, step = random.Random(time.time_ns()), int(written.value) + 1
    writer = FrameWriter(folder, RUN)
    while True:
        if chance.random() < 0.05:
            step = max(0, step - chance.randrange(80))
            written.value = step - 1
            writer.drop_from(step)
        writer.write("waves", step, frame(step), {"inputs": np.arange(4)}, ABOUT)
        written.value = step
        step += 1


@pytest.mark.slow
def test_kill_at_random_moments(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "h5py"])
    written, chance = context.Value("q", -1), random.Random(0)
    for _ in range(25):
        process = context.Process(target=child, args=(tmp_path, written))
        process.start()
        before = written.value
        while written.value == before:
            time.sleep(0.001)
        time.sleep(chance.uniform(0.0, 0.1))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        found = Recordings(tmp_path, RUN)["waves"]
        steps = found.steps.tolist()
        assert steps == list(range(len(steps)))
        assert steps[-1] >= written.value
        for step, arrays in found.frames():
            assert np.array_equal(arrays["x"], frame(step)["x"])
