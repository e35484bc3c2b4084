"""Images as sequences to be classified at their end: pixel by pixel, in a permuted order, or row by row."""

from __future__ import annotations

from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from corpora.images.idx import read_idx
from corpora.images.mnist import images_in
from corpora.source import File, find, folder_of
from hfopt.experiment.data import Pair, Shuffled

ORDERS = ("pixels", "permuted", "rows")
ROLES = ("train", "valid", "test")
PERMUTATION_SEEDS = {"nnrnn": 1234, "exprnn": 92916}
"""Seeds of numpy's RandomState that published permutations were drawn from: Kerg, Goyette et al. 2019 and
Lezcano-Casado & Martinez-Rubio 2019."""
FILES = {
    name: File(name)
    for name in (
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
        "t10k-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte",
    )
}


class Pixels(Shuffled[Pair]):
    """Images of ten classes in minibatches, each a sequence with its class to be said at the end.

    A minibatch has inputs `(T, B, V)`, from 0 (black) to 1 (white), and targets `(B,)`: T is the number of pixels and V
    is 1, or T the number of rows and V that of columns.

    Args:
        name: of the data.
        parts: `(N, D)` uint8 and classes `(N,)` of the roles "train", "valid" and "test".
        shape: rows and columns.
        white: the number that stands for white.
        order: "pixels", row by row; "permuted", the same permutation of all pixels for all images; or "rows".
        permutation: seed of the permutation, numpy's RandomState.
        batch_size: images in a minibatch at most; None: all training images in one.
        evaluate_on: what the test minibatches are, "valid", "test" or "train".
        test_size: images in a test minibatch at most.
        shuffled: whether the training images come in a new order in each pass.
        device, dtype: of the minibatches.
        options: the others of :class:`hfopt.experiment.data.Shuffled`: seed, shuffle_every, memory.

    Raises:
        ValueError: an argument is out of its range, or images and classes do not fit each other.
    """

    def __init__(
        self,
        name: str,
        parts: dict[str, tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]],
        *,
        shape: tuple[int, int],
        white: int,
        order: str = "rows",
        permutation: int = PERMUTATION_SEEDS["nnrnn"],
        batch_size: int | None = None,
        evaluate_on: str = "valid",
        test_size: int = 2000,
        shuffled: bool = True,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> None:
        for argument, value, known in (("order", order, ORDERS), ("evaluate_on", evaluate_on, ROLES)):
            if value not in known:
                raise ValueError(f"{argument} is {value!r}; choose {' or '.join(map(repr, known))}")
        rows, columns = shape
        for role in ROLES:
            images, classes = parts[role]
            if images.ndim != 2 or images.shape[1] != rows * columns or classes.shape != images.shape[:1]:
                raise ValueError(
                    f"{role} has images of shape {images.shape} and classes of shape {classes.shape}; they are "
                    f"(N, {rows * columns}) and (N,)"
                )
        self.name, self.shape, self.order, self.evaluate_on = name, shape, order, evaluate_on
        self.permutation = permutation if order == "permuted" else 0
        self.device, self.dtype = torch.device(device), dtype
        self._white, self._test_size, self._shuffled = white, test_size, shuffled
        self._steps, self.V = (rows, columns) if order == "rows" else (rows * columns, 1)
        self.O = int(max(classes.max() for _, classes in parts.values())) + 1
        self.places: npt.NDArray[np.int64] = np.arange(rows * columns)
        """The pixel that each place of the sequence has."""
        if order == "permuted":
            self.places = np.random.RandomState(permutation).permutation(rows * columns)
        self._parts = {
            role: (
                torch.from_numpy(np.ascontiguousarray(images[:, self.places])),
                torch.from_numpy(classes.astype(np.int64)),
            )
            for role, (images, classes) in parts.items()
        }
        super().__init__(len(parts["train"][0]), len(parts[evaluate_on][0]), batch_size=batch_size, **options)
        self._group()

    def _group(self) -> None:
        self._test_count = len(self._parts[self.evaluate_on][0])
        self.test_batches = range(-1, -1 - -(-self._test_count // self._test_size), -1)

    def evaluated_on(self, role: str) -> Pixels:
        """The same training minibatches with test minibatches of another role.

        Raises:
            ValueError: an unknown role.
        """
        if role not in ROLES:
            raise ValueError(f"role is {role!r}; choose {' or '.join(map(repr, ROLES))}")
        other = copy(self)
        other.evaluate_on, other.train_mem, other.test_mem = role, {}, {}
        other._group()
        return other

    def take(self, role: str, cases: slice | Tensor) -> Pair:
        """The given images as sequences."""
        images, classes = self._parts["train" if role == "train" else self.evaluate_on]
        chosen = images[cases].to(self.device, self.dtype) / self._white
        inputs = chosen.view(len(chosen), self._steps, self.V).transpose(0, 1).contiguous()
        return Pair(inputs, classes[cases].to(self.device))

    def _present_order(self, epoch: int) -> Tensor:
        return super()._present_order(epoch) if self._shuffled else torch.arange(self._count)

    def size(self, batch: Pair) -> int:
        """The number of images."""
        return len(batch.targets)

    def loss(self, outputs: Tensor, batch: Pair) -> Tensor:
        """The mean cross-entropy in nats of logits `(B, O)`."""
        return F.cross_entropy(outputs, batch.targets)

    def zero_one_loss(self, outputs: Tensor, batch: Pair) -> Tensor:
        """Which images are given another class, `(B,)`; all where an output is NaN."""
        wrong: Tensor = (outputs.argmax(1) != batch.targets) | outputs.isnan().any(1)
        return wrong

    def identity(self) -> dict[str, int | float | str]:
        """Name, order and permutation, what is evaluated, and the minibatches."""
        return {
            "name": self.name,
            "order": self.order,
            "permutation": self.permutation,
            "evaluate_on": self.evaluate_on,
            **super().identity(),
            **({} if self._shuffled else {"shuffled": 0}),
        }

    def __repr__(self) -> str:
        counts = ", ".join(f"{len(self._parts[role][0]):,} {role}" for role in ROLES)
        return f"{self.name}({counts} images, order={self.order!r}, T={self._steps}, V={self.V})"


def pixels(data: str | Path | None = None, *, valid: int = 10_000, split: int = 1234, **options: Any) -> Pixels:
    """MNIST as sequences: 50,000 images for training, 10,000 of the published training images for validation.

    The split is drawn as in the program of Kerg, Goyette et al. (NeurIPS 2019): numpy's RandomState with the seed
    1234 gives a permutation of 784 pixels, then one of the 60,000 images, whose last 10,000 are for validation.

    Args:
        data: folder of MNIST's four files, images and labels, plain or packed. Default: `mnist` in the folder that the
            environment variable HFOPT_DATA names. Nothing is downloaded.
        valid: images for validation.
        split: seed of the split.
        options: those of :class:`Pixels`: order, permutation, batch_size, evaluate_on, seed, device, ...

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged or holds something else, or an argument is out of its range.
    """
    folder = folder_of(data, "mnist", list(FILES.values()))
    both = {}
    for role in ("train", "t10k"):
        images = images_in(find(folder, FILES[f"{role}-images-idx3-ubyte"]).path)
        path = find(folder, FILES[f"{role}-labels-idx1-ubyte"]).path
        classes = read_idx(path)
        if classes.shape != (len(images),) or classes.max(initial=0) > 9:
            raise ValueError(
                f"{path} holds an array of shape {classes.shape}; {len(images):,} classes 0 to 9 were expected"
            )
        both[role] = images, classes
    images, classes = both["train"]
    if not 1 <= valid < len(images):
        raise ValueError(f"valid is {valid}; choose from 1 to {len(images) - 1} images")
    stream = np.random.RandomState(split)
    stream.permutation(images.shape[1])
    order = stream.permutation(len(images))
    train, held = order[:-valid], order[-valid:]
    parts = {"train": (images[train], classes[train]), "valid": (images[held], classes[held]), "test": both["t10k"]}
    return Pixels("mnist", parts, shape=(28, 28), white=255, **options)


def small_pixels(**options: Any) -> Pixels:
    """scikit-learn's digits as sequences, which need no files: 1,200 images for training, 300 and 297 for the others.

    Args:
        options: those of :class:`Pixels`.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("scikit-learn brings the digits along; pip install scikit-learn") from error
    found = load_digits()
    images, classes = np.asarray(found.data).astype(np.uint8), np.asarray(found.target).astype(np.uint8)
    ends = {"train": slice(0, 1200), "valid": slice(1200, 1500), "test": slice(1500, None)}
    parts = {role: (images[part], classes[part]) for role, part in ends.items()}
    return Pixels("digits", parts, shape=(8, 8), white=16, **options)
