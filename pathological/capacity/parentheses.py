"""Parallel parentheses counting: ten streams, each with a count of its own kind of parentheses."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hfopt.experiment.data import integer
from pathological.capacity.task import Task
from pathological.stream import Stream


@dataclass(frozen=True, eq=False)
class Streams:
    """B sequences of parallel streams, as numbers of symbols.

    Attributes:
        symbols: (T, B, K) uint8.
        targets: counts (B, K).
        alphabet: number of different symbols.
        dtype: of the inputs.
    """

    symbols: Tensor
    targets: Tensor
    alphabet: int
    dtype: torch.dtype

    @property
    def inputs(self) -> Tensor:
        """The symbols one-hot, (T, B, K alphabet), made at each use: they take 120 times the room of their numbers."""
        inputs = self.symbols.new_zeros((*self.symbols.shape, self.alphabet), dtype=self.dtype)
        return inputs.scatter_(3, self.symbols.unsqueeze(3).long(), 1.0).flatten(2)


class ParallelParentheses(Task):
    """`parens_counting`: stream k of several has to be answered with the number of open parentheses of kind k.

    At each step, each stream has a parenthesis with probability 1/2, any of the `2 kinds` alike, and otherwise one of
    `noise` other characters. An opening one of kind k raises the count of stream k, up to `most`, a closing one lowers
    it, down to 0; parentheses of other kinds change nothing there. The inputs are one-hot, those of all streams behind
    each other, V = kinds (2 kinds + noise); the outputs are logits of the counts 0 to `most` of each stream.

    Args:
        kinds: of parentheses, and number of streams.
        noise: other characters.
        steps: T.
        most: where the counts saturate.
        options: those of :class:`Task`.

    Source: Collins, Sohl-Dickstein & Sussillo, ICLR 2017, appendix B. That counts do not fall below 0 is implied there.
    """

    name = "parens_counting"

    def __init__(self, kinds: int = 10, noise: int = 10, steps: int = 175, most: int = 9, **options: Any) -> None:
        super().__init__(**options)
        self.kinds, self.noise = integer("kinds", kinds, 1), integer("noise", noise, 1)
        self.most, self.steps = integer("most", most, 1), integer("steps", steps, 1)
        self.alphabet = 2 * self.kinds + self.noise
        self.V, self.O = self.kinds * self.alphabet, self.kinds * (self.most + 1)
        # Half of the equally likely draws are parentheses: of 40, for 10 kinds and 10 others, each of these has two.
        divisor = math.gcd(2 * self.kinds, self.noise)
        draws_of = [self.noise // divisor] * 2 * self.kinds + [2 * self.kinds // divisor] * self.noise
        self._symbol_of = np.repeat(np.arange(self.alphabet, dtype=np.uint8), draws_of)
        if len(self._symbol_of) > 255 or self.alphabet > 255 or self.most > 126:
            raise ValueError(
                f"kinds={kinds}, noise={noise} and most={most} make more than 255 symbols or draws, or counts over 126"
            )

    def _sequences(self, stream: Stream) -> Streams:
        draws = stream.small(len(self._symbol_of), self.steps, self.batch_size, self.kinds)
        # Flat: comparing rows of K numbers with K others one row at a time takes eight times as long.
        symbols = np.take(self._symbol_of, draws).reshape(self.steps, -1)
        opening = np.tile(2 * np.arange(self.kinds, dtype=np.uint8), self.batch_size)
        change = (symbols == opening).view(np.int8) - (symbols == opening + np.uint8(1)).view(np.int8)
        count, most = np.zeros(symbols.shape[1], np.int8), np.int8(self.most)
        for step in change:
            count += step
            np.minimum(count, most, out=count)
            np.maximum(count, 0, out=count)
        numbers, counts = symbols.reshape(draws.shape), count.astype(np.int64).reshape(draws.shape[1:])
        return Streams(torch.from_numpy(numbers), torch.from_numpy(counts), self.alphabet, self.dtype)

    def _moved(self, batch: Streams) -> Streams:
        return Streams(batch.symbols.to(self.device), batch.targets.to(self.device), batch.alphabet, batch.dtype)

    def loss(self, outputs: Tensor, batch: Streams) -> Tensor:
        """The cross-entropies of outputs (B, O) in nats, summed over the streams."""
        self._check(outputs, (batch.targets.shape[0], self.O))
        return F.cross_entropy(outputs.reshape(-1, self.most + 1), batch.targets.flatten()) * self.kinds

    def zero_one_loss(self, outputs: Tensor, batch: Streams) -> Tensor:
        """Which sequences have a wrong count, (B,)."""
        counts = outputs.reshape(-1, self.kinds, self.most + 1)
        return ((counts.argmax(2) != batch.targets) | counts.isnan().any(2)).any(1)

    def identity(self) -> dict[str, int | float | str]:
        """See :meth:`Task.identity`; and the alphabet."""
        return {**super().identity(), "kinds": self.kinds, "noise": self.noise, "most": self.most}
