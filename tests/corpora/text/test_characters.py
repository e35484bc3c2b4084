"""Characters: of files, of the published corpora, of Python's own text; and what is refused."""

from __future__ import annotations

import gzip
import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from corpora.text import SYMBOLS_2011, Alphabet, characters, ptb
from corpora.text.alphabet import UNKNOWN
from corpora.text.characters import as_points

SMALL = {"window": 5, "warm_up": 1, "batch_size": 2}
DATA = os.environ.get("HFOPT_DATA", "")


def test_the_text_that_needs_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    from pydoc_data.topics import topics

    monkeypatch.delenv("HFOPT_DATA", raising=False)
    problem = characters()
    whole = "".join(topics[name] for name in sorted(topics))
    assert sum(problem.lengths.values()) == len(whole)
    assert f"{len(whole):,} characters" in problem.note
    assert hashlib.sha256(whole.encode()).hexdigest()[:12] in problem.note
    decoded = "".join(problem.alphabet.decode(problem.codes(part)) for part in ("train", "valid", "test"))
    mended = "".join(c if c in problem.alphabet.numbers else UNKNOWN for c in whole)
    assert decoded == mended
    assert problem.lengths["valid"] == problem.lengths["test"] == int(0.05 * len(whole))


def test_without_python_s_text_another_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(ModuleNotFoundError, match="choose another text"):
        characters()


def test_a_file_of_one_s_own(tmp_path: Path) -> None:
    text = "Füße auf dem Gras. " * 30 + "Öl 中 am Ende"
    path = tmp_path / "own.txt"
    path.write_text(text, encoding="utf-8")
    problem = characters(path, shares=(0.1, 0.1), **SMALL)
    train = text[: problem.lengths["train"]]
    # What only the last part has is one symbol.
    assert problem.alphabet.symbols == (*sorted(set(train)), UNKNOWN)
    assert problem.alphabet.decode(problem.codes("train")) == train
    others = sum(c not in train for c in text)
    assert others >= 2
    assert problem.note == f"{others} characters stand for all that the alphabet lacks."
    packed = tmp_path / "own.txt.gz"
    packed.write_bytes(gzip.compress(text.encode()))
    assert characters(packed, shares=(0.1, 0.1), **SMALL).text_hash == problem.text_hash


def test_bytes_are_symbols_too(tmp_path: Path) -> None:
    path = tmp_path / "raw.bin"
    content = bytes(np.random.default_rng(0).integers(0, 256, 5000).astype(np.uint8))
    path.write_bytes(content)
    problem = characters(path, encoding="bytes", **SMALL)
    assert problem.V == 256
    assert problem._codes.dtype == np.uint8
    assert bytes(problem._codes) == content


def test_a_large_alphabet_takes_larger_numbers(tmp_path: Path) -> None:
    text = "".join(chr(0x4E00 + k % 700) for k in range(5000))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    problem = characters(tmp_path / "a.txt", **SMALL)
    assert problem.V == 700
    assert problem._codes.dtype == np.uint16
    assert problem.alphabet.decode(problem._codes) == text


def test_the_symbols_of_2011(tmp_path: Path) -> None:
    assert len(SYMBOLS_2011) == len(set(SYMBOLS_2011)) == 85
    (tmp_path / "a.txt").write_text("A <b> [c] ^ ~\n" * 50, encoding="utf-8")
    problem = characters(tmp_path / "a.txt", alphabet="2011", **SMALL)
    assert problem.V == 86
    assert (
        problem.alphabet.decode(problem.codes("train")[:14])
        == f"A {UNKNOWN}b{UNKNOWN} {UNKNOWN}c{UNKNOWN} {UNKNOWN} {UNKNOWN}\n"
    )


# -- published corpora ------------------------------------------------------------------------------------------


