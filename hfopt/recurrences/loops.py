"""The loops over time of the simple recurrence, on plain tensors: forward, tangent and adjoint.

h_t = f(a_t), a_t = p_t + h_{t-1} W, t = 0..T-1, h_{-1} = h0.

Written for speed on small matrices: a step is one or two calls of BLAS and one pointwise pass, on buffers made once.
What does not recur (H dW in the tangent, H' dA in the adjoint) runs over blocks of steps: all steps at once on an
accelerator; on a CPU as many as stay in cache, where one product over a long sequence would go through memory again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hfopt.recurrences.nonlinearities import Nonlinearity

_BLOCK_BYTES = 1 << 19


def forward(P: Tensor, W: Tensor, h0: Tensor, f: Nonlinearity) -> Tensor:
    """H (T, B, h) from projected inputs P (T, B, h), W (h, h), h0 (B, h)."""
    H = torch.empty_like(P, memory_format=torch.contiguous_format)
    previous = h0
    for p, h in zip(P.unbind(), H.unbind(), strict=True):
        torch.addmm(p, previous, W, out=h)
        f.apply_(h)
        previous = h
    return H


def blocks(H: Tensor) -> list[tuple[int, int]]:
    """Ranges [start, stop) of steps of H (T, B, h) whose non-recurrent products are done together; step 0 is alone."""
    steps = H.shape[0]
    length = steps
    if H.device.type == "cpu":
        length = max(1, _BLOCK_BYTES // (H[0].numel() * H.element_size()))
    return [(0, 1), *((start, min(start + length, steps)) for start in range(1, steps, length))]


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

    dP (T, *K, B, h), dW (h, h), dh0 (*K, B, h), each may be None (zero); K is nothing, or a number of tangents carried
    together, and dW is None then.
    """
    steps, batch, hidden = H.shape
    vectors = () if dP is None else dP.shape[1:-2]
    shape = (steps, *vectors, batch, hidden)
    R = H.new_empty(shape)
    Ra = H.new_empty(shape) if preactivations else R
    recurrent = None if dh0 is None else dh0.reshape(-1, hidden)
    hs = H.unbind()
    for start, stop in blocks(H):
        block = Ra[start:stop].flatten(0, -2)
        if dW is not None:
            lagged = h0 if start == 0 else H[start - 1 : stop - 1].flatten(0, 1)
            if dP is None:
                torch.mm(lagged, dW, out=block)
            else:
                torch.addmm(dP[start:stop].flatten(0, -2), lagged, dW, out=block)
        elif dP is not None:
            block.copy_(dP[start:stop].flatten(0, -2))
        else:
            block.zero_()
        for t in range(start, stop):
            a, r = Ra[t], R[t]
            if recurrent is not None:
                a.view(-1, hidden).addmm_(recurrent, W)
            f.scale(a, hs[t], r)
            recurrent = r.view(-1, hidden)
    return R, Ra if preactivations else None


def adjoint(
    U: Tensor | None, Ua: Tensor | None, H: Tensor, h0: Tensor, W: Tensor, f: Nonlinearity
) -> tuple[Tensor, Tensor, Tensor]:
    """dA (T, *K, B, h), dW (*K, h, h), dh0 (*K, B, h): dA_t = f'(a_t) (u_t + dA_{t+1} W') + ua_t, dW = sum_t h_{t-1}' dA_t,
    dh0 = dA_0 W'.

    U, Ua (T, *K, B, h) are cotangents of H and of the pre-activations; one of them may be None (zero).
    """
    given = Ua if U is None else U
    assert given is not None
    hidden = W.shape[0]
    vectors = given.shape[1:-2]
    dA = torch.empty_like(given, memory_format=torch.contiguous_format)
    dW = W.new_zeros(*vectors, hidden, hidden)
    Wt = W.t()
    hs, us, uas = H.unbind(), None if U is None else U.unbind(), None if Ua is None else Ua.unbind()
    following: Tensor | None = None
    for start, stop in reversed(blocks(H)):
        for t in range(stop - 1, start - 1, -1):
            a = dA[t]
            rows = a.view(-1, hidden)
            if following is None:
                if us is None:
                    a.zero_()
                else:
                    f.scale(us[t], hs[t], a)
            else:
                if us is None:
                    torch.mm(following, Wt, out=rows)
                else:
                    torch.addmm(us[t].reshape(-1, hidden), following, Wt, out=rows)
                f.scale(a, hs[t], a)
            if uas is not None:
                a.add_(uas[t])
            following = rows
        lagged = h0 if start == 0 else H[start - 1 : stop - 1].flatten(0, 1)
        if vectors:
            for k, gradient in enumerate(dW.unbind()):
                gradient.addmm_(lagged.t(), dA[start:stop, k].flatten(0, 1))
        else:
            dW.addmm_(lagged.t(), dA[start:stop].flatten(0, 1))
    assert following is not None
    return dA, dW, torch.mm(following, Wt).view(given.shape[1:])
