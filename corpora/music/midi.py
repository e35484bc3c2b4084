"""MIDI files: a folder of them as piano rolls (with symusic), and piano rolls as MIDI files (with mido)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from corpora.music.rolls import LOWEST, PITCHES, ROLES, Roll

SUFFIXES = (".mid", ".midi")
DRUMS = 9


def read_midi(path: Path, steps_per_beat: int = 2, longest: int = 1_000_000) -> Roll:
    """The notes of a MIDI file as a roll: frame t is what sounds in the t-th step of `1 / steps_per_beat` beats.

    Onsets and ends go to the nearest step, and every note lasts for at least one. Drums and notes that a piano does
    not have are left out.

    Raises:
        ValueError: the file is no MIDI file, has no note, or has more than `longest` frames.
        ModuleNotFoundError: symusic is not installed.
    """
    try:
        from symusic import Score
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("symusic is needed to read MIDI files: pip install symusic") from error
    with path.open("rb") as file:
        start = file.read(4)
    if start != b"MThd":
        raise ValueError(f"{path} is no MIDI file: it begins with {start.hex(' ') or 'nothing'}, not with MThd")
    try:
        score: Any = Score(path)
    except Exception as error:  # symusic raises RuntimeError and others on damaged files
        raise ValueError(f"{path} is damaged or truncated ({str(error) or type(error).__name__})") from error
    spans = [
        (round(note.start * steps_per_beat / score.tpq), round(note.end * steps_per_beat / score.tpq), note.pitch)
        for track in score.tracks
        if not track.is_drum
        for note in track.notes
        if LOWEST <= note.pitch < LOWEST + PITCHES
    ]
    if not spans:
        raise ValueError(f"{path} has no note of a piano; it may be truncated")
    last = max(max(end, start + 1) for start, end, _ in spans)
    if last > longest:
        raise ValueError(f"{path} lasts for {last:,} frames; more than {longest:,} are not read")
    roll = np.zeros((last, PITCHES), dtype=np.uint8)
    for start_step, end_step, pitch in spans:
        roll[start_step : max(end_step, start_step + 1), pitch - LOWEST] = 1
    return roll[int(roll.any(1).argmax()) :]


def read_folder(folder: Path, steps_per_beat: int = 2, seed: int = 0) -> dict[str, list[Roll]]:
    """All MIDI files in a folder and those below it, a tenth each for validation and test, drawn from `seed`.

    Raises:
        ValueError: there are fewer than three MIDI files, or one is damaged; the message names it.
    """
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if len(paths) < len(ROLES):
        raise ValueError(f"{folder} has {len(paths)} MIDI files ({', '.join(SUFFIXES)}); at least 3 are needed")
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(paths))
    held = max(1, len(paths) // 10)
    parts = {"valid": order[:held], "test": order[held : 2 * held], "train": order[2 * held :]}
    return {role: [read_midi(paths[k], steps_per_beat) for k in sorted(parts[role])] for role in ROLES}


def write_midi(path: Path, roll: Roll, steps_per_beat: int = 2, tempo: float = 100.0) -> None:
    """Write a roll `(T, 88)` as a MIDI file of one piano; a pitch in consecutive frames is one note.

    Args:
        path: of the file, replaced if it exists.
        roll: the frames.
        steps_per_beat: frames in a quarter note.
        tempo: quarter notes in a minute.

    Raises:
        ModuleNotFoundError: mido is not installed.
    """
    try:
        import mido
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("mido is needed to write MIDI files: pip install mido") from error
    ticks = 480
    silence = np.zeros((1, PITCHES), dtype=np.int8)
    changes = np.diff(np.concatenate([silence, np.asarray(roll, dtype=np.int8), silence]), axis=0)
    track = mido.MidiTrack([mido.MetaMessage("set_tempo", tempo=mido.bpm2tempo(tempo)), mido.Message("program_change")])
    now = 0
    for t, change in enumerate(changes):
        tick = round(t * ticks / steps_per_beat)
        # Notes end before others begin, so that a note that is struck again is not cut off.
        for kind, sign in (("note_off", -1), ("note_on", 1)):
            for pitch in np.flatnonzero(change == sign):
                track.append(mido.Message(kind, note=int(pitch) + LOWEST, velocity=64, time=tick - now))
                now = tick
    mido.MidiFile(tracks=[track], ticks_per_beat=ticks).save(path)
