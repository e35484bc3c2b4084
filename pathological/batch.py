"""A minibatch of sequences, padded to one length."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """``B`` sequences of at most ``T`` steps, time first.

    Attributes:
        inputs: ``(T, B, V)``; zero after a sequence's end.
        targets: ``(T, B, O)`` real numbers or ``(T, B)`` class indices; meaningful where ``mask`` is True.
        mask: ``(T, B)`` bool; True at the steps that are scored.
        lengths: ``(B,)`` int64; the steps of each sequence, so that ``t >= lengths[b]`` is padding.
        scored: ``(N,)`` int64; where the scored steps lie in ``x.flatten(0, 1)``, in order of time.
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
    def valid(self) -> Tensor:
        """``(T, B)`` bool; True at the steps before a sequence's end."""
        steps = torch.arange(self.inputs.shape[0], device=self.lengths.device)
        return steps.unsqueeze(1) < self.lengths

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(x.nbytes for x in (self.inputs, self.targets, self.mask, self.lengths, self.scored))

    def select(self, x: Tensor) -> Tensor:
        """The scored steps of ``x (T, B, ...)`` as ``(N, ...)``; differentiable, in order of time.

        Raises:
            ValueError: the first two dimensions of ``x`` are not those of ``mask``.
        """
        if x.shape[:2] != self.mask.shape:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, but the batch has (T, B) = {tuple(self.mask.shape)}; "
                "give one value per time step and sequence, time first"
            )
        flat = x.flatten(0, 1)
        # An index is faster to differentiate than a mask, and its shape does not depend on data.
        return flat if self.scored.numel() == flat.shape[0] else flat.index_select(0, self.scored)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Batch:
        """This batch on another device, its real numbers in another dtype."""
        targets = self.targets.to(device=device)
        return Batch(
            inputs=self.inputs.to(device=device, dtype=dtype),
            targets=targets.to(dtype=dtype) if targets.is_floating_point() else targets,
            mask=self.mask.to(device=device),
            lengths=self.lengths.to(device=device),
        )
