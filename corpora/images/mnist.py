"""MNIST, from files that are there already."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from corpora.images.idx import read_idx
from corpora.images.images import Images

FILES = {"train": "train-images-idx3-ubyte.gz", "test": "t10k-images-idx3-ubyte.gz"}
"""The canonical names of the files with the images."""


def mnist(data: str | Path | None = None, **options: Any) -> Images:
    """MNIST's images of handwritten digits, 28x28 with 256 levels of grey: 60,000 for training, 10,000 for test.

    Args:
        data: folder of the files `train-images-idx3-ubyte.gz` and `t10k-images-idx3-ubyte.gz`, which may also be
            unpacked, without `.gz`. Default: `mnist` in the folder that the environment variable HFOPT_DATA names.
            Nothing is downloaded.
        options: those of :class:`corpora.Images`: batch_size, seed, loss, device, dtype, ...

    Raises:
        FileNotFoundError: a file is missing, or neither `data` nor HFOPT_DATA is given.
        ValueError: a file is damaged or holds no 28x28 images.

    Source: LeCun, Bottou, Bengio & Haffner, "Gradient-based learning applied to document recognition", 1998.
    """
    if data is None:
        root = os.environ.get("HFOPT_DATA")
        if not root:
            raise FileNotFoundError(
                f"MNIST's files {' and '.join(FILES.values())} are needed: give their folder as data=, or set the "
                "environment variable HFOPT_DATA to the folder that has them in its folder mnist"
            )
        data = Path(root, "mnist")
    train, test = (_images(Path(data), name) for name in FILES.values())
    return Images("mnist", train, test, white=255, shape=(28, 28), **options)


def _images(folder: Path, name: str) -> npt.NDArray[np.uint8]:
    """`(N, 784)` from a file, packed or not."""
    packed = folder / name
    plain = packed.with_suffix("")
    if not packed.is_file() and not plain.is_file():
        raise FileNotFoundError(
            f"there is no {name} in {folder}; MNIST's images are in the files {' and '.join(FILES.values())}"
        )
    return images_in(packed if packed.is_file() else plain)


def images_in(path: Path) -> npt.NDArray[np.uint8]:
    """The images `(N, 784)` in a file.

    Raises:
        ValueError: the file is damaged or holds no 28x28 images.
    """
    images = read_idx(path)
    if images.ndim != 3 or images.shape[1:] != (28, 28):
        raise ValueError(f"{path} holds an array of shape {images.shape}; MNIST's images are (N, 28, 28)")
    return images.reshape(-1, 784)
