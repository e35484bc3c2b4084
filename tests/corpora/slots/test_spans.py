"""Spans and their F1: by hand, and compared with seqeval on random tags."""

from __future__ import annotations

import random

import pytest
from seqeval.metrics import f1_score, precision_score, recall_score

from corpora.slots import compare, spans
from corpora.slots.spans import Counts


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ([], []),
        (["O", "O"], []),
        (["B-a"], [("a", 0, 1)]),
        (["B-a", "I-a", "O", "B-a"], [("a", 0, 2), ("a", 3, 4)]),
        (["B-a", "B-a", "I-a"], [("a", 0, 1), ("a", 1, 3)]),
        (["I-a", "I-a", "I-b"], [("a", 0, 2), ("b", 2, 3)]),
        (["B-a", "I-b", "O"], [("a", 0, 1), ("b", 1, 2)]),
        (["B-x.y-z", "I-x.y-z"], [("x.y-z", 0, 2)]),
    ],
)
def test_spans(tags: list[str], expected: list[tuple[str, int, int]]) -> None:
    assert spans(tags) == expected


def test_counts() -> None:
    true = [["B-a", "I-a", "O"], ["B-b", "O", "B-c"]]
    predicted = [["B-a", "O", "O"], ["B-b", "O", "I-c"]]
    counts = compare(true, predicted)
    assert counts == Counts(right=2, found=3, there=3)  # an I that begins a span is as good as a B
    assert counts.f1 == pytest.approx(2 / 3)
    assert Counts(0, 0, 0).f1 == 0


def test_as_seqeval_counts() -> None:
    generator = random.Random(0)
    kinds = ["O", "O", "B-a", "I-a", "B-b", "I-b", "B-c", "I-c"]
    for _ in range(60):
        lengths = [generator.randrange(1, 12) for _ in range(8)]
        true, predicted = ([[generator.choice(kinds) for _ in range(n)] for n in lengths] for _ in range(2))
        counts = compare(true, predicted)
        assert counts.right / counts.found == pytest.approx(precision_score(true, predicted))
        assert counts.right / counts.there == pytest.approx(recall_score(true, predicted))
        assert counts.f1 == pytest.approx(f1_score(true, predicted))
