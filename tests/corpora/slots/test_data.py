"""Slots as a data object: vocabulary, minibatches, loss and F1."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from corpora.slots import Slots, atis
from corpora.slots.data import folded
from corpora.slots.iob import Utterance
from hfopt.experiment.data import check_data
from hfopt.experiment.roles import evaluate


def utterance(text: str) -> Utterance:
    words, tags = zip(*(word.split("/") for word in text.split()), strict=True)
    return Utterance(words, tags)


TRAIN = [
    utterance("fly/O to/O boston/B-city"),
    utterance("fly/O at/O 838/B-time am/I-time to/O boston/B-city"),
    utterance("to/O denver/B-city at/O 1110/B-time"),
]
VALID = [utterance("fly/O to/O rome/B-city"), utterance("boston/B-city")]
TEST = [utterance("at/O 999/B-time"), utterance("to/O class/B-class first/I-class")]
PARTS = {"train": TRAIN, "valid": VALID, "test": TEST}


def test_vocabulary() -> None:
    slots = Slots(PARTS)
    check_data(slots)
    assert folded("b1x23") == "bDIGITxDIGITDIGIT"
    vocabulary = slots.vocabulary
    # am, denver and the folded 838 and 1110 occur once; the others more often.
    assert set(vocabulary.words) == {"<UNK>", "at", "boston", "fly", "to"}
    assert vocabulary.tags == ("B-city", "B-time", "I-time", "O")
    assert vocabulary.word("denver") == vocabulary.word("rome") == vocabulary.word("838") == 1
    assert sorted(vocabulary.words.values()) == [1, 2, 3, 4, 5]
    assert (slots.V, slots.O) == (6, 4)


def test_minibatches() -> None:
    slots = Slots(PARTS)
    (group,) = slots(-1).groups
    order = [k for members in slots(-1).members for k in members]
    assert [len(VALID[k].words) for k in order] == group.lengths.tolist() == [1, 3]
    assert group.inputs[:, 1].tolist() == [slots.vocabulary.word(w) for w in ("fly", "to", "rome")]
    assert group.inputs[1:, 0].tolist() == [0, 0]
    assert group.targets[:, 1].tolist() == [3, 3, 0]
    assert slots.size(slots(-1)) == 4


def test_loss_and_metrics() -> None:
    slots = Slots(PARTS, evaluate_on="test")
    batch = slots(-1)
    logits = torch.zeros(5, 4)
    assert float(slots.loss(logits, batch)) == pytest.approx(math.log(4))  # tags that are unknown are left out

    def tag(*tags: str) -> Tensor:
        return torch.stack(
            [torch.nn.functional.one_hot(torch.tensor(slots.vocabulary.tags.index(t)), 4) for t in tags]
        ).float()

    scored = {}
    for name, tags in {
        "all that can be": {"at": "O", "999": "B-time", "to": "O", "class": "O", "first": "O"},
        "none": {"at": "B-city", "999": "O", "to": "O", "class": "O", "first": "O"},
    }.items():
        (group,) = batch.groups
        members = [slots.parts["test"][k].words for k in batch.members[0]]
        ordered = [members[b][t] for t in range(3) for b in range(2) if t < len(members[b])]
        outputs = tag(*(tags[word] for word in ordered))
        assert slots.predictions(outputs, batch) == [[tags[w] for w in words] for words in members]
        found = evaluate(torch.nn.Identity(), slots, [-1], lambda _model, _batch, z=outputs: z)
        scored[name] = found.values
        assert group.mask.sum() == 5
    assert scored["all that can be"]["F1"] == pytest.approx(2 / 3)  # one of two spans, and no wrong one
    assert scored["all that can be"]["wrong_tags"] == pytest.approx(2 / 5)
    assert scored["none"]["F1"] == 0


def test_roles_and_refusals() -> None:
    slots = Slots(PARTS, batch_size=2)
    assert [len(m) for m in slots(0).members] in ([1], [2])
    assert len(slots.evaluated_on("train").test_batches) == 2
    assert slots.evaluated_on("test")(-1).groups[0].lengths.tolist() == [2, 3]
    assert slots(-1).groups[0].lengths.tolist() == [1, 3]
    with pytest.raises(ValueError, match="has no test utterances"):
        Slots({**PARTS, "test": []})
    with pytest.raises(ValueError, match="evaluate_on is 'dev'"):
        Slots(PARTS, evaluate_on="dev")
    with pytest.raises(ValueError, match="role is 'dev'"):
        slots.evaluated_on("dev")


DATA = os.environ.get("HFOPT_DATA", "")


@pytest.mark.skipif(not DATA or not Path(DATA, "atis").is_dir(), reason="HFOPT_DATA has no ATIS")
def test_atis() -> None:
    slots = atis(valid_share=0.2)
    assert [len(slots.parts[role]) for role in ("train", "valid", "test")] == [3982, 996, 893]
    words: Any = sum(len(u.words) for role in ("train", "valid") for u in slots.parts[role])
    assert (words, sum(len(u.words) for u in slots.parts["test"])) == (56_200 - 0, 9_164)
    assert len({t for role in ("train", "valid") for u in slots.parts[role] for t in u.tags}) == 121
    with pytest.raises(ValueError, match="valid_share is 1"):
        atis(valid_share=1)
