"""The idx format of MNIST: a header of big-endian numbers, then bytes; plain or gzipped."""

from __future__ import annotations

import gzip
import math
import zlib
from io import BufferedReader
from pathlib import Path

import numpy as np
import numpy.typing as npt

_UNSIGNED_BYTE = 8
_PIECE = 1 << 20


def read_idx(path: Path, most: int = 1 << 30) -> npt.NDArray[np.uint8]:
    """The array of unsigned bytes in an idx file, gzipped if its name ends so.

    Header: two zero bytes, the type (8 for unsigned bytes), the number of dimensions, then each dimension as four
    bytes, the most significant first. A packed file of some MB can unpack to many GB; arrays of more than `most` bytes
    are refused by what the header says.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, truncated, or no idx file of unsigned bytes.

    Source: LeCun, Cortes & Burges, "The MNIST database of handwritten digits".
    """
    try:
        with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as file:
            return _read(path, file, most)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is no complete gzip file ({error}); fetch it again") from error


def _read(path: Path, file: gzip.GzipFile | BufferedReader, most: int) -> npt.NDArray[np.uint8]:
    """The array in an opened file. No more is unpacked than its header says, and a byte to see that nothing follows."""
    start = file.read(4)
    if len(start) < 4 or start[:2] != b"\0\0" or start[2] != _UNSIGNED_BYTE:
        raise ValueError(f"{path} is no idx file of unsigned bytes: it begins with {start.hex(' ') or 'nothing'}")
    sizes = file.read(4 * start[3])
    if len(sizes) < 4 * start[3]:
        raise ValueError(f"{path} ends within its header; fetch it again")
    shape = tuple(np.frombuffer(sizes, dtype=">u4").tolist())
    count = math.prod(shape)
    if count > most:
        raise ValueError(f"{path} says that it holds {count:,} bytes, {shape}; more than {most:,} are not read")
    # In pieces: a header may promise what does not follow.
    data = bytearray()
    while len(data) <= count and (piece := file.read(min(_PIECE, count + 1 - len(data)))):
        data += piece
    if len(data) != count:
        there = f"more than {count}" if len(data) > count else str(len(data))
        raise ValueError(f"{path} has {there} bytes of data where {shape} needs {count}")
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)
