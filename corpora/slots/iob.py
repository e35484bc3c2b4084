"""Slot-filling files of ATIS: an utterance a line, its words and IOB tags in two fields."""

from __future__ import annotations

import re
from typing import NamedTuple

from corpora.source import Found, texts

_TAG = re.compile(r"O|[BI]-\S+")
BEGIN, END = "BOS", "EOS"


class Utterance(NamedTuple):
    """Words and their tags, as many of each."""

    words: tuple[str, ...]
    tags: tuple[str, ...]


def read_iob(found: Found) -> list[Utterance]:
    """The utterances of a file: ``BOS w1 .. wn EOS<TAB>O t1 .. tn intent`` in each line; the intent is left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, damaged, no UTF-8 text, or has a line of another form; the message names it.
    """
    content = "".join(texts(found, most=1 << 28))
    utterances = []
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip():
            utterances.append(_utterance(line, f"{found}, line {number}"))
    if not utterances:
        raise ValueError(f"{found} has no utterance")
    if not content.endswith("\n"):
        raise ValueError(f"{found} ends within line {len(content.splitlines())}; it is truncated, fetch it again")
    return utterances


def _utterance(line: str, where: str) -> Utterance:
    fields = line.split("\t")
    if len(fields) != 2:
        raise ValueError(f"{where} has {len(fields)} fields; words and tags are separated by one tab")
    words, tags = fields[0].split(), fields[1].split()
    if len(words) < 3 or words[0] != BEGIN or words[-1] != END:
        raise ValueError(f"{where}: the words do not go from {BEGIN} to {END}")
    if len(tags) != len(words):
        raise ValueError(f"{where} has {len(words)} words with {BEGIN} and {END}, but {len(tags)} tags with the intent")
    wrong = next((tag for tag in tags[:-1] if not _TAG.fullmatch(tag)), None)
    if wrong is not None:
        raise ValueError(f"{where} has the tag {wrong!r}; tags are O, B-... and I-...")
    return Utterance(tuple(words[1:-1]), tuple(tags[1:-1]))
