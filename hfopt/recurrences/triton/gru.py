"""The GRU's passes on CUDA: what does not recur by torch, the rest by the kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hfopt.recurrences.registry import Maybes, Passes, Tensors, batch_of_vectors, with_vectors
from hfopt.recurrences.triton import gru_kernels, tiles
from hfopt.recurrences.triton.outside import correlated, projected, start_of


class _GRU:
    """`hfopt.recurrences.gru.GRUCell`'s passes, of the same arguments and results."""

    def forward(self, arguments: Tensors) -> list[Tensor]:
        """(H, gates, M)."""
        X, Kh, Kx, b, h0 = arguments
        tiles.check(X=X, K_h=Kh, K_x=Kx, b_n=b, h0=h0)
        (steps, batch, _), hidden = X.shape, h0.shape[1]
        G = X.new_empty(steps, batch, 3 * hidden)
        H, N = (X.new_empty(steps, batch, hidden) for _ in range(2))
        projected(None, (X, Kx), out=G)
        M, bias, first = Kh.contiguous(), b.contiguous(), h0.contiguous()
        plan = tiles.plan(H, batch, hidden, 3)

        def call(t: int, number: int) -> None:
            tiles.launch(
                gru_kernels.forward_kernel, plan.grid(batch, hidden), H,
                G[t], M, bias, H[t - 1] if t else first, H[t], G[t], N[t], number, batch, batch * hidden,
                UNITS=hidden, **plan.settings(),
            )  # fmt: skip

        tiles.run(steps, plan.form, call)
        return [H, G, N]

    def tangent(self, tangents: Maybes, arguments: Tensors, results: Tensors) -> list[Tensor]:
        """(R_h,), (T, *N, B, h), of (dX, dK_h, dK_x, db_n, dh0)."""
        dX, dKh, dKx, db, dh0 = tangents
        X, Kh, Kx, b, h0 = arguments
        tiles.check(X=X, K_h=Kh, K_x=Kx, b_n=b, h0=h0, dX=dX, dK_h=dKh, dK_x=dKx, db_n=db, dh0=dh0)
        H, G, N = (x.contiguous() for x in results)
        (steps, batch, hidden), vectors = H.shape, batch_of_vectors(tangents, arguments)
        R = H.new_empty(with_vectors(H.shape, vectors))
        Q = None
        if not (dX is None and dKh is None and dKx is None and db is None):
            Q = H.new_empty(*R.shape[:-1], 3 * hidden)
            projected(None, ((h0, H), dKh), out=Q)
            inner = Q[..., 2 * hidden :]
            if db is not None:
                inner.add_(db.unsqueeze(-2))
            r = G[..., :hidden]
            # The n block's share of h meets r before that of x joins it.
            inner.mul_(r.unsqueeze(1) if vectors else r)
            projected(Q, (X, dKx), *(() if dX is None else ((dX, Kx),)), out=Q)
        M, first, h_first = Kh.contiguous(), start_of(R, dh0), h0.contiguous()
        count = len(first)
        plan = tiles.plan(H, count, hidden, 3)

        def call(t: int, number: int) -> None:
            before = (R[t - 1], H[t - 1]) if t else (first, h_first)
            tiles.launch(
                gru_kernels.tangent_kernel, plan.grid(count, hidden), H,
                R[t] if Q is None else Q[t], M, before[0], R[t], before[1], H[t], G[t], N[t],
                number, count, batch, count * hidden, batch * hidden,
                HAS_Q=Q is not None, UNITS=hidden, **plan.settings(),
            )  # fmt: skip

        tiles.run(steps, plan.form, call)
        return [R]

    def adjoint(self, cotangents: Maybes, arguments: Tensors, results: Tensors, needed: Sequence[bool]) -> list[Tensor]:
        """(dX, dK_h, dK_x, db_n, dh0) of (U,), (T, *N, B, h)."""
        (given,) = cotangents
        assert given is not None
        X, Kh, Kx, b, h0 = arguments
        tiles.check(X=X, K_h=Kh, K_x=Kx, b_n=b, h0=h0, U=given)
        H, G, N = (x.contiguous() for x in results)
        U = given.contiguous()
        (steps, batch, hidden), vectors = H.shape, batch_of_vectors(cotangents, (H,))
        D = H.new_empty(*U.shape[:-1], 4 * hidden)
        Kr, Kz, Kn = Kh.t().chunk(3)
        M, h_first = torch.cat((Kn, Kr, Kz)), h0.contiguous()
        count = U[0].numel() // hidden
        last, carry = D.new_zeros(count, 4 * hidden), D.new_zeros(count, hidden)
        plan = tiles.plan(H, count, hidden, 3)

        def call(done: int, number: int) -> None:
            t = steps - 1 - done
            # H_{t-1} of the first and of the last step of this call.
            h, h_last = (H[k - 1] if k else h_first for k in (t, t - number + 1))
            tiles.launch(
                gru_kernels.adjoint_kernel, plan.grid(count, hidden), H,
                U[t], M, D[t + 1] if done else last, carry, D[t], h_last, h, G[t], N[t],
                number, count, batch, count * hidden, batch * hidden,
                UNITS=hidden, **plan.settings(),
            )  # fmt: skip

        tiles.run(steps, plan.form, call)
        none = H.new_empty(0)
        to_state, to_input = D[..., : 3 * hidden], D[..., hidden:]
        dh0 = (to_state[0] @ M).view(*vectors, *h0.shape).add_(carry.view(*vectors, *h0.shape)) if needed[4] else none
        return [
            to_input @ Kx.t() if needed[0] else none,
            # From the order n, r, z to r, z, n.
            correlated(to_state, (h0, H)).roll(-hidden, -1) if needed[1] else none,
            correlated(to_input, X) if needed[2] else none,
            D[..., :hidden].sum((0, -2)) if needed[3] else none,
            dh0,
        ]


def cell(name: str) -> Passes:
    """The passes; there is one GRU."""
    del name
    return _GRU()
