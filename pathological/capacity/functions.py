"""Random continuous functions: a fixed set of random vectors, each with a random number to learn."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from hfopt.experiment.data import integer
from pathological.capacity.task import Cases, Task
from pathological.stream import Stream

Floats = npt.NDArray[np.float32]


class RandomContinuousFunction(Task):
    """`rcf`: a network that sees one of N fixed unit vectors answers with that vector's number, drawn from N(0, 1).

    The loss is sum_i beta_i (yhat_i - y_i)^2 with beta_i proportional to 1 / (i + tau), i = 1..N. Minibatches take the
    vectors with the probabilities beta_i, so that their mean squared error estimates it without bias. N is so large
    that the parameters are what limits the network. The set is the same for training and test.

    Args:
        samples: N.
        inputs: V, entries of a vector.
        steps: T, after which the network answers.
        tau: of the weights.
        present: whether the vector is seen at "every" step or at the "first" alone, which the source leaves open.
        options: those of :class:`Task`.

    Source: Collins, Sohl-Dickstein & Sussillo, ICLR 2017, appendix B.
    """

    name = "rcf"
    error_name = "squared error"

    def __init__(
        self,
        samples: int = 1_000_000,
        inputs: int = 50,
        steps: int = 50,
        tau: float = 5000.0,
        present: str = "every",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.samples, self.V, self.O = integer("samples", samples, 1), integer("inputs", inputs, 1), 1
        self.steps, self.tau, self.present = integer("steps", steps, 1), tau, shown(present)
        if not tau > -1:
            raise ValueError(f"tau is {tau}; 1 + tau is above 0")

    @cached_property
    def _function(self) -> tuple[Floats, Floats, npt.NDArray[np.float64]]:
        """Vectors, numbers, and sums of the weights up to each, made at the first use: 200 MB for the published N."""
        stream = Stream(self.seed, "function", 0, 0)
        vectors = stream.normal(self.samples, self.V)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        beta = 1 / (np.arange(1, self.samples + 1) + self.tau)
        return vectors, stream.normal(self.samples), np.cumsum(beta / beta.sum())

    def _sequences(self, stream: Stream) -> Cases:
        vectors, numbers, sums = self._function
        drawn = np.minimum(np.searchsorted(sums, stream.uniform(self.batch_size), side="right"), self.samples - 1)
        inputs = repeated(torch.from_numpy(vectors[drawn]).to(self.dtype), self.steps, self.present)
        return Cases(inputs, torch.from_numpy(numbers[drawn, None]))

    def loss(self, outputs: Tensor, batch: Cases) -> Tensor:
        """The mean squared error of outputs (B, 1)."""
        self._check(outputs, tuple(batch.targets.shape))
        return F.mse_loss(outputs, batch.targets)

    def errors(self, outputs: Tensor, batch: Cases) -> Tensor:
        """The squared error of each sequence."""
        return (outputs - batch.targets).square().squeeze(1)

    def identity(self) -> dict[str, int | float | str]:
        """See :meth:`Task.identity`; and the function."""
        return {**super().identity(), "samples": self.samples, "tau": self.tau, "present": self.present}


def shown(present: str) -> str:
    """The name of a way to show a constant input.

    Raises:
        ValueError: an unknown one.
    """
    if present not in ("first", "every"):
        raise ValueError(f"present is {present!r}; choose 'first' or 'every'")
    return present


def repeated(vectors: Tensor, steps: int, present: str) -> Tensor:
    """Inputs (T, B, V) of vectors (B, V): the same at every step, without taking more room, or at the first alone."""
    if present == "every":
        return vectors.expand(steps, *vectors.shape)
    inputs = vectors.new_zeros(steps, *vectors.shape)
    inputs[0] = vectors
    return inputs
