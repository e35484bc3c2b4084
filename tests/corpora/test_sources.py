"""Where images come from: scikit-learn, MNIST's files, and a pen that draws curves."""

from __future__ import annotations

import gzip
import math
import os
import struct
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.integrate import quad

import corpora
from corpora.images.curves import MARGIN, SIDE, WIDTH, control_points, draw
from corpora.images.idx import read_idx

# -- digits -------------------------------------------------------------------------------------------------


def test_digits_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    problem = corpora.digits(batch_size=100)
    assert problem.shape == (8, 8)
    expected = torch.from_numpy(load_digits().images / 16).float().flatten(1)
    held_out = torch.cat([problem(i).inputs for i in problem.test_batches])
    torch.testing.assert_close(held_out, expected[1500:], rtol=0, atol=0)
    train = torch.cat([problem(i).inputs for i in problem.train_batches])
    assert len(problem.train_batches) == 15
    assert {row.numpy().tobytes() for row in train} == {row.numpy().tobytes() for row in expected[:1500]}


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ModuleNotFoundError, match="pip install scikit-learn"):
        corpora.digits()


# -- MNIST --------------------------------------------------------------------------------------------------


def write_idx(path: Path, array: npt.NDArray[np.uint8]) -> None:
    data = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files like MNIST's: 12 and 5 images, the second one not packed."""
    pixels = np.random.default_rng(0).integers(0, 256, size=(17, 28, 28), dtype=np.uint8)
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", pixels[:12])
    write_idx(tmp_path / "t10k-images-idx3-ubyte", pixels[12:])
    return tmp_path


def test_mnist_reads_packed_and_plain_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = corpora.mnist(folder)
    assert (problem.train_images, problem.test_images) == (12, 5)
    pixels = np.random.default_rng(0).integers(0, 256, size=(17, 28, 28), dtype=np.uint8)
    expected = torch.from_numpy(pixels[12:].reshape(5, 784)) / 255
    torch.testing.assert_close(problem(-1).inputs, expected, rtol=0, atol=0)
    monkeypatch.setenv("HFOPT_DATA", str(folder.parent))
    (folder.parent / "mnist").unlink(missing_ok=True)
    (folder.parent / "mnist").symlink_to(folder)
    torch.testing.assert_close(corpora.mnist()(-1).inputs, expected, rtol=0, atol=0)


