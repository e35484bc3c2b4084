"""Slot filling as a data object: each word of an utterance gets a tag."""

from __future__ import annotations

from collections import Counter
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from corpora.sequences import Groups, Sequences, by_length, padded
from corpora.slots.iob import Utterance, read_iob
from corpora.slots.spans import compare
from corpora.source import File, find, folder_of
from hfopt.experiment.data import Shuffled
from hfopt.experiment.metrics import Metric

_JOINT = "https://raw.githubusercontent.com/yvchen/JointSLU/master/data"
FILES = {
    "train": File(
        "atis.train.w-intent.iob",
        f"{_JOINT}/atis.train.w-intent.iob",
        "e0a1e3de978345b4fbfa4f2eefa8bb974460f0f7f38330e179ccaecc80d68178",
    ),
    "test": File(
        "atis.test.w-intent.iob",
        f"{_JOINT}/atis.test.w-intent.iob",
        "744bc272bce1c6a828df7b5580b47a4aee2ad2019e5d2376c348bea1c15f0d6e",
    ),
}
ROLES = ("train", "valid", "test")
UNKNOWN = "<UNK>"
PADDING = 0
"""The index of no word, behind the ends of utterances."""


def folded(word: str) -> str:
    """A word with every digit replaced by the word DIGIT: 838 becomes DIGITDIGITDIGIT."""
    return "".join("DIGIT" if "0" <= c <= "9" else c for c in word)


@dataclass(frozen=True)
class Vocabulary:
    """Indices of words, from 1, and of tags, from 0. A word that is not there has that of `UNKNOWN`."""

    words: dict[str, int]
    tags: tuple[str, ...]

    @classmethod
    def of(cls, train: list[Utterance]) -> Vocabulary:
        """The words that occur twice or more in the training utterances, digits folded; and all of their tags."""
        counts = Counter(folded(word) for utterance in train for word in utterance.words)
        known = sorted(word for word, count in counts.items() if count > 1)
        tags = sorted({tag for utterance in train for tag in utterance.tags})
        return cls({word: k for k, word in enumerate([UNKNOWN, *known], 1)}, tuple(tags))

    def word(self, word: str) -> int:
        """The index of a word."""
        return self.words.get(folded(word), self.words[UNKNOWN])


