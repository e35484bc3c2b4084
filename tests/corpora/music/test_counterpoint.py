"""Generated counterpoint keeps its rules, and the measure sees where rules are broken."""

from __future__ import annotations

import numpy as np
import pytest

from corpora.music import counterpoint
from corpora.music.baseline import FirstOrder
from corpora.music.rolls import LOWEST, PITCHES, Roll
from corpora.music.rules import RULES, consonant, mean_share, obedience, parallel


def of_chords(*chords: tuple[int, ...]) -> Roll:
    """A chord of MIDI numbers for each frame."""
    roll = np.zeros((len(chords), PITCHES), dtype=np.uint8)
    for t, chord in enumerate(chords):
        roll[t, np.array(chord) - LOWEST] = 1
    return roll


def test_all_rules_are_obeyed_and_apply_often() -> None:
    pieces = counterpoint(pieces=60, beats=32, seed=3)
    counts = obedience(pieces.parts["train"])
    assert {rule: count.share for rule, count in counts.items()} == dict.fromkeys(RULES, 1.0)
    assert min(count.cases for count in counts.values()) > 100
    assert {int(roll[0].sum()) for roll in pieces.parts["train"]} == {2, 3, 4}
    moving = np.mean([(roll[1:] != roll[:-1]).any(1).mean() for roll in pieces.parts["train"]])
    assert moving > 0.6  # it is music, no organ point


def test_a_function_of_the_seed() -> None:
    assert counterpoint(5, 8, seed=1).fingerprint() == counterpoint(5, 8, seed=1).fingerprint()
    assert counterpoint(5, 8, seed=1).fingerprint() != counterpoint(5, 8, seed=2).fingerprint()
    assert counterpoint().fingerprint() == "65ffcff1"  # on every machine
    for options in ({"pieces": 2}, {"beats": 1}, {"seed": -1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            counterpoint(**options)


def test_intervals() -> None:
    assert consonant([48, 52, 55, 60])  # the fourth from 55 to 60 is not above the bass
    assert not consonant([48, 53])  # a fourth above the bass
    assert not consonant([48, 54])
    assert not consonant([48, 55, 61])
    assert parallel([48, 55], [50, 57])  # fifths
    assert parallel([48, 60], [50, 62])  # octaves
    assert parallel([48, 55], [50, 69])  # a fifth and a twelfth
    assert not parallel([48, 55], [48, 55])  # they stay
    assert not parallel([48, 52], [50, 53])


def test_every_rule_can_be_broken() -> None:
    base = ((48, 64), (48, 64), (50, 65), (50, 65))
    shares = {rule: count.share for rule, count in obedience([of_chords(*base)]).items()}
    assert shares == dict.fromkeys(RULES, 1.0)
    for rule, chords in {
        "scale": ((48, 64), (49, 64), (50, 65), (50, 65)),
        "voices": ((48, 64), (64,), (50, 65), (50, 65)),
        "consonance": ((48, 64), (48, 64), (50, 64), (50, 64)),
        "parallels": ((48, 67), (48, 67), (50, 69), (50, 69)),
        "leaps": ((48, 64), (48, 64), (52, 71), (52, 71), (53, 74), (53, 74)),
    }.items():
        broken = [name for name, count in obedience([of_chords(*chords)]).items() if count.share < 1]
        assert broken == [rule]
    assert obedience([of_chords((48, 64))])["leaps"].cases == 0


def test_independent_notes_do_not_keep_the_rules() -> None:
    pieces = counterpoint(pieces=30, beats=16, seed=0)
    generator = np.random.default_rng(0)
    drawn = [FirstOrder(pieces).sample(32, generator) for _ in range(8)]
    counts = obedience(drawn)
    assert mean_share(counts) < 0.8
    assert counts["consonance"].share < 0.7
    assert counts["scale"].share > 0.95  # other notes hardly ever sound
