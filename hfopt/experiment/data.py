"""Data objects: what an experiment asks of one, and ready-made bases that have all of it but the data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from hfopt.experiment.metrics import Metric

B = TypeVar("B")


class Batch(Protocol):
    """What the default `forward` looks at: `inputs`, of whatever shape the model takes."""

    @property
    def inputs(self) -> Tensor: ...


class Data(Protocol):
    """A data object: batches by index, drawn again after `forget()`, and their loss.

    `size(batch)` is the number of scored outputs, which `loss` is the mean over. `state_dict` holds what the next
    draws depend on.
    """

    @property
    def train_batches(self) -> Sequence[int]: ...
    @property
    def test_batches(self) -> Sequence[int]: ...
    def __call__(self, index: int, /) -> Any: ...
    def size(self, batch: Any, /) -> int: ...
    def forget(self) -> None: ...
    def loss(self, outputs: Tensor, batch: Any, /) -> Tensor: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any], /) -> None: ...


class Counted(Data, Protocol):
    """A data object whose answers are right or wrong: `zero_one_loss` is the number of wrong cases.

    There are `size(batch)` cases in a batch; if not every scored output is a case of its own, a method `cases(batch)`
    says how many there are. `zero_one_loss` may also return which cases are wrong, `(N,)`.
    """

    def zero_one_loss(self, outputs: Tensor, batch: Any, /) -> Tensor: ...


class Measured(Data, Protocol):
    """A data object whose answers are more or less wrong: `errors (N,)` of the cases, and what they are called."""

    @property
    def error_name(self) -> str: ...
    def errors(self, outputs: Tensor, batch: Any, /) -> Tensor: ...


class Judged(Data, Protocol):
    """A data object with metrics of its own, the first of which judges a run unless errors are counted or measured."""

    @property
    def metrics(self) -> Sequence[Metric]: ...


Problem = Counted | Measured | Judged

_NEEDED = {
    "train_batches": "the indices of the training batches",
    "test_batches": "the indices of the test batches",
    "__call__": "the batch of an index, problem(i)",
    "size": "size(batch): how many scored outputs its loss is the mean over",
    "forget": "forget(): the next use of a training batch draws a new one",
    "loss": "loss(outputs, batch): the mean loss, a scalar tensor",
    "state_dict": "state_dict(): what the next draws depend on; {} if nothing",
    "load_state_dict": "load_state_dict(state): go on from there",
}


def check_data(problem: Any) -> None:
    """Check that a data object has all that an experiment asks of it.

    Raises:
        TypeError: members are missing; all of them are named.
        ValueError: there is no training or no test batch.
    """
    missing = [
        f"{name} ({what})"
        for name, what in _NEEDED.items()
        if not (callable(problem) if name == "__call__" else hasattr(problem, name))
    ]
    if not any(hasattr(problem, name) for name in ("zero_one_loss", "errors", "metrics")):
        missing.append("zero_one_loss (zero_one_loss(outputs, batch): the number of wrong cases), errors or metrics")
    if hasattr(problem, "errors") and not hasattr(problem, "error_name"):
        missing.append("error_name (what errors(outputs, batch) measures)")
    if missing:
        raise TypeError(
            f"the data object, a {type(problem).__name__}, lacks {'; '.join(missing)}. "
            "hfopt.experiment.data.Minibatches and Samples have most of these ready-made"
        )
    for name in ("train_batches", "test_batches"):
        if not len(getattr(problem, name)):
            raise ValueError(f"{name} of the data object, a {type(problem).__name__}, is empty; give at least one")


class Minibatches(ABC, Generic[B]):
    """The base of a data object: minibatches by index, kept until they are forgotten, and a state to go on from.

    Training minibatches have the indices ``0 .. train_batches - 1``, test minibatches ``-1, -2, ..``. ``problem(i)``
    draws a minibatch on first use and keeps it; ``forget`` drops the training draws, so that the next use draws new
    ones, while test draws stay. A subclass defines :meth:`draw`, `size`, `loss` and `zero_one_loss` (or `errors` and
    `error_name`, or `metrics`), and says in :meth:`identity` what tells it from others.

    Args:
        train_batches, test_batches: the numbers of minibatches.
        seed: a non-negative integer that draws may depend on.
        memory: bytes that the kept minibatches may take in all; one that finds no room is drawn again at each use.

    Attributes:
        train_batches: the indices for training, as a range.
        test_batches: the indices for tests, as a range.
        train_mem: the training minibatches kept so far, by index.
        test_mem: the test minibatches kept so far, by index.
        epoch: the number of calls of `forget`.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(self, train_batches: int, test_batches: int, *, seed: int = 0, memory: int = 2 << 30) -> None:
        self.train_batches = range(integer("train_batches", train_batches, 1))
        self.test_batches = range(-1, -1 - integer("test_batches", test_batches, 1), -1)
        self.seed = integer("seed", seed, 0)
        self._memory = integer("memory", memory, 0)
        self.train_mem: dict[int, B] = {}
        self.test_mem: dict[int, B] = {}
        self._epoch = 0

    @property
    def epoch(self) -> int:
        """The number of calls of `forget`, which training draws depend on."""
        return self._epoch

    @abstractmethod
    def draw(self, i: int, epoch: int) -> B:
        """A new minibatch: a function of `i`, the epoch (0 for test minibatches) and `seed` alone."""

    def __call__(self, i: int) -> B:
        """Minibatch ``i``: training for ``i >= 0``, test for ``i < 0``.

        Raises:
            IndexError: there is no such minibatch.
        """
        if i in self.train_batches:
            memory, epoch = self.train_mem, self._epoch
        elif i in self.test_batches:
            memory, epoch = self.test_mem, 0
        else:
            raise IndexError(
                f"there is no minibatch {i}: training has 0 to {self.train_batches[-1]}, test -1 to "
                f"{self.test_batches[-1]}; {self._more_batches}"
            )
        if i in memory:
            return memory[i]
        batch = self.draw(i, epoch)
        kept = sum(map(nbytes, (*self.train_mem.values(), *self.test_mem.values())))
        if kept + nbytes(batch) <= self._memory:
            memory[i] = batch
        return batch

    _more_batches = "more come with train_batches= or test_batches="

    def keeps(self, i: int) -> bool:
        """Whether minibatch `i` is kept at the moment."""
        return i in self.train_mem or i in self.test_mem

    def forget(self) -> None:
        """Drop all training minibatches: the next use of each draws a new one. Test minibatches stay."""
        self.train_mem.clear()
        self._epoch += 1

    def identity(self) -> dict[str, int | float | str]:
        """What a state must have in common with the object that goes on from it, as plain numbers and strings."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """All that the next draws depend on, as plain numbers and strings."""
        return {**self.identity(), "seed": self.seed, "epoch": self._epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as the object whose :meth:`state_dict` this is; its minibatches are drawn again when used.

        What only one of the two knows is not compared: a later version may have more settings.

        Raises:
            ValueError: the state is that of other data, or of minibatches of another size.
        """
        for key, own in self.identity().items():
            if key in state and state[key] != own:
                raise ValueError(
                    f"the state has {key} = {state[key]!r}, but {type(self).__name__} has {own!r}; build the data "
                    "object with the arguments of the run that wrote the state"
                )
        self.seed = integer("seed", state.get("seed"), 0)
        self._epoch = integer("epoch", state.get("epoch"), 0)
        self.train_mem.clear()
        self.test_mem.clear()


