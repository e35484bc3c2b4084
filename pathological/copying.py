"""The copy problem and the adding problem with the conventions of the work on unitary and orthogonal networks."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hfopt.experiment.data import integer
from hfopt.experiment.metrics import Metric
from pathological.answers import ClassAnswer, RealAnswer
from pathological.batch import Batch
from pathological.stream import Stream


class Copying(ClassAnswer):
    """The copy problem: read c symbols, wait, and repeat them when the marker comes.

    Symbols 1 to `labels` are data, 0 is the blank, `labels` + 1 the marker; T + 2 c steps. The target is the blank at
    T + c steps and then the c symbols. All steps are scored; a sequence is wrong where one of its last c answers is.
    Without memory, the best loss is ``c ln(labels) / (T + 2 c)``.

    Forms: "nnrnn", c symbols, T - 1 blanks, the marker, c blanks; "tcn", the marker at each of the last c + 1 steps;
    "exprnn", T blanks, the marker, c - 1 blanks, so that the first answer is due at the marker.

    Args:
        T: the length of the wait.
        c_length: c.
        labels: the number of data symbols.
        one_hot: whether inputs are vectors of `labels` + 2 numbers, or the number of the symbol itself.
        variable: whether the wait of each sequence is drawn, uniformly from 1 to T.
        form: see above.
        options: the other arguments of :class:`pathological.problem.Problem`.

    Raises:
        ValueError: an argument is out of its range.

    Source: Hochreiter & Schmidhuber 1997; Arjovsky, Shah & Bengio, ICML 2016; forms of Kerg, Goyette et al. (NeurIPS
    2019), Bai, Kolter & Koltun (arXiv:1803.01271) and Lezcano-Casado & Martinez-Rubio (ICML 2019).
    """

    name = "copy"
    shortest: ClassVar = {"nnrnn": 1, "tcn": 1, "exprnn": 1}

    def __init__(
        self,
        T: int,
        *,
        c_length: int = 10,
        labels: int = 8,
        one_hot: bool = False,
        variable: bool = False,
        form: str = "nnrnn",
        **options: Any,
    ) -> None:
        self.c_length, self.labels = integer("c_length", c_length, 1), integer("labels", labels, 2)
        self.one_hot, self.variable = bool(one_hot), bool(variable)
        super().__init__(T, form=form, **options)
        self.metrics = [Metric("accuracy", self._accuracy, unit="%", better="higher")]

    def _sizes(self) -> tuple[int, int]:
        return self.labels + 2 if self.one_hot else 1, self.labels + 1

    @property
    def steps(self) -> int:
        return self.T + 2 * self.c_length

    @property
    def baseline(self) -> float:
        """The loss without memory, in nats per step; for sequences of the full length."""
        return self.c_length * math.log(self.labels) / self.steps

    def _draw(self, stream: Stream) -> Batch:
        c, B, steps = self.c_length, self.batch_size, self.steps
        waits = stream.integers(1, self.T, B) if self.variable else np.full(B, self.T)
        symbols = stream.integers(1, self.labels, c, B)
        lengths = waits + 2 * c
        inputs, targets = np.zeros((steps, B), np.int64), np.zeros((steps, B), np.int64)
        inputs[:c] = symbols
        all_sequences, last = np.arange(B), lengths - c + np.arange(c)[:, None]
        marker = lengths - c if self.form == "exprnn" else lengths - c - 1
        inputs[marker, all_sequences] = self.labels + 1
        if self.form == "tcn":
            inputs[last, all_sequences] = self.labels + 1
        targets[last, all_sequences] = symbols
        ends = torch.from_numpy(lengths).to(self.device)
        valid = torch.arange(steps, device=self.device).unsqueeze(1) < ends
        numbers = torch.from_numpy(inputs).to(self.device)
        return Batch(
            inputs=self._one_hot(numbers, valid) if self.one_hot else numbers.unsqueeze(2).to(self.dtype),
            targets=torch.from_numpy(targets).to(self.device),
            mask=valid,
            lengths=ends,
        )

    def _answers(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Which of the last c answers are right, ``(c, B)``; none where an output is NaN."""
        c, B = self.c_length, len(batch.lengths)
        steps = batch.lengths - c + torch.arange(c, device=outputs.device).unsqueeze(1)
        sequences = torch.arange(B, device=outputs.device)
        found = outputs[steps, sequences]
        right: Tensor = (found.argmax(2) == batch.targets[steps, sequences]) & ~found.isnan().any(2)
        return right

    def wrong(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Which sequences have a wrong answer among their last c, ``(B,)`` bool."""
        self._scored(outputs, batch)
        return ~self._answers(outputs, batch).all(0)

    def _accuracy(self, outputs: Tensor, batch: Batch) -> Tensor:
        return self._answers(outputs, batch).flatten().double()

    def identity(self) -> dict[str, int | float | str]:
        """That of every problem, and the variant."""
        variant = {"c_length": self.c_length, "labels": self.labels}
        return {**super().identity(), **variant, "one_hot": int(self.one_hot), "variable": int(self.variable)}


class AddingProblem(RealAnswer):
    """The adding problem: the sum of two marked numbers, one in each half of the sequence, is due at its end.

    Inputs (value, marker), T steps. The loss is the squared error, not half of it; with values from [0, 1] it is 1/6
    for the best constant, and 2 with values of variance 1.

    Args:
        T: the number of steps.
        values: "uniform", from [0, 1]; or "normal", of mean 0 and standard deviation 1.
        options: the other arguments of :class:`pathological.problem.Problem`.

    Raises:
        ValueError: an argument is out of its range.

    Source: Hochreiter & Schmidhuber 1997; conventions of the program released with Kerg, Goyette et al. (NeurIPS 2019).
    """

    name = "adding"
    shortest: ClassVar = {"nnrnn": 2}

    def __init__(self, T: int, *, values: str = "uniform", form: str = "nnrnn", **options: Any) -> None:
        if values not in ("uniform", "normal"):
            raise ValueError(f"values is {values!r}; choose 'uniform' or 'normal'")
        self.values = values
        super().__init__(T, form=form, **options)

    def _sizes(self) -> tuple[int, int]:
        return 2, 1

    @property
    def steps(self) -> int:
        return self.T

    @property
    def baseline(self) -> float:
        """The loss of the best constant answer."""
        return 1 / 6 if self.values == "uniform" else 2.0

    def _draw(self, stream: Stream) -> Batch:
        T, B = self.T, self.batch_size
        first, second = stream.integers(0, T // 2 - 1, B), stream.integers(T // 2, T - 1, B)
        u = stream.uniform(T, B)
        if self.values == "normal":  # by Box and Muller
            u = np.sqrt(-2 * np.log1p(-u)) * np.cos(2 * np.pi * stream.uniform(T, B))
        sequences, marker = np.arange(B), np.zeros((T, B))
        marker[first, sequences] = marker[second, sequences] = 1
        targets = np.zeros((T, B, 1))
        targets[-1, :, 0] = u[first, sequences] + u[second, sequences]
        mask = torch.zeros(T, B, dtype=torch.bool, device=self.device)
        mask[-1] = True
        return Batch(
            inputs=torch.from_numpy(np.stack((u, marker), 2)).to(self.device, self.dtype),
            targets=torch.from_numpy(targets).to(self.device, self.dtype),
            mask=mask,
            lengths=torch.full((B,), T, dtype=torch.int64, device=self.device),
        )

    def _criterion(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(outputs, targets)

    def identity(self) -> dict[str, int | float | str]:
        """That of every problem, and the kind of values."""
        return {**super().identity(), "values": self.values}
