"""Products of whole blocks of steps, and what else the passes in torch's operations share.

What does not recur is worked out for blocks of steps: all steps at once on an accelerator; on a CPU as many as stay in
the cache, since one product over a long sequence would go through memory again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Maybe = Tensor | None

_BLOCK_BYTES = 1 << 20


def blocks(H: Tensor) -> list[tuple[int, int]]:
    """Ranges [start, stop) of steps of H (T, ..., h) whose non-recurrent products are one; step 0 is alone."""
    steps = H.shape[0]
    length = steps
    if H.device.type == "cpu":
        length = max(1, _BLOCK_BYTES // (H[0].numel() * H.element_size()))
    return [(0, 1), *((start, min(start + length, steps)) for start in range(1, steps, length))]


def plus(*terms: Maybe) -> Maybe:
    """The sum of those terms that are there; None if none is."""
    given = [term for term in terms if term is not None]
    return sum(given[1:], start=given[0]) if given else None


def lag(H: Tensor, first: Tensor) -> Tensor:
    """H_{t-1} for t = 0..T-1, with H_{-1} = first: (T, *N, B, h)."""
    return torch.cat((first.unsqueeze(0), H[:-1]))


def lagged(H: Tensor, first: Tensor, start: int, stop: int) -> Tensor:
    """H_{t-1} for t = start..stop-1, with H_{-1} = first (*N, B, h); a range that begins with step 0 ends there."""
    return first.unsqueeze(0) if start == 0 else H[start - 1 : stop - 1]


def project_(out: Tensor, *pairs: tuple[Maybe, Maybe]) -> Tensor:
    """Fill out (n, *N, B, m) with the sum of rows @ weight over the pairs; a pair with a None is zero.

    Either of rows (n, *N, B, k) and weight (*N, k, m) carries the vectors, the other has no N.
    """
    if out.numel() == 0:
        return out
    empty = True
    for rows, weight in pairs:
        if rows is None or weight is None or weight.shape[-2] == 0:
            continue
        if weight.dim() == 2:
            flat, left = out.view(-1, out.shape[-1]), rows.reshape(-1, rows.shape[-1])
            if empty:
                torch.mm(left, weight, out=flat)
            else:
                flat.addmm_(left, weight)
        elif empty:
            torch.matmul(rows.unsqueeze(1), weight, out=out)
        else:
            out.add_(rows.unsqueeze(1) @ weight)
        empty = False
    return out.zero_() if empty else out


def correlate_(total: Tensor, rows: Tensor, values: Tensor) -> None:
    """Add to total (*N, k, m) the sum over all steps of rows' values: rows (n, B, k), values (n, *N, B, m)."""
    if rows.shape[-1] == 0:
        return
    left = rows.reshape(-1, rows.shape[-1]).t()
    if total.dim() == 2:
        total.addmm_(left, values.reshape(-1, values.shape[-1]))
        return
    for one, value in zip(total.unbind(), values.unbind(1), strict=True):
        one.addmm_(left, value.reshape(-1, value.shape[-1]))


def projected(arguments: Sequence[Tensor]) -> list[Tensor]:
    """The same arguments with the projections of the inputs in their place."""
    X, Kx, *others = arguments
    return [X @ Kx if Kx.shape[0] else X, Kx[:0], *others]


def correlate(X: Tensor, Y: Tensor) -> Tensor:
    """The sum over t of X_t' Y_t: (m, n) from X (T, B, m), Y (T, B, n)."""
    return X.flatten(0, 1).t() @ Y.flatten(0, 1)
