"""The loops over time of the simple recurrence, on plain tensors: forward, tangent and adjoint.

h_t = f(a_t), a_t = p_t + z_t K, z_t = [h_{t-1}, x_t], t = 0..T-1, h_{-1} = h0; K (h + V, h) holds the recurrent weights
W = K[:h] on top of the input weights. The inputs x may have no columns (V = 0), p may be missing.

Written for speed on small matrices: a step is one call of BLAS and one pointwise pass, on buffers made once and split
into steps once. What does not recur (z dK in the tangent, z' dA in the adjoint, x K) is done for blocks of steps: all
steps at once on an accelerator; on a CPU as many as stay in cache, since one product over a long sequence would go
through memory again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hfopt.recurrences.nonlinearities import Nonlinearity

_BLOCK_BYTES = 1 << 20


def blocks(H: Tensor) -> list[tuple[int, int]]:
    """Ranges [start, stop) of steps of H (T, ..., h) whose non-recurrent products are one; step 0 is alone."""
    steps = H.shape[0]
    length = steps
    if H.device.type == "cpu":
        length = max(1, _BLOCK_BYTES // (H[0].numel() * H.element_size()))
    return [(0, 1), *((start, min(start + length, steps)) for start in range(1, steps, length))]


def forward(P: Tensor | None, X: Tensor, K: Tensor, h0: Tensor, f: Nonlinearity) -> Tensor:
    """H (T, B, h) from P (T, B, h), which may be None (zero), X (T, B, V), K (h + V, h), h0 (B, h)."""
    hidden = K.shape[1]
    W, Wx = K[:hidden], K[hidden:]
    H = K.new_empty(*X.shape[:2], hidden)
    states = H.unbind()
    inputs = None if P is None else P.unbind()
    inside = inputs is None or len(Wx) > 0
    X = X.contiguous()
    recurrent = h0
    for start, stop in blocks(H):
        if inside:
            block = H[start:stop].view(-1, hidden)
            x = X[start:stop].flatten(0, 1)
            if P is None:
                torch.mm(x, Wx, out=block)
            else:
                torch.addmm(P[start:stop].reshape(-1, hidden), x, Wx, out=block)
        for t in range(start, stop):
            if inside or inputs is None:
                states[t].addmm_(recurrent, W)
            else:
                torch.addmm(inputs[t], recurrent, W, out=states[t])
            f.apply_(states[t])
            recurrent = states[t]
    return H


def tangent(
    dP: Tensor | None,
    dK: Tensor | None,
    dh0: Tensor | None,
    X: Tensor,
    H: Tensor,
    h0: Tensor,
    K: Tensor,
    f: Nonlinearity,
    preactivations: bool,
) -> tuple[Tensor, Tensor | None]:
    """R_h (T, *N, B, h), and R_a if asked: R_a,t = dp_t + z_t dK + R_h,{t-1} W, R_h,t = f'(a_t) R_a,t.

    dP (T, *N, B, h), dK (h + V, h), dh0 (*N, B, h) may each be None (zero). N is nothing, or the number of tangents
    that are carried together, without dK then.
    """
    steps, batch, hidden = H.shape
    H, X, W = H.contiguous(), X.contiguous(), K[:hidden]
    vectors = () if dP is None else dP.shape[1:-2]
    shape = (steps, *vectors, batch, hidden)
    R = H.new_empty(shape)
    Ra = H.new_empty(shape) if preactivations else R
    # Pointwise passes see (*N, B, h), so that one h_t serves all tangents; matrix products see (N B, h).
    r_rows, r_all = _steps(R)
    a_rows, a_all = _steps(Ra) if preactivations else (r_rows, r_all)
    h_all = H.unbind()
    recurrent = None if dh0 is None else dh0.reshape(-1, hidden)
    for start, stop in blocks(R):
        block = Ra[start:stop].view(-1, hidden)
        if dK is not None:
            lagged = h0 if start == 0 else H[start - 1 : stop - 1].view(-1, hidden)
            if dP is None:
                torch.mm(lagged, dK[:hidden], out=block)
            else:
                torch.addmm(dP[start:stop].reshape(-1, hidden), lagged, dK[:hidden], out=block)
            if X.shape[2]:
                block.addmm_(X[start:stop].view(-1, X.shape[2]), dK[hidden:])
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
    U: Tensor | None,
    Ua: Tensor | None,
    X: Tensor,
    H: Tensor,
    h0: Tensor,
    K: Tensor,
    f: Nonlinearity,
    inputs: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Adjoint dA (T, *N, B, h) of the pre-activations if `inputs`, dK (*N, h + V, h) and dh0 (*N, B, h).

    dA_t = f'(a_t) (u_t + dA_{t+1} W') + ua_t, dK = sum_t z_t' dA_t, dh0 = dA_0 W'; U, Ua (T, *N, B, h) are cotangents
    of H and of the pre-activations, one of which may be None (zero). Without `inputs`, dA lives in two blocks only.
    """
    given = Ua if U is None else U
    assert given is not None
    hidden = K.shape[1]
    # BLAS is a third slower on small matrices when one of them is a transposed view.
    H, X, Wt = H.contiguous(), X.contiguous(), K[:hidden].t().contiguous()
    steps, *vectors = given.shape[:-2]
    dA = given.new_empty(given.shape) if inputs else None
    dK = K.new_zeros(*vectors, *K.shape)
    us = None if U is None else U.reshape(steps, -1, hidden).unbind()
    uas = None if Ua is None else Ua.unbind()
    h_all = H.unbind()
    ranges = blocks(given)
    longest = max(stop - start for start, stop in ranges)
    spare = [] if inputs else [_with_steps(given.new_empty(longest, *given.shape[1:])) for _ in range(2)]
    following: Tensor | None = None
    for start, stop in reversed(ranges):
        if dA is not None:
            block, rows, all_ = _with_steps(dA[start:stop])
        else:
            block, rows, all_ = spare[0]
            spare.reverse()
        for t in range(stop - 1, start - 1, -1):
            row, a = rows[t - start], all_[t - start]
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
        x = X[start:stop].flatten(0, 1)
        for k in range(vectors[0]) if vectors else (None,):
            whole = block[: stop - start] if k is None else block[: stop - start, k]
            sums = dK if k is None else dK[k]
            sums[:hidden].addmm_(lagged.t(), whole.reshape(-1, hidden))
            if X.shape[2]:
                sums[hidden:].addmm_(x.t(), whole.reshape(-1, hidden))
    assert following is not None
    return dA, dK, torch.mm(following, Wt).view(given.shape[1:])


def _steps(X: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The steps of X (T, *N, B, h), as matrices (N B, h) and as they are."""
    if X.dim() == 3:
        steps = X.unbind()
        return steps, steps
    return X.flatten(1, 2).unbind(), X.unbind()


def _with_steps(X: Tensor) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    return X, *_steps(X)
