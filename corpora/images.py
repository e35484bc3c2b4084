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


class Images:
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
        **recorded: int | float | str,
    ) -> None:
        for argument, value, known in (("loss", loss, LOSSES), ("evaluate_on", evaluate_on, EVALUATED)):
            if value not in known:
                raise ValueError(f"{argument} is {value!r}; choose {' or '.join(map(repr, known))}")
        batch_size = len(train) if batch_size is None else batch_size
        for argument, number, least in (
            ("batch_size", batch_size, 1),
            ("shuffle_every", 1 if shuffle_every is None else shuffle_every, 1),
            ("seed", seed, 0),
        ):
            if number < least:
                raise ValueError(f"{argument} is {number}; choose an integer of at least {least}")
        if not dtype.is_floating_point:
            raise ValueError(f"dtype is {dtype}; choose a floating-point type such as torch.float32")
        self.name, self.shape = name, shape
        self.white, self.seed = white, seed
        self.batch_size = min(batch_size, len(train))
        self.criterion, self.evaluate_on = loss, evaluate_on
        self.device, self.dtype = torch.device(device), dtype
        self.V = self.O = shape[0] * shape[1]
        self.recorded = recorded
        self._train = self._pixels("train", train)
        self._held_out = self._pixels("test", test)
        self._test = self._held_out if evaluate_on == "test" else self._train
        self.train_images, self.test_images = len(train), len(test)
        self.train_batches = range(_parts(len(self._train), self.batch_size))
        self.test_batches = range(-1, -1 - _parts(len(self._test), self.batch_size), -1)
        self.shuffle_every = len(self.train_batches) if shuffle_every is None else shuffle_every
        self.train_mem: dict[int, Batch] = {}
        self.test_mem: dict[int, Batch] = {}
        self._epoch = 0
        self._order: tuple[int, Tensor] | None = None  # of which pass, and the order

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
        other.test_batches = range(-1, -1 - _parts(len(other._test), self.batch_size), -1)
        other.train_mem, other.test_mem = {}, {}
        return other

    # -- minibatches ------------------------------------------------------------------------------------

    def __call__(self, i: int) -> Batch:
        """Minibatch `i`: training for `i >= 0`, test for `i < 0`.

        Raises:
            IndexError: there is no such minibatch.
        """
        if i in self.train_batches:
            if i not in self.train_mem:
                part = _part(i, len(self._train), len(self.train_batches))
                self.train_mem[i] = self._batch(self._train[self._present_order()[part]])
            return self.train_mem[i]
        if i in self.test_batches:
            if i not in self.test_mem:
                part = _part(-1 - i, len(self._test), len(self.test_batches))
                self.test_mem[i] = self._batch(self._test[part])
            return self.test_mem[i]
        raise IndexError(
            f"there is no minibatch {i}: training has 0 to {self.train_batches[-1]}, test -1 to "
            f"{self.test_batches[-1]}; a smaller batch_size= makes more"
        )

    def _batch(self, pixels: Tensor) -> Batch:
        return Batch(pixels.to(self.dtype) / self.white)

    def _present_order(self) -> Tensor:
        # A driver forgets before every step, the first one too.
        number = max(0, self._epoch - 1) // self.shuffle_every
        if self._order is None or self._order[0] != number:
            generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, number])))
            self._order = number, torch.from_numpy(generator.permutation(len(self._train))).to(self.device)
        return self._order[1]

    def forget(self) -> None:
        """Drop all training minibatches; every `shuffle_every` calls put the images in a new order."""
        self.train_mem.clear()
        self._epoch += 1

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

    # -- state and pictures -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, int | float | str]:
        """All that the next minibatches depend on, as plain numbers and strings."""
        return {**self._identity(), "seed": self.seed, "epoch": self._epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as the data object whose :meth:`state_dict` this is; its minibatches are made again when used.

        Raises:
            ValueError: the state is that of other images, or of minibatches of another size.
        """
        for key, own in self._identity().items():
            if state.get(key) != own:
                raise ValueError(
                    f"the state has {key} = {state.get(key)!r}, but these images have {own!r}; build them with the "
                    "arguments of the run that wrote the state"
                )
        self.seed, self._epoch = int(state["seed"]), int(state["epoch"])
        self._order = None
        self.train_mem.clear()
        self.test_mem.clear()

    def _identity(self) -> dict[str, int | float | str]:
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
        from corpora.picture import draw_images

        batch = self(0) if batch is None else batch
        return draw_images({"image": batch.inputs[:count]}, self.shape, title=self.name)

    def __repr__(self) -> str:
        return (
            f"{self.name}({self.train_images} training and {self.test_images} test images, shape={self.shape}, "
            f"batch_size={self.batch_size}, seed={self.seed}, loss={self.criterion!r}, "
            f"evaluate_on={self.evaluate_on!r}, device={str(self.device)!r}, dtype={self.dtype})"
        )


def _parts(count: int, size: int) -> int:
    return -(-count // size)


def _part(i: int, count: int, parts: int) -> slice:
    """Part `i` of `count` things in parts of nearly equal size."""
    return slice(i * count // parts, (i + 1) * count // parts)
