"""Characters, typed, on a text of its own: windows of columns, halved rates, places of files, two metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import runs.ptb_characters as p
from corpora.text import Window
from hfopt.experiment.store.reader import read_run

RUN = "ptb_characters"


@pytest.fixture
def small(tmp_path: Path) -> tuple[str, ...]:
    path = tmp_path / "text.txt"
    path.write_text("abcd efgh. " * 400)
    sizes = (
        "--nhid",
        "8",
        "--emsize",
        "4",
        "--bptt",
        "10",
        "--batch",
        "4",
        "--hf-batch",
        "4",
        "--gradient-batches",
        "2",
    )
    return ("--text", str(path), *sizes)


@pytest.mark.parametrize("words", [("--optimizer", "Adam", "--betas", "0", "0.9"), ("--optimizer", "hf"), ()])
def test_a_run(tmp_path: Path, typed: Any, small: tuple[str, ...], words: tuple[str, ...]) -> None:
    name = ("--name", str(tmp_path / "run"), "--updates", "12", "--log-interval", "6", "--lr", "0.002")
    assert typed(*small, *words, *name) == 0
    run = read_run(tmp_path / "run")
    assert run.steps["bits per character"][-1] < run.steps["bits per character"][0]
    assert (tmp_path / "run" / "model.pt").is_file()
    kept = (tmp_path / "run" / "model.pt").read_bytes()
    assert typed(*small, *words, *name, "--resume") == 0
    assert (tmp_path / "run" / "model.pt").read_bytes() == kept


def test_an_epoch_is_a_pass_over_all_windows(tmp_path: Path, typed: Any, small: tuple[str, ...]) -> None:
    assert typed(*small, "--epochs", "1", "--name", str(tmp_path / "run"), "--net-type", "LSTM") == 0
    run = read_run(tmp_path / "run")
    assert run.steps["updated"].sum() == (3960 - 1) // 4 // 10


def test_the_run_is_called_after_the_text_and_not_after_mnist() -> None:
    """The released program saves its language models among those of sequential MNIST."""
    assert p.hf.path.name.startswith("ptb_characters-nnRNN-")
    assert "mnist" not in str(p.hf.path).lower()


def test_accuracy_is_the_share_of_hits() -> None:
    targets = torch.tensor([[1, 0], [2, -100]])
    outputs = torch.zeros(3, 2, 4)
    outputs[1, 0, 1] = outputs[1, 1, 3] = outputs[2, 0, 2] = 1.0
    assert p.hits(outputs, Window(torch.zeros(3, 2, dtype=torch.long), targets, 1)).tolist() == [1.0, 0.0, 1.0]


def test_refusals(typed: Any, small: tuple[str, ...], tmp_path: Path) -> None:
    assert "tied needs an embedding of as many columns" in typed(*small, "--tied")
    assert "--emsize is 0" in typed(*small, "--emsize", "0")
    assert "window is 0" in typed(*small, "--bptt", "0")
    assert "there is no file" in typed("--text", str(tmp_path / "nothing.txt"))
    assert "there is no preset 'x'; choose from rnn-ptb-150" in typed("--preset", "x")
