"""Slot filling, typed, on files of the form of ATIS's that are made here."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from hfopt.experiment.store.reader import read_run

RUN = "slots"
TINY = ("--hidden", "12", "--embedding", "8", "--cg-iterations", "10", "--dropout", "0", "--word-dropout", "0")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Utterances whose tags follow from the word before a city."""
    generator = random.Random(0)
    cities = ["boston", "denver", "dallas", "oakland"]

    def line() -> str:
        a, b = generator.sample(cities, 2)
        polite = generator.choice(["please", "now"])
        forms = [
            (f"{polite} fly from {a} to {b}", "O O O B-from O B-to"),
            (f"to {b} from {a} {polite}", "O B-to O B-from O"),
            (f"flights {polite}", "O O"),
        ]
        words, tags = generator.choice(forms)
        return f"BOS {words} EOS\tO {tags} flight\n"

    for role, count in (("train", 200), ("test", 50)):
        (tmp_path / f"atis.{role}.w-intent.iob").write_text("".join(line() for _ in range(count)))
    return tmp_path


@pytest.mark.parametrize("preset", ["window", "bidirectional", "lstm"])
def test_hessian_free_learns_the_slots(folder: Path, tmp_path: Path, typed: Any, preset: str, capsys: Any) -> None:
    words = (preset, "--folder", str(folder), "--name", str(tmp_path / "run"), *TINY)
    assert typed(*words, "--max-steps", "12") == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["test"]["F1"] > 0.95
    assert "test: F1 " in capsys.readouterr().out
    assert read_run(tmp_path / "run").steps["F1"][0] < 0.8
    assert typed(*words, "--picture", str(tmp_path / "tags.png")) == 0
    assert (tmp_path / "tags.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", ["adam", "muon", "rmsprop", "sgd"])
def test_first_order_optimizers_learn(folder: Path, tmp_path: Path, typed: Any, name: str) -> None:
    words = ("--folder", str(folder), "--name", str(tmp_path / "run"), *TINY, "--optimizer", name)
    assert typed(*words, "--max-steps", "30", "--validate-every", "10") == 0
    wrong = read_run(tmp_path / "run").steps["wrong_tags"]
    assert wrong[-1] < 0.7 * wrong[0]


def test_bad_words_end_with_a_sentence(folder: Path, tmp_path: Path, typed: Any) -> None:
    (tmp_path / "cut").mkdir()
    for role in ("train", "test"):
        text = (folder / f"atis.{role}.w-intent.iob").read_text()
        (tmp_path / "cut" / f"atis.{role}.w-intent.iob").write_text(text[:-10])
    for words, message in {
        ("crf",): "there is no preset 'crf'; choose from window, bidirectional, lstm, stable",
        ("--folder", str(tmp_path / "cut")): "atis.train.w-intent.iob",
        ("--folder", str(folder), "--window", "2"): "window is 2; it is an odd number of words",
        ("--folder", str(folder), "--valid-share", "0"): "valid_share is 0.0",
        ("--folder", str(folder), "--optimizer", "nag"): "optimizer nag has no settings here",
    }.items():
        assert message in str(typed(*words))
