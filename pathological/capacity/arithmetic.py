"""Arithmetic: the sum of two integers, read and written digit by digit."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from hfopt.experiment.data import integer
from pathological.capacity.task import Cases, Task
from pathological.stream import Stream

SYMBOLS = "0123456789+-= "
"""What inputs and outputs number."""
_PLUS, _MINUS, _EQUAL, _SPACE = range(10, 14)
_ONE_HOT = torch.eye(len(SYMBOLS))


class Arithmetic(Task):
    """`arithmetic`: after "-343243+93851=" and some spaces, the answer "-249392" has to be written.

    The operands are uniform integers from -`largest` to `largest`. A negative second operand is written with its sign
    in place of the plus. All sequences have T steps: spaces, the problem, `compute_steps` spaces, and the slots of the
    answer, as many as the longest possible one has characters. The answer begins in the first slot, and spaces follow
    it. The loss is the mean cross-entropy of the slots.

    The source gives neither the alphabet nor the number of slots, and says "after 36 time steps" where it may mean the
    whole length; with its operands and up to 6 steps, the sequences here have at most 36.

    Args:
        largest: absolute value of operands.
        compute_steps: steps between "=" and the step of the first character, from 1.
        steps: T; None: the shortest possible with `compute_steps`.
        options: those of :class:`Task`.

    Raises:
        ValueError: `steps` leaves no room for the longest problem.

    Source: Collins, Sohl-Dickstein & Sussillo, ICLR 2017, appendix B.
    """

    name = "arithmetic"
    output = "all"

    def __init__(
        self, largest: int = 10_000_000, compute_steps: int = 1, steps: int | None = 36, **options: Any
    ) -> None:
        super().__init__(**options)
        self.V = self.O = len(SYMBOLS)
        self.largest, self.compute_steps = (
            integer("largest", largest, 1),
            integer("compute_steps", compute_steps, 1),
        )
        self._digits = len(str(self.largest))
        self.slots = len(str(-2 * self.largest))
        shortest = 2 * self._digits + 3 + self.compute_steps + self.slots
        self.steps = shortest if steps is None else integer("steps", steps, 1)
        if self.steps < shortest:
            raise ValueError(
                f"steps is {steps}; operands up to {largest} and compute_steps = {compute_steps} need {shortest}"
            )

    def _sequences(self, stream: Stream) -> Cases:
        a, b = (stream.integers(-self.largest, self.largest, self.batch_size) for _ in range(2))
        rows = np.arange(self.batch_size)
        # Right to left: "=", the second operand, its sign or the plus, the first operand, its sign.
        problem = np.full((self.batch_size, 2 * self._digits + 3), _SPACE)
        problem[:, -1] = _EQUAL
        second, length = _written(np.abs(b), self._digits)
        problem[:, -1 - self._digits : -1] = second
        at = problem.shape[1] - 2 - length
        problem[rows, at] = np.where(b < 0, _MINUS, _PLUS)
        first, first_length = _signed(a, self._digits + 1)
        columns = at[:, None] - 1 - np.arange(self._digits + 1)
        fits = columns >= 0
        taken = np.where(np.arange(self._digits + 1) < first_length[:, None], first[:, ::-1], _SPACE)
        problem[np.broadcast_to(rows[:, None], fits.shape)[fits], columns[fits]] = taken[fits]
        answer, answer_length = _signed(a + b, self.slots)
        slots = np.arange(self.slots) + self.slots - answer_length[:, None]
        written = np.where(slots < self.slots, answer[rows[:, None], np.minimum(slots, self.slots - 1)], _SPACE)
        symbols = np.full((self.batch_size, self.steps), _SPACE)
        end = self.steps - self.slots - self.compute_steps
        symbols[:, end - problem.shape[1] : end] = problem
        inputs = _ONE_HOT[torch.from_numpy(np.ascontiguousarray(symbols.T))]
        return Cases(inputs, torch.from_numpy(np.ascontiguousarray(written.T)))

    def size(self, batch: Cases) -> int:
        """The number of slots, which the loss is the mean over."""
        return batch.targets.numel()

    def cases(self, batch: Cases) -> int:
        """The number of sequences."""
        return int(batch.targets.shape[1])

    def loss(self, outputs: Tensor, batch: Cases) -> Tensor:
        """The mean cross-entropy of the slots in nats, of outputs (T, B, O)."""
        self._check(outputs, (*batch.inputs.shape[:2], self.O))
        return F.cross_entropy(outputs[-self.slots :].flatten(0, 1), batch.targets.flatten())

    def zero_one_loss(self, outputs: Tensor, batch: Cases) -> Tensor:
        """Which answers have a wrong character, (B,)."""
        answers = outputs[-self.slots :]
        return ((answers.argmax(2) != batch.targets) | answers.isnan().any(2)).any(0)

    def text(self, batch: Cases, b: int) -> tuple[str, str]:
        """The problem and the answer of sequence `b` as text."""
        problem = "".join(SYMBOLS[k] for k in batch.inputs[:, b].argmax(1).tolist())
        return problem, "".join(SYMBOLS[k] for k in batch.targets[:, b].tolist())

    def identity(self) -> dict[str, int | float | str]:
        """See :meth:`Task.identity`; and the operands and the pause."""
        return {**super().identity(), "largest": self.largest, "compute_steps": self.compute_steps}


Ints = npt.NDArray[np.int64]


def _written(numbers: Ints, width: int) -> tuple[Ints, Ints]:
    """Digits (B, width) of numbers from 0, right-aligned behind spaces, and how many each has."""
    powers = 10 ** np.arange(width - 1, -1, -1)
    digits = numbers[:, None] // powers % 10
    length = 1 + (numbers[:, None] >= powers[:-1]).sum(1)
    return np.where(np.arange(width) >= width - length[:, None], digits, _SPACE), length


def _signed(numbers: Ints, width: int) -> tuple[Ints, Ints]:
    """The same with a minus before negative numbers; `width` has room for it."""
    written, length = _written(np.abs(numbers), width)
    negative = np.flatnonzero(numbers < 0)
    written[negative, width - 1 - length[negative]] = _MINUS
    return written, length + (numbers < 0)
