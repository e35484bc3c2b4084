"""What all problems share: when minibatches are drawn, kept and forgotten, and how outputs are judged."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from hfopt.experiment.data import Minibatches, integer
from pathological.batch import Batch
from pathological.stream import Stream

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Problem(Minibatches[Batch]):
    """A synthetic problem as a data object: minibatches by index, a loss, a measure of error.

    Training minibatches have the indices ``0 .. train_batches - 1``, test minibatches ``-1, -2, ..``.
    ``problem(i)`` draws a minibatch on first use and keeps it; ``forget`` drops the training draws, so
    that the next use draws new ones, while test draws stay. A minibatch is a function of ``(seed, i)`` and of
    the number of calls of ``forget`` alone (see :mod:`pathological.stream`): one that is not kept because ``memory``
    is used up is drawn again, the same, at each use.

    Args:
        T: the problem's length, as its definition uses it; the sequences have :attr:`steps` steps.
        form: "paper", the definition in Martens & Sutskever (ICML 2011) and Sutskever's thesis (2013); or
            "release", that of the program which Sutskever released in 2011.
        batch_size: sequences in a minibatch, B.
        train_batches: the number of training minibatches.
        test_batches: the number of test minibatches.
        seed: a non-negative integer.
        device: where the minibatches lie. They are drawn on the CPU: a seed gives the same on every device.
        dtype: floating-point type of inputs and real targets.
        memory: bytes that the kept minibatches may take in all.

    Attributes:
        name: the name of the problem.
        V: the number of inputs at each step.
        O: the number of outputs at each step.
        train_batches: the indices of the training minibatches, a range.
        test_batches: the indices of the test minibatches, a range.
        train_mem: the training minibatches kept so far, by index.
        test_mem: the test minibatches kept so far, by index.

    Raises:
        ValueError: an argument is out of its range.
    """

    name: ClassVar[str]
    shortest: ClassVar[dict[str, int]]
    """The smallest T that each form can have."""

    def __init__(
        self,
        T: int,
        *,
        form: str = "paper",
        batch_size: int = 1000,
        train_batches: int = 10,
        test_batches: int = 10,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        memory: int = 2 << 30,
    ) -> None:
        if form not in self.shortest:
            forms = " or ".join(repr(known) for known in self.shortest)
            raise ValueError(f"form is {form!r}; choose {forms}")
        if not dtype.is_floating_point:
            raise ValueError(f"dtype is {dtype}; choose a floating-point type such as torch.float32")
        self.form = form
        super().__init__(train_batches, test_batches, seed=seed, memory=memory)
        self.T = integer("T", T, self.shortest[form], f"{self.name} in the {form} form needs")
        self.batch_size = integer("batch_size", batch_size, 1)
        self.device = torch.device(device)
        self.dtype = dtype
        self.V, self.O = self._sizes()

    @abstractmethod
    def _sizes(self) -> tuple[int, int]:
        """The numbers of inputs and outputs at each step, V and O."""

    @property
    @abstractmethod
    def steps(self) -> int:
        """The number of steps to which every sequence is padded, that of the longest possible one."""

    @abstractmethod
    def _draw(self, stream: Stream) -> Batch:
        """A new minibatch from the numbers of a stream."""

    @abstractmethod
    def _criterion(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of scored outputs ``(N, O)``."""

    @abstractmethod
    def _right(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Which of the scored outputs ``(N, O)`` are right, ``(N,)`` bool; never where an output is NaN."""

    @abstractmethod
    def predictions(self, outputs: Tensor) -> Tensor:
        """What outputs ``(..., O)`` stand for after the output nonlinearity, same shape."""

    # -- minibatches ------------------------------------------------------------------------------------

    def draw(self, i: int, epoch: int) -> Batch:
        """Minibatch ``i`` from a stream of its own."""
        return self._draw(Stream(self.seed, "train" if i >= 0 else "test", epoch, i))

    def size(self, batch: Batch) -> int:
        """The number of scored steps of a minibatch, which its loss is the mean over."""
        return batch.scored.numel()

    def cases(self, batch: Batch) -> int:
        """The number of sequences, B, which :meth:`zero_one_loss` counts the wrong ones of."""
        return batch.mask.shape[1]

    # -- judging outputs --------------------------------------------------------------------------------

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The mean loss over the scored steps.

        Args:
            outputs: ``(T, B, O)``, before the output nonlinearity.
            batch: the minibatch that they answer.

        Returns:
            The sum, a scalar, over scored steps (natural logarithms) divided by :meth:`size`.

        Raises:
            ValueError: the shape of ``outputs`` is not ``(T, B, O)``.
        """
        return self._criterion(self._scored(outputs, batch), batch.select(batch.targets))

    def wrong(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Which sequences are answered wrongly at one or more of their scored steps, ``(B,)`` bool."""
        errors = ~self._right(self._scored(outputs, batch), batch.select(batch.targets))
        count = torch.zeros(batch.mask.shape[1], dtype=torch.int64, device=outputs.device)
        return count.index_add_(0, batch.scored % batch.mask.shape[1], errors.long()) > 0

    def zero_one_loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The number of sequences that are answered wrongly (see :meth:`wrong`), a scalar int64 tensor."""
        return self.wrong(outputs, batch).sum()

    def _scored(self, outputs: Tensor, batch: Batch) -> Tensor:
        expected = (*batch.mask.shape, self.O)
        if tuple(outputs.shape) != expected:
            raise ValueError(
                f"outputs have shape {tuple(outputs.shape)}, but {self.name} needs (T, B, O) = {expected}: "
                "the model's outputs at every step, before the output nonlinearity"
            )
        return batch.select(outputs)

    # -- identity and pictures --------------------------------------------------------------------------

    def plot(self, b: int = 0, batch: Batch | None = None) -> Figure:
        """A picture of sequence ``b`` of a minibatch (default: training minibatch 0); needs matplotlib."""
        from pathological.picture import draw_sequence

        return draw_sequence(self, self(0) if batch is None else batch, b)

    def identity(self) -> dict[str, int | float | str]:
        """Name, form, length and size of a minibatch."""
        return {"name": self.name, "form": self.form, "T": self.T, "batch_size": self.batch_size}

    def __repr__(self) -> str:
        return (
            f"{self.name}(T={self.T}, form={self.form!r}, batch_size={self.batch_size}, "
            f"train_batches={len(self.train_batches)}, test_batches={len(self.test_batches)}, "
            f"seed={self.seed}, device={str(self.device)!r}, dtype={self.dtype})"
        )


def percent(T: int, k: int) -> int:
    """``k`` per cent of ``T``, rounded down; in integers, so that 100 per cent of 29 are 29."""
    return k * T // 100
