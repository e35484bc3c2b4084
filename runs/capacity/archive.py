"""The published data set of 630,880 trainings, read without unpacking it and without running what is in it."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from runs.capacity.table import COLUMNS, Table
from runs.capacity.unpickling import PickleError, unpickle

PUBLISHED_SHA256 = "f2e86251474c"
"""How the checksum of rnn_hp_dataset.tar.gz begins."""
LARGEST_MEMBER = 8 << 30
MOST_MEMBERS = 200
_DAMAGE = (tarfile.TarError, EOFError, zlib.error, OSError)


def checksum(path: Path) -> str:
    """The SHA-256 checksum of a file."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            found.update(piece)
    return found.hexdigest()


def read(path: Path, *, largest: int = LARGEST_MEMBER) -> Table:
    """Read all tables of an archive `.tar.gz` of pickled structured arrays, or of one pickled array, as one.

    Args:
        path: of the archive or the pickle.
        largest: bytes that an unpacked file may have.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, too large, asks for something else than arrays, or has other columns.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; the data set is rnn_hp_dataset.tar.gz, of cap-n-train-hps")
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    tables: list[Table] = []
    if packed:
        for name, member in _members(path, largest):
            tables += _tables(f"{name} in {path}", member)
    else:
        if path.stat().st_size > largest:
            raise ValueError(f"{path} has {path.stat().st_size:,} bytes; at most {largest:,} are read")
        with path.open("rb") as file:
            tables += _tables(str(path), file)
    if not tables:
        raise ValueError(f"{path} has no table: no pickled array with the columns {', '.join(COLUMNS.names or ())}")
    return np.concatenate(tables)


def _members(path: Path, largest: int) -> Iterator[tuple[str, BinaryIO]]:
    """The pickles in an archive, one after the other, in memory."""
    try:
        with gzip.open(path) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
            for number, info in enumerate(archive):
                if number >= MOST_MEMBERS:
                    raise ValueError(f"{path} has more than {MOST_MEMBERS} files")
                if not info.isfile() or not info.name.endswith((".p", ".pkl", ".pickle")):
                    continue
                if info.size > largest:
                    raise ValueError(
                        f"{info.name[:100]} in {path} has {info.size:,} bytes; at most {largest:,} are read"
                    )
                member = cast(Any, archive.extractfile(info))
                content = member.read(info.size)
                if len(content) != info.size:
                    raise ValueError(f"{path} is damaged: {info.name[:100]} ends too early")
                yield info.name[:100], io.BytesIO(content)
            behind = 0  # to the end, where the checksum is
            while piece := stream.read(1 << 20):
                behind += len(piece)
                if behind > largest:
                    raise ValueError(f"{path} goes on for more than {largest:,} bytes behind its last file")
    except _DAMAGE as error:
        raise ValueError(f"{path} is damaged or no .tar.gz archive ({error})") from error


def _tables(name: str, file: BinaryIO) -> list[Table]:
    try:
        found = unpickle(file)
    except PickleError as error:
        raise ValueError(f"{name} is refused: {error}") from None
    arrays = found if isinstance(found, (list, tuple)) else found.values() if isinstance(found, dict) else [found]
    return [_ours(name, array) for array in arrays if isinstance(array, np.ndarray) and array.dtype.names]


def _ours(name: str, array: Table) -> Table:
    """The same rows with our types: text may have come as bytes or as objects."""
    missing = set(COLUMNS.names or ()) - set(array.dtype.names or ())
    if missing:
        raise ValueError(f"{name} has a table without the columns {', '.join(sorted(missing))}")
    made = np.empty(array.size, COLUMNS)
    array = array.reshape(-1)
    for column in COLUMNS.names or ():
        values = array[column]
        try:
            if COLUMNS[column].kind == "U":
                made[column] = [v.decode("latin-1") if isinstance(v, bytes) else str(v) for v in values.tolist()]
            elif column == "hparams":
                for i, hparams in enumerate(values):
                    made[column][i] = _plain(hparams)
            else:
                made[column] = values
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{name} has a column {column} of another kind ({error})") from error
    return made


def _plain(hparams: Any) -> dict[str, Any]:
    if not isinstance(hparams, dict):
        raise TypeError(f"a {type(hparams).__name__} in place of a dictionary")
    return {_decoded(key): _decoded(value) for key, value in hparams.items()}


def _decoded(value: Any) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    return value.decode("latin-1") if isinstance(value, bytes) else value
