"""Images to be reconstructed, as a data object."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from hfopt.experiment.data import Shuffled

LOSSES = ("cross-entropy", "squared-error")
EVALUATED = ("test", "train")


@dataclass(frozen=True, eq=False)
class Batch:
    """N images of D pixels each, row by row: `inputs (N, D)`, from 0 (black) to 1 (white)."""

    inputs: Tensor

    @property
    def targets(self) -> Tensor:
        """What the outputs should be: the images themselves."""
        return self.inputs


class Images(Shuffled[Batch]):
    """A set of images in minibatches, with the losses and the error of a network that reconstructs them.

    Training minibatches have the indices 0, 1, ..; together they are all training images in random order, in parts of
    equal size (or of two sizes that differ by 1). :meth:`forget` puts the images in a new order. Test minibatches have
    the indices -1, -2, ..; they are all test images in the order of the data. A minibatch is a function of
    `(seed, i)` and of the number of calls of `forget` alone.

    Args:
        name: of the data.
        train, test: `(N, D)` uint8.
        white: the number that stands for white, all others being in proportion.
        shape: rows and columns of an image.
        batch_size: images in a minibatch at most; None: all training images in one.
        seed: what the order of the training images is drawn from, a non-negative integer.
        shuffle_every: calls of `forget` that make a new order: 1 for optimizers that take all minibatches at a step,
            None, the number of minibatches, for those that take one, so that they see every image before one comes
            again.
        loss: "cross-entropy" (outputs are logits) or "squared-error" (outputs are linear).
        evaluate_on: "test"; or "train" for test minibatches that are the training images, in the order of the data. To
            follow the training error, which is what was published on deep autoencoders.
        device: where images and minibatches lie. Orders are drawn on the CPU: a seed gives the same on every device.
        dtype: floating-point type of the minibatches.
        memory: bytes that the kept minibatches may take in all.
        recorded: further settings (plain numbers or strings) that tell this set of images from others; attributes.

    Attributes:
        V, O: the numbers of inputs and outputs: D, both.
        train_batches, test_batches: the indices, as ranges.
        train_mem, test_mem: the minibatches made so far, by index.
        error_name: what :meth:`errors` measures.

    Raises:
        ValueError: an argument is out of its range.
    """

    error_name = "squared error"

    def __init__(
        self,
        name: str,
        train: npt.NDArray[np.uint8],
        test: npt.NDArray[np.uint8],
        *,
        white: int,
        shape: tuple[int, int],
        batch_size: int | None = None,
        seed: int = 0,
        shuffle_every: int | None = 1,
        loss: str = "cross-entropy",
        evaluate_on: str = "test",
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        memory: int = 2 << 30,
        **recorded: int | float | str,
    ) -> None:
        for argument, value, known in (("loss", loss, LOSSES), ("evaluate_on", evaluate_on, EVALUATED)):
            if value not in known:
                raise ValueError(f"{argument} is {value!r}; choose {' or '.join(map(repr, known))}")
        if not dtype.is_floating_point:
            raise ValueError(f"dtype is {dtype}; choose a floating-point type such as torch.float32")
        self.name, self.shape, self.white = name, shape, white
        self.criterion, self.evaluate_on = loss, evaluate_on
        self.device, self.dtype = torch.device(device), dtype
        self.V = self.O = shape[0] * shape[1]
        self.recorded = recorded
        self._train = self._pixels("train", train)
        self._held_out = self._pixels("test", test)
        self._test = self._held_out if evaluate_on == "test" else self._train
        self.train_images, self.test_images = len(train), len(test)
        super().__init__(
            len(train), len(self._test), batch_size=batch_size, seed=seed, shuffle_every=shuffle_every, memory=memory
        )

    def _pixels(self, role: str, images: npt.NDArray[np.uint8]) -> Tensor:
        if images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != self.V or not len(images):
            raise ValueError(
                f"{role} has shape {images.shape} and dtype {images.dtype}; it is (N, {self.V}) uint8, N at least 1"
            )
        return torch.tensor(images, device=self.device)

    def evaluated_on(self, role: str) -> Images:
        """The same images with test minibatches that are the "test" images, or the "train" images.

        Raises:
            ValueError: another role.
        """
        if role not in EVALUATED:
            raise ValueError(f"role is {role!r}; choose {' or '.join(map(repr, EVALUATED))}")
        other = copy(self)
        other.evaluate_on, other._test = role, self._held_out if role == "test" else self._train
        other._test_count = len(other._test)
        other.test_batches = range(-1, -1 - -(-other._test_count // self.batch_size), -1)
        other.train_mem, other.test_mem = {}, {}
        return other

    # -- minibatches ------------------------------------------------------------------------------------

    def take(self, role: str, cases: slice | Tensor) -> Batch:
        """The given images, in floating point."""
        pixels = self._train if role == "train" else self._test
        chosen = pixels[cases if isinstance(cases, slice) else cases.to(self.device)]
        return Batch(chosen.to(self.dtype) / self.white)

    def size(self, batch: Batch) -> int:
        """The number of images of a minibatch, which its loss is the mean over."""
        return len(batch.inputs)

    # -- judging outputs --------------------------------------------------------------------------------

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The loss, summed over pixels and averaged over images.

        `sum_d -y ln p - (1-y) ln(1-p)` in nats, `p = logistic(z)`, for "cross-entropy"; its least value is the entropy
        of the pixels, which is not 0 where they are grey. `sum_d (z - y)^2` for "squared-error".

        Args:
            outputs: z `(N, D)`, before the output nonlinearity.
            batch: the images y.

        Raises:
            ValueError: the shape of `outputs` is not that of the images.
        """
        self._check(outputs, batch)
        if self.criterion == "cross-entropy":
            return F.binary_cross_entropy_with_logits(outputs, batch.targets) * self.O
        return F.mse_loss(outputs, batch.targets) * self.O

    def errors(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Each image's squared error, summed over pixels: `sum_d (p - y)^2 (N,)`; infinite where an output is NaN.

        The figure published on deep autoencoders is its mean over images.
        """
        self._check(outputs, batch)
        squared = (self.predictions(outputs) - batch.targets).square().sum(1)
        return squared.nan_to_num(nan=torch.inf)

    def predictions(self, outputs: Tensor) -> Tensor:
        """The reconstructions that outputs `(..., D)` stand for, same shape."""
        return outputs.sigmoid() if self.criterion == "cross-entropy" else outputs

    def _check(self, outputs: Tensor, batch: Batch) -> None:
        if outputs.shape != batch.targets.shape:
            raise ValueError(
                f"outputs have shape {tuple(outputs.shape)}, but the images {tuple(batch.targets.shape)}: give one "
                "output per pixel, before the output nonlinearity"
            )

    # -- identity and pictures --------------------------------------------------------------------------

    def identity(self) -> dict[str, int | float | str]:
        """Name, numbers of images, minibatches, what is evaluated, and the settings recorded."""
        return {
            "name": self.name,
            "train_images": self.train_images,
            "test_images": self.test_images,
            "batch_size": self.batch_size,
            "shuffle_every": self.shuffle_every,
            "evaluate_on": self.evaluate_on,
            **self.recorded,
        }

    def plot(self, batch: Batch | None = None, count: int = 10) -> Any:
        """The first images of a minibatch (default: training minibatch 0) as a matplotlib figure."""
        from corpora.images.picture import draw_images

        batch = self(0) if batch is None else batch
        return draw_images({"image": batch.inputs[:count]}, self.shape, title=self.name)

    def __repr__(self) -> str:
        return (
            f"{self.name}({self.train_images} training and {self.test_images} test images, shape={self.shape}, "
            f"batch_size={self.batch_size}, seed={self.seed}, loss={self.criterion!r}, "
            f"evaluate_on={self.evaluate_on!r}, device={str(self.device)!r}, dtype={self.dtype})"
        )
