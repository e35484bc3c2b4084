"""The run on words: columns with the state carried, perplexity, samples of words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hfopt.experiment.store.reader import read_run

RUN = "words"
TINY = ["--hidden", "8", "--embedding", "6", "--window", "6", "--batch-size", "4", "--minibatch", "4", "--warm-up", "3"]


@pytest.mark.parametrize("optimizer", ["hf", "adam"])
def test_perplexity_falls_and_is_that_of_every_word(typed: Any, tmp_path: Path, capsys: Any, optimizer: str) -> None:
    (tmp_path / "a.txt").write_text("the cat sat on the mat\nthe rat ran at the cat\n" * 60, encoding="utf-8")
    words = ["--text", str(tmp_path / "a.txt"), "--name", str(tmp_path / "run"), *TINY, "--gradient-batches", "3"]
    assert typed(*words, "--optimizer", optimizer, "--max-steps", "10", "--test-every", "2", "--sample", "5") == 0
    said = capsys.readouterr().out
    assert "perplexity of all symbols" in said
    assert "count model" not in said
    values = read_run(tmp_path / "run").steps["perplexity"]
    assert values[10] < values[0] < 20
    scores = json.loads((tmp_path / "run" / "scores.json").read_text(encoding="utf-8"))["scores"]
    assert scores["valid"] == pytest.approx(min(values[[0, 10]] if optimizer == "adam" else values[::2]), rel=1e-5)
    sample = said.rpartition("a sample at temperature 0:\n")[2].strip().splitlines()[0]
    assert len(sample.split()) == 4 + 5


def test_bad_words_end_with_a_sentence(typed: Any) -> None:
    assert "there is no preset 'ptc'; choose from topics, ptb" in str(typed("ptc"))
    assert "vocabulary is 1" in str(typed("--vocabulary", "1"))
