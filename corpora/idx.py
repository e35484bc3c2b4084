"""The idx format of MNIST: a header of big-endian numbers, then bytes; plain or gzipped."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

_UNSIGNED_BYTE = 8


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """The array of unsigned bytes in an idx file, gzipped if its name ends so.

    Header: two zero bytes, the type (8 for unsigned bytes), the number of dimensions, then each dimension as four
    bytes, the most significant first.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, truncated, or no idx file of unsigned bytes.

    Source: LeCun, Cortes & Burges, "The MNIST database of handwritten digits".
    """
    data = path.read_bytes()
    if path.name.endswith(".gz"):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is no complete gzip file ({error}); fetch it again") from error
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] != _UNSIGNED_BYTE:
        raise ValueError(f"{path} is no idx file of unsigned bytes: it begins with {data[:4].hex(' ') or 'nothing'}")
    start = 4 + 4 * data[3]
    if len(data) < start:
        raise ValueError(f"{path} ends within its header; fetch it again")
    shape = tuple(np.frombuffer(data[4:start], dtype=">u4").tolist())
    if len(data) - start != math.prod(shape):
        raise ValueError(f"{path} has {len(data) - start} bytes of data where {shape} needs {math.prod(shape)}")
    return np.frombuffer(data, dtype=np.uint8, offset=start).reshape(shape)
