"""Piano rolls: pieces of music as binary frames of 88 pitches, in training, validation and test parts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

PITCHES = 88
"""Keys of a piano, A0 to C8."""
LOWEST = 21
"""The MIDI number of A0."""
ROLES = ("train", "valid", "test")

Roll = npt.NDArray[np.uint8]
"""`(T, 88)`, 1 where a note sounds."""


@dataclass(frozen=True)
class Pieces:
    """A collection of pieces, each a roll `(T, 88)` of zeros and ones.

    Args:
        name: of the collection.
        parts: the rolls of the roles "train", "valid" and "test".
        source: what the rolls were read from, for messages.
        steps_per_beat: frames in a quarter note, for MIDI files.

    Raises:
        ValueError: a part is missing or empty, or a roll is not `(T, 88)`, T at least 1.
    """

    name: str
    parts: dict[str, list[Roll]] = field(repr=False)
    source: str = ""
    steps_per_beat: int = 2

    def __post_init__(self) -> None:
        where = self.source or self.name
        for role in ROLES:
            rolls = self.parts.get(role)
            if not rolls:
                raise ValueError(
                    f"{where} has no {role} pieces; there must be at least one of each of {', '.join(ROLES)}"
                )
            for k, roll in enumerate(rolls):
                if roll.ndim != 2 or roll.shape[1] != PITCHES or not len(roll):
                    raise ValueError(
                        f"{where}: {role} piece {k} has shape {roll.shape}; a roll is (T, {PITCHES}), T at least 1"
                    )

    def frames(self, role: str) -> int:
        """The number of frames of all pieces of a role."""
        return sum(map(len, self.parts[role]))

    def fingerprint(self) -> str:
        """Eight hexadecimal digits of a hash of all frames, to tell a collection from others of its name."""
        digest = hashlib.blake2b(digest_size=4)
        for role in ROLES:
            for roll in self.parts[role]:
                digest.update(len(roll).to_bytes(4, "little") + np.packbits(roll.astype(bool)).tobytes())
        return digest.hexdigest()


def roll_of(frames: Sequence[Iterable[Any]], where: str) -> Roll:
    """The roll of frames that list their MIDI notes.

    Args:
        frames: the notes of each frame, MIDI numbers from 21 to 108.
        where: what a message names.

    Raises:
        ValueError: a note is no integer or no key of a piano.
    """
    roll = np.zeros((len(frames), PITCHES), dtype=np.uint8)
    for t, notes in enumerate(frames):
        for note in notes:
            if isinstance(note, bool) or not isinstance(note, int) or not LOWEST <= note < LOWEST + PITCHES:
                raise ValueError(
                    f"{where}: frame {t} has the note {note!r}; notes are MIDI numbers from {LOWEST} (A0) to "
                    f"{LOWEST + PITCHES - 1} (C8)"
                )
            roll[t, note - LOWEST] = 1
    return roll
