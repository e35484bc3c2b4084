"""Memorization problems: repeat a string of symbols long after it was seen."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch

from pathological.answers import ClassAnswer
from pathological.batch import Batch
from pathological.stream import Integers, Stream


class Memorization(ClassAnswer):
    """Read n symbols out of k, wait, and after a trigger repeat them in order. Nothing else is random.

    One-hot inputs and classes. The target is "blank" at each step before the answers. Every step is scored
    and a sequence is wrong where any scored step is. The answer "blank" before the trigger and chance after
    it give a loss of ``n ln k / steps``.

    Paper form: n data symbols, T steps without data of which the last is the trigger (step T + n, counted
    from 1), n steps for the answers: T + 2n steps. Symbols: k for data, one for blank, one for the trigger.
    Release form: T steps in all; trigger at step T - n - 1, counted from 0. There are only k symbols: blank is
    the data symbol k - 1, the trigger k - 2.

    Args:
        T: the length (see above).
        only_memory_bits: score the last n steps alone, those of the answers.
        options: the other arguments of :class:`pathological.problem.Problem`.
    """

    symbols: ClassVar[int]
    """n, the length of the string."""
    values: ClassVar[int]
    """k, the number of different data symbols."""

    def __init__(self, T: int, *, only_memory_bits: bool = False, **options: Any) -> None:
        self.only_memory_bits = bool(only_memory_bits)
        super().__init__(T, **options)

    def _sizes(self) -> tuple[int, int]:
        size = self.values + 2 if self.form == "paper" else self.values
        return size, size

    @property
    def steps(self) -> int:
        return self.T + 2 * self.symbols if self.form == "paper" else self.T

    def _strings(self, stream: Stream) -> Integers:
        """The strings to memorize, ``(n, B)``."""
        return stream.integers(0, self.values - 1, self.symbols, self.batch_size)

    def _draw(self, stream: Stream) -> Batch:
        n, k, B, steps = self.symbols, self.values, self.batch_size, self.steps
        blank, trigger = (k, k + 1) if self.form == "paper" else (k - 1, k - 2)
        strings = self._strings(stream)
        inputs = np.full((steps, B), blank)
        inputs[:n] = strings
        inputs[steps - n - 1] = trigger
        targets = np.full((steps, B), blank)
        targets[steps - n :] = strings
        valid = torch.ones(steps, B, dtype=torch.bool, device=self.device)
        mask = valid.clone()
        if self.only_memory_bits:
            mask[: steps - n] = False
        return Batch(
            inputs=self._one_hot(torch.from_numpy(inputs).to(self.device), valid),
            targets=torch.from_numpy(targets).to(self.device),
            mask=mask,
            lengths=torch.full((B,), steps, dtype=torch.int64, device=self.device),
        )

    def identity(self) -> dict[str, int | float | str]:
        """That of every problem, and what is scored."""
        return {**super().identity(), "only_memory_bits": int(self.only_memory_bits)}


class Memorization5Bit(Memorization):
    """Noiseless memorization of 5 bits: n = 5, k = 2.

    There are 32 strings. The paper form draws them at random; in the release form sequence ``row`` has the
    string whose bits are those of ``row % 32``, so that a minibatch of 32 holds each once, and training and
    test minibatches are the same.

    Form and arguments: :class:`Memorization`; loss: :class:`pathological.answers.ClassAnswer`. Source:
    Martens & Sutskever (ICML 2011), problem 7.
    """

    name = "memorization_5bit"
    shortest: ClassVar = {"paper": 1, "release": 11}
    symbols, values = 5, 2

    def _strings(self, stream: Stream) -> Integers:
        if self.form == "paper":
            return super()._strings(stream)
        return (np.arange(self.batch_size) >> np.arange(self.symbols)[:, None]) & 1


class Memorization20Bit(Memorization):
    """Noiseless memorization of "20 bits": ten symbols out of five (23.2 bits), n = 10, k = 5.

    Form and arguments: :class:`Memorization`; loss: :class:`pathological.answers.ClassAnswer`. Source:
    Martens & Sutskever (ICML 2011), problem 8.
    """

    name = "memorization_20bit"
    shortest: ClassVar = {"paper": 1, "release": 21}
    symbols, values = 10, 5
