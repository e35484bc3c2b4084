"""The random permutation problem: remember the first symbol while predicting unpredictable ones."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from pathological.answers import ClassAnswer
from pathological.batch import Batch
from pathological.stream import Stream

SYMBOLS = 100


class RandomPermutation(ClassAnswer):
    """The random permutation problem: predict the next symbol; only the last, the first again, can be known.

    A sequence of one-hot symbols out of 100: the first is 0 or 1, the others are uniform over 2 .. 99, the
    last repeats the first. The target at each step is the next symbol; every step is scored, but a sequence
    is wrong where its last step is. By chance: ln 98 per step, ln 2 at the last, and 50% wrong.

    Paper form: T symbols, so T - 1 steps; the first is 0 or 1 with equal chance.
    Release form: T steps, T + 1 symbols; the first is ``row % 2``.

    A minibatch's inputs take ``400 T B`` bytes in float32, so that not all are kept where T is large (``memory``).

    Arguments: :class:`pathological.problem.Problem`; loss: :class:`pathological.answers.ClassAnswer`. Source:
    Martens & Sutskever (ICML 2011), problem 6.
    """

    name = "random_permutation"
    shortest: ClassVar = {"paper": 3, "release": 2}

    def _sizes(self) -> tuple[int, int]:
        return SYMBOLS, SYMBOLS

    @property
    def steps(self) -> int:
        return self.T - 1 if self.form == "paper" else self.T

    def _draw(self, stream: Stream) -> Batch:
        B = self.batch_size
        symbols = stream.integers(2, SYMBOLS - 1, self.steps + 1, B)
        symbols[0] = stream.integers(0, 1, B) if self.form == "paper" else np.arange(B) % 2
        symbols[-1] = symbols[0]
        sequence = torch.from_numpy(symbols).to(self.device)
        mask = torch.ones(self.steps, B, dtype=torch.bool, device=self.device)
        return Batch(
            inputs=self._one_hot(sequence[:-1], mask),
            targets=sequence[1:].contiguous(),
            mask=mask,
            lengths=torch.full((B,), self.steps, dtype=torch.int64, device=self.device),
        )

    def wrong(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Which sequences are answered wrongly at their last step, ``(B,)`` bool: no other can be known."""
        self._scored(outputs, batch)
        return ~self._right(outputs[-1], batch.targets[-1])
