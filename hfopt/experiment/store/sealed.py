"""Sealed HDF5 files: written as a whole, with a checksum of every byte in front of what any HDF5 reader sees.

The first 512 bytes, HDF5's user block, are ASCII: a line that says what the file is, a JSON line of facts, and a line
with the BLAKE2b hash of all other bytes. So facts are read without HDF5, and a changed byte is found before HDF5
interprets it.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hfopt.experiment.store.format import CHECKPOINTS, RECORDED, RunError, WriteError

BLOCK = 512
_TITLE = b"hfopt sealed HDF5\n"
_DIGEST = 32
# What HDF5 and what reads from it raise on contents that are not as they should be.
UNREADABLE = (
    OSError, KeyError, ValueError, TypeError, AttributeError, IndexError, RuntimeError, OverflowError, MemoryError,
)  # fmt: skip

Piece = bytes | bytearray | memoryview


class SyncBudget:
    """Decides when to wait for the disk: as often as that takes no more than a share of the time.

    With steps that take much longer than a flush every row is on the disk before it is shown. With steps of
    milliseconds, what a power cut may take is what was written in the last few flushes' time times ``1 / share``.
    """

    def __init__(self, share: float = 0.04) -> None:
        self._share, self._began, self._spent = share, time.perf_counter(), 0.0

    def due(self) -> bool:
        """Whether to flush now."""
        return self._spent <= self._share * (time.perf_counter() - self._began)

    def sync(self, handle: int) -> None:
        """Flush a file or a folder to the disk."""
        began = time.perf_counter()
        os.fsync(handle)
        self._spent += time.perf_counter() - began


def write_sealed(
    path: Path, facts: Mapping[str, Any], pieces: Iterable[Piece], budget: SyncBudget | None = None
) -> bool:
    """Write an HDF5 file, given in pieces, beside `path` and rename it to that; say whether it was flushed.

    Without a budget it is always flushed to the disk. Raises WriteError if it cannot be written; the old file stays.
    """
    pieces = [memoryview(piece).cast("B") for piece in pieces if len(memoryview(piece).cast("B"))]
    head = _TITLE + json.dumps(facts, separators=(",", ":")).encode("ascii") + b"\n"
    digest = hashlib.blake2b(digest_size=_DIGEST)
    tail = b"\n" * (BLOCK - len(head) - 2 * _DIGEST)
    if len(head) + 2 * _DIGEST + 1 > BLOCK:
        raise ValueError(f"{path}: {facts} do not fit the user block")
    for piece in (head, tail, *pieces):
        digest.update(piece)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    flushed = budget is None or budget.due()
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            for piece in (head + digest.hexdigest().encode("ascii") + tail, *pieces):
                write_all(handle, piece)
            if flushed:
                (budget or SyncBudget()).sync(handle)
        finally:
            os.close(handle)
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise cannot_write(path, error) from error
        raise
    if flushed:
        sync_folder(path.parent, budget or SyncBudget())
    return flushed


def cannot_write(path: Path, error: OSError) -> WriteError:
    """The sentence on a file that cannot be written."""
    return WriteError(
        f"{path} cannot be written ({error.strerror or error}); nothing that was computed is lost: mend that, "
        "then call optimize() or save() again in the same process"
    )


def write_all(handle: int, data: Piece) -> None:
    """Write all of `data`; the system may take it in parts."""
    left = memoryview(data)
    while len(left):
        left = left[os.write(handle, left) :]


def sync_folder(folder: Path, budget: SyncBudget) -> None:
    """Make renames durable; systems that cannot open a folder do not need it."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        with suppress(OSError):
            budget.sync(handle)
    finally:
        os.close(handle)


def read_facts(path: Path) -> dict[str, Any]:
    """The facts of a sealed file from its first bytes alone, unchecked; RunError if it does not begin as one.

    A file that is not there is no damage: FileNotFoundError.
    """
    try:
        with path.open("rb") as file:
            return _facts(file.read(BLOCK))[0]
    except FileNotFoundError:
        raise
    except UNREADABLE as error:
        raise RunError(f"{path} is truncated or damaged ({error}); {way_out(path)}") from error


def is_sealed(path: Path) -> bool:
    """Whether a file begins like a sealed one."""
    try:
        with path.open("rb") as file:
            return file.read(len(_TITLE)) == _TITLE
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror})") from error


def is_finished(path: Path) -> bool:
    """Whether a file's first bytes are there: after a power cut one that was just written may be empty, or zeros."""
    with path.open("rb") as file:
        return any(file.read(BLOCK))


