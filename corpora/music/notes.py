"""Chorales as lists of MIDI notes in JSON: chords of each frame, or the notes of four voices with -1 for silence."""

from __future__ import annotations

import json
import math
from typing import Any

from corpora.music.rolls import ROLES, Roll, roll_of
from corpora.source import Found, read


def read_notes(path: Found, most: int = 1 << 28) -> dict[str, list[Roll]]:
    """The piano rolls in a .json or .json.gz file: ``{"train": [[[60, 64], ..], ..], "valid": .., "test": ..}``.

    Each piece lists its frames, each frame its MIDI notes. A -1 (or NaN) stands for a silent voice in the form that
    keeps the voices apart; voices in unison become one note.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, damaged, truncated, larger than `most` bytes unpacked, or no such JSON.
    """
    text = read(path, most)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is no complete JSON ({str(error) or type(error).__name__}); fetch it again"
        ) from error
    if not isinstance(found, dict) or not set(ROLES) <= found.keys():
        raise ValueError(f"{path} has no lists {', '.join(ROLES)}; each lists pieces, a piece its frames of MIDI notes")
    return {
        role: [
            _piece(piece, f"{path}: {role} piece {k}") for k, piece in enumerate(_list(found[role], f"{path}: {role}"))
        ]
        for role in ROLES
    }


def _piece(piece: Any, where: str) -> Roll:
    frames = [_list(frame, f"{where}: frame {t}") for t, frame in enumerate(_list(piece, where))]
    return roll_of([[_note(n) for n in frame if not _silent(n)] for frame in frames], where)


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{where} is {type(value).__name__}, not a list")
    return value


def _silent(note: Any) -> bool:
    return note == -1 or (isinstance(note, float) and math.isnan(note))


def _note(note: Any) -> Any:
    """A whole number as an int; what else stands there is refused later, by the name of its frame."""
    return int(note) if isinstance(note, float) and note.is_integer() else note
