"""Problems about two marked numbers: their sum and their product."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pathological.batch import Batch
from pathological.problem import Problem, percent
from pathological.stream import Integers, Stream


class MarkedPair(Problem):
    """A sequence of numbers ``u_t`` of which two are marked; the answer at the end depends on these two.

    Inputs ``(u_t, marker_t)``; the output at the last step is scored. Steps count from 1, ``i[a, b]`` is
    uniform over the integers from a to b.

    Paper form: length ``T' ~ i[T, 11T/10]``; ``I ~ i[1, T'/10]``, ``J ~ i[T'/10, T'/2]``, ``J != I``; the
    marker is 1 at I and J and 0 elsewhere.
    Release form: steps from 0, with ``f(k) = floor(kT/100)``: last step ``E ~ i[f(100), f(110) - 1]``,
    ``I ~ i[max(1, f(1)), f(10) - 1]``, ``J ~ i[f(10), f(50) - 1]``; the marker is 1 at I and J, -1 at the
    steps 0 and E - 3.
    """

    shortest: ClassVar = {"paper": 10, "release": 20}
    V, O = 2, 1

    @abstractmethod
    def _answer(self, first: Tensor, second: Tensor) -> Tensor:
        """The target of the two marked numbers, ``(B,)`` each."""

    def _values(self, stream: Stream) -> Tensor:
        """``u (T, B)``, in [0, 1)."""
        return torch.from_numpy(stream.uniform(self.steps, self.batch_size))

    @property
    def steps(self) -> int:
        return self.T + self.T // 10 if self.form == "paper" else percent(self.T, 110)

    def _positions(self, stream: Stream) -> tuple[Integers, Integers, Integers]:
        """The lengths, I and J, ``(B,)`` each, steps counted from 0."""
        T, B = self.T, self.batch_size
        if self.form == "paper":
            lengths = T + stream.integers(0, T // 10, B)
            first = stream.integers(1, lengths // 10, B)
            # The two windows share a step where 10 divides T'; one number must not be marked twice.
            second = stream.integers(np.maximum(-(-lengths // 10), first + 1), lengths // 2, B)
            return lengths, first - 1, second - 1
        ends = stream.integers(percent(T, 100), percent(T, 110) - 1, B)
        first = stream.integers(max(1, percent(T, 1)), percent(T, 10) - 1, B)
        second = stream.integers(percent(T, 10), percent(T, 50) - 1, B)
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


class RealPair(MarkedPair):
    """Two marked numbers with a real answer: half the squared error, and a tolerance for what is right.

    The loss is ``1/2 (z - y)^2``, the mean over sequences; a sequence is wrong where ``|z - y| > tolerance``.
    """

    tolerance: float = 0.04
    """0.04 in Sutskever's thesis and the release; Pascanu et al. (ICML 2013) print a squared error: 0.2."""

    def _criterion(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return 0.5 * F.mse_loss(outputs, targets)

    def _right(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return ((outputs - targets).abs() <= self.tolerance).all(1)

    def predictions(self, outputs: Tensor) -> Tensor:
        """The outputs themselves: they are linear."""
        return outputs


class Addition(RealPair):
    """The addition problem: add two marked numbers of a long sequence of random ones.

    ``u_t ~ U[0, 1]``; the target at the last step is ``(u_I + u_J) / 2`` (release form: ``u_I + u_J``). With
    the best constant answer the loss is 1/48 (1/12) and 84.6% (92.2%) of the sequences are wrong.

    Arguments: :class:`pathological.problem.Problem`; windows: :class:`MarkedPair`. Source: Hochreiter &
    Schmidhuber (1997), in the form of Martens & Sutskever (ICML 2011), problem 1.
    """

    name = "addition"

    def _answer(self, first: Tensor, second: Tensor) -> Tensor:
        return (first + second) / 2 if self.form == "paper" else first + second


class Multiplication(RealPair):
    """The multiplication problem: multiply two marked numbers of a long sequence of random ones.

    ``u_t ~ U[0, 1]``; the target at the last step is ``u_I u_J``. With the mean as constant answer the loss
    is 7/288 and 88.9% of the sequences are wrong; with the best constant 71.8%.

    Arguments: :class:`pathological.problem.Problem`; windows: :class:`MarkedPair`. Source: Hochreiter &
    Schmidhuber (1997), in the form of Martens & Sutskever (ICML 2011), problem 2.
    """

    name = "multiplication"

    def _answer(self, first: Tensor, second: Tensor) -> Tensor:
        return first * second
