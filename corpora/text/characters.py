"""Characters of a text: of any file, of the published corpora, or of what every Python installation carries."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from corpora.source import File, Found, find, folder_of, pieces, texts
from corpora.text import ptb
from corpora.text.alphabet import SYMBOLS_2011, UNKNOWN, Alphabet, Codes, of_points
from corpora.text.stream import Text
from corpora.text.topics import topics

Points = npt.NDArray[np.uint32]
_POINTS = 0x110000
"""The number of code points of Unicode."""
MAHONEY = 100_000_000
"""Characters of whole text8 and enwik8: 90, 5 and 5 million for training, validation and test."""


@dataclass(frozen=True)
class Mahoney:
    """A file of Mahoney's: its download, and what all its bytes or its first ones are."""

    file: File
    member: str
    allowed: bytes = bytes(range(256))
    begins: bytes = b""


TEXT8 = Mahoney(
    File(
        "text8",
        "http://mattmahoney.net/dc/text8.zip",
        "a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232",
        member="text8",
    ),
    "text8",
    allowed=b" abcdefghijklmnopqrstuvwxyz",
)
ENWIK8 = Mahoney(
    File(
        "enwik8",
        "http://mattmahoney.net/dc/enwik8.zip",
        "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
        member="enwik8",
    ),
    "enwik8",
    begins=b"<mediawiki ",
)


def characters(
    source: str | Path = "topics",
    *,
    data: str | Path | None = None,
    encoding: str = "utf-8",
    alphabet: str = "text",
    shares: tuple[float, float] = (0.05, 0.05),
    **options: Any,
) -> Text:
    """The characters of a text as a data object.

    Args:
        source: "topics", the text in the module `pydoc_data.topics` of this Python, which needs no file; "ptb", "text8"
            or "enwik8"; or the path of a file, which may be gzipped.
        data: folder of the published corpora's files; default: the folder of this name in the one that the environment
            variable HFOPT_DATA names. What is missing there is downloaded from its canonical address.
        encoding: of a file of one's own; "bytes" for a file that is no text: its symbols are bytes.
        alphabet: "text": the characters of the training part, and, where the other parts have more, a symbol for those;
            "2011": the 85 characters of Sutskever, Martens & Hinton, and a symbol for all others.
        shares: of the validation part and the test part, which are the last ones, in a file of one's own.
        options: those of :class:`Text`: regime, window, warm_up, batch_size, train_batches, evaluate_on, seed, ...

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is empty, damaged, in another encoding, or not what its name says; or an argument is out of
            its range.

    Source: Marcus et al. 1993 in the preparation of Mikolov et al. 2010 (ptb); Mahoney, "About the test data", 2011
    (text8, enwik8; splits as in Zilly et al., ICML 2017).
    """
    if alphabet not in ("text", "2011"):
        raise ValueError(f"alphabet is {alphabet!r}; choose 'text' or '2011'")
    if not all(0 < share < 1 for share in shares) or sum(shares) >= 1:
        raise ValueError(f"shares is {shares}; they are above 0, and together below 1")
    name = str(source)
    note = ""
    if name in CORPORA:
        chunks, lengths, note = CORPORA[name](data, shares)
    else:
        path = Path(source)
        if not path.is_file():
            known = ", ".join(CORPORA)
            raise FileNotFoundError(f"there is no file {path}, and no text of this name; texts are {known}")
        name = path.name
        chunks, lengths = _points(Found(path), encoding), None
    points = _joined(chunks)
    valid, test = (max(1, int(share * len(points))) for share in shares)
    parts = (len(points) - valid - test, len(points) - test) if lengths is None else lengths
    if parts[0] < 1:
        raise ValueError(f"{name} has only {len(points)} characters; there is nothing left for training")
    symbols = _alphabet(points, parts[0], alphabet)
    codes, others = _encode(points, symbols)
    if others:
        note = f"{note} {others:,} characters stand for all that the alphabet lacks.".strip()
    return Text(name, codes, parts, symbols, note=note, **options)


def _points(found: Found, encoding: str) -> Iterator[Points]:
    """Code points of a file, piece by piece; its bytes if the encoding is "bytes"."""
    if encoding == "bytes":
        yield from (np.frombuffer(piece, np.uint8).astype(np.uint32) for piece in pieces(found))
        return
    try:
        for text in texts(found, encoding):
            yield as_points(text)
    except LookupError as error:
        raise ValueError(
            f"encoding is {encoding!r}, which Python does not know; utf-8, latin-1 or bytes are some"
        ) from error


def as_points(text: str) -> Points:
    """The code points of a text."""
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


