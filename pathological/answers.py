"""Three kinds of answer, each with its loss and its measure of what is right: a number, a bit, a class."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pathological.problem import Problem


class RealAnswer(Problem):
    """A number: half the squared error, and a tolerance for what is right.

    The loss is ``1/2 (z - y)^2``; an answer is wrong where ``|z - y| > tolerance``.
    """

    tolerance: float = 0.04
    """0.04 in Sutskever's thesis and the release; Pascanu et al. (ICML 2013) print a squared error: 0.2."""

    def predictions(self, outputs: Tensor) -> Tensor:
        """The outputs themselves: they are linear."""
        return outputs

    def _criterion(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return 0.5 * F.mse_loss(outputs, targets)

    def _right(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return ((outputs - targets).abs() <= self.tolerance).all(1)


class BitAnswer(Problem):
    """A bit: the cross-entropy of a logistic output (nats); wrong where the output's sign is."""

    def predictions(self, outputs: Tensor) -> Tensor:
        """The probability of a 1."""
        return outputs.sigmoid()

    def _criterion(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(outputs, targets)

    def _right(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs * (2 * targets - 1) > 0).all(1)


class ClassAnswer(Problem):
    """One of O classes: the cross-entropy of a softmax output (nats); wrong where another output is largest.

    Targets are class indices, ``(T, B)`` int64.
    """

    def predictions(self, outputs: Tensor) -> Tensor:
        """The probabilities of the classes."""
        return outputs.softmax(-1)

    def _criterion(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets)

    def _right(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.argmax(1) == targets) & ~outputs.isnan().any(1)

    def _one_hot(self, symbols: Tensor, valid: Tensor) -> Tensor:
        """``(T, B, V)`` with a 1 at each symbol of ``symbols (T, B)`` where ``valid (T, B)`` is True."""
        hot = _zeros((*symbols.shape, self.V), self.dtype, symbols.device)
        return hot.scatter_(2, symbols.unsqueeze(2), valid.to(self.dtype).unsqueeze(2))


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; large ones on the CPU lie in numpy's memory, which asks for huge pages: few page faults, not thousands."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)
