"""Reading pickles of numpy arrays without running anything that they ask for.

A pickle is a program: it can name any function and have it called. Here, the few names that arrays need stand for
harmless records of what was asked for; every other name is refused before it is looked up. Arrays are then made of the
records by numpy's public constructors. numpy's own way is not used: it believes what the file says of an array's memory
(flags of its type, its size), which a file that was made for it can turn into writing anywhere.
"""

from __future__ import annotations

import math
import pickle
import re
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

_KIND = re.compile(r"[|<>=]?[biufcSUVO]\d{0,7}")
_DEEPEST = 50
_NOTHING: Any = object()
_CONTAINERS = {"dict": dict, "list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


class PickleError(ValueError):
    """A pickle asks for something that is no array, type, number or container, or is damaged."""


class _Dtype:
    """What a pickle says of a type: its name, and what it adds to that."""

    def __init__(self, kind: Any, *_: Any) -> None:
        self.kind, self.state = _text(kind), _NOTHING

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def real(self, depth: int = 0) -> np.dtype[Any]:
        if depth > _DEEPEST or not _KIND.fullmatch(self.kind):
            raise PickleError(f"it has a type {self.kind[:50]!r}, which is no number, text or object")
        if self.state is _NOTHING:
            return np.dtype(self.kind)
        if not isinstance(self.state, tuple) or len(self.state) < 7:
            raise PickleError("it describes a type in a way that numpy does not")
        order, sub, names, fields, size = self.state[1:6]
        if sub is not None:
            base, shape = sub
            pair: Any = (_Dtype.of(base).real(depth + 1), _shape(shape))
            array: np.dtype[Any] = np.dtype(pair)
            return array
        if names:
            columns = [(_text(name), *fields[name]) for name in names]
            formats = [_Dtype.of(kind).real(depth + 1) for _, kind, *_ in columns]
            layout: Any = {"names": [c[0] for c in columns], "formats": formats, "offsets": [c[2] for c in columns]}
            if size not in (None, -1):
                layout["itemsize"] = int(size)
            structured: np.dtype[Any] = np.dtype(layout)
            return structured
        made: Any = np.dtype(self.kind if self.kind[0] not in "SUV" or size in (None, -1) else _sized(self.kind, size))
        found: np.dtype[Any] = made if order in ("|", "=") else made.newbyteorder(_text(order))
        return found

    @staticmethod
    def of(given: Any) -> _Dtype:
        if not isinstance(given, _Dtype):
            raise PickleError(f"it has a {type(given).__name__} where a type should be")
        return given


class _Array:
    """What a pickle says of an array."""

    def __init__(self, *_: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def real(self, depth: int) -> npt.NDArray[Any]:
        if not isinstance(self.state, tuple) or len(self.state) not in (4, 5):
            raise PickleError("it describes an array in a way that numpy does not")
        shape, kind, fortran, data = self.state[-4:]
        dtype, shape = _Dtype.of(kind).real(), _shape(shape)
        count = math.prod(shape)
        order: Any = "F" if fortran else "C"
        if dtype.hasobject:
            if not isinstance(data, list) or len(data) != count:
                raise PickleError(f"it has an array of {count:,} objects whose entries are missing")
            entries = [_real(entry, depth + 1) for entry in data]
            flat = np.empty(count, dtype)
            for i, entry in enumerate(entries):
                flat[i] = entry
            return flat.reshape(shape, order=order)
        raw = data.encode("latin-1") if isinstance(data, str) else data
        if not isinstance(raw, bytes) or dtype.itemsize == 0 or len(raw) != count * dtype.itemsize:
            raise PickleError(f"it has an array of {count:,} entries with memory for another number of them")
        return np.frombuffer(raw, dtype).reshape(shape, order=order).copy()


def _reconstruct(kind: Any, *_: Any) -> _Array:
    if kind is not _Array:
        raise PickleError("it asks for an array of an unknown kind")
    return _Array()


def _scalar(dtype: Any, data: Any = None) -> Any:
    made = _Dtype.of(dtype).real()
    raw = data.encode("latin-1") if isinstance(data, str) else data
    if made.hasobject or not isinstance(raw, bytes) or len(raw) != made.itemsize or not raw:
        raise PickleError("it has a number with memory for something else")
    return np.frombuffer(raw, made)[0]


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or str(encoding).lower() not in ("latin1", "latin-1"):
        raise PickleError("it encodes something else than bytes")
    return text.encode("latin-1")


_HARMLESS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(module, name): made for module in ("builtins", "__builtin__") for name, made in _CONTAINERS.items()},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _HARMLESS:
            raise PickleError(f"it asks for {module}.{name}, which is no part of an array; nothing of it was run")
        return _HARMLESS[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise PickleError("it refers to something outside the file")


def unpickle(file: BinaryIO) -> Any:
    """Read a pickle of numpy arrays, numbers, text and plain containers; text of Python 2 is read as Latin-1.

    Raises:
        PickleError: it asks for something else, or is damaged; the message says what.
    """
    try:
        # buffers= stays empty: no memory of others is taken in.
        found = _Unpickler(file, encoding="latin1").load()
        return _real(found, 0)
    except PickleError:
        raise
    except MemoryError:
        raise PickleError("it asks for more memory than there is") from None
    except Exception as error:
        # Bytes that are no pickle make it fail in any of a dozen ways.
        raise PickleError(f"it is damaged or no pickle of arrays ({type(error).__name__}: {error})") from error


def _real(found: Any, depth: int) -> Any:
    """The same with arrays and types in place of the records of them."""
    if depth > _DEEPEST:
        raise PickleError(f"its containers are nested more than {_DEEPEST} deep")
    if isinstance(found, _Array):
        return found.real(depth)
    if isinstance(found, _Dtype):
        return found.real()
    if isinstance(found, dict):
        return {_real(k, depth + 1): _real(v, depth + 1) for k, v in found.items()}
    if isinstance(found, (list, tuple, set, frozenset)):
        return type(found)(_real(entry, depth + 1) for entry in found)
    if found is None or isinstance(found, (bool, int, float, complex, str, bytes, np.generic)):
        return found
    raise PickleError(f"it has a {getattr(found, '__name__', type(found).__name__)} among its data")


def _text(given: Any) -> str:
    return given.decode("latin-1") if isinstance(given, bytes) else str(given)


def _sized(kind: str, size: int) -> str:
    letter = kind.lstrip("|<>=")[0]
    return f"{letter}{int(size) // (4 if letter == 'U' else 1)}"


def _shape(shape: Any) -> tuple[int, ...]:
    made = shape if isinstance(shape, tuple) else (shape,)
    if len(made) > 32 or not all(isinstance(n, int) and 0 <= n < 2**48 for n in made):
        raise PickleError(f"it has an array of the shape {str(shape)[:60]}")
    return made