def _joined(chunks: Iterable[Points]) -> Points:
    """All chunks together, in the smallest integers that hold them: a text of 100 million bytes takes 100 MB."""
    small: list[Any] = []
    for chunk in chunks:
        top = int(chunk.max(initial=0))
        small.append(chunk.astype(np.uint8 if top < 1 << 8 else np.uint16 if top < 1 << 16 else np.uint32))
    kind = max((chunk.dtype for chunk in small), key=lambda dtype: dtype.itemsize, default=np.dtype(np.uint8))
    joined = np.empty(sum(map(len, small)), kind)
    at = 0
    while small:  # each chunk is let go when it has been copied
        chunk = small.pop(0)
        joined[at : at + len(chunk)] = chunk
        at += len(chunk)
    return joined


def _alphabet(points: Points, train: int, kind: str) -> Alphabet:
    if kind == "2011":
        return Alphabet((*SYMBOLS_2011, UNKNOWN), UNKNOWN)
    first = _counts(points[:train])
    return of_points(first, first + _counts(points[train:]))


def _counts(points: Points) -> npt.NDArray[np.int64]:
    """How often each code point occurs, counted piece by piece: bincount makes long integers of all it gets."""
    total = np.zeros(_POINTS if points.dtype.itemsize > 1 else 256, np.int64)
    for start in range(0, len(points), 1 << 20):
        total += np.bincount(points[start : start + (1 << 20)], minlength=len(total))
    return total


def _encode(points: Points, alphabet: Alphabet) -> tuple[Codes, int]:
    """Numbers of the characters, and how many of them stand for others; in place where the integers are as large."""
    other = 0 if alphabet.unknown is None else alphabet.numbers[alphabet.unknown]
    table = np.full(_POINTS, other, alphabet.dtype)
    for symbol, k in alphabet.numbers.items():
        if symbol != alphabet.unknown:
            table[ord(symbol)] = k
    codes = (
        points if points.dtype == alphabet.dtype and points.flags.writeable else np.empty(len(points), alphabet.dtype)
    )
    others = 0
    for start in range(0, len(points), 1 << 20):
        some = slice(start, start + (1 << 20))
        codes[some] = table[points[some]]
        others += int((codes[some] == other).sum()) if alphabet.unknown is not None else 0
    return codes, others


# -- published texts ----------------------------------------------------------------------------------------

Loaded = tuple[Iterable[Points], "tuple[int, int] | None", str]


def _topics(data: str | Path | None, shares: tuple[float, float]) -> Loaded:
    text, note = topics()
    return [as_points(text)], None, note


def _ptb(data: str | Path | None, shares: tuple[float, float]) -> Loaded:
    """Penn Treebank as characters: one end of line for each line."""
    parts = ptb.characters(data)
    train, valid, _ = map(len, parts)
    return map(as_points, parts), (train, train + valid), ""


def _mahoney(which: Mahoney) -> Callable[[str | Path | None, tuple[float, float]], Loaded]:
    def load(data: str | Path | None, shares: tuple[float, float]) -> Loaded:
        name = which.file.name
        folder = folder_of(data, name, [which.file])
        prefix = next((p for p in (folder / f"{name}.prefix", folder / f"{name}.prefix.gz") if p.is_file()), None)
        whole = any((folder / p).is_file() for p in (name, f"{name}.gz", which.file.download_name))
        found = Found(prefix) if prefix is not None and not whole else find(folder, which.file)
        points = _joined(_checked(found, which))
        if len(points) > MAHONEY:
            raise ValueError(f"{found} has {len(points):,} bytes, but {name} has {MAHONEY:,}: it is another file")
        train, valid = (len(points) * share // 100 for share in (90, 95))
        note = ""
        if len(points) < MAHONEY:
            note = (
                f"This is a prefix of {name}: {len(points):,} of its {MAHONEY:,} bytes, of which 90% are for training, "
                "5% for validation and 5% for the test, as of the whole; results are not those of the whole."
            )
        return [points], (train, valid), note

    return load


def _checked(found: Found, which: Mahoney) -> Iterator[Points]:
    """The bytes of a file, refused where they are not what its name says."""
    allowed = np.zeros(256, bool)
    allowed[list(which.allowed)] = True
    first = True
    for piece in pieces(found):
        some = np.frombuffer(piece, np.uint8)
        if first and not piece.startswith(which.begins):
            raise ValueError(f"{found} begins with {piece[:20]!r}, but {which.file.name} with {which.begins!r}")
        if not allowed[some].all():
            foreign = some[~allowed[some]][0]
            raise ValueError(f"{found} has the byte {foreign:#04x}, but {which.file.name} has only a to z and spaces")
        first = False
        yield some  # type: ignore[misc]


CORPORA: dict[str, Callable[[str | Path | None, tuple[float, float]], Loaded]] = {
    "topics": _topics,
    "ptb": _ptb,
    "text8": _mahoney(TEXT8),
    "enwik8": _mahoney(ENWIK8),
}
"""What loads the texts that :func:`characters` knows by name."""
