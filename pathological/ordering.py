"""Problems about the order of a few special symbols among many others."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch

from pathological.answers import ClassAnswer
from pathological.batch import Batch
from pathological.problem import percent
from pathological.stream import Integers, Stream

FILLERS = 4
"""The symbols 0 to 3 mean nothing; 4 and 5 are the special ones, X and Y."""
CUE, START = 6, 7
"""Two more symbols of the release form."""


class SpecialSymbols(ClassAnswer):
    """One-hot symbols, of which a few, in fixed windows, are special; the class at the end tells which.

    The k-th special symbol is X or Y (bit 0 or 1) with equal chance. The output at the last step is scored.

    Paper form, steps counted from 1: length ``T' ~ i[T, 11T/10]``, special symbols at ``i[aT/10, bT/10]`` for
    each window (a, b); 6 symbols; the first special symbol is the highest bit of the class.
    Release form, steps counted from 0, ``f(k) = floor(kT/100)``: last step ``E ~ i[f(100), f(110) - 1]``,
    special symbols at ``i[max(1, f(10a)), f(10b)]``; 8 symbols, a start symbol at step 0 and a cue near the
    end; bits by the number of the sequence, so that the classes are balanced: ``(row // 2**k) % 2``.
    """

    shortest: ClassVar = {"paper": 10, "release": 10}
    windows: ClassVar[dict[str, tuple[tuple[int, int], ...]]]
    """Per form the windows of the special symbols, in tenths of T (release: per cent)."""
    cue_before_end: ClassVar[int]
    """How many steps before the last one the release form has its cue."""
    lowest_bit_first: ClassVar[bool]
    """Whether the release form's first special symbol is the lowest bit of the class."""

    def _sizes(self) -> tuple[int, int]:
        return (6 if self.form == "paper" else 8), 2 ** len(self.windows[self.form])

    @property
    def steps(self) -> int:
        return self.T + self.T // 10 if self.form == "paper" else percent(self.T, 110)

    def _bits(self, stream: Stream) -> Integers:
        """Which special symbols come, ``(number of windows, B)``."""
        windows = len(self.windows[self.form])
        if self.form == "paper":
            return stream.integers(0, 1, windows, self.batch_size)
        return (np.arange(self.batch_size) >> np.arange(windows)[:, None]) & 1

    def _draw(self, stream: Stream) -> Batch:
        T, B = self.T, self.batch_size
        windows, rows = self.windows[self.form], np.arange(B)
        symbols = stream.integers(0, FILLERS - 1, self.steps, B)
        bits = self._bits(stream)
        if self.form == "paper":
            lengths = T + stream.integers(0, T // 10, B)
        else:
            lengths = stream.integers(percent(T, 100), percent(T, 110) - 1, B) + 1
            symbols[0] = START
            symbols[lengths - 1 - self.cue_before_end, rows] = CUE
        for (low, high), bit in zip(windows, bits, strict=True):
            if self.form == "paper":
                position = stream.integers(-(-low * T // 10), high * T // 10, B) - 1
            else:
                position = stream.integers(max(1, percent(T, low)), percent(T, high), B)
            symbols[position, rows] = FILLERS + bit
        weights = 2 ** np.arange(len(windows))
        if self.form == "paper" or not self.lowest_bit_first:
            weights = weights[::-1]
        classes = (bits * weights[:, None]).sum(0)

        lengths_ = torch.from_numpy(lengths).to(self.device)
        steps = torch.arange(self.steps, device=self.device).unsqueeze(1)
        mask = steps == lengths_ - 1
        return Batch(
            inputs=self._one_hot(torch.from_numpy(symbols).to(self.device), steps < lengths_),
            targets=torch.from_numpy(classes).to(self.device) * mask,
            mask=mask,
            lengths=lengths_,
        )


class TemporalOrder(SpecialSymbols):
    """The temporal order problem: in which order two special symbols came, each X or Y.

    4 classes ``2a + b``; windows [T/10, 2T/10] and [5T/10, 6T/10] (release form: [f(1), f(10)] and
    [f(40), f(50)], the cue one step before the last). By chance: ln 4 and 75% wrong.

    Arguments: :class:`pathological.problem.Problem`; form: :class:`SpecialSymbols`; loss and errors:
    :class:`pathological.answers.ClassAnswer`. Source: Hochreiter & Schmidhuber (1997), in the form of Martens
    & Sutskever (ICML 2011), problem 4.
    """

    name = "temporal_order"
    windows: ClassVar = {"paper": ((1, 2), (5, 6)), "release": ((1, 10), (40, 50))}
    cue_before_end = 1
    lowest_bit_first = False


class TemporalOrder3Bit(SpecialSymbols):
    """The 3-bit temporal order problem: in which order three special symbols came, each X or Y.

    8 classes; windows [T/10, 2T/10], [3T/10, 4T/10] and [6T/10, 7T/10] (release form: [f(1), f(10)],
    [f(30), f(40)] and [f(50), f(60)], the cue at the last step). By chance: ln 8 and 87.5% wrong.

    Arguments: :class:`pathological.problem.Problem`; form: :class:`SpecialSymbols`; loss and errors:
    :class:`pathological.answers.ClassAnswer`. Source: Hochreiter & Schmidhuber (1997), in the form of Martens
    & Sutskever (ICML 2011), problem 5.
    """

    name = "temporal_order_3bit"
    windows: ClassVar = {
        "paper": ((1, 2), (3, 4), (6, 7)),
        "release": ((1, 10), (30, 40), (50, 60)),
    }
    cue_before_end = 0
    lowest_bit_first = True
