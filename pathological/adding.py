"""Problems about two marked numbers of a sequence: their sum, their product, and whether two bits differ."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from pathological.answers import BitAnswer, RealAnswer
from pathological.batch import Batch
from pathological.problem import Problem, percent
from pathological.stream import Integers, Stream


class MarkedPair(Problem):
    """A sequence of numbers ``u_t`` of which two are marked; the answer at the end depends on these two.

    Inputs ``(u_t, marker_t)``; the output at the last step is scored. ``i[a, b]`` is uniform over the
    integers from a to b.

    Paper form, steps counted from 1: length ``T' ~ i[T, 11T/10]``; ``I ~ i[1, T'/10]``,
    ``J ~ i[T'/10, T'/2]``, ``J != I``; the marker is 1 at I and J and 0 elsewhere.
    Release form, steps counted from 0, ``f(k) = floor(kT/100)``: last step ``E ~ i[f(100), f(110) - 1]``,
    ``I ~ i[max(1, f(1)), f(10) - 1]``, ``J ~ i[f(10), f(50) - 1]`` (other percentages for XOR); the marker is
    1 at I and J, -1 at the steps 0 and E - 3.
    """

    shortest: ClassVar = {"paper": 10, "release": 20}
    release_second: ClassVar = (10, 50)
    """Where J lies in the release form, in per cent of T."""
    release_end: ClassVar = (100, 110)
    """Where the last step lies in the release form, in per cent of T."""

    @abstractmethod
    def _answer(self, first: Tensor, second: Tensor) -> Tensor:
        """The target of the two marked numbers, ``(B,)`` each."""

    def _values(self, stream: Stream) -> Tensor:
        """``u (T, B)``, in [0, 1)."""
        return torch.from_numpy(stream.uniform(self.steps, self.batch_size))

    def _sizes(self) -> tuple[int, int]:
        return 2, 1

    @property
    def steps(self) -> int:
        return self.T + self.T // 10 if self.form == "paper" else percent(self.T, self.release_end[1])

    def _positions(self, stream: Stream) -> tuple[Integers, Integers, Integers]:
        """The lengths, I and J, ``(B,)`` each, steps counted from 0."""
        T, B = self.T, self.batch_size
        if self.form == "paper":
            lengths = T + stream.integers(0, T // 10, B)
            first = stream.integers(1, lengths // 10, B)
            # The two windows share a step where 10 divides T'; one number must not be marked twice.
            second = stream.integers(np.maximum(-(-lengths // 10), first + 1), lengths // 2, B)
            return lengths, first - 1, second - 1
        ends = stream.integers(percent(T, self.release_end[0]), percent(T, self.release_end[1]) - 1, B)
        first = stream.integers(max(1, percent(T, 1)), percent(T, 10) - 1, B)
        second = stream.integers(percent(T, self.release_second[0]), percent(T, self.release_second[1]) - 1, B)
        return ends + 1, first, second

    def _draw(self, stream: Stream) -> Batch:
        lengths, first, second = (torch.from_numpy(p).to(self.device) for p in self._positions(stream))
        values = self._values(stream).to(self.dtype).to(self.device)
        sequences = torch.arange(self.batch_size, device=self.device)
        steps = torch.arange(self.steps, device=self.device).unsqueeze(1)

        marker = torch.zeros_like(values)
        marker[first, sequences] = 1.0
        marker[second, sequences] = 1.0
        if self.form == "release":
            marker[0] = -1.0
            marker[lengths - 4, sequences] = -1.0
        targets = torch.zeros_like(values).unsqueeze(2)
        answer = self._answer(values[first, sequences], values[second, sequences])
        targets[lengths - 1, sequences, 0] = answer
        return Batch(
            inputs=torch.stack((values * (steps < lengths), marker), dim=2),
            targets=targets,
            mask=steps == lengths - 1,
            lengths=lengths,
        )


class Addition(MarkedPair, RealAnswer):
    """The addition problem: add two marked numbers of a long sequence of random ones.

    ``u_t ~ U[0, 1]``; the target at the last step is ``(u_I + u_J) / 2`` (release form: ``u_I + u_J``). With
    the best constant answer the loss is 1/48 (1/12) and 84.6% (92.2%) of the sequences are wrong.

    Arguments: :class:`pathological.problem.Problem`; windows: :class:`MarkedPair`; loss and errors:
    :class:`pathological.answers.RealAnswer`. Source: Hochreiter & Schmidhuber (1997), in the form of Martens
    & Sutskever (ICML 2011), problem 1.
    """

    name = "addition"

    def _answer(self, first: Tensor, second: Tensor) -> Tensor:
        return (first + second) / 2 if self.form == "paper" else first + second


class Multiplication(MarkedPair, RealAnswer):
    """The multiplication problem: multiply two marked numbers of a long sequence of random ones.

    ``u_t ~ U[0, 1]``; the target at the last step is ``u_I u_J``. With the mean as constant answer the loss
    is 7/288 and 88.9% of the sequences are wrong; with the best constant 71.8%.

    Arguments: :class:`pathological.problem.Problem`; windows: :class:`MarkedPair`; loss and errors:
    :class:`pathological.answers.RealAnswer`. Source: Hochreiter & Schmidhuber (1997), in the form of Martens
    & Sutskever (ICML 2011), problem 2.
    """

    name = "multiplication"

    def _answer(self, first: Tensor, second: Tensor) -> Tensor:
        return first * second


class ExclusiveOr(MarkedPair, BitAnswer):
    """The XOR problem: whether two marked bits of a long sequence of random ones differ.

    ``u_t`` are fair bits; the target at the last step is ``u_I xor u_J``. By chance: ln 2 and 50% wrong.
    In the release form the sequences are about T/2 long: ``E ~ i[f(50), f(55) - 1]``,
    ``J ~ i[f(15), f(25) - 1]``; what it calls T = 200 has 101 to 110 steps.

    Arguments: :class:`pathological.problem.Problem`; windows: :class:`MarkedPair`; loss and errors:
    :class:`pathological.answers.BitAnswer`. Source: Martens & Sutskever (ICML 2011), problem 3.
    """

    name = "xor"
    release_second: ClassVar = (15, 25)
    release_end: ClassVar = (50, 55)

    def _values(self, stream: Stream) -> Tensor:
        return torch.from_numpy(stream.integers(0, 1, self.steps, self.batch_size))

    def _answer(self, first: Tensor, second: Tensor) -> Tensor:
        return (first != second).to(first.dtype)
