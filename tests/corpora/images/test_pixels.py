"""Images as sequences: rows, pixels and the published permutation."""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from corpora.images.pixels import PERMUTATION_SEEDS, Pixels, pixels, small_pixels
from hfopt.experiment.data import check_data


def parts(count: int = 6) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    return {
        role: (generator.integers(0, 256, (count, 12)).astype(np.uint8), np.arange(count, dtype=np.uint8) % 3)
        for role in ("train", "valid", "test")
    }


def test_rows_pixels_and_permutations() -> None:
    images = parts()["valid"][0]
    rows = Pixels("mine", parts(), shape=(3, 4), white=255)
    check_data(rows)
    assert (rows.V, rows.O) == (4, 3)
    assert torch.equal(rows(-1).inputs, torch.tensor(images / 255, dtype=torch.float32).view(6, 3, 4).transpose(0, 1))
    assert rows(-1).targets.tolist() == [0, 1, 2, 0, 1, 2]
    each = Pixels("mine", parts(), shape=(3, 4), white=255, order="pixels")
    assert torch.equal(each(-1).inputs[:, :, 0].T, torch.tensor(images / 255, dtype=torch.float32))
    mixed = Pixels("mine", parts(), shape=(3, 4), white=255, order="permuted", permutation=7)
    order = np.random.RandomState(7).permutation(12)
    assert torch.equal(mixed(-1).inputs[:, :, 0].T, torch.tensor(images[:, order] / 255, dtype=torch.float32))
    assert not np.array_equal(order, np.arange(12))


def test_losses() -> None:
    problem = Pixels("mine", parts(), shape=(3, 4), white=255)
    batch = problem(-1)
    outputs = torch.zeros(6, 3)
    outputs[:, 1] = 1
    outputs[1] = torch.nan
    assert problem.zero_one_loss(outputs, batch).tolist() == [True, True, True, True, False, True]
    assert float(problem.loss(torch.zeros(6, 3), batch)) == pytest.approx(np.log(3), rel=1e-6)
    assert problem.size(batch) == 6


def test_published_seeds() -> None:
    assert PERMUTATION_SEEDS == {"nnrnn": 1234, "exprnn": 92916}
    # numpy promises that RandomState draws the same for ever.
    assert np.random.RandomState(1234).permutation(784)[:4].tolist() == [529, 511, 328, 133]


def test_digits_need_no_files() -> None:
    digits = small_pixels(batch_size=100)
    assert digits(0).inputs.shape == (8, 100, 8)
    assert digits.evaluated_on("test")(-1).targets.shape == (297,)
    for options, said in (({"order": "columns"}, "'rows'"), ({"evaluate_on": "dev"}, "'test'")):
        with pytest.raises(ValueError, match=said):
            small_pixels(**options)
    with pytest.raises(ValueError, match="role is 'dev'"):
        digits.evaluated_on("dev")


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no train-images-idx3-ubyte in"):
        pixels(tmp_path)
    for role, count in (("train", 3), ("t10k", 2)):
        header = bytes((0, 0, 8, 3)) + b"".join(n.to_bytes(4, "big") for n in (count, 28, 28))
        (tmp_path / f"{role}-images-idx3-ubyte").write_bytes(header + bytes(784 * count))
        labels = bytes((0, 0, 8, 1)) + (count + 1).to_bytes(4, "big") + bytes(count + 1)
        (tmp_path / f"{role}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte.gz holds an array of shape \(4,\); 3 classes"):
        pixels(tmp_path)


DATA = os.environ.get("HFOPT_DATA", "")


@pytest.mark.skipif(not DATA or not Path(DATA, "mnist").is_dir(), reason="HFOPT_DATA has no MNIST")
def test_mnist() -> None:
    problem = pixels(order="permuted", batch_size=100)
    assert [len(problem._parts[role][0]) for role in ("train", "valid", "test")] == [50_000, 10_000, 10_000]
    assert problem(0).inputs.shape == (784, 100, 1)
    counts = problem._parts["train"][1].bincount() + problem._parts["valid"][1].bincount()
    assert counts.tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]  # of the 60,000
