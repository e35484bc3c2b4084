"""Windows, minibatches, losses and metrics of piano rolls, each against sums by hand."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from corpora.music import Music, Pieces, counterpoint, load
from corpora.music.baseline import FirstOrder
from corpora.music.data import windows
from hfopt.experiment.data import check_data
from hfopt.experiment.roles import evaluate

PIECES = counterpoint(pieces=30, beats=9, seed=0)


def ragged(seed: int = 0) -> Pieces:
    """Pieces of 1 to 40 frames."""
    generator = np.random.default_rng(seed)
    parts: dict[str, list[Any]] = {
        role: [(generator.random((length, 88)) < 0.04).astype(np.uint8) for length in generator.integers(1, 41, count)]
        for role, count in (("train", 60), ("valid", 7), ("test", 5))
    }
    return Pieces("ragged", parts)


def test_windows_score_every_frame_once() -> None:
    for length in (1, 7, 50, 101):
        for window in (None, 1, 10, 50):
            parts = windows(0, length, window, 5)
            assert [t for part in parts for t in range(part.score, part.end)] == list(range(length))
            assert all(part.score - part.begin == min(5, part.score) for part in parts)
            lengths = [part.end - part.score for part in parts]
            assert max(lengths) - min(lengths) <= 1
            assert max(lengths) <= (window or length)


@pytest.mark.parametrize("first", ["predicted", "left out"])
@pytest.mark.parametrize("window", [None, 10])
def test_minibatches_hold_each_frame_once_after_the_one_before(first: str, window: int | None) -> None:
    pieces = ragged()
    music = Music(pieces, batch_size=25, window=window, context=4, first=first, seed=1)
    check_data(music)
    music.forget()
    scored = []
    for i in music.train_batches:
        for group in music(i).groups:
            for b, length in enumerate(group.lengths.tolist()):
                inputs, targets, mask = group.inputs[:, b], group.targets[:, b], group.mask[:, b]
                assert torch.equal(inputs[1:length], targets[: length - 1])
                assert not mask[length:].any()
                assert not inputs[length:].any()
                scored.append(targets[mask])
    frames = [roll if first == "predicted" else roll[1:] for roll in pieces.parts["train"]]
    found, expected = torch.cat(scored), np.concatenate(frames)
    assert len(found) == len(expected)
    assert sorted(map(tuple, found.tolist())) == sorted(map(tuple, expected.tolist()))


def by_hand(rolls: list[Any], p: Any) -> tuple[float, float, float, float]:
    """Nats of all frames and of later ones, accuracy and expected accuracy, for the same chances at all frames."""
    nats, later, hits, union, right, total = [], [], 0, 0, 0.0, 0.0
    for roll in rolls:
        for t, frame in enumerate(roll):
            nats.append(-sum(math.log(q if v else 1 - q) for v, q in zip(frame.tolist(), p, strict=True)))
            later += [nats[-1]] if t else []
            on = {i for i in range(88) if p[i] >= 0.5}
            there = set(np.flatnonzero(frame).tolist())
            hits, union = hits + len(on & there), union + len(on | there)
            right += sum(p[i] for i in there)
            total += sum(p) + len(there)
    return sum(nats) / len(nats), sum(later) / len(later), hits / union, right / (total - right)


def test_metrics_by_hand() -> None:
    pieces = ragged(1)
    music = Music(pieces, evaluate_on="test", test_frames=60)
    assert len(music.test_batches) > 1
    p = np.linspace(0.01, 0.7, 88)
    logits = torch.logit(torch.tensor(p, dtype=torch.float32))

    def constant(_: torch.nn.Module, batch: Any) -> Tensor:
        return logits.expand(batch.size, 88)

    found = evaluate(torch.nn.Identity(), music, music.test_batches, constant)
    expected = by_hand(pieces.parts["test"], p)
    assert list(found.values.values()) == pytest.approx(expected, rel=1e-5)
    assert found.loss == pytest.approx(expected[0], rel=1e-5)
    assert [m.name for m in music.metrics] == ["nats/frame", "nats/frame from 2nd", "accuracy", "expected accuracy"]
    assert len(Music(pieces, conditional=True).metrics) == 2
    for role in ("valid", "train"):
        other = music.evaluated_on(role)
        whole = evaluate(torch.nn.Identity(), other, other.test_batches, constant)
        assert whole.loss == pytest.approx(by_hand(pieces.parts[role], p)[0], rel=1e-5)


def test_outputs_of_another_shape_and_settings_that_are_none() -> None:
    music = Music(PIECES)
    with pytest.raises(ValueError, match="one logit per frame and pitch"):
        music.loss(torch.zeros(3, 88), music(0))
    for options, said in (
        ({"first": "no"}, "choose 'predicted' or 'left out'"),
        ({"evaluate_on": "dev"}, "'valid'"),
        ({"window": 0}, "window"),
        ({"context": -1}, "context"),
    ):
        with pytest.raises(ValueError, match=said):
            Music(PIECES, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has no valid pieces"):
        Pieces("none", {"train": PIECES.parts["train"]})


def test_state_of_other_pieces_is_refused() -> None:
    state = Music(PIECES).state_dict()
    Music(PIECES).load_state_dict(state)
    with pytest.raises(ValueError, match="fingerprint"):
        Music(counterpoint(pieces=30, beats=9, seed=1)).load_state_dict(state)


DATA = os.environ.get("HFOPT_DATA", "")


@pytest.mark.skipif(not DATA or not Path(DATA, "music").is_dir(), reason="HFOPT_DATA has no music")
@pytest.mark.parametrize(("name", "nats"), [("jsb", 10.491), ("nottingham", 5.153), ("piano-midi", 8.265)])
def test_first_order_model_of_published_pieces(name: str, nats: float) -> None:
    pieces = load(name)
    assert FirstOrder(pieces).nats(pieces.parts["test"])[1] == pytest.approx(nats, abs=6e-4)


def test_first_order_model_by_hand() -> None:
    roll = np.zeros((4, 88), dtype=np.uint8)
    roll[:, 40] = (1, 1, 0, 1)
    model = FirstOrder(Pieces("one", {role: [roll] for role in ("train", "valid", "test")}))
    assert model.start[40] == pytest.approx(1.5 / 2)
    assert model.after[0, 40] == pytest.approx(1.5 / 2)  # 0 -> 1 once of once
    assert model.after[1, 40] == pytest.approx(1.5 / 3)  # 1 -> 1 once of twice
    others = 87 * (math.log(1 - 0.5 / 2) + 3 * math.log(1 - 0.5 / 4))
    own = math.log(0.75) + math.log(0.5) + math.log(0.5) + math.log(0.75)
    assert model.nats([roll])[0] == pytest.approx(-(others + own) / 4)
