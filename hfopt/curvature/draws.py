"""Random targets by the places of cases: the same for one batch or several, in one process or many.

Every criterion has a stream of random numbers of its own, from which its cases take theirs one after the other. Where a
closure calls ``backward()`` for several batches, each goes on where the last one stopped; and where processes have
equal shares of the cases, each begins where the process before it ends.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hfopt.losses import OutputCurvature

# Of one batch: (number of the output, the curvature to draw from) for every criterion; None: there is no distribution.
Forms = list[tuple[int, OutputCurvature]]

# A generator of the CPU is seeded by 32 bits. Odd multiples of a stream's number differ in them, and are far from the
# seeds of the steps around.
_SEEDS = 1 << 32
_APART = 0x7F4A7C15, 0x1CE4E5B9


def draw(
    batches: Sequence[Forms | None],
    outputs: Sequence[Sequence[Tensor]],
    batch_dim: int,
    seed: int,
    number: int = 0,
    rank: int = 0,
) -> list[list[tuple[int, Tensor]] | None]:
    """For every batch, (number of the output, a random g with ``E[g g'] = H``) for every criterion.

    Args:
        batches: what to draw from.
        outputs: of every batch, for their shapes.
        batch_dim: the dimension along which cases stand, of the outputs that have it.
        seed: of all streams.
        number: of the draw, among several with one seed.
        rank: how many processes with as many cases come before this one.
    """
    streams: dict[int, torch.Generator] = {}

    def stream(criterion: int, device: torch.device) -> torch.Generator:
        if criterion not in streams:
            own = (seed + criterion * _APART[0] + number * _APART[1]) % _SEEDS
            streams[criterion] = torch.Generator(device=device).manual_seed(own)
        return streams[criterion]

    found: list[list[tuple[int, Tensor]] | None] = []
    for _ in range(rank + 1):  # the draws of the processes before are made and let go
        found = [
            None
            if forms is None
            else [
                (i, form.sample(stream(n, zs[i].device), case_dim(zs[i], batch_dim)))
                for n, (i, form) in enumerate(forms)
            ]
            for forms, zs in zip(batches, outputs, strict=True)
        ]
    return found


def case_dim(z: Tensor, batch_dim: int) -> int:
    """The dimension of an output along which cases stand: the first where there is no ``batch_dim``."""
    return batch_dim % z.dim() if -z.dim() <= batch_dim < z.dim() else 0
