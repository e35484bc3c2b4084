"""Spans of IOB tags, and their F1, by the rules of the CoNLL-2000 script conlleval."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Span(NamedTuple):
    """A slot: its kind, and the words from `begin` to before `end`."""

    kind: str
    begin: int
    end: int


class Counts(NamedTuple):
    """Numbers of spans: found rightly, found in all, and there to be found."""

    right: int
    found: int
    there: int

    @property
    def f1(self) -> float:
        """The harmonic mean of precision and recall, 2 right / (found + there); 0 where there is no span at all."""
        return 2 * self.right / (self.found + self.there) if self.found + self.there else 0.0


def spans(tags: Sequence[str]) -> list[Span]:
    """The spans of a sequence of IOB tags.

    A span begins with a B, and with an I that follows an O, the beginning, or a tag of another kind; it goes on with
    each I of its kind.

    Source: Tjong Kim Sang & Buchholz, "Introduction to the CoNLL-2000 shared task: chunking", CoNLL 2000.
    """
    found: list[Span] = []
    kind, begin = "", 0
    for t, tag in enumerate([*tags, "O"]):
        prefix, _, now = tag.partition("-")
        if kind and (prefix != "I" or now != kind):
            found.append(Span(kind, begin, t))
            kind = ""
        if prefix != "O" and not kind:
            kind, begin = now, t
    return found


def compare(true: Iterable[Sequence[str]], predicted: Iterable[Sequence[str]]) -> Counts:
    """The spans of predicted tags against those of the true ones; a span is right if its kind and both ends are."""
    right = found = there = 0
    for t, p in zip(true, predicted, strict=True):
        wanted, got = set(spans(t)), set(spans(p))
        right, found, there = right + len(wanted & got), found + len(got), there + len(wanted)
    return Counts(right, found, there)
