"""Perceptron capacity: how many random bits a network can be made to store."""

from __future__ import annotations

import math
from copy import copy
from functools import cached_property, partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hfopt.experiment.data import Shuffled, integer
from hfopt.experiment.metrics import Metric
from pathological.capacity.functions import repeated, shown
from pathological.capacity.task import Cases
from pathological.stream import Stream


def mutual_information(samples: float, share_right: float) -> float:
    """I = b (1 + p log2 p + (1 - p) log2 (1 - p)) bits that answers tell about b labels, p of them being right.

    Source: Collins, Sohl-Dickstein & Sussillo, ICLR 2017, section 2.1.
    """
    entropy = -sum(p * math.log2(p) for p in (share_right, 1 - share_right) if p > 0)
    return samples * (1 - entropy)


class PerceptronCapacity(Shuffled[Cases]):
    """`per_cap`: a fixed set of random bit strings, each with a random bit as its label, is to be learned by heart.

    The loss is the mean cross-entropy of the labels at every step after the first `warm_up`. What counts is the mutual
    information of labels and answers at the last step, in bits: divided by the number of parameters, it is the
    capacity. Training set, validation set and test set are one.

    Args:
        samples: b, of the order of the number of parameters (the source tunes it within 0.1 to 10 times that).
        inputs: V, bits of a string. The source does not give it: with 32, two of thousands of strings hardly ever
            agree, and few parameters are spent on inputs.
        steps: T. The source varies it: capacity rises with it at first.
        warm_up: steps before the first that is scored.
        present: whether a string is seen at "every" step or at the "first" alone.
        batch_size: strings in a minibatch; None: all, as suits Hessian-free.
        seed: of the set, and of the order of its minibatches.
        shuffle_every, memory: see :class:`hfopt.experiment.data.Shuffled`.
        device, dtype: of the minibatches.

    Source: Collins, Sohl-Dickstein & Sussillo, ICLR 2017, section 2.1 and appendix B.
    """

    name: ClassVar[str] = "per_cap"
    output: ClassVar[str] = "all"
    evaluate_on = "train"

    def __init__(
        self,
        samples: int = 1000,
        inputs: int = 32,
        steps: int = 10,
        warm_up: int = 5,
        present: str = "every",
        *,
        batch_size: int | None = None,
        seed: int = 0,
        shuffle_every: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        memory: int = 1 << 30,
    ) -> None:
        samples = integer("samples", samples, 1)
        super().__init__(samples, samples, batch_size=batch_size, seed=seed, shuffle_every=shuffle_every, memory=memory)
        self.samples, self.V, self.O = samples, integer("inputs", inputs, 1), 1
        self.steps, self.warm_up = integer("steps", steps, 1), integer("warm_up", warm_up, 0)
        if self.warm_up >= self.steps:
            raise ValueError(f"warm_up is {warm_up}, but a sequence has {steps} steps: nothing would be scored")
        self.present = shown(present)
        self.device, self.dtype = torch.device(device), dtype
        finish = partial(mutual_information, samples)
        self.metrics = [Metric("mutual information", self._right, unit="bits", better="higher", finish=finish)]

    @cached_property
    def _set(self) -> tuple[Tensor, Tensor]:
        stream = Stream(self.seed, "strings", 0, 0)
        strings, labels = stream.small(2, self.samples, self.V), stream.small(2, self.samples)
        return tuple(torch.from_numpy(x).to(self.device, self.dtype) for x in (strings, labels))  # type: ignore[return-value]

    def take(self, role: str, cases: slice | Tensor) -> Cases:
        """Some of the strings."""
        strings, labels = (x[cases.to(x.device) if isinstance(cases, Tensor) else cases] for x in self._set)
        return Cases(repeated(strings, self.steps, self.present), labels)

    def evaluated_on(self, part: str) -> PerceptronCapacity:
        """The same: there is one set for all."""
        return copy(self)

    def size(self, batch: Cases) -> int:
        """The number of strings."""
        return int(batch.targets.shape[0])

    def loss(self, outputs: Tensor, batch: Cases) -> Tensor:
        """The mean cross-entropy in nats of outputs (T, B, 1), logits, behind the warm-up.

        Raises:
            ValueError: outputs of another shape.
        """
        expected = (self.steps, batch.targets.shape[0], 1)
        if tuple(outputs.shape) != expected:
            raise ValueError(f"outputs have shape {tuple(outputs.shape)}; per_cap takes (T, B, O) = {expected}")
        logits = outputs[self.warm_up :].squeeze(2)
        return F.binary_cross_entropy_with_logits(logits, batch.targets.expand_as(logits))

    def _right(self, outputs: Tensor, batch: Cases) -> Tensor:
        """Which labels are answered at the last step; never where an output is NaN."""
        last = outputs[-1].squeeze(1)
        return torch.where(batch.targets > 0.5, last > 0, last <= 0)

    def identity(self) -> dict[str, int | float | str]:
        """The set and how it is shown."""
        return {
            **super().identity(),
            "name": self.name,
            "V": self.V,
            "steps": self.steps,
            "warm_up": self.warm_up,
            "present": self.present,
        }

    def __repr__(self) -> str:
        return f"per_cap(samples={self.samples}, inputs={self.V}, steps={self.steps}, batch_size={self.batch_size})"
