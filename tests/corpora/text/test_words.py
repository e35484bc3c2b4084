"""Words: vocabulary by frequency, every one once, published counts, and what is refused."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest

from corpora.text import ptb, words
from corpora.text import words as _words_function  # the module has the same name
from corpora.text.words import END, UNKNOWN, WIKITEXT2_FILES, _ptb, _wikitext2, vocabulary_of

assert _words_function is words
SMALL = {"window": 5, "warm_up": 1, "batch_size": 2}
DATA = os.environ.get("HFOPT_DATA", "")


def test_the_vocabulary_is_by_frequency() -> None:
    found = vocabulary_of(["b", "a", "a", "c", "<unk>", "<unk>", "c", "a", "d"])
    assert found.symbols == ("a", "c", "<unk>", "b", "d")
    assert found.encode("a e d").tolist() == [0, 2, 4]
    assert found.decode([0, 2]) == "a <unk>"
    few = vocabulary_of(["b", "a", "a", "c", "c", "a", "d"], 3)
    assert few.symbols == ("a", "c", UNKNOWN)


def test_words_of_a_file_end_their_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the cat sat\n\n the mat\n" * 40, encoding="utf-8")
    problem = words(tmp_path / "a.txt", shares=(0.1, 0.1), **SMALL)
    assert problem.alphabet.decode(problem.codes("train")[:8]) == f"the cat sat {END} {END} the mat {END}"
    assert sum(problem.lengths.values()) == 320
    assert problem.regime == "columns"
    assert problem.metrics[0].name == "perplexity"
    found = sum(problem.size(problem(i)) for i in problem.test_batches)
    assert found == problem.lengths["valid"] == 32


def test_the_words_that_need_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HFOPT_DATA", raising=False)
    problem = words(vocabulary=100)
    assert problem.V == 100
    assert "pydoc_data.topics" in problem.note
    assert sum(problem.size(problem(i)) for i in problem.test_batches) == problem.lengths["valid"]


def write(folder: Path, names: list[str], text: str) -> None:
    for name in names:
        (folder / f"{name}.gz").write_bytes(gzip.compress(text.encode()))


def test_lines_of_the_two_corpora(tmp_path: Path) -> None:
    write(tmp_path, [file.name for file in ptb.FILES], " the <unk> is N \n of it \n")
    parts, _ = _ptb(tmp_path, None)
    assert parts[0] == ["the", "<unk>", "is", "N", END, "of", "it", END]
    write(tmp_path, [file.name for file in WIKITEXT2_FILES], " \n = Title = \n \n a\u2028b \n")
    parts, _ = _wikitext2(tmp_path, None)
    # An empty line is an end, too; a line ends nowhere else.
    assert parts[0] == [END, "=", "Title", "=", END, END, "a", "b", END]


def test_other_files_than_the_published_ones_are_refused(tmp_path: Path) -> None:
    write(tmp_path, [file.name for file in ptb.FILES], " the cat \n")
    with pytest.raises(ValueError, match=r"ptb\.train\.txt\.gz has 3 words, but 929,589 were expected"):
        words("ptb", data=tmp_path)
    write(tmp_path, [file.name for file in WIKITEXT2_FILES], " the cat \n")
    with pytest.raises(ValueError, match=r"wiki\.train\.tokens\.gz has 3 words, but 2,088,628 were expected"):
        words("wikitext2", data=tmp_path)
    (tmp_path / "wiki.train.tokens.gz").write_bytes(gzip.compress(b"Stra\xdfe"))
    with pytest.raises(ValueError, match="is no UTF-8 text at byte 4"):
        words("wikitext2", data=tmp_path)
    with pytest.raises(FileNotFoundError, match="texts are topics, ptb, wikitext2"):
        words("nothing")
    with pytest.raises(ValueError, match="vocabulary is 1"):
        words(vocabulary=1)
    (tmp_path / "b.txt").write_text("a", encoding="utf-8")
    with pytest.raises(ValueError, match="the text has only 2 words"):
        words(tmp_path / "b.txt")


@pytest.mark.skipif(not Path(DATA, "ptb").is_dir(), reason="HFOPT_DATA has no Penn Treebank")
def test_the_published_numbers_of_the_treebank() -> None:
    problem = words("ptb")
    assert tuple(problem.lengths.values()) == (929_589, 73_760, 82_430)
    assert problem.V == 10_000
    assert problem.alphabet.symbols[:5] == ("the", UNKNOWN, END, "N", "of")


@pytest.mark.slow
@pytest.mark.skipif(not Path(DATA, "wikitext2").is_dir(), reason="HFOPT_DATA has no WikiText-2")
def test_the_published_numbers_of_wikitext2() -> None:
    problem = words("wikitext2")
    assert tuple(problem.lengths.values()) == (2_088_628, 217_646, 245_569)
    assert problem.V == 33_278
