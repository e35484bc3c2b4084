"""Generated counterpoint of two to four voices: music without files, with rules that a model can be seen to learn."""

from __future__ import annotations

import numpy as np

from corpora.music.rolls import LOWEST, PITCHES, Pieces, Roll
from corpora.music.rules import FRAMES_PER_BEAT, LEAP, SCALE, STEP, consonant, parallel
from hfopt.experiment.data import integer

# Bass, tenor, alto, soprano: MIDI numbers.
RANGES = ((40, 57), (48, 65), (57, 72), (64, 81))
_VOICES = {2: (0, 3), 3: (0, 2, 3), 4: (0, 1, 2, 3)}
_APART = 3
"""Semitones that neighbouring voices are apart at least."""
_NOTES = tuple(note for note in range(LOWEST, LOWEST + PITCHES) if note % 12 in SCALE)
# Moves from beat to beat, in steps of the scale, with their relative frequency: mostly steps, now and then a leap.
_MOVES = {-1: 4.0, 1: 4.0, -2: 2.0, 2: 2.0, 0: 1.0, -3: 0.6, 3: 0.6, -4: 0.4, 4: 0.4}
_PASSING = 0.7
"""How often a third is filled with the note in between."""


def counterpoint(pieces: int = 240, beats: int = 32, seed: int = 0) -> Pieces:
    """Pieces in C major that obey the rules of :mod:`corpora.music.rules`: a function of the arguments alone.

    Every piece has two, three or four voices, each in its range. On beats, voices move to a consonant chord of the
    scale, mostly by steps, without parallel fifths or octaves; leaps of any voice are followed by a step back. In the
    second half of a beat, a voice that moves by a third may play the note in between; the others hold theirs.

    Args:
        pieces: their number; a tenth of them, at least one, are for validation and as many for test.
        beats: of each piece, two frames each.
        seed: what they are drawn from.

    Raises:
        ValueError: fewer than three pieces or two beats.
    """
    integer("pieces", pieces, 3)
    integer("beats", beats, 2)
    integer("seed", seed, 0)
    rolls = [
        _piece(np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, k]))), beats) for k in range(pieces)
    ]
    held = max(1, pieces // 10)
    parts = {"train": rolls[2 * held :], "valid": rolls[:held], "test": rolls[held : 2 * held]}
    return Pieces("counterpoint", parts, steps_per_beat=FRAMES_PER_BEAT)


def _piece(generator: np.random.Generator, beats: int) -> Roll:
    voices = _VOICES[int(generator.integers(2, 5))]
    chords: list[list[int]] = []
    while len(chords) < beats:
        chord = _next(chords, voices, generator)
        if chord is None:  # no chord follows these: take others
            del chords[-2:]
        else:
            chords.append(chord)
    roll = np.zeros((beats * FRAMES_PER_BEAT, PITCHES), dtype=np.uint8)
    for k, chord in enumerate(chords):
        after = chords[k + 1] if k + 1 < beats else chord
        between = [_between(a, b, generator) for a, b in zip(chord, after, strict=True)]
        # Two voices may not meet on their ways, or one of them would be gone.
        second = between if len(set(between)) == len(chord) else chord
        roll[FRAMES_PER_BEAT * k, np.array(chord) - LOWEST] = 1
        roll[FRAMES_PER_BEAT * k + 1, np.array(second) - LOWEST] = 1
    return roll


def _between(note: int, after: int, generator: np.random.Generator) -> int:
    """What a voice plays in the second half of a beat: the note in between if it moves by a third, or the same."""
    i, j = _NOTES.index(note), _NOTES.index(after)
    return _NOTES[(i + j) // 2] if abs(i - j) == 2 and generator.random() < _PASSING else note


def _next(chords: list[list[int]], voices: tuple[int, ...], generator: np.random.Generator) -> list[int] | None:
    """A chord that may follow, found voice by voice from below; None if there is none."""
    wanted = [_candidates([chord[v] for chord in chords], RANGES[voice], generator) for v, voice in enumerate(voices)]
    before = chords[-1] if chords else None

    def complete(chord: list[int]) -> list[int] | None:
        if len(chord) == len(voices):
            return chord
        for note in wanted[len(chord)]:
            longer = [*chord, note]
            if chord and note < chord[-1] + _APART:
                continue
            if not consonant(longer) or (before is not None and parallel(before[: len(longer)], longer)):
                continue
            if (found := complete(longer)) is not None and found != before:
                return found
        return None

    return complete([])


def _candidates(line: list[int], within: tuple[int, int], generator: np.random.Generator) -> list[int]:
    """The notes that a voice may go on to, in random order, likelier ones first more often."""
    low, high = within
    if not line:
        return [int(n) for n in generator.permutation([n for n in _NOTES if low <= n <= high])]
    at = _NOTES.index(line[-1])
    leap = line[-1] - line[-2] if len(line) > 1 and abs(line[-1] - line[-2]) >= LEAP else 0
    # Smallest first of exponential variables at these rates: a draw without replacement.
    times = {move: generator.exponential() / rate for move, rate in _MOVES.items()}
    notes = [_NOTES[at + move] for move in sorted(times, key=lambda m: times[m]) if 0 <= at + move < len(_NOTES)]
    if leap:
        notes = [n for n in notes if 0 < abs(n - line[-1]) <= STEP and (n - line[-1]) * leap < 0]
    return [n for n in notes if low <= n <= high]
