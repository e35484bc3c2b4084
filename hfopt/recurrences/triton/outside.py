"""What does not recur: a few large matrix products over all steps, by torch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

Maybe = Tensor | None
# Sequences (T, B, k), or a first state and the states after it, which are read one step late.
Rows = Tensor | tuple[Tensor, Tensor]


def _pieces(rows: Rows, steps: int) -> Iterator[tuple[int, int, Tensor]]:
    """(start, stop, rows (stop - start, B, k)) of as few ranges of steps as need no copy."""
    if isinstance(rows, Tensor):
        yield 0, steps, rows
        return
    first, states = rows
    yield 0, 1, first.unsqueeze(0)
    if steps > 1:
        yield 1, steps, states[: steps - 1]


def projected(base: Maybe, *terms: tuple[Rows, Maybe], out: Tensor) -> Tensor:
    """The sum of base and of rows @ weight over the terms, in `out` (T, *N, B, m); a None is zero.

    Either of rows (T, *N, B, k) and weight (*N, k, m) may carry N vectors.
    """
    if base is None:
        fresh = True
    else:
        if base is not out:
            out.copy_(base)
        fresh = False
    for rows, weight in terms:
        if weight is None or weight.shape[-2] == 0:
            continue
        for start, stop, x in _pieces(rows, len(out)):
            block = out[start:stop]
            if weight.dim() == 2:
                left, flat = x.reshape(-1, x.shape[-1]), block.view(-1, out.shape[-1])
                if fresh:
                    torch.mm(left, weight, out=flat)
                else:
                    flat.addmm_(left, weight)
            else:
                for n, w in enumerate(weight.unbind()):
                    moved = x @ w
                    if fresh:
                        block[:, n].copy_(moved)
                    else:
                        block[:, n].add_(moved)
        fresh = False
    return out.zero_() if fresh else out


def correlated(values: Tensor, *rows: Rows) -> Tensor:
    """(*N, k, m): under each other, for each of rows (T, B, k), the sum over steps and sequences of rows' values.

    values (T, *N, B, m).
    """
    width = values.shape[-1]
    sizes = [(x if isinstance(x, Tensor) else x[0]).shape[-1] for x in rows]
    total = values.new_empty(*values.shape[1:-2], sum(sizes), width)
    for one, value in [(total, values)] if values.dim() == 3 else zip(total.unbind(), values.unbind(1), strict=True):
        below = 0
        for x, size in zip(rows, sizes, strict=True):
            part = one[below : below + size]
            for start, stop, piece in _pieces(x, len(values)) if size else ():
                left, right = piece.reshape(-1, size).t(), value[start:stop].reshape(-1, width)
                if start == 0:
                    torch.mm(left, right, out=part)
                else:
                    part.addmm_(left, right)
            below += size
    return total


def start_of(like: Tensor, first: Maybe) -> Tensor:
    """The state before the first step, (N B, h) or (B, h), for sequences like (T, *N, B, h); None is zero."""
    units = like.shape[-1]
    if first is None:
        return like.new_zeros(like[0].numel() // units, units)
    return first.reshape(-1, units).contiguous()
