"""The rules of the generated counterpoint, and how often a piano roll obeys each of them.

The frames of a beat are `FRAMES_PER_BEAT`; the first one of each beat is strong. The rules are:

- scale: notes belong to C major;
- voices: the number of notes does not change from one frame to the next;
- consonance: on a strong frame, any two notes are a unison, third, fifth, sixth or octave apart, up to octaves; or a
  fourth, if neither is the lowest note;
- parallels: from one strong frame to the next, two voices that are a fifth or an octave apart do not both move to the
  same interval; voices are counted from below;
- leaps: if the highest note leaps by a fourth or more, its next move is a step in the opposite direction.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from corpora.music.rolls import LOWEST, Roll

FRAMES_PER_BEAT = 2
SCALE = frozenset((0, 2, 4, 5, 7, 9, 11))
"""Pitch classes of C major."""
CONSONANCES = frozenset((0, 3, 4, 7, 8, 9))
"""Intervals in semitones, up to octaves, that are consonant with the lowest note too."""
FOURTH = 5
PERFECT = frozenset((0, 7))
"""Octaves and fifths, up to octaves."""
STEP = 2
"""Semitones of a step at most."""
LEAP = 5
"""Semitones of a leap at least: a fourth."""
RULES = ("scale", "voices", "consonance", "parallels", "leaps")


class Count(NamedTuple):
    """How often a rule applied, and how often it was obeyed."""

    obeyed: int
    cases: int

    @property
    def share(self) -> float:
        """The share obeyed; 1 where the rule never applied."""
        return self.obeyed / self.cases if self.cases else 1.0


def consonant(notes: Sequence[int]) -> bool:
    """Whether any two of the notes, which are in ascending order, are consonant."""
    return all(
        (notes[j] - notes[i]) % 12 in CONSONANCES or (i > 0 and (notes[j] - notes[i]) % 12 == FOURTH)
        for j in range(len(notes))
        for i in range(j)
    )


def parallel(before: Sequence[int], after: Sequence[int]) -> bool:
    """Whether two voices move in fifths or octaves from one chord to another with as many notes."""
    return any(
        before[i] != after[i]
        and before[j] != after[j]
        and (before[j] - before[i]) % 12 == (after[j] - after[i]) % 12
        and (after[j] - after[i]) % 12 in PERFECT
        for j in range(len(before))
        for i in range(j)
    )


def obedience(rolls: Iterable[Roll]) -> dict[str, Count]:
    """How often each of the rules is obeyed in piano rolls, the first frame of which is strong."""
    totals = {rule: [0, 0] for rule in RULES}

    def note(rule: str, obeyed: bool) -> None:
        totals[rule][0] += obeyed
        totals[rule][1] += 1

    for roll in rolls:
        chords = [(np.flatnonzero(frame) + LOWEST).tolist() for frame in roll]
        for chord in chords:
            for pitch in chord:
                note("scale", pitch % 12 in SCALE)
        for before, after in itertools.pairwise(chords):
            note("voices", len(before) == len(after))
        strong = chords[::FRAMES_PER_BEAT]
        for chord in strong:
            if len(chord) > 1:
                note("consonance", consonant(chord))
        for before, after in itertools.pairwise(strong):
            if len(before) == len(after) > 1:
                note("parallels", not parallel(before, after))
        top = [chord[-1] for chord in chords if chord]
        moves = [b - a for a, b in itertools.pairwise(top) if a != b]
        for move, answer in itertools.pairwise(moves):
            if abs(move) >= LEAP:
                note("leaps", abs(answer) <= STEP and move * answer < 0)
    return {rule: Count(obeyed, cases) for rule, (obeyed, cases) in totals.items()}


def mean_share(counts: dict[str, Count]) -> float:
    """The mean over the rules of the shares obeyed."""
    return sum(count.share for count in counts.values()) / len(counts)