class Shuffled(Minibatches[B]):
    """Minibatches of a finite set: all training cases in random order, in parts of (nearly) equal size.

    ``forget`` puts the cases in a new order. Test minibatches are the test cases in the order of the data. A
    subclass defines :meth:`take` in place of `draw`.

    Args:
        train, test: the numbers of cases, N and M.
        batch_size: cases in a minibatch at most; None: all training cases in one.
        seed: what the order of the training cases is drawn from.
        shuffle_every: calls of `forget` that make a new order: 1 for optimizers that take all minibatches at a step,
            None, the number of minibatches, for those that take one, so that they see every case before one comes
            again.
        memory: see :class:`Minibatches`.

    Raises:
        ValueError: an argument is out of its range.
    """

    _more_batches = "a smaller batch_size= makes more"

    def __init__(
        self,
        train: int,
        test: int,
        *,
        batch_size: int | None = None,
        seed: int = 0,
        shuffle_every: int | None = 1,
        memory: int = 2 << 30,
    ) -> None:
        self._count, self._test_count = integer("train", train, 1), integer("test", test, 1)
        self.batch_size = min(train, train if batch_size is None else integer("batch_size", batch_size, 1))
        parts = [-(-count // self.batch_size) for count in (train, test)]
        super().__init__(*parts, seed=seed, memory=memory)
        self.shuffle_every = parts[0] if shuffle_every is None else integer("shuffle_every", shuffle_every, 1)
        self._order: tuple[int, Tensor] | None = None  # of which pass, and the order

    @abstractmethod
    def take(self, role: str, cases: slice | Tensor) -> B:
        """A minibatch of the given cases; role "train" or "test"."""

    def draw(self, i: int, epoch: int) -> B:
        """Part `i` of the training cases in their present order, or part `-1 - i` of the test cases."""
        if i < 0:
            return self.take("test", _part(-1 - i, self._test_count, len(self.test_batches)))
        return self.take("train", self._present_order(epoch)[_part(i, self._count, len(self.train_batches))])

    def _present_order(self, epoch: int) -> Tensor:
        # A driver forgets before every step, the first one too.
        number = max(0, epoch - 1) // self.shuffle_every
        if self._order is None or self._order[0] != number:
            generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, number])))
            self._order = number, torch.from_numpy(generator.permutation(self._count))
        return self._order[1]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :meth:`Minibatches.load_state_dict`."""
        super().load_state_dict(state)
        self._order = None

    def identity(self) -> dict[str, int | float | str]:
        """The numbers of cases, the size of a minibatch and the pace of the orders."""
        return {
            "train_cases": self._count,
            "test_cases": self._test_count,
            "batch_size": self.batch_size,
            "shuffle_every": self.shuffle_every,
        }


class Pair(NamedTuple):
    """A minibatch of inputs and targets, N of each."""

    inputs: Any
    targets: Any


class Samples(Shuffled[Pair]):
    """Inputs and targets, from tensors or from torch datasets, with a criterion: a data object ready for use.

    ``Samples((x, y), (x_test, y_test), torch.nn.CrossEntropyLoss(), batch_size=500)``

    Args:
        train, test: pairs of tensors (inputs, targets), N cases along the first dimension; or map-style torch datasets
            whose items are such pairs.
        criterion: the mean loss of (outputs, targets).
        errors: the error of each case `(N,)`, a function of (outputs, targets). By default, where targets are class
            indices `(N,)`, the wrong ones are counted; other targets have the squared error, summed over the rest.
        error_name: what `errors` measures.
        metrics: further metrics.
        name: of the data, compared when a run is resumed.
        device: where minibatches lie.
        options: the others of :class:`Shuffled`: batch_size, seed, shuffle_every, memory.

    Raises:
        ValueError: inputs and targets differ in number, or an argument is out of its range.
    """

    def __init__(
        self,
        train: Any,
        test: Any,
        criterion: Callable[[Tensor, Any], Tensor],
        *,
        errors: Callable[[Tensor, Any], Tensor] | None = None,
        error_name: str | None = None,
        metrics: Iterable[Metric] = (),
        name: str = "samples",
        device: torch.device | str | None = None,
        **options: Any,
    ) -> None:
        self._data = {"train": _counted("train", train), "test": _counted("test", test)}
        super().__init__(len(self._data["train"]), len(self._data["test"]), **options)
        self.name, self.metrics = name, list(metrics)
        self._criterion, self._device = criterion, device
        if errors is None and self._has_classes():
            self.zero_one_loss = self._wrong
        else:
            given = self._squared if errors is None else errors
            self.errors = lambda outputs, batch: given(outputs, batch.targets)
            self.error_name = error_name or ("squared error" if errors is None else "error")

    def _has_classes(self) -> bool:
        """Whether targets are class indices."""
        target = self._data["train"][0][1]
        return isinstance(target, int) or (
            isinstance(target, Tensor) and target.dim() == 0 and not target.is_floating_point()
        )

    def take(self, role: str, cases: slice | Tensor) -> Pair:
        """The given inputs and targets, stacked."""
        data = self._data[role]
        if isinstance(data, _Tensors):
            pair = data.take(cases)
        else:
            order = range(len(data))[cases] if isinstance(cases, slice) else cases.tolist()
            inputs, targets = torch.utils.data.default_collate([data[k] for k in order])
            pair = Pair(inputs, targets)
        return pair if self._device is None else Pair(*(_moved(part, self._device) for part in pair))

    def size(self, batch: Pair) -> int:
        """The number of cases."""
        return len(batch.targets)

    def loss(self, outputs: Tensor, batch: Pair) -> Tensor:
        """The criterion's."""
        return self._criterion(outputs, batch.targets)

    @staticmethod
    def _wrong(outputs: Tensor, batch: Pair) -> Tensor:
        """Which cases have another class as their largest output, ``(N,)``; all where an output is NaN."""
        wrong: Tensor = (outputs.argmax(1) != batch.targets) | outputs.isnan().any(1)
        return wrong

    @staticmethod
    def _squared(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).double().square().flatten(1).sum(1).nan_to_num(nan=torch.inf)

    def identity(self) -> dict[str, int | float | str]:
        """See :meth:`Shuffled.identity`; and the name."""
        return {"name": self.name, **super().identity()}


