"""Utterances from IOB files, and files that are none."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from corpora.slots.iob import Utterance, read_iob
from corpora.source import Found

LINES = [
    "BOS fly to san francisco EOS\tO O O B-toloc I-toloc atis_flight",
    "BOS at 838 am EOS\t O O B-time I-time atis_flight",
]


def written(path: Path, *lines: str, end: str = "\n") -> Found:
    text = "\n".join(lines) + end
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return Found(path)


@pytest.mark.parametrize("name", ["a.iob", "a.iob.gz"])
def test_words_and_tags(tmp_path: Path, name: str) -> None:
    first, second = read_iob(written(tmp_path / name, *LINES, ""))
    assert first == Utterance(("fly", "to", "san", "francisco"), ("O", "O", "B-toloc", "I-toloc"))
    assert second == Utterance(("at", "838", "am"), ("O", "B-time", "I-time"))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("BOS fly EOS O O x", "line 2 has 1 fields"),
        ("fly EOS\tO x", "do not go from BOS to EOS"),
        ("BOS fly to EOS\tO O x", "4 words with BOS and EOS, but 3 tags"),
        ("BOS fly EOS\tO X-y x", "the tag 'X-y'"),
    ],
)
def test_lines_of_another_form(tmp_path: Path, line: str, said: str) -> None:
    with pytest.raises(ValueError, match=r"bad\.iob, line 2") as refused:
        read_iob(written(tmp_path / "bad.iob", LINES[0], line))
    assert said in str(refused.value)


def test_damaged_files(tmp_path: Path) -> None:
    for content, said in ((b"", "is empty"), (b"\xff\xfe\x00", "is no UTF-8 text"), (b"\n\n", "has no utterance")):
        path = tmp_path / "bad.iob"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"bad.iob {said}"):
            read_iob(Found(path))
    with pytest.raises(ValueError, match=r"ends within line 2; it is truncated"):
        read_iob(written(tmp_path / "cut.iob", *LINES, end=""))
    whole = written(tmp_path / "whole.iob.gz", *LINES).path.read_bytes()
    (tmp_path / "cut.iob.gz").write_bytes(whole[:-5])
    with pytest.raises(ValueError, match=r"cut\.iob.gz is no complete gzip file"):
        read_iob(Found(tmp_path / "cut.iob.gz"))
