"""Products of whole blocks of steps, and what else the passes in torch's operations share."""

from __future__ import annotations

import torch
from torch import Tensor

Maybe = Tensor | None


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


def steps_of(X: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The steps of a contiguous X (n, *N, B, m): as matrices (N B, m) for products, and as they are."""
    if X.dim() == 3:
        steps = X.unbind()
        return steps, steps
    return X.flatten(1, 2).unbind(), X.unbind()


def in_gates(X: Tensor, count: int) -> Tensor:
    """X (..., count h) as (..., count, h)."""
    return X.view(*X.shape[:-1], count, -1)


def pull_(u: Maybe, following: Maybe, Wt: Tensor, out: Tensor) -> None:
    """Fill out (N B, h) with u + following W'; a None is zero."""
    if following is None:
        if u is None:
            out.zero_()
        else:
            out.copy_(u)
    elif u is None:
        torch.mm(following, Wt, out=out)
    else:
        torch.addmm(u, following, Wt, out=out)
