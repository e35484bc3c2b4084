"""Random targets by the places of cases: the same for one batch or several, in one process or many.

One stream of random numbers goes through the criteria in the order of their calls, and the cases of each: a loss
written with a criterion for every batch draws what one criterion of them all does. Where processes have equal shares of
the cases, those of a criterion stand one process after the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hfopt.losses import OutputCurvature

# Of one batch: (number of the output, the curvature to draw from) for every criterion; None: there is no distribution.
Forms = list[tuple[int, OutputCurvature]]

# A generator of the CPU is seeded by 32 bits. Odd multiples of a draw's number differ in them, and are far from the
# seeds of the steps around.
_SEEDS = 1 << 32
_APART = 0x7F4A7C15


def draw(
    batches: Sequence[Forms | None],
    outputs: Sequence[Sequence[Tensor]],
    batch_dim: int,
    seed: int,
    number: int = 0,
    rank: int = 0,
    size: int = 1,
) -> list[list[tuple[int, Tensor]] | None]:
    """For every batch, (number of the output, a random g with ``E[g g'] = H``) for every criterion.

    Args:
        batches: what to draw from.
        outputs: of every batch, for their shapes.
        batch_dim: the dimension along which cases stand, of the outputs that have it.
        seed: of the stream.
        number: of the draw, among several with one seed.
        rank, size: of this process, among others with as many cases.
    """
    streams: dict[torch.device, torch.Generator] = {}

    def sampled(form: OutputCurvature, z: Tensor) -> Tensor:
        if z.device not in streams:
            own = (seed + number * _APART) % _SEEDS
            streams[z.device] = torch.Generator(device=z.device).manual_seed(own)
        # Those of the other processes are made and let go.
        return [form.sample(streams[z.device], case_dim(z, batch_dim)) for _ in range(size)][rank]

    return [
        None if forms is None else [(i, sampled(form, zs[i])) for i, form in forms]
        for forms, zs in zip(batches, outputs, strict=True)
    ]


def case_dim(z: Tensor, batch_dim: int) -> int:
    """The dimension of an output along which cases stand: the first where there is no ``batch_dim``."""
    return batch_dim % z.dim() if -z.dim() <= batch_dim < z.dim() else 0
