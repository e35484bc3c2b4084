"""Symbols and their numbers: characters, bytes or words."""

from __future__ import annotations

import string
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

Codes = npt.NDArray[np.unsignedinteger]

SYMBOLS_2011 = tuple(sorted(string.ascii_letters + string.digits + "_-+.,:;?/\\!@#$%&*()\"'\n "))
"""The 85 characters of Sutskever, Martens & Hinton, ICML 2011; a further symbol stands for all others."""

UNKNOWN = "\ufffd"
"""What an alphabet of characters calls the symbol of all others."""


class Alphabet:
    """Symbols in a fixed order; number k stands for the kth.

    Args:
        symbols: all of them, each once.
        unknown: the one among them that stands for all others; None if others are errors.
        between: what is written between two symbols: "" for characters, " " for words.

    Raises:
        ValueError: no symbol, one that occurs twice, or an `unknown` that is not among them.
    """

    def __init__(self, symbols: Iterable[str], unknown: str | None = None, between: str = "") -> None:
        self.symbols = tuple(symbols)
        self.numbers = {symbol: k for k, symbol in enumerate(self.symbols)}
        if len(self.numbers) != len(self.symbols) or not self.symbols:
            raise ValueError("an alphabet needs at least one symbol, and each of them once")
        if unknown is not None and unknown not in self.numbers:
            raise ValueError(f"the symbol of all others, {unknown!r}, is not in the alphabet")
        self.unknown, self.between = unknown, between

    def __len__(self) -> int:
        return len(self.symbols)

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        """The smallest integers that number all symbols."""
        return np.uint8 if len(self) <= 1 << 8 else np.uint16 if len(self) <= 1 << 16 else np.uint32

    def split(self, text: str) -> Sequence[str]:
        """The symbols that a text consists of: characters, or words."""
        return text.split() if self.between else text

    def encode(self, text: str | Iterable[str]) -> Codes:
        """The numbers of a text's symbols.

        Raises:
            ValueError: a symbol that the alphabet lacks, if none stands for all others.
        """
        symbols = self.split(text) if isinstance(text, str) else text
        other = None if self.unknown is None else self.numbers[self.unknown]
        found = [self.numbers.get(symbol, other) for symbol in symbols]
        if None in found:
            missing = next(symbol for symbol in symbols if symbol not in self.numbers)
            raise ValueError(f"the alphabet of {len(self)} symbols has no {missing!r}")
        return np.array(found, dtype=self.dtype)

    def decode(self, codes: Iterable[int]) -> str:
        """The text of some numbers."""
        return self.between.join(self.symbols[int(k)] for k in codes)


def of_points(counts: npt.NDArray[np.int64], also: npt.NDArray[np.int64]) -> Alphabet:
    """The characters that occur, in the order of their code points; with UNKNOWN at the end where others occur besides.

    Args:
        counts: how often each code point occurs in the training part.
        also: how often in all parts together.
    """
    points = np.flatnonzero(counts)
    symbols = [chr(p) for p in points]
    if len(np.flatnonzero(also)) > len(points):
        symbols = [s for s in symbols if s != UNKNOWN] + [UNKNOWN]
    return Alphabet(symbols, UNKNOWN if UNKNOWN in symbols else None)
