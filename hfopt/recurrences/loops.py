"""The loops over time of the simple recurrence, on plain tensors: forward, tangent and adjoint.

h_t = f(a_t), a_t = p_t + h_{t-1} W, t = 0..T-1, h_{-1} = h0.

Written for speed on small matrices: a step is one call of BLAS and one pointwise pass, on buffers made once and split
into steps once. What does not recur (H dW in the tangent, H' dA in the adjoint) is done for blocks of steps: all steps
at once on an accelerator; on a CPU as many as stay in cache, since one product over a long sequence would go through
memory again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hfopt.recurrences.nonlinearities import Nonlinearity

_BLOCK_BYTES = 1 << 19


def blocks(H: Tensor) -> list[tuple[int, int]]:
    """Ranges [start, stop) of steps of H (T, B, h) whose non-recurrent products are one; step 0 is alone."""
    steps = H.shape[0]
    length = steps
    if H.device.type == "cpu":
        length = max(1, _BLOCK_BYTES // (H[0].numel() * H.element_size()))
    return [(0, 1), *((start, min(start + length, steps)) for start in range(1, steps, length))]


def forward(P: Tensor, W: Tensor, h0: Tensor, f: Nonlinearity) -> Tensor:
    """H (T, B, h) from projected inputs P (T, B, h), W (h, h), h0 (B, h)."""
    H = torch.empty_like(P, memory_format=torch.contiguous_format)
    previous = h0
    for p, h in zip(P.unbind(), H.unbind(), strict=True):
        torch.addmm(p, previous, W, out=h)
        f.apply_(h)
        previous = h
    return H


def tangent(
    dP: Tensor | None,
    dW: Tensor | None,
    dh0: Tensor | None,
    H: Tensor,
    h0: Tensor,
    W: Tensor,
    f: Nonlinearity,
    preactivations: bool,
) -> tuple[Tensor, Tensor | None]:
    """R_h (T, *K, B, h), and R_a if asked: R_a,t = dp_t + h_{t-1} dW + R_h,{t-1} W, R_h,t = f'(a_t) R_a,t.

    dP (T, *K, B, h), dW (h, h), dh0 (*K, B, h) may each be None (zero). K is nothing, or the number of tangents that
    are carried together, without dW then.
    """
    H = H.contiguous()
    steps, batch, hidden = H.shape
    vectors = () if dP is None else dP.shape[1:-2]
    shape = (steps, *vectors, batch, hidden)
    R = H.new_empty(shape)
    Ra = H.new_empty(shape) if preactivations else R
    # Pointwise passes see (*K, B, h), so that one h_t serves all tangents; matrix products see (K B, h).
    r_rows, r_all = _steps(R)
    a_rows, a_all = _steps(Ra) if preactivations else (r_rows, r_all)
    h_all = H.unbind()
    recurrent = None if dh0 is None else dh0.reshape(-1, hidden)
    for start, stop in blocks(H):
        block = Ra[start:stop].view(-1, hidden)
        if dW is not None:
            lagged = h0 if start == 0 else H[start - 1 : stop - 1].view(-1, hidden)
            if dP is None:
                torch.mm(lagged, dW, out=block)
            else:
                torch.addmm(dP[start:stop].reshape(-1, hidden), lagged, dW, out=block)
        elif dP is not None:
            Ra[start:stop].copy_(dP[start:stop])
        else:
            block.zero_()
        for t in range(start, stop):
            if recurrent is not None:
                a_rows[t].addmm_(recurrent, W)
            f.scale(a_all[t], h_all[t], r_all[t])
            recurrent = r_rows[t]
    return R, Ra if preactivations else None


def adjoint(
    U: Tensor | None, Ua: Tensor | None, H: Tensor, h0: Tensor, W: Tensor, f: Nonlinearity
) -> tuple[Tensor, Tensor, Tensor]:
    """Adjoint dA (T, *K, B, h) of the pre-activations, with dW (*K, h, h) and dh0 (*K, B, h).

    dA_t = f'(a_t) (u_t + dA_{t+1} W') + ua_t, dW = sum_t h_{t-1}' dA_t, dh0 = dA_0 W'; U, Ua (T, *K, B, h) are
    cotangents of H and of the pre-activations, one of which may be None (zero).
    """
    given = Ua if U is None else U
    assert given is not None
    H = H.contiguous()
    hidden = W.shape[0]
    steps, *vectors = given.shape[:-2]
    dA = torch.empty_like(given, memory_format=torch.contiguous_format)
    dW = W.new_zeros(*vectors, hidden, hidden)
    Wt = W.t()
    rows, a_all = _steps(dA)
    us = None if U is None else U.reshape(steps, -1, hidden).unbind()
    uas = None if Ua is None else Ua.unbind()
    h_all = H.unbind()
    following: Tensor | None = None
    for start, stop in reversed(blocks(H)):
        for t in range(stop - 1, start - 1, -1):
            row, a = rows[t], a_all[t]
            if following is None:
                if us is None:
                    row.zero_()
                else:
                    row.copy_(us[t])
            elif us is None:
                torch.mm(following, Wt, out=row)
            else:
                torch.addmm(us[t], following, Wt, out=row)
            f.scale(a, h_all[t], a)
            if uas is not None:
                a.add_(uas[t])
            following = row
        lagged = h0 if start == 0 else H[start - 1 : stop - 1].view(-1, hidden)
        if vectors:
            for k, gradient in enumerate(dW.unbind()):
                gradient.addmm_(lagged.t(), dA[start:stop, k].reshape(-1, hidden))
        else:
            dW.addmm_(lagged.t(), dA[start:stop].view(-1, hidden))
    assert following is not None
    return dA, dW, torch.mm(following, Wt).view(given.shape[1:])


def _steps(X: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The steps of X (T, *K, B, h), as matrices (K B, h) and as they are."""
    if X.dim() == 3:
        steps = X.unbind()
        return steps, steps
    return X.flatten(1, 2).unbind(), X.unbind()