class _Tensors:
    """Tensors of the same length as one sequence of pairs."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.pair = inputs, targets

    def __len__(self) -> int:
        return len(self.pair[0])

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor]:
        return self.pair[0][k], self.pair[1][k]

    def take(self, cases: slice | Tensor) -> Pair:
        return Pair(*(x[cases if isinstance(cases, slice) else cases.to(x.device)] for x in self.pair))


def _counted(role: str, data: Any) -> Any:
    """A dataset, or tensors as one; ValueError if it has no pairs."""
    tensors = getattr(data, "tensors", data)
    if isinstance(tensors, (tuple, list)) and all(isinstance(x, Tensor) for x in tensors):
        if len(tensors) != 2 or len(tensors[0]) != len(tensors[1]):
            shapes = [tuple(x.shape) for x in tensors]
            raise ValueError(f"{role} has tensors of shapes {shapes}; give a pair (inputs, targets), N of each")
        return _Tensors(*tensors)
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise ValueError(
            f"{role} is a {type(data).__name__}; give a pair of tensors or a map-style dataset, with len and items"
        )
    return data


def _moved(part: Any, device: torch.device | str) -> Any:
    return part.to(device) if hasattr(part, "to") else part


def _part(i: int, count: int, parts: int) -> slice:
    """Part `i` of `count` things in parts of nearly equal size."""
    return slice(i * count // parts, (i + 1) * count // parts)


def nbytes(batch: Any) -> int:
    """Bytes of a minibatch: its own `nbytes`, or those of the tensors in it."""
    own = getattr(batch, "nbytes", None)
    if isinstance(own, int):
        return own
    if isinstance(batch, Mapping):
        return sum(map(nbytes, batch.values()))
    if isinstance(batch, (tuple, list)):
        return sum(map(nbytes, batch))
    return sum(map(nbytes, vars(batch).values())) if hasattr(batch, "__dict__") else 0


def integer(name: str, value: object, least: int, why: str = "choose") -> int:
    """``value`` as an int not below ``least``, or a ValueError that names the argument."""
    try:
        number = int(value)  # type: ignore[call-overload]
        whole = not isinstance(value, bool | str) and number == value
    except (TypeError, ValueError, OverflowError):
        whole = False
    if not whole or number < least:
        raise ValueError(f"{name} is {value!r}; {why} an integer of at least {least}")
    return int(number)
