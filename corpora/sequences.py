"""A minibatch of sequences of different lengths, padded to one length, with the steps that are scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

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


def padded(arrays: Sequence[npt.NDArray[np.generic]], fill: int = 0) -> npt.NDArray[np.generic]:
    """Arrays `(T_b, ...)` that differ in their first dimension, as one `(T, B, ...)`, filled up after their ends."""
    longest = max(map(len, arrays))
    joined = np.full((longest, len(arrays), *arrays[0].shape[1:]), fill, dtype=arrays[0].dtype)
    for b, array in enumerate(arrays):
        joined[: len(array), b] = array
    return joined
