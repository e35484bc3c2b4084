"""What the tasks of capacity share: draws by part, and which steps of a network they judge."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from hfopt.experiment.data import Minibatches, integer
from pathological.stream import Stream

PARTS = ("valid", "test")
T = TypeVar("T", bound="Task")


@dataclass(frozen=True, eq=False)
class Cases:
    """B sequences, time first, and their targets.

    Attributes:
        inputs: (T, B, V).
        targets: as the task's loss takes them.
    """

    inputs: Tensor
    targets: Tensor


class Task(Minibatches[Any]):
    """A task as a data object. A subclass says in `_sequences` what a minibatch is, and defines a loss and an error.

    Training minibatches are new ones after every `forget`. Test minibatches are other draws, which stay the same: those
    of the part "valid" tell which settings are best, those of the part "test" (the source's "eval") what they are
    worth.

    Args:
        batch_size: B, sequences in a minibatch.
        train_batches, test_batches: the numbers of minibatches.
        evaluate_on: the part of the test minibatches, "valid" or "test".
        seed: of all draws.
        device: where minibatches lie; they are drawn on the CPU.
        dtype: of inputs and of targets that are real numbers.
        memory: bytes that the kept minibatches may take in all.

    Attributes:
        name: of the task, as published.
        output: whether the network is judged at its "last" step or at several ("all"): the `output` of a model.
        V, O: numbers of inputs and outputs.
        steps: T, of a sequence.

    Raises:
        ValueError: an argument is out of its range.
    """

    name: ClassVar[str]
    output: ClassVar[str] = "last"
    V: int
    O: int
    steps: int

    def __init__(
        self,
        *,
        batch_size: int = 100,
        train_batches: int = 1,
        test_batches: int = 10,
        evaluate_on: str = "valid",
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        memory: int = 1 << 30,
    ) -> None:
        if not dtype.is_floating_point:
            raise ValueError(f"dtype is {dtype}; choose a floating-point type such as torch.float32")
        super().__init__(train_batches, test_batches, seed=seed, memory=memory)
        self.batch_size = integer("batch_size", batch_size, 1)
        self.evaluate_on = _part(evaluate_on)
        self.device, self.dtype = torch.device(device), dtype

    @abstractmethod
    def _sequences(self, stream: Stream) -> Any:
        """A minibatch from the numbers of a stream, on the CPU."""

    @abstractmethod
    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """The mean loss, a scalar, of outputs before the output nonlinearity."""

    def draw(self, i: int, epoch: int) -> Any:
        """Minibatch `i` from a stream of its own."""
        return self._moved(self._sequences(Stream(self.seed, "train" if i >= 0 else self.evaluate_on, epoch, i)))

    def _moved(self, batch: Any) -> Any:
        return Cases(batch.inputs.to(self.device, self.dtype), self._numbers(batch.targets))

    def _numbers(self, targets: Tensor) -> Tensor:
        return targets.to(self.device, self.dtype if targets.is_floating_point() else None)

    def evaluated_on(self: T, part: str) -> T:
        """The same task with test minibatches of another part, "valid" or "test"."""
        other = self._copy()
        other.evaluate_on = _part(part)
        other.train_mem, other.test_mem = {}, {}
        return other

    def _copy(self: T) -> T:
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def size(self, batch: Any) -> int:
        """The number of sequences, which the loss is the mean over."""
        return int(batch.targets.shape[0])

    def identity(self) -> dict[str, int | float | str]:
        """Name, sizes and part."""
        return {
            "name": self.name,
            "V": self.V,
            "O": self.O,
            "steps": self.steps,
            "batch_size": self.batch_size,
            "evaluate_on": self.evaluate_on,
        }

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={v!r}' for k, v in self.identity().items() if k != 'name')})"

    def _check(self, outputs: Tensor, expected: tuple[int, ...]) -> None:
        if tuple(outputs.shape) != expected:
            names = "(B, O)" if self.output == "last" else "(T, B, O)"
            raise ValueError(f"outputs have shape {tuple(outputs.shape)}; {self.name} takes {names} = {expected}")


def _part(part: str) -> str:
    if part not in PARTS:
        raise ValueError(f"evaluate_on is {part!r}; choose 'valid' or 'test'")
    return part
