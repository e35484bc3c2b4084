"""Minibatches of sequences of different lengths, padded in groups of similar length, with the steps that are scored."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Sequences:
    """B sequences of at most T steps, time first.

    Attributes:
        inputs: `(T, B, V)` numbers or `(T, B)` indices; zero after a sequence's end.
        targets: `(T, B, O)` numbers or `(T, B)` class indices; meaningful where `mask` is True.
        mask: `(T, B)` bool, True at the steps that are scored.
        lengths: `(B,)` int64, the steps of each sequence.
        scored: `(N,)` int64, where the scored steps are in `x.flatten(0, 1)`.
    """

    inputs: Tensor
    targets: Tensor
    mask: Tensor
    lengths: Tensor
    scored: Tensor = field(init=False)

    def __post_init__(self) -> None:
        # Not on first use: that may be inside a function transform, whose tensors must not be kept.
        object.__setattr__(self, "scored", self.mask.flatten().nonzero().squeeze(1))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(x.nbytes for x in (self.inputs, self.targets, self.mask, self.lengths, self.scored))

    def select(self, x: Tensor) -> Tensor:
        """The scored steps of `x (T, B, ...)` as `(N, ...)`, in order of time; differentiable.

        Raises:
            ValueError: the first two dimensions of `x` are not those of `mask`.
        """
        if x.shape[:2] != self.mask.shape:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, but the batch has (T, B) = {tuple(self.mask.shape)}; "
                "give one value per time step and sequence, time first"
            )
        flat = x.flatten(0, 1)
        # An index is faster to differentiate than a mask, and its shape does not depend on data.
        return flat if self.scored.numel() == flat.shape[0] else flat.index_select(0, self.scored)

    def place(self, x: Tensor, fill: float = 0) -> Tensor:
        """Values `(N, ...)` of the scored steps as `(T, B, ...)`, with `fill` at the others."""
        flat = x.new_full((self.mask.numel(), *x.shape[1:]), fill)
        flat[self.scored] = x
        return flat.view(*self.mask.shape, *x.shape[1:])


@dataclass(frozen=True, eq=False)
class Groups:
    """A minibatch: groups of sequences of similar length, so that little of it is padding.

    Outputs of a minibatch are those of all scored steps `(N, O)`, group by group and in each in order of time.

    Attributes:
        groups: the groups.
        members: which of the sequences, in the order in which they were given, each group has.
    """

    groups: tuple[Sequences, ...]
    members: tuple[tuple[int, ...], ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(group.nbytes for group in self.groups)

    @property
    def size(self) -> int:
        """N, the number of scored steps."""
        return sum(group.scored.numel() for group in self.groups)

    @cached_property
    def targets(self) -> Tensor:
        """The targets of all scored steps `(N, ...)`."""
        return torch.cat([group.select(group.targets) for group in self.groups])

    def split(self, outputs: Tensor) -> tuple[Tensor, ...]:
        """Outputs `(N, ...)` group by group."""
        return torch.split(outputs, [group.scored.numel() for group in self.groups])

    def outputs(self, model: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The outputs `(N, O)` of a model that takes inputs `(T, B, ..)` and lengths `(B,)` and returns `(T, B, O)`."""
        return torch.cat([group.select(model(group.inputs, group.lengths)) for group in self.groups])


def by_length(lengths: Sequence[int], least: int = 24, most: int = 4) -> tuple[tuple[int, ...], ...]:
    """Sequences in groups of similar length, as equal in number as they can be.

    Args:
        lengths: of the sequences.
        least: sequences of a group at least, where there are as many: small groups make slow products.
        most: groups at most.
    """
    order = sorted(range(len(lengths)), key=lambda k: lengths[k])
    count = max(1, min(most, len(order) // least))
    bounds = [k * len(order) // count for k in range(count + 1)]
    return tuple(tuple(order[a:b]) for a, b in itertools.pairwise(bounds))


def padded(arrays: Sequence[npt.NDArray[np.generic]], fill: int = 0) -> npt.NDArray[np.generic]:
    """Arrays `(T_b, ...)` that differ in their first dimension, as one `(T, B, ...)`, filled up after their ends."""
    longest = max(map(len, arrays))
    joined = np.full((longest, len(arrays), *arrays[0].shape[1:]), fill, dtype=arrays[0].dtype)
    for b, array in enumerate(arrays):
        joined[: len(array), b] = array
    return joined
