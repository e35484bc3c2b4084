"""Piano rolls from files: as published, written again, damaged in every way, and never by executing anything."""

from __future__ import annotations

import gzip
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import savemat

from corpora.music.collections import NAMES, load
from corpora.music.midi import read_folder, read_midi, write_midi
from corpora.music.rolls import PITCHES, Pieces, Roll

DATA = os.environ.get("HFOPT_DATA", "")
published = pytest.mark.skipif(not Path(DATA, "music").is_dir() or not DATA, reason="HFOPT_DATA has no music")


def rolls(count: int, seed: int = 0) -> list[Roll]:
    generator = np.random.default_rng(seed)
    return [(generator.random((5 + k, PITCHES)) < 0.05).astype(np.uint8) for k in range(count)]


def cells(parts: list[Any]) -> Any:
    joined = np.empty((1, len(parts)), dtype=object)
    for k, part in enumerate(parts):
        joined[0, k] = part
    return joined


def mat(path: Path, **changed: Any) -> Path:
    content = {f"{role}data": cells(rolls(3, seed)) for seed, role in enumerate(("train", "valid", "test"))}
    savemat(path, {name: value for name, value in {**content, **changed}.items() if value is not None})
    return path


def test_mat_files_are_read_as_they_were_written(tmp_path: Path) -> None:
    pieces = load(str(mat(tmp_path / "mine.mat")))
    for seed, role in enumerate(("train", "valid", "test")):
        for found, expected in zip(pieces.parts[role], rolls(3, seed), strict=True):
            assert found.dtype == np.uint8
            assert np.array_equal(found, expected)
    packed = tmp_path / "packed.mat.gz"
    packed.write_bytes(gzip.compress((tmp_path / "mine.mat").read_bytes()))
    assert load(str(packed)).fingerprint() == pieces.fingerprint()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"testdata": None}, "has no variable testdata"),
        ({"traindata": np.zeros((3, 88))}, "traindata is no cell array"),
        ({"validdata": cells([np.zeros((4, 80))])}, "cell 0 of validdata has shape (4, 80)"),
        ({"validdata": cells([np.zeros((4, 88)), "text"])}, "cell 1 of validdata"),
        ({"testdata": cells([np.full((4, 88), 2)])}, "besides 0 and 1"),
        ({"testdata": cells([np.zeros((0, 88))])}, "test piece 0 has shape (0, 88)"),
    ],
)
def test_mat_files_that_hold_something_else(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    path = mat(tmp_path / "other.mat", **changed)
    with pytest.raises(ValueError, match=r"other\.mat") as refused:
        load(str(path))
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"\x89HDF\r\n\x1a\n" + bytes(600), "version 7.3"),
        (b"PK\x03\x04" + bytes(600), "no MATLAB file of version 5"),
        (b"MATLAB 5.0 MAT-file, short", "damaged or truncated"),
    ],
)
def test_files_that_are_no_mat_files(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "bad.mat"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.mat") as refused:
        load(str(path))
    assert said in str(refused.value)


def test_every_truncation_of_a_mat_file_is_refused(tmp_path: Path) -> None:
    whole = mat(tmp_path / "whole.mat").read_bytes()
    path = tmp_path / "cut.mat"
    for length in range(1, len(whole), max(1, len(whole) // 40)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.mat"):
            load(str(path))


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_pickles_are_refused_and_not_executed(tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    for name in ("chorales.npz", "chorales.pickle"):
        path = tmp_path / name
        if name.endswith("npz"):
            np.savez(path, train=np.array([Bomb(trace)], dtype=object))
        else:
            path.write_bytes(pickle.dumps({"train": [Bomb(trace)]}))
        with pytest.raises(ValueError, match="can execute code"):
            load(str(path))
    assert not trace.exists()


def notes(path: Path, **changed: Any) -> Path:
    content = {"train": [[[60, 64], [62]], [[21]]], "valid": [[[108], []]], "test": [[[-1, 60.0, -1, 60]]], **changed}
    text = json.dumps(content)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["mine.json", "mine.json.gz"])
def test_json_files(tmp_path: Path, name: str) -> None:
    pieces = load(str(notes(tmp_path / name)))
    assert [np.flatnonzero(frame).tolist() for frame in pieces.parts["train"][0]] == [[39, 43], [41]]
    assert [np.flatnonzero(frame).tolist() for frame in pieces.parts["valid"][0]] == [[87], []]
    assert np.flatnonzero(pieces.parts["test"][0][0]).tolist() == [39]  # two voices in unison, two silent


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"train": [[[60], [20]]]}, "train piece 0: frame 1 has the note 20"),
        ({"valid": [[["C4"]]]}, "valid piece 0: frame 0 has the note 'C4'"),
        ({"valid": [[60]]}, "valid piece 0: frame 0 is int, not a list"),
        ({"test": {}}, "test is dict, not a list"),
        ({"test": []}, "has no test pieces"),
        ({"test": [[[True]]]}, "has the note True"),
    ],
)
def test_json_that_is_something_else(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=r"other\.json") as refused:
        load(str(notes(tmp_path / "other.json", **changed)))
    assert said in str(refused.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b'{"train": []}', b"[" * 100_000])