def _facts(block: bytes) -> tuple[dict[str, Any], int]:
    """The facts, and where the digest begins."""
    if not block.startswith(_TITLE):
        raise ValueError("it does not begin as a file of hfopt does")
    line, found, _ = block[len(_TITLE) :].partition(b"\n")
    facts = json.loads(line)
    if not found or not isinstance(facts, dict):
        raise ValueError("it has no facts")
    return facts, len(_TITLE) + len(line) + 1


def way_out(path: Path) -> str:
    """What to do about a file that cannot be read."""
    if path.parent.name == CHECKPOINTS:
        return "restore it from a copy, or remove it and load another checkpoint by its step"
    if path.parent.name == RECORDED:
        return "restore it from a copy, or remove it, and with it its frames"
    return "restore it from a copy, or start a new run under another name"


@contextmanager
def open_sealed(path: Path) -> Iterator[tuple[dict[str, Any], Any]]:
    """The facts and the HDF5 root of a sealed file, after its checksum was found right.

    Whatever goes wrong with its contents, in here or where it is used, is a RunError that names the file.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror})") from error
    try:
        facts, at = _facts(data[:BLOCK])
        digest = hashlib.blake2b(memoryview(data)[:at], digest_size=_DIGEST)
        digest.update(memoryview(data)[at + 2 * _DIGEST :])
        if data[at : at + 2 * _DIGEST] != digest.hexdigest().encode("ascii"):
            raise ValueError("its bytes do not have the checksum they were written with")
    except UNREADABLE as error:
        raise RunError(
            f"{path} has been truncated, damaged or changed since it was written ({error}); {way_out(path)}"
        ) from error
    with reading(path), h5py.File(io.BytesIO(data), "r") as file:
        yield facts, file


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever is raised about a file's contents into a RunError that names the file."""
    try:
        yield
    except (RunError, FileNotFoundError):
        raise
    except (*UNREADABLE, RecursionError) as error:
        said = str(error).strip("\"'").replace("\n", " ")
        raise RunError(
            f"{path} cannot be read: it is truncated, damaged or no HDF5 file of a run ({said}); {way_out(path)}"
        ) from error


def item(group: Any, name: str) -> Any:
    """A member of a group, reached by a hard link: files refer to nothing outside themselves, nor to other names."""
    link = group.get(name, getlink=True)
    if link is None:
        raise KeyError(f"{group.name.rstrip('/')}/{name} is missing")
    if not isinstance(link, h5py.HardLink):
        raise ValueError(f"{group.name.rstrip('/')}/{name} is a link to another place")
    return group[name]


def array(dataset: Any, kinds: str, ndim: int | None = None, likely: np.dtype[Any] | None = None) -> Any:
    """The values of a dataset that is stored as it is: no more of them than the file has bytes for.

    `kinds` are those of numpy that may occur; a compound type has kind "V", and its columns "f", "i", "u", "b" or "S".
    With the `likely` type of a table, it need not be found out column by column: a list reads hundreds of files.
    """
    if not isinstance(dataset, h5py.Dataset):
        raise TypeError(f"{dataset.name} is no dataset")
    properties = dataset.id.get_create_plist()
    if properties.get_layout() not in (h5py.h5d.CONTIGUOUS, h5py.h5d.COMPACT) or properties.get_external_count():
        raise ValueError(f"{dataset.name} is not stored as a whole in this file")
    stored = dataset.id.get_type()
    dtype = likely if likely is not None and stored == _stored_as(likely) else dataset.dtype
    columns = [dtype[name] for name in dtype.names or ()]
    if dtype.kind not in kinds or dtype.hasobject or any(c.kind not in "fiubS" or c.subdtype for c in columns):
        raise TypeError(f"{dataset.name} has type {dtype}")
    shape = dataset.shape
    if shape is None or (ndim is not None and len(shape) != ndim):
        raise ValueError(f"{dataset.name} has shape {shape}")
    if math.prod(shape) * dtype.itemsize > dataset.id.get_storage_size():
        raise ValueError(f"{dataset.name} has shape {shape}, but {dataset.id.get_storage_size()} bytes")
    values = np.empty(shape, dtype)
    if values.size:
        dataset.id.read(h5py.h5s.ALL, h5py.h5s.ALL, values, stored if dtype is likely else None)
    return values


@functools.lru_cache(maxsize=64)
def _stored_as(dtype: np.dtype[Any]) -> Any:
    """HDF5's type for the rows of a table."""
    return h5py.h5t.py_create(dtype, logical=True)


def text(dataset: Any) -> str:
    """The UTF-8 text in a dataset of bytes."""
    return bytes(np.asarray(array(dataset, "u", 1), np.uint8)).decode("utf-8").rstrip("\n ")


def put_text(group: Any, name: str, value: Any) -> None:
    """Write something as JSON text into a dataset of bytes."""
    group.create_dataset(name, data=np.frombuffer(json.dumps(value, indent=1).encode("utf-8"), np.uint8))