class Slots(Shuffled[Groups]):
    """Utterances in minibatches, with the loss and the span F1 of a model that tags every word.

    The inputs are word indices `(T, B)`, 0 after an utterance's end; the targets are tag indices `(T, B)`. Vocabulary
    and tags are those of the training utterances: a tag that only test utterances have cannot be predicted, and counts
    as a span that was not found.

    Args:
        parts: utterances of the roles "train", "valid" and "test".
        batch_size: utterances in a minibatch at most; None: all in one.
        evaluate_on: what the test minibatches are, "valid", "test" or "train".
        name: of the data.
        options: the others of :class:`hfopt.experiment.data.Shuffled`: seed, shuffle_every, memory.

    Attributes:
        vocabulary: of words and tags.
        V, O: numbers of word indices, that of padding included, and of tags.
        metrics: "F1" of spans, and the share of wrong tags.

    Raises:
        ValueError: a role has no utterances, or an argument is out of its range.
    """

    def __init__(
        self,
        parts: dict[str, list[Utterance]],
        *,
        batch_size: int | None = None,
        evaluate_on: str = "valid",
        name: str = "slots",
        device: torch.device | str = "cpu",
        **options: Any,
    ) -> None:
        for role in ROLES:
            if not parts.get(role):
                raise ValueError(f"{name} has no {role} utterances; there must be at least one of each role")
        if evaluate_on not in ROLES:
            raise ValueError(f"evaluate_on is {evaluate_on!r}; choose {' or '.join(map(repr, ROLES))}")
        self.name, self.evaluate_on, self.device = name, evaluate_on, torch.device(device)
        self.parts = parts
        self.vocabulary = Vocabulary.of(parts["train"])
        self.V, self.O = len(self.vocabulary.words) + 1, len(self.vocabulary.tags)
        self._tags = {tag: k for k, tag in enumerate(self.vocabulary.tags)}
        super().__init__(len(parts["train"]), len(parts[evaluate_on]), batch_size=batch_size, **options)
        self.metrics = [
            Metric("F1", self._spans, unit="%", better="higher"),
            Metric("wrong tags", self._wrong, unit="%", column="wrong_tags"),
        ]

    def evaluated_on(self, role: str) -> Slots:
        """The same training minibatches with test minibatches of another role.

        Raises:
            ValueError: an unknown role.
        """
        if role not in ROLES:
            raise ValueError(f"role is {role!r}; choose {' or '.join(map(repr, ROLES))}")
        other = copy(self)
        other.evaluate_on, other._test_count = role, len(self.parts[role])
        other.test_batches = range(-1, -1 - -(-other._test_count // self.batch_size), -1)
        other.train_mem, other.test_mem = {}, {}
        return other

    def take(self, role: str, cases: slice | Tensor) -> Groups:
        """The given utterances."""
        part = self.parts["train" if role == "train" else self.evaluate_on]
        chosen = part[cases] if isinstance(cases, slice) else [part[k] for k in cases.tolist()]
        members = by_length([len(u.words) for u in chosen])
        groups = tuple(self._group_of([chosen[k] for k in group]) for group in members)
        return Tagged(groups, members, [chosen[k].tags for group in members for k in group])

    def _group_of(self, chosen: list[Utterance]) -> Sequences:
        words = padded([np.array([self.vocabulary.word(w) for w in u.words]) for u in chosen], PADDING)
        # -1 for a tag that training utterances do not have: nothing equals it.
        tags = padded([np.array([self._tags.get(t, -1) for t in u.tags]) for u in chosen], -1)
        lengths = np.array([len(u.words) for u in chosen])
        return Sequences(
            inputs=torch.from_numpy(words).to(self.device),
            targets=torch.from_numpy(tags).to(self.device),
            mask=torch.from_numpy(np.arange(len(words))[:, None] < lengths).to(self.device),
            lengths=torch.from_numpy(lengths).to(self.device),
        )

    def size(self, batch: Groups) -> int:
        """The number of words, which the loss is the mean over."""
        return batch.size

    def loss(self, outputs: Tensor, batch: Groups) -> Tensor:
        """The mean cross-entropy of the tags in nats; words whose tag no training utterance has are left out.

        Args:
            outputs: logits of all words `(N, O)`.
            batch: whose words they tag.
        """
        return F.cross_entropy(outputs, batch.targets, ignore_index=-1)

    def predictions(self, outputs: Tensor, batch: Groups) -> list[list[str]]:
        """The most likely tags of each utterance, group by group."""
        found = []
        for group, some in zip(batch.groups, batch.split(outputs.argmax(1)), strict=True):
            for row, length in zip(group.place(some).T.tolist(), group.lengths.tolist(), strict=True):
                found.append([self.vocabulary.tags[k] for k in row[:length]])
        return found

    def _spans(self, outputs: Tensor, batch: Groups) -> tuple[float, float]:
        assert isinstance(batch, Tagged)
        counts = compare(batch.tags, self.predictions(outputs, batch))
        return 2.0 * counts.right, float(counts.found + counts.there)

    @staticmethod
    def _wrong(outputs: Tensor, batch: Groups) -> tuple[float, float]:
        wrong = outputs.argmax(1) != batch.targets
        return float(wrong.sum()), float(wrong.numel())

    def identity(self) -> dict[str, int | float | str]:
        """Name, sizes of the vocabulary, what is evaluated, and the minibatches."""
        return {"name": self.name, "V": self.V, "O": self.O, "evaluate_on": self.evaluate_on, **super().identity()}

    def __repr__(self) -> str:
        counts = ", ".join(f"{len(self.parts[role]):,} {role}" for role in ROLES)
        return f"{self.name}({counts} utterances, {self.V - 1} words, {self.O} tags, batch_size={self.batch_size})"


@dataclass(frozen=True, eq=False)
class Tagged(Groups):
    """Utterances with their tags as words, group by group, those that no training utterance has included."""

    tags: list[tuple[str, ...]]


def atis(data: str | Path | None = None, *, valid_share: float = 0.2, **options: Any) -> Slots:
    """ATIS: 4,978 training utterances, of which a share is taken for validation, and 893 for test.

    Args:
        data: folder of the files `atis.train.w-intent.iob` and `atis.test.w-intent.iob`, which may be packed with
            `.gz` behind their names. Default: `atis` in the folder that the environment variable HFOPT_DATA names;
            what is missing there is downloaded.
        valid_share: of the training utterances, drawn from the seed 0 whatever the seed of the minibatches is.
        options: those of :class:`Slots`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged or of another kind, or the share is not between 0 and 1.

    Source: Hemphill, Godfrey & Doddington, "The ATIS spoken language systems pilot corpus", 1990.
    """
    if not 0 < valid_share < 1:
        raise ValueError(f"valid_share is {valid_share}; it is a share, above 0 and below 1")
    folder = folder_of(data, "atis", list(FILES.values()))
    read = {role: read_iob(find(folder, file)) for role, file in FILES.items()}
    order = np.random.Generator(np.random.Philox(0)).permutation(len(read["train"]))
    held = max(1, round(valid_share * len(order)))
    parts = {
        "train": [read["train"][k] for k in order[held:]],
        "valid": [read["train"][k] for k in order[:held]],
        "test": read["test"],
    }
    return Slots(parts, name="atis", **options)
