"""Checkpoints: saved states in files of their own, each tensor a dataset, everything else JSON text.

A state is a tree of dicts (string or integer keys), lists, tuples, tensors, numpy arrays, strings, numbers, booleans
and None: what `state_dict()` of modules and optimizers returns. In a file the tensor at `state["a"]["b"]` is the
dataset `/a/b`, and `/hfopt:tree` is the JSON text of the tree in which tensors are named by their datasets. Saves of
one run differ in the bytes of datasets alone, so the HDF5 structure is made once, and later saves put new bytes in
their places.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from hfopt.experiment.store import sealed
from hfopt.experiment.store.format import CHECKPOINTS, RunError
from hfopt.experiment.store.tree import link_name

if TYPE_CHECKING:
    import torch

_TAG = "$"
_TREE = "hfopt:tree"  # no key of a state becomes a name that begins so
_ROOM = 1024  # bytes by which the text may grow before the structure is made again
NAME = re.compile(r"[A-Za-z][\w.+-]{0,99}", re.ASCII)
OWN_NAMES = ("last", "best")
_FILE = re.compile(r"(\d{8,}|[A-Za-z][\w.+-]{0,99})\.h5", re.ASCII)


@dataclass(frozen=True)
class Checkpoint:
    """One saved state: the name of its file, the step it stands before, its place in the order of saving."""

    key: str
    step: int
    serial: int
    named: bool
    saved: float


# -- writing ----------------------------------------------------------------------------------------------


class CheckpointWriter:
    """Writes the checkpoints of one run.

    Args:
        folder: of the run.
        run: the run's id.
    """

    def __init__(self, folder: Path, run: str) -> None:
        self.folder, self._run = folder / CHECKPOINTS, run
        self._budget = sealed.SyncBudget()
        self._structure: _Structure | None = None

    def path(self, key: str) -> Path:
        """The file of a checkpoint."""
        return self.folder / f"{key}.h5"

    def write(self, checkpoint: Checkpoint, state: Mapping[str, Any]) -> bool:
        """Write a state; whether it has been flushed to the disk.

        Raises:
            TypeError: a value has no place in a file; it is named.
            WriteError: there is no room, or no permission.
        """
        tensors: dict[str, torch.Tensor | np.ndarray[Any, Any]] = {}
        tree = _encode(state, (), tensors)
        arrays = {name: _plain_array(value) for name, value in tensors.items()}
        words = json.dumps(tree, separators=(",", ":")).encode("utf-8")
        if self._structure is None or not self._structure.fits(arrays, len(words)):
            self._structure = _Structure(arrays, len(words) + _ROOM)
        facts = {
            "kind": "checkpoint",
            "run": self._run,
            "step": checkpoint.step,
            "serial": checkpoint.serial,
            "named": checkpoint.named,
            "saved": checkpoint.saved,
        }
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise sealed.cannot_write(self.folder, error) from error
        pieces = self._structure.filled(arrays, words)
        return sealed.write_sealed(self.path(checkpoint.key), facts, pieces, self._budget)

    def sync(self, key: str) -> None:
        """Flush a checkpoint to the disk."""
        with self.path(key).open("rb") as file:
            self._budget.sync(file.fileno())
        sealed.sync_folder(self.folder, self._budget)


class _Structure:
    """The bytes of an HDF5 file around those of its datasets."""

    def __init__(self, arrays: Mapping[str, np.ndarray[Any, Any]], room: int) -> None:
        self._kinds = {name: (array.dtype, array.shape) for name, array in arrays.items()}
        self._room = room
        with h5py.File("structure", "w", driver="core", backing_store=False, userblock_size=sealed.BLOCK) as file:
            words = file.create_dataset(_TREE, data=np.full(room, ord(" "), np.uint8))
            places = {_TREE: words}
            for name, array in arrays.items():
                places[name] = file.create_dataset(name, data=np.zeros(array.shape, array.dtype))
            file.flush()
            # Offsets count the user block, which the image does not have.
            offsets = {
                name: dataset.id.get_offset() - sealed.BLOCK for name, dataset in places.items() if dataset.nbytes
            }
            sizes = {name: dataset.nbytes for name, dataset in places.items()}
            image = memoryview(file.id.get_file_image())
        self._parts: list[bytes | str] = []
        end = 0
        for name, start in sorted(offsets.items(), key=lambda place: place[1]):
            self._parts += [bytes(image[end:start]), name]
            end = start + sizes[name]
        self._parts.append(bytes(image[end:]))

    def fits(self, arrays: Mapping[str, np.ndarray[Any, Any]], words: int) -> bool:
        """Whether a state has the same tensors, and text for which there is room."""
        return words <= self._room and self._kinds == {name: (a.dtype, a.shape) for name, a in arrays.items()}

    def filled(self, arrays: Mapping[str, np.ndarray[Any, Any]], words: bytes) -> Iterator[sealed.Piece]:
        """The bytes of the file with these contents."""
        for part in self._parts:
            if isinstance(part, bytes):
                yield part
            elif part == _TREE:
                yield words.ljust(self._room)
            else:
                yield arrays[part].reshape(-1).view(np.uint8).data


def _encode(value: Any, at: tuple[str, ...], tensors: dict[str, Any]) -> Any:
    """A tree as JSON values; tensors and arrays go into `tensors` under the names of their datasets."""
    from hfopt.experiment.store.tensors import is_tensor, type_of

    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, np.generic):
        return _encode(value.item(), at, tensors)
    if isinstance(value, (int, float)):
        return value
    if is_tensor(value, f"/{'/'.join(map(link_name, at))}"):
        return {_TAG: "tensor", "at": _place(at, value, tensors), "dtype": type_of(value)}
    if isinstance(value, np.ndarray):
        return {_TAG: "array", "at": _place(at, value, tensors)}
    if isinstance(value, Mapping):
        keys = list(value)
        integers = bool(keys) and all(type(key) is int for key in keys)
        if not integers and not all(isinstance(key, str) for key in keys):
            raise ValueError(f"/{'/'.join(at)}: keys must be all strings or all integers, got {keys[:5]}")
        items = [_encode(item, (*at, str(key)), tensors) for key, item in value.items()]
        if integers or _TAG in keys:
            return {_TAG: "dict", "keys": keys, "values": items}
        return dict(zip(keys, items, strict=True))
    if isinstance(value, (list, tuple)):
        items = [_encode(item, (*at, str(i)), tensors) for i, item in enumerate(value)]
        return {_TAG: "tuple", "values": items} if isinstance(value, tuple) else items
    raise TypeError(
        f"/{'/'.join(at)}: a {type(value).__name__} cannot be saved; "
        "state may hold dicts, lists, tensors, arrays, strings, numbers, booleans and None"
    )


def _place(at: tuple[str, ...], value: Any, tensors: dict[str, Any]) -> str:
    """The name of the dataset of a tensor or an array, which is put there."""
    name = "/".join(map(link_name, at))
    if isinstance(value, np.ndarray) and value.dtype.kind not in "biufc":
        raise TypeError(f"/{name}: an array of {value.dtype} cannot be saved")
    tensors[name] = value
    return name


def _plain_array(value: Any) -> np.ndarray[Any, Any]:
    """The numbers as they lie in memory; of types that numpy lacks, the bits."""
    if isinstance(value, np.ndarray):
        return np.ascontiguousarray(value).reshape(value.shape)
    from hfopt.experiment.store.tensors import as_array

    return as_array(value)


# -- reading ----------------------------------------------------------------------------------------------


def list_checkpoints(folder: Path, run: str, known: Container[str] = ()) -> list[Checkpoint]:
    """The checkpoints of a run by their files' first bytes, in the order of saving.

    A file that was never finished, which a power cut can leave, is left out, unless its key is `known` from run.h5.
    Raises RunError for any other that is no checkpoint.
    """
    found = []
    for path in sorted((folder / CHECKPOINTS).glob("*.h5")):
        name = _FILE.fullmatch(path.name)
        try:
            if name is None or (name.group(1) not in known and not sealed.is_finished(path)):
                continue
            facts = sealed.read_facts(path)
        except FileNotFoundError:  # it made room for newer ones meanwhile
            continue
        checkpoint = _checked(path, name.group(1), facts)
        if facts.get("run") == run:
            found.append(checkpoint)
    return sorted(found, key=lambda c: c.serial)


def _checked(path: Path, key: str, facts: Mapping[str, Any]) -> Checkpoint:
    """The facts of a checkpoint; RunError if they are not those of one."""
    step, serial, named, saved = (facts.get(name) for name in ("step", "serial", "named", "saved"))
    if (
        type(step) is int
        and type(serial) is int
        and step >= 0
        and serial > 0
        and isinstance(named, bool)
        and isinstance(saved, (int, float))
        and (named or key == f"{step:08d}")
    ):
        return Checkpoint(key, step, serial, named, float(saved))
    raise RunError(f"{path} is no checkpoint, or damaged; {sealed.way_out(path)}")


def read_checkpoint(path: Path, serial: int, part: str | None = None) -> Any:
    """The state in a file, or one of its parts, after the checksum was found right.

    Raises FileNotFoundError if there is no such file, and RunError if it is damaged or another save has replaced it.
    """
    with sealed.open_sealed(path) as (facts, file):
        if facts.get("kind") != "checkpoint" or facts.get("serial") != serial:
            raise RunError(f"{path} has been replaced since; read the run again")
        tree = json.loads(sealed.text(sealed.item(file, _TREE)))
        if part is not None:
            tree = tree[part]

        def tensor(at: str) -> Any:
            group = file
            *path_to, last = at.split("/")
            for name in path_to:
                group = sealed.item(group, name)
            return sealed.array(sealed.item(group, last), "biufcV")

        return _decode(tree, tensor)


def _decode(value: Any, tensor: Callable[[str], Any]) -> Any:
    """A tree from its JSON values."""
    if isinstance(value, list):
        return [_decode(item, tensor) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value.get(_TAG)
    if kind is None:
        return {key: _decode(item, tensor) for key, item in value.items()}
    if kind == "tuple":
        return tuple(_decode(item, tensor) for item in value["values"])
    if kind == "dict":
        items = [_decode(item, tensor) for item in value["values"]]
        return dict(zip(value["keys"], items, strict=True))
    array = tensor(value["at"])
    if kind == "array":
        return array
    from hfopt.experiment.store.tensors import as_tensor

    return as_tensor(array, value["dtype"])