def write_ptb(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for part in ptb.PARTS:
        lines = [f" the {part} has <unk> words \n", " and N lines \n"] * 20
        (folder / f"ptb.{part}.txt").write_text("".join(lines), encoding="utf-8")


def test_treebank_characters_are_the_same_from_words_and_from_characters(tmp_path: Path) -> None:
    write_ptb(tmp_path)
    from_words = ptb.characters(tmp_path, None)
    assert from_words[1].startswith("the_valid_has_<unk>_words\nand_N_lines\n")
    for part, text in zip(ptb.PARTS, from_words, strict=True):
        lines = "".join(" " + " ".join(line) + " \n" for line in text.splitlines())
        (tmp_path / f"ptb.char.{part}.txt.gz").write_bytes(gzip.compress(f"{lines} \n".encode()))
    assert ptb.characters(tmp_path, None) == from_words


def test_treebank_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    write_ptb(tmp_path)
    with pytest.raises(
        ValueError, match=r"ptb\.train\.txt has 760 characters, but 5,017,482 were expected: it is cut off"
    ):
        characters("ptb", data=tmp_path)
    for part in ptb.PARTS:
        (tmp_path / f"ptb.char.{part}.txt").write_text("t h e _ word\n", encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"ptb\.char\.train\.txt has 'word' in line 1; there each character stands alone"
    ):
        characters("ptb", data=tmp_path)
    (tmp_path / "ptb.char.train.txt").write_bytes("f ü r\n".encode())
    with pytest.raises(ValueError, match=r"ptb\.char\.train\.txt has the byte 0xc3 at 2; .* ASCII"):
        characters("ptb", data=tmp_path)


def test_a_prefix_of_text8_has_the_proportions_and_says_so(tmp_path: Path) -> None:
    text = "the cat sat on the mat " * 100
    (tmp_path / "text8.prefix.gz").write_bytes(gzip.compress(text.encode()))
    problem = characters("text8", data=tmp_path, **SMALL)
    assert problem.lengths == {"train": 2070, "valid": 115, "test": 115}
    assert "a prefix of text8: 2,300 of its 100,000,000 bytes" in problem.note
    assert "results are not those of the whole" in problem.describe()
    with zipfile.ZipFile(tmp_path / "text8.zip", "w") as archive:
        archive.writestr("text8", text[:2000])
    assert sum(characters("text8", data=tmp_path, **SMALL).lengths.values()) == 2000


def test_foreign_files_under_a_published_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text8").write_text("The cat", encoding="utf-8")
    with pytest.raises(ValueError, match="text8 has the byte 0x54, but text8 has only a to z and spaces"):
        characters("text8", data=tmp_path)
    (tmp_path / "enwik8").write_text("<html>", encoding="utf-8")
    with pytest.raises(ValueError, match="enwik8 begins with b'<html>', but enwik8 with b'<mediawiki '"):
        characters("enwik8", data=tmp_path)
    (tmp_path / "enwik8").unlink()
    (tmp_path / "enwik8.gz").write_bytes(gzip.compress(b"<mediawiki " * 100)[:-9])
    with pytest.raises(ValueError, match=r"enwik8\.gz is no complete gzip file"):
        characters("enwik8", data=tmp_path)


def test_bad_arguments_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match="there is no file nothing, and no text of this name; texts are topics, ptb"
    ):
        characters("nothing")
    with pytest.raises(ValueError, match="alphabet is 'all'"):
        characters(alphabet="all")
    with pytest.raises(ValueError, match="shares is"):
        characters(shares=(0.5, 0.5))
    (tmp_path / "a.txt").write_bytes(b"ein Fu\xdf " * 100)
    with pytest.raises(ValueError, match=r"a\.txt is no UTF-8 text: byte 6 is 0xdf"):
        characters(tmp_path / "a.txt")
    with pytest.raises(ValueError, match="encoding is 'utf-9', which Python does not know"):
        characters(tmp_path / "a.txt", encoding="utf-9")
    assert "ß" in characters(tmp_path / "a.txt", encoding="latin-1", **SMALL).alphabet.numbers
    (tmp_path / "b.txt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"b\.txt is empty"):
        characters(tmp_path / "b.txt")
    (tmp_path / "c.txt").write_bytes(b"ab")
    with pytest.raises(ValueError, match=r"c\.txt has only 2 characters"):
        characters(tmp_path / "c.txt")


@pytest.mark.skipif(not Path(DATA, "ptb").is_dir(), reason="HFOPT_DATA has no Penn Treebank")
def test_the_published_numbers_of_the_treebank() -> None:
    problem = characters("ptb")
    assert tuple(problem.lengths.values()) == (5_017_482, 393_042, 442_423)
    assert problem.V == 50
    assert problem.note == ""


@pytest.mark.slow
def test_enwik8_of_full_length_takes_less_than_a_gigabyte(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    with gzip.open(tmp_path / "enwik8.gz", "wb", compresslevel=1) as file:
        file.write(b"<mediawiki ")
        for _ in range(100):
            file.write(bytes(generator.integers(0, 205, 1_000_000 - (_ == 0) * 11).astype(np.uint8)))
    program = (
        "import resource, sys; from corpora.text import characters; import torch\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"problem = characters('enwik8', data={str(tmp_path)!r}); problem.forget(); problem(0); problem(-1)\n"
        "print(sum(problem.lengths.values()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, before, problem.note)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    count, peak, *_ = done.stdout.split()
    assert int(count) == 100_000_000
    assert int(peak) < 1_000_000  # kilobytes, with Python and torch


def test_alphabets_refuse_what_they_lack() -> None:
    with pytest.raises(ValueError, match="the alphabet of 2 symbols has no 'c'"):
        Alphabet("ab").encode("abc")
    with pytest.raises(ValueError, match="each of them once"):
        Alphabet("aba")
    with pytest.raises(ValueError, match="the symbol of all others"):
        Alphabet("ab", "c")
    assert as_points("a🎼").tolist() == [97, 0x1F3BC]
