"""Sequential MNIST, typed, on the digits that need no files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from corpora.images.pixels import Pixels, small_pixels
from hfopt.experiment.store.reader import read_run

RUN = "smnist"
SMALL = ("--data", "digits", "--nhid", "16", "--updates", "4", "--log-interval", "2")


@pytest.mark.parametrize("permute", [(), ("--permute",)])
@pytest.mark.parametrize("words", [("--optimizer", "Adam", "--betas", "0", "0.9"), ("--optimizer", "hf")])
def test_with_and_without_a_permutation(
    tmp_path: Path, typed: Any, permute: tuple[str, ...], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """The released program has no generator for the split unless it has drawn a permutation before."""
    small = (*SMALL, *permute, *words, "--net-type", "expRNN", "--cg-iterations", "5")
    assert typed(*small, "--name", str(tmp_path / "run")) == 0
    run = read_run(tmp_path / "run")
    assert run.configuration["problem"]["order"] == ("permuted" if permute else "pixels")
    assert run.steps["test_loss"][-1] != run.steps["test_loss"][0]
    assert "test: error rate" in capsys.readouterr().out


def images(order: str) -> Pixels:
    """The split of `pixels` on images that tell their number."""
    stream = np.random.RandomState(1234)
    stream.permutation(16)
    order_of = stream.permutation(40)
    numbers = (np.arange(40)[:, None] * np.ones(16)).astype(np.uint8)
    classes = (np.arange(40) % 10).astype(np.uint8)
    parts = {"train": order_of[:-8], "valid": order_of[-8:], "test": order_of[:4]}
    given = {role: (numbers[own], classes[own]) for role, own in parts.items()}
    return Pixels(
        "numbers", given, shape=(4, 4), white=1, order=order, shuffled=False, batch_size=8, shuffle_every=None
    )


def test_images_keep_their_order_unless_shuffled() -> None:
    first, permuted = images("pixels"), images("permuted")
    for _ in range(5):
        found = [first(i).inputs[0, :, 0] for i in first.train_batches]
        assert torch.equal(torch.cat(found), torch.cat([permuted(i).inputs[0, :, 0] for i in permuted.train_batches]))
        assert torch.cat(found).tolist() == [float(k) for k in first._parts["train"][0][:, 0]]
        first.forget()
        permuted.forget()
    assert first.identity()["shuffled"] == 0
    assert "shuffled" not in small_pixels().identity()


def test_refusals(typed: Any, tmp_path: Path) -> None:
    assert "there is no preset 'x'; choose from rnn-psmnist" in typed("--preset", "x")
    assert "there is no train-images-idx3-ubyte in" in typed("--folder", str(tmp_path))
    assert "need a power of 2" in typed("--data", "digits", "--net-type", "EURNN", "--style", "fft", "--nhid", "20")
    assert "--epochs is 0" in typed("--data", "digits", "--epochs", "0")
