"""Piano rolls in MATLAB files, as published with Boulanger-Lewandowski, Bengio & Vincent (ICML 2012)."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np

from corpora.music.rolls import PITCHES, Roll
from corpora.source import Found, read

_MAGIC = b"MATLAB 5.0 MAT-file"
_HDF5 = b"\x89HDF\r\n\x1a\n"
_VARIABLES = {"train": "traindata", "valid": "validdata", "test": "testdata"}


def read_mat(path: Found, most: int = 1 << 28) -> dict[str, list[Roll]]:
    """The piano rolls in a .mat file of version 5: cell arrays `traindata`, `validdata`, `testdata` of `(T, 88)`.

    The format holds numbers alone; nothing in it is executed. Files of more than `most` bytes are refused.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, damaged or truncated, or it holds something else.
        ModuleNotFoundError: scipy is not installed.
    """
    start = (content := read(path, most))[:128]
    if start.startswith(_HDF5):
        raise ValueError(f"{path} is a MATLAB file of version 7.3; save it again with save(..., '-v7')")
    if not start.startswith(_MAGIC):
        raise ValueError(f"{path} is no MATLAB file of version 5: it begins with {start[:8].hex(' ') or 'nothing'}")
    try:
        from scipy.io import loadmat
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("scipy is needed to read .mat files: pip install scipy") from error
    try:
        found: dict[str, Any] = loadmat(BytesIO(content), variable_names=list(_VARIABLES.values()))
    except Exception as error:  # scipy raises errors of a dozen kinds on damaged files
        raise ValueError(f"{path} is damaged or truncated ({type(error).__name__}: {error}); fetch it again") from error
    missing = sorted(set(_VARIABLES.values()) - found.keys())
    if missing:
        raise ValueError(
            f"{path} has no variable {', '.join(missing)}; piano rolls are in {', '.join(_VARIABLES.values())}"
        )
    return {
        role: [_roll(path, name, k, x) for k, x in enumerate(_cells(path, name, found))]
        for role, name in _VARIABLES.items()
    }


def _cells(path: Found, name: str, found: dict[str, Any]) -> list[Any]:
    cells = found[name]
    if not isinstance(cells, np.ndarray) or cells.dtype != object:
        raise ValueError(f"{path}: {name} is no cell array; each of its cells is a piece (T, {PITCHES})")
    return list(cells.ravel())


def _roll(path: Found, name: str, k: int, x: Any) -> Roll:
    if not isinstance(x, np.ndarray) or x.dtype.kind not in "uifb" or x.ndim != 2 or x.shape[1] != PITCHES:
        what = f"shape {x.shape} and dtype {x.dtype}" if isinstance(x, np.ndarray) else f"type {type(x).__name__}"
        raise ValueError(f"{path}: cell {k} of {name} has {what}; a piece is (T, {PITCHES}) numbers")
    if not np.isin(x, (0, 1)).all():
        raise ValueError(f"{path}: cell {k} of {name} has values besides 0 and 1; a note sounds or it does not")
    return np.ascontiguousarray(x, dtype=np.uint8)
