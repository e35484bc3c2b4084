"""Words of a text, with the vocabulary of its training part."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from corpora.source import File, Found, find, folder_of, read, texts
from corpora.text import ptb
from corpora.text.alphabet import Alphabet
from corpora.text.stream import Text
from corpora.text.topics import topics

END, UNKNOWN = "<eos>", "<unk>"
"""The symbols behind each line, and of all words outside the vocabulary."""
_WIKITEXT = ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens")
WIKITEXT2_FILES = tuple(
    File(
        name,
        "https://s3.amazonaws.com/research.metamind.io/wikitext/wikitext-2-v1.zip",
        "92675f1d63015c1c8b51f1656a52d5bdbc33aafa60cc47a218a66e7ee817488c",
        member=f"wikitext-2/{name}",
    )
    for name in _WIKITEXT
)
WIKITEXT2 = (2_088_628, 217_646, 245_569)
"""Published numbers of its words, with an end behind each line, empty ones too."""

Tokens = list[str]
Loader = Callable[[str | Path | None], tuple[Sequence[Tokens], str]]


def words(
    source: str | Path = "topics",
    *,
    data: str | Path | None = None,
    encoding: str = "utf-8",
    vocabulary: int | None = None,
    shares: tuple[float, float] = (0.05, 0.05),
    **options: Any,
) -> Text:
    """The words of a text as a data object, by default in contiguous columns with the state carried.

    The vocabulary is that of the training part, the most frequent word first. Words outside it become `<unk>`.

    Args:
        source: "topics", the text in the module `pydoc_data.topics` of this Python, which needs no file, its words
            and punctuation marks in lower case; "ptb" or "wikitext2"; or the path of a text, whose words stand between
            spaces.
        data: folder of the published corpora's files; default: the folder of this name in the one that the environment
            variable HFOPT_DATA names. What is missing there is downloaded from its canonical address.
        encoding: of a file of one's own.
        vocabulary: words at most; the less frequent ones become `<unk>`. None: all of the training part.
        shares: of the validation part and the test part, which are the last ones, in a file of one's own.
        options: those of :class:`Text`: regime, window, warm_up, batch_size, train_batches, evaluate_on, seed, ...

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is empty, damaged, in another encoding, or not what its name says; or an argument is out of
            its range.

    Source: Marcus et al. 1993 in the preparation of Mikolov et al. 2010 (ptb); Merity et al., arXiv:1609.07843
    (wikitext2).
    """
    if vocabulary is not None and vocabulary < 2:
        raise ValueError(f"vocabulary is {vocabulary}; it is at least 2")
    if not all(0 < share < 1 for share in shares) or sum(shares) >= 1:
        raise ValueError(f"shares is {shares}; they are above 0, and together below 1")
    name, note = str(source), ""
    if name in WORDS:
        parts, note = WORDS[name](data)
    else:
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}, and no text of this name; texts are {', '.join(WORDS)}")
        name = path.name
        text = "".join(texts(Found(path), encoding))
        parts = [_tokens(text.splitlines())]
    if len(parts) == 1:
        parts = _cut(parts[0], shares)
    train, valid, _ = map(len, parts)
    alphabet = vocabulary_of(parts[0], vocabulary)
    codes = np.concatenate([alphabet.encode(part) for part in parts])
    given = {"regime": "columns", "window": 35, "warm_up": 34, "batch_size": 20, **options}
    return Text(name, codes, (train, train + valid), alphabet, words=True, note=note, **given)


def vocabulary_of(tokens: Iterable[str], most: int | None = None) -> Alphabet:
    """The words by frequency, the most frequent first and equally frequent ones in alphabetical order; with UNKNOWN."""
    counts = Counter(tokens)
    unknown = counts.pop(UNKNOWN, 0)
    ranked = sorted(counts, key=lambda word: (-counts[word], word))[: None if most is None else most - 1]
    more = sum(counts[word] >= max(unknown, 1) for word in ranked)  # its own place, as if the others were one word
    return Alphabet([*ranked[:more], UNKNOWN, *ranked[more:]], UNKNOWN, between=" ")


def _tokens(lines: Iterable[str]) -> Tokens:
    return [word for line in lines for word in (*line.split(), END)]


def _cut(tokens: Tokens, shares: tuple[float, float]) -> list[Tokens]:
    valid, test = (max(1, int(share * len(tokens))) for share in shares)
    train = len(tokens) - valid - test
    if train < 1:
        raise ValueError(f"the text has only {len(tokens)} words; there is nothing left for training")
    return [tokens[:train], tokens[train : train + valid], tokens[train + valid :]]


def _topics(data: str | Path | None) -> tuple[Sequence[Tokens], str]:
    text, note = topics()
    lines = (line.lower() for line in text.splitlines() if line.strip())
    return [[word for line in lines for word in (*re.findall(r"\w+|[^\w\s]", line), END)]], note


def _ptb(data: str | Path | None, expected: Sequence[int] | None = ptb.WORDS) -> tuple[Sequence[Tokens], str]:
    folder = folder_of(data, "ptb", ptb.FILES)
    parts = []
    for k, file in enumerate(ptb.FILES):
        found = find(folder, file)
        parts.append(_tokens(ptb.lines(found)))
        ptb.counted(found, "words", len(parts[-1]), None if expected is None else expected[k])
    return parts, ""


def _wikitext2(data: str | Path | None, expected: Sequence[int] | None = WIKITEXT2) -> tuple[Sequence[Tokens], str]:
    folder = folder_of(data, "wikitext2", WIKITEXT2_FILES)
    parts = []
    for k, file in enumerate(WIKITEXT2_FILES):
        found = find(folder, file)
        try:
            text = read(found).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{found} is no UTF-8 text at byte {error.start:,}; WikiText-2 is") from error
        lines = text.removesuffix("\n").split("\n")  # splitlines would cut at other characters, too
        parts.append(_tokens(lines))
        ptb.counted(found, "words", len(parts[-1]), None if expected is None else expected[k])
    return parts, ""


WORDS: dict[str, Loader] = {"topics": _topics, "ptb": _ptb, "wikitext2": _wikitext2}
"""What loads the texts that :func:`words` knows by name."""
