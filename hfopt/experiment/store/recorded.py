"""Recorded frames: arrays that recorders keep of a run, in sealed files of some frames each.

The frames of the recorder `spectrum` lie in `recorded/spectrum-000001.h5`, `recorded/spectrum-000002.h5`, ..., each a
sealed HDF5 file (:mod:`hfopt.experiment.store.sealed`) with the frames of consecutive steps, a fixed distance apart:

* `/step` (n,) int64, and every array of the frames under its name, stacked along a first axis (n, ...);
* `/constant/<name>`, arrays that all frames share;
* `/about`, JSON text: what the arrays are, with axes and units.

The newest file is written again with each frame until it is large; then the next begins. So a killed process loses no
frame that was written, and the writer holds no more than one file's frames. The facts in front of each file say which
steps it has, with a checksum of their own, so that steps are listed without reading the frames.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from hfopt.experiment.store import sealed
from hfopt.experiment.store.format import RECORDED, RunError

Array = npt.NDArray[Any]
Frame = dict[str, Array]

# A file is complete with so many frames, or so many bytes of them.
MOST_FRAMES, MOST_BYTES = 64, 1 << 18
NAME = re.compile(r"[a-z][a-z0-9_]{0,49}", re.ASCII)
_FILE = re.compile(rf"({NAME.pattern})-(\d{{6,9}})\.h5", re.ASCII)
_STEP, _CONSTANT, _ABOUT = "step", "constant", "about"


@dataclass(frozen=True)
class Piece:
    """The steps in one file: `count` of them from `first`, `stride` apart."""

    path: Path
    number: int
    first: int
    stride: int
    count: int

    @property
    def steps(self) -> range:
        """The steps."""
        return range(self.first, self.first + self.stride * self.count, self.stride)


# -- writing ----------------------------------------------------------------------------------------------


class FrameWriter:
    """Writes the frames of one run; the run's lock is held by its caller.

    Args:
        folder: of the run.
        run: the run's id.
    """

    def __init__(self, folder: Path, run: str) -> None:
        self._folder, self._run = folder / RECORDED, run
        self._budget = sealed.SyncBudget()
        self._open: dict[str, _Open] = {}
        self._last: dict[str, int] = {}
        """The last step of each recorder of which there is a frame."""
        self._next: dict[str, int] = {}
        for name, pieces in list_pieces(folder, run).items():
            self._last[name], self._next[name] = pieces[-1].steps[-1], pieces[-1].number + 1

    def write(
        self, name: str, step: int, frame: Mapping[str, Any], constant: Mapping[str, Any], about: Mapping[str, Any]
    ) -> None:
        """Write one frame of the recorder `name`; its frames of this step and of later ones are dropped first.

        Raises:
            TypeError: an array that has no place in a file; it is named.
            WriteError: there is no room, or no permission; the frames before stay.
        """
        self.drop_from(step, name)
        frame, constant = ({key: np.asarray(a) for key, a in arrays.items()} for arrays in (frame, constant))
        for key, array in {**frame, **constant}.items():
            if not NAME.fullmatch(key) or key in (_STEP, _CONSTANT, _ABOUT):
                raise TypeError(f"recorder {name}: {key!r} cannot be the name of an array; use a-z, 0-9 and _")
            if array.dtype.kind not in "fiub":
                raise TypeError(f"recorder {name}: {key} must be an array of numbers, not of {array.dtype}")
        piece = self._open.get(name)
        if piece is None or not piece.takes(step, frame, constant, about):
            number = self._next.get(name, 1)
            piece = _Open(number, constant, dict(about))
            self._next[name] = number + 1
        piece.frames.append((step, frame))
        try:
            self._write(name, piece)
        except BaseException:
            piece.frames.pop()
            raise
        self._open[name], self._last[name] = piece, step

    def drop_from(self, step: int, only: str | None = None) -> None:
        """Drop frames of this step and of later ones, of all recorders or of one: they are computed again."""
        late = {name for name, last in self._last.items() if last >= step and only in (None, name)}
        if not late:
            return
        found = list_pieces(self._folder.parent, self._run)
        for name in late:
            self._open.pop(name, None)
            before = [piece for piece in found.get(name, []) if piece.first < step]
            for piece in reversed(found.get(name, [])[len(before) :]):
                _unlink(piece.path)
            if before and before[-1].steps[-1] >= step:
                cut = before[-1]
                frames, constant, about = read_piece(cut, self._run, name)
                kept = _Open(cut.number, constant, about, [entry for entry in frames if entry[0] < step])
                self._write(name, kept)
                self._open[name] = kept
                self._last[name] = kept.frames[-1][0]
            elif before:
                self._last[name] = before[-1].steps[-1]
            else:
                del self._last[name]

    def _write(self, name: str, piece: _Open) -> None:
        steps = [step for step, _ in piece.frames]
        facts: dict[str, Any] = {
            "kind": "recorded",
            "run": self._run,
            "recorder": name,
            "first": steps[0],
            "stride": steps[1] - steps[0] if len(steps) > 1 else 1,
            "count": len(steps),
        }
        try:
            self._folder.mkdir(exist_ok=True)
        except OSError as error:
            raise sealed.cannot_write(self._folder, error) from error
        facts["crc"] = _checksum(facts)
        path = self._folder / f"{name}-{piece.number:06d}.h5"
        sealed.write_sealed(path, facts, [_image(piece)], self._budget)


@dataclass
class _Open:
    """A file that may still take frames."""

    number: int
    constant: Frame
    about: dict[str, Any]
    frames: list[tuple[int, Frame]] = field(default_factory=list)

    def takes(self, step: int, frame: Frame, constant: Frame, about: Mapping[str, Any]) -> bool:
        """Whether a frame fits in with those that are there."""
        steps = [at for at, _ in self.frames]
        if not steps:
            return True
        size = sum(array.nbytes for _, arrays in self.frames for array in arrays.values())
        return (
            len(steps) < MOST_FRAMES
            and size < MOST_BYTES
            and (len(steps) == 1 or step - steps[-1] == steps[-1] - steps[-2])
            and _shapes(frame) == _shapes(self.frames[0][1])
            and dict(about) == self.about
            and _shapes(constant) == _shapes(self.constant)
            and all(np.array_equal(array, self.constant[key]) for key, array in constant.items())
        )


def _unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise sealed.cannot_write(path, error) from error


def _shapes(frame: Frame) -> dict[str, Any]:
    return {key: (array.dtype, array.shape) for key, array in frame.items()}


def _image(piece: _Open) -> bytes:
    """The bytes of a file, without its user block."""
    with h5py.File("recorded", "w", driver="core", backing_store=False, userblock_size=sealed.BLOCK) as file:
        file.create_dataset(_STEP, data=np.array([step for step, _ in piece.frames], np.int64))
        for key in piece.frames[0][1]:
            file.create_dataset(key, data=np.stack([arrays[key] for _, arrays in piece.frames]))
        group = file.create_group(_CONSTANT)
        for key, array in piece.constant.items():
            group.create_dataset(key, data=array)
        sealed.put_text(file, _ABOUT, piece.about)
        file.flush()
        image: bytes = file.id.get_file_image()
    return image


def _checksum(facts: Mapping[str, Any]) -> str:
    """Of the facts in front of a file, besides the checksum."""
    told = {key: value for key, value in facts.items() if key != "crc"}
    return f"{zlib.crc32(json.dumps(told, sort_keys=True).encode()):08x}"


# -- reading ----------------------------------------------------------------------------------------------


def list_pieces(folder: Path, run: str) -> dict[str, list[Piece]]:
    """The files of a run's frames by recorder, in the order of their steps, from their first bytes.

    A file that was never finished, which a power cut can leave, is left out. Raises RunError for any other that is
    none of recorded frames, or whose steps do not follow those of the one before.
    """
    found: dict[str, list[Piece]] = {}
    for path in sorted((folder / RECORDED).glob("*.h5")):
        match = _FILE.fullmatch(path.name)
        if match is None:
            continue
        try:
            if not sealed.is_finished(path):
                continue
            facts = sealed.read_facts(path)
        except FileNotFoundError:  # it was dropped meanwhile
            continue
        if facts.get("run") == run or "run" not in facts or facts.get("crc") != _checksum(facts):
            found.setdefault(match[1], []).append(_checked(path, match[1], int(match[2]), facts))
    for name, pieces in found.items():
        pieces.sort(key=lambda piece: piece.number)
        for one, next_ in pairwise(pieces):
            if next_.first <= one.steps[-1]:
                raise RunError(
                    f"{next_.path} has frames of {name} from step {next_.first}, but those before it go to "
                    f"step {one.steps[-1]}; remove one of the two files"
                )
    return found


def _checked(path: Path, name: str, number: int, facts: Mapping[str, Any]) -> Piece:
    """The facts of a file; RunError if they are not those of one."""
    numbers = [facts.get(key) for key in ("first", "stride", "count")]
    first, stride, count = (value if type(value) is int and value < 1 << 62 else -1 for value in numbers)
    if (
        facts.get("kind") == "recorded"
        and facts.get("recorder") == name
        and facts.get("crc") == _checksum(facts)
        and first >= 0
        and stride > 0
        and 0 < count <= MOST_FRAMES
    ):
        return Piece(path, number, first, stride, count)
    raise RunError(f"{path} has no frames of {name}, or is damaged; {sealed.way_out(path)}")


def read_piece(piece: Piece, run: str, name: str) -> tuple[list[tuple[int, Frame]], Frame, dict[str, Any]]:
    """The frames of a file, what they share, and what they are, after the checksum was found right.

    Raises FileNotFoundError if it has been dropped, and RunError if it is damaged or of another run.
    """
    with sealed.open_sealed(piece.path) as (facts, file):
        if facts.get("kind") != "recorded" or facts.get("run") != run or facts.get("recorder") != name:
            raise RunError(f"{piece.path} has been replaced since; read the run again")
        steps = sealed.array(sealed.item(file, _STEP), "i", 1)
        keys = [key for key in file if key not in (_STEP, _CONSTANT, _ABOUT)]
        stacked = {key: sealed.array(sealed.item(file, key), "fiub") for key in keys}
        if any(array.ndim < 1 or len(array) != len(steps) for array in stacked.values()):
            raise ValueError("its arrays are not of as many frames as it has steps")
        if steps.tolist() != list(piece.steps) or not all(map(NAME.fullmatch, keys)):
            raise ValueError("its arrays have other names or steps than it tells")
        group = sealed.item(file, _CONSTANT)
        if not isinstance(group, h5py.Group):
            raise TypeError(f"/{_CONSTANT} is no group")
        constant = {key: sealed.array(sealed.item(group, key), "fiub") for key in group}
        about = json.loads(sealed.text(sealed.item(file, _ABOUT)))
        if not isinstance(about, dict):
            raise TypeError(f"/{_ABOUT} is no table of names")
    frames = [
        (int(step), {key: np.asarray(array[i]) for key, array in stacked.items()}) for i, step in enumerate(steps)
    ]
    return frames, constant, about


class Recorded:
    """The frames of one recorder.

    Attributes:
        name: of the recorder.
        steps: the steps of which there are frames, (n,) int64, ascending: updates made before.
    """

    def __init__(self, name: str, run: str, pieces: list[Piece]) -> None:
        self.name, self._run, self._pieces = name, run, pieces
        self.steps: npt.NDArray[np.int64] = np.array([s for piece in pieces for s in piece.steps], np.int64)
        self._read: tuple[Piece, dict[int, Frame], Frame, dict[str, Any]] | None = None

    def __repr__(self) -> str:
        return f"Recorded({self.name!r}, {len(self.steps)} frames, steps {self.steps[0]} to {self.steps[-1]})"

    @property
    def about(self) -> dict[str, Any]:
        """What the arrays are, a `title` and, under `arrays`, the `label`, `unit` and `axes` of each."""
        return self._piece(self._pieces[-1])[3]

    def nearest(self, step: int) -> int:
        """The step nearest to `step` of which there is a frame; the earlier of two."""
        return int(self.steps[np.abs(self.steps - step).argmin()])

    def frame(self, step: int) -> Frame:
        """The arrays recorded before update `step`, by name.

        Raises:
            KeyError: there is no frame of this step.
            RunError: the file is damaged, or another process has dropped the frame since.
        """
        for piece in self._pieces:
            if step in piece.steps:
                _, frames, constant, _ = self._piece(piece)
                if step not in frames:
                    raise RunError(f"{piece.path} has been replaced since; read the run again")
                return {**constant, **frames[step]}
        near = self.nearest(step)
        raise KeyError(f"{self.name} has no frame of step {step}; the nearest is that of step {near}")

    def frames(self) -> Iterator[tuple[int, Frame]]:
        """All frames with their steps, in order; one file's are held at a time."""
        for step in self.steps.tolist():
            yield step, self.frame(step)

    def _piece(self, piece: Piece) -> tuple[Piece, dict[int, Frame], Frame, dict[str, Any]]:
        if self._read is None or self._read[0] is not piece:
            try:
                frames, constant, about = read_piece(piece, self._run, self.name)
            except FileNotFoundError as error:
                raise RunError(f"{piece.path} has been dropped since; read the run again") from error
            self._read = piece, dict(frames), constant, about
        return self._read


class Recordings(Mapping[str, Recorded]):
    """What was recorded of a run, by recorder."""

    def __init__(self, folder: Path, run: str) -> None:
        self._folder = folder
        self._found = {name: Recorded(name, run, p) for name, p in list_pieces(folder, run).items()} if run else {}

    def __getitem__(self, name: str) -> Recorded:
        if name not in self._found:
            there = ", ".join(self._found) or "nothing"
            raise KeyError(f"{self._folder} has no frames of {name!r}; recorded was {there} (see HF(record=[...]))")
        return self._found[name]

    def __contains__(self, name: object) -> bool:
        return name in self._found

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


def remove_all(folder: Path) -> None:
    """Remove the frames of an earlier run; what else lies there stays. Raises OSError."""
    for path in (folder / RECORDED).glob("*.h5"):
        if _FILE.fullmatch(path.name):
            path.unlink(missing_ok=True)
    with suppress(OSError):
        (folder / RECORDED).rmdir()
