"""Runs of language models as they are typed: training, resuming, samples, scores, pictures, and what is refused."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from hfopt.experiment.store.reader import read_run
from runs.cells import ROOT
from runs.language_presets import CHARACTERS

RUN = "characters"
TINY = [
    "--hidden",
    "8",
    "--window",
    "12",
    "--warm-up",
    "2",
    "--batch-size",
    "10",
    "--minibatch",
    "10",
    "--threads",
    "1",
]
FEW = ["--gradient-batches", "2", "--evaluation-batches", "2", "--cg-iterations", "5", "--sample", "20", "--order", "1"]


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text("the cat sat on the mat, and the rat ran at the cat. " * 60, encoding="utf-8")
    return path


def test_hessian_free_trains_and_says_what_came_of_it(typed: Any, book: Path, tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    words = ["--text", str(book), "--name", str(run), *TINY, *FEW, "--test-every", "2", "--sample-every", "2"]
    assert typed(*words, "--max-steps", "8") == 0
    said = capsys.readouterr().out
    assert f"book.txt has {len(set(book.read_text(encoding='utf-8')))} different symbols" in said
    assert "a count model of order 1 with back-off: " in said
    assert said.count("The meaning of life is ") >= 2 + 2
    assert "a sample at temperature 0:" in said
    found = json.loads((run / "scores.json").read_text(encoding="utf-8"))
    steps = read_run(run).steps
    bits = steps["bits per character"]
    assert bits[8] < bits[0]
    assert found["scores"]["valid"] == pytest.approx(min(bits[::2]), rel=1e-6)
    assert 0 < found["scores"]["test"] < bits[0]
    assert found["text"]["name"] == "book.txt"


@pytest.mark.parametrize("name", ["adam", "muon", "rmsprop", "sgd"])
def test_the_other_optimizers_resume_to_the_same_bits(typed: Any, book: Path, tmp_path: Path, name: str) -> None:
    more = ["--optimizer", name, "--regime", "columns", "--cell", "gru", "--depth", "2", "--test-every", "1"]
    words = ["--text", str(book), *TINY, *FEW, *more, "--sample-every", "1", "--halve-after", "1"]
    assert typed(*words, "--name", str(tmp_path / "whole"), "--max-steps", "120") == 0
    assert typed(*words, "--name", str(tmp_path / "parts"), "--max-steps", "60") == 0
    assert typed(*words, "--name", str(tmp_path / "parts"), "--max-steps", "120", "--resume") == 0
    whole, parts = (read_run(tmp_path / n).parameters() for n in ("whole", "parts"))
    assert all(whole[key].equal(parts[key]) for key in whole)
    bits = read_run(tmp_path / "whole").steps["bits per character"]
    assert bits[100] < bits[0]


def test_a_run_ends_without_progress_and_in_time(typed: Any, book: Path, tmp_path: Path, capsys: Any) -> None:
    words = ["--text", str(book), *TINY, *FEW, "--optimizer", "sgd", "--test-every", "1", "--sample-every", "0"]
    assert typed(*words, "--lr", "0", "--stop-after", "2", "--name", str(tmp_path / "a"), "--max-steps", "5000") == 0
    assert "no progress of bits per character in 2 tests" in capsys.readouterr().out
    assert typed(*words, "--minutes", "0.001", "--name", str(tmp_path / "b"), "--max-steps", "100000") == 0
    assert "0.001 minutes are over" in capsys.readouterr().out


def test_a_picture_and_samples_from_python(typed: Any, book: Path, tmp_path: Path, monkeypatch: Any) -> None:
    words = ["--text", str(book), "--name", str(tmp_path / "run"), *TINY, *FEW]
    assert typed(*words, "--max-steps", "1") == 0
    assert typed(*words, "--picture", str(tmp_path / "a.png")) == 0
    assert (tmp_path / "a.png").stat().st_size > 10_000
    monkeypatch.setattr(sys, "argv", ["characters"])
    module = runpy.run_path(str(ROOT / "runs" / "characters.py"), run_name="runs.characters")
    hf = module["hf"]
    sample = hf.sample("The meaning of life is", 30, temperature=0.8)
    assert sample.startswith("The meaning of life is")
    assert len(sample) == len("The meaning of life is") + 30
    assert sample == hf.sample("The meaning of life is", 30, temperature=0.8)
    assert sample != hf.sample("The meaning of life is", 30, temperature=0.8, seed=1)
    assert hf.sample("", 5, temperature=0) == hf.sample("", 5, temperature=0, seed=1)


def test_bad_words_end_with_a_sentence(typed: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xfd" * 100)
    for words, message in {
        ("nothing",): "there is no preset 'nothing'; choose from topics, ptb",
        ("--text", "nothing"): "there is no file nothing",
        ("--text", str(tmp_path / "a.txt")): "a.txt is no UTF-8 text: byte 0 is 0xff",
        ("--warm-up", "60"): "warm_up is 60, but a window has 60 steps",
        ("--tied",): "tied needs an embedding",
        ("--parameters", "10"): "budget is 10",
    }.items():
        assert message in str(typed(*words))


@pytest.mark.parametrize("preset", CHARACTERS)
def test_every_preset_has_a_model_of_the_size_it_says(preset: str) -> None:
    from runs.language import build

    settings = CHARACTERS[preset]
    if preset != "mrnn-2011":
        model = build(settings, 50)
        assert settings.parameters is None or sum(p.numel() for p in model.parameters()) <= settings.parameters
    else:  # 4.9 million parameters were published
        assert sum(p.numel() for p in build(settings, 86).parameters()) == pytest.approx(4.89e6, rel=0.001)