def test_damaged_json(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.json"):
        load(str(path))
    cut = tmp_path / "cut.json.gz"
    cut.write_bytes(notes(tmp_path / "whole.json.gz").read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"cut\.json.gz is no complete gzip file"):
        load(str(cut))


def test_midi_files_are_read_as_they_were_written(tmp_path: Path) -> None:
    roll = np.zeros((9, PITCHES), dtype=np.uint8)
    roll[0:4, 39] = 1
    roll[2:9, 43] = 1
    roll[8, [0, 87]] = 1
    roll[5, 39] = 1
    for steps_per_beat in (1, 2, 4):
        write_midi(tmp_path / "song.mid", roll, steps_per_beat)
        assert np.array_equal(read_midi(tmp_path / "song.mid", steps_per_beat), roll)


def test_a_folder_of_midi_files(tmp_path: Path) -> None:
    for k, roll in enumerate(rolls(12, seed=5)):
        roll[0, 40] = roll[-1, 40] = 1  # leading and trailing silence would be left out
        below = tmp_path / ("a" if k % 2 else "b")
        below.mkdir(exist_ok=True)
        write_midi(below / f"{k:02}.mid", roll)
    pieces = load(str(tmp_path))
    assert {role: len(part) for role, part in pieces.parts.items()} == {"valid": 1, "test": 1, "train": 10}
    assert pieces.fingerprint() == load(str(tmp_path)).fingerprint()
    (tmp_path / "a" / "bad.mid").write_bytes((tmp_path / "b" / "00.mid").read_bytes()[:30])
    with pytest.raises(ValueError, match=r"bad\.mid"):
        read_folder(tmp_path)
    (tmp_path / "a" / "bad.mid").write_bytes(b"RIFF")
    with pytest.raises(ValueError, match=r"bad\.mid is no MIDI file: it begins with 52 49 46 46"):
        read_folder(tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="has 0 MIDI files"):
        load(str(empty))


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="choose counterpoint, jsb, nottingham, piano-midi, musedata"):
        load("chorals")
    with pytest.raises(FileNotFoundError, match=r"there is no MuseData.mat in .*: put it there"):
        load("musedata", tmp_path)
    monkeypatch.delenv("HFOPT_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=r"music needs the files JSB_Chorales\.mat"):
        load("jsb")
    assert NAMES[0] == "counterpoint"


@published
@pytest.mark.parametrize(
    ("name", "counts", "frames"),
    [
        ("jsb", (229, 76, 77), (13_807, 4_602, 4_725)),
        ("jsb-quarter", (229, 76, 77), (13_807, 4_602, 4_725)),
        ("jsb-16th", (229, 76, 77), (55_228, 18_408, 18_900)),
        ("nottingham", (694, 173, 170), (176_561, 45_513, 44_463)),
        ("piano-midi", (87, 12, 25), (75_911, 8_540, 19_036)),
    ],
)
def test_published_collections(name: str, counts: tuple[int, ...], frames: tuple[int, ...]) -> None:
    pieces: Pieces = load(name)
    roles = ("train", "valid", "test")
    assert tuple(len(pieces.parts[role]) for role in roles) == counts
    assert tuple(pieces.frames(role) for role in roles) == frames
