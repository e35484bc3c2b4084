"""Memory throughput: a vector is seen once and has to be reproduced."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hfopt.experiment.data import integer
from pathological.capacity.task import Cases, Task
from pathological.stream import Stream


class MemoryThroughput(Task):
    """`mem_thru`: a vector is seen at the first of `steps` steps, and is to be reproduced at the last one.

    The entries are uniform within +-sqrt(3), of variance 1; the inputs of the later steps are 0. A network that always
    answers 0 has the error 1.

    Args:
        inputs: V = O, entries of the vector.
        steps: T, the step of the vector included. ("After 12 steps" leaves open whether it counts.)
        options: those of :class:`Task`.

    Source: Collins, Sohl-Dickstein & Sussillo, ICLR 2017, appendix B.
    """

    name = "mem_thru"
    error_name = "squared error per entry"

    def __init__(self, inputs: int = 64, steps: int = 12, **options: Any) -> None:
        super().__init__(**options)
        self.V = self.O = integer("inputs", inputs, 1)
        self.steps = integer("steps", steps, 1)

    def _sequences(self, stream: Stream) -> Cases:
        vectors = torch.from_numpy(math.sqrt(3) * (2 * stream.uniform(self.batch_size, self.V) - 1)).to(self.dtype)
        inputs = torch.zeros(self.steps, self.batch_size, self.V, dtype=self.dtype)
        inputs[0] = vectors
        return Cases(inputs, vectors)

    def loss(self, outputs: Tensor, batch: Cases) -> Tensor:
        """The squared error of outputs (B, V), a mean over entries and sequences."""
        self._check(outputs, tuple(batch.targets.shape))
        return F.mse_loss(outputs, batch.targets)

    def errors(self, outputs: Tensor, batch: Cases) -> Tensor:
        """The squared error of each sequence, a mean over entries."""
        return (outputs - batch.targets).square().mean(1)