def test_mnist_says_which_files_are_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "t10k-images-idx3-ubyte").unlink()
    both = r"train-images-idx3-ubyte\.gz and t10k-images-idx3-ubyte\.gz"
    with pytest.raises(FileNotFoundError, match=rf"there is no t10k-images-idx3-ubyte\.gz in .*{both}"):
        corpora.mnist(folder)
    monkeypatch.delenv("HFOPT_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=rf"{both} are needed: give their folder as data=, or set .*HFOPT_DATA"):
        corpora.mnist()


def test_damaged_files(folder: Path) -> None:
    path = folder / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    for data in (whole[: len(whole) // 2], b"not packed", whole[:100] + b"\0" * 40 + whole[140:]):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="is no complete gzip file"):
            corpora.mnist(folder)
    plain = folder / "plain"
    for data, message in (
        (b"", "begins with nothing"),
        (b"\0\0\x0d\1" + b"\0" * 8, "no idx file of unsigned bytes: it begins with 00 00 0d 01"),
        (b"\0\0\x08\3" + b"\0" * 8, "ends within its header"),
        (b"\0\0\x08\1\0\0\0\5" + b"\0" * 4, r"has 4 bytes of data where \(5,\) needs 5"),
    ):
        plain.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            read_idx(plain)
    write_idx(path, np.zeros((3, 8, 8), np.uint8))
    with pytest.raises(ValueError, match=r"shape \(3, 8, 8\); MNIST's images are \(N, 28, 28\)"):
        corpora.mnist(folder)


def test_files_that_unpack_to_more_than_they_should(tmp_path: Path) -> None:
    """A few kB that would be many GB: neither what the header promises nor what follows it is unpacked for nothing."""
    path = tmp_path / "bomb.gz"
    zeros = bytes(10_000_000)
    cases = (
        (struct.pack(">3I", 10_000_000, 28, 28), r"more than 1,073,741,824 are not read"),
        (struct.pack(">3I", 10, 28, 28), r"has more than 7840 bytes of data where \(10, 28, 28\) needs 7840"),
        (struct.pack(">3I", 1_000_000, 28, 28), r"has 10000000 bytes of data where"),
        (struct.pack(">3I", 0, 28, 28), r"has more than 0 bytes"),
    )
    for header, message in cases:
        path.write_bytes(gzip.compress(b"\0\0\x08\3" + header + zeros))
        assert path.stat().st_size < 20_000
        tracemalloc.start()
        try:
            with pytest.raises(ValueError, match=message):
                read_idx(path)
            assert tracemalloc.get_traced_memory()[1] < 40_000_000
        finally:
            tracemalloc.stop()
    plain = tmp_path / "plain"
    plain.write_bytes(b"\0\0\x08\4" + struct.pack(">4I", *[2**32 - 1] * 4) + b"x")
    with pytest.raises(ValueError, match="are not read"):
        read_idx(plain)
    write_idx(plain, np.zeros((3, 2), np.uint8))
    with pytest.raises(ValueError, match="6 bytes"):
        read_idx(plain, most=5)


HERE = os.environ.get("HFOPT_DATA")


@pytest.mark.skipif(not HERE or not Path(HERE, "mnist").is_dir(), reason="HFOPT_DATA has no MNIST")
def test_mnist_itself() -> None:
    problem = corpora.mnist(batch_size=7500)
    assert (problem.train_images, problem.test_images) == (60_000, 10_000)
    assert len(problem.train_batches) == 8
    # The mean and the standard deviation of all training pixels, as everybody uses them.
    mean = np.mean([float(problem(i).inputs.double().mean()) for i in problem.train_batches])
    square = np.mean([float(problem(i).inputs.double().square().mean()) for i in problem.train_batches])
    assert mean == pytest.approx(0.1307, abs=5e-5)
    assert math.sqrt(square - mean**2) == pytest.approx(0.3081, abs=5e-5)


# -- curves -------------------------------------------------------------------------------------------------


def test_curves_are_as_many_as_asked_and_the_same_again() -> None:
    problem = corpora.curves(600, 50, batch_size=100)
    assert (problem.train_images, problem.test_images, problem.shape) == (600, 50, (28, 28))
    again = corpora.curves(600, 50, batch_size=100)
    assert torch.equal(problem(2).inputs, again(2).inputs)
    longer = corpora.curves(100, 70)
    assert torch.equal(longer(-1).inputs[:50], problem(-1).inputs)
    other = corpora.curves(10, 50, data_seed=1)
    assert not torch.equal(other(-1).inputs, problem(-1).inputs)
    train = {row.numpy().tobytes() for i in problem.train_batches for row in problem(i).inputs}
    assert len(train) == 600
    assert not train & {row.numpy().tobytes() for row in problem(-1).inputs}
    with pytest.raises(ValueError, match="data_seed = 0, but Images has 1"):
        other.load_state_dict(corpora.curves(10, 50).state_dict())


def test_the_published_numbers_of_images_are_the_default() -> None:
    points = control_points(3, 0, 0)
    assert np.array_equal(control_points(20_000, 0, 0)[:3], points)
    low, high = MARGIN, SIDE - 1 - MARGIN
    many = control_points(20_000, 0, 0)
    assert low <= many.min() < low + 0.01
    assert high - 0.01 < many.max() <= high
    assert many.mean() == pytest.approx((low + high) / 2, abs=0.1)


def test_ink_is_the_line_integral() -> None:
    points = np.array([[[4.0, 5.0], [22.0, 9.0], [12.0, 23.0]], [[6.0, 6.0], [7.0, 20.0], [20.0, 8.0]]])
    drawn = draw(points).reshape(2, SIDE, SIDE)
    for image, (a, b, c) in zip(drawn, points, strict=True):
        for pixel in [(4, 5), (12, 9), (14, 12), (15, 17), (10, 12), (0, 0), (12, 23)]:

            def ink(t: float, a=a, b=b, c=c, pixel=pixel) -> float:
                curve = (1 - t) ** 2 * a + 2 * t * (1 - t) * b + t**2 * c
                speed = np.linalg.norm(2 * (1 - t) * (b - a) + 2 * t * (c - b))
                return float(speed * np.exp(-((curve - pixel) ** 2).sum() / (2 * WIDTH**2)))

            value, _ = quad(ink, 0, 1, limit=200, points=[0.25, 0.5, 0.75])
            expected = 255 * min(1.0, value / (math.sqrt(2 * math.pi) * WIDTH))
            assert abs(int(image[pixel]) - expected) <= 1.0


def test_a_straight_line_is_white_with_a_soft_edge() -> None:
    image = draw(np.array([[[14.0, 3.0], [14.0, 14.0], [14.0, 24.0]]])).reshape(SIDE, SIDE)
    profile = 255 * np.exp(-0.5 * ((np.arange(SIDE) - 14) / WIDTH) ** 2)
    assert image[:, 12] == pytest.approx(profile, abs=1)
    assert image[14, 6:21].min() >= 254
    assert image[14, [0, 27]].max() == 0


@pytest.mark.parametrize(("options", "message"), [((0, 1), "train is 0"), ((1, 0), "test is 0")])
def test_curves_refuse_empty_sets(options: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        corpora.curves(*options)
    with pytest.raises(ValueError, match="data_seed is -1"):
        corpora.curves(1, 1, data_seed=-1)
