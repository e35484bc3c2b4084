"""The LSTM's passes on CUDA: what does not recur by torch, the rest by the kernels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hfopt.recurrences.registry import Maybes, Passes, Tensors, batch_of_vectors, with_vectors
from hfopt.recurrences.triton import lstm_kernels, tiles
from hfopt.recurrences.triton.outside import correlated, projected, start_of


class _LSTM:
    """`hfopt.recurrences.lstm.LSTMCell`'s passes, of the same arguments and results."""

    def forward(self, arguments: Tensors) -> list[Tensor]:
        """(H, C, gates, Y)."""
        X, K, h0, c0 = arguments
        tiles.check(X=X, K=K, h0=h0, c0=c0)
        (steps, batch, _), hidden = X.shape, h0.shape[1]
        G = X.new_empty(steps, batch, 4 * hidden)
        H, C, Y = (X.new_empty(steps, batch, hidden) for _ in range(3))
        projected(None, (X, K[hidden:]), out=G)
        M, first, memory = K[:hidden].contiguous(), h0.contiguous(), c0.contiguous()
        plan = tiles.plan(H, batch, hidden, 4)

        def call(t: int, number: int) -> None:
            before = (H[t - 1], C[t - 1]) if t else (first, memory)
            tiles.launch(
                lstm_kernels.forward_kernel, plan.grid(batch, hidden), H,
                G[t], M, *before, H[t], C[t], G[t], Y[t], number, batch, batch * hidden,
                UNITS=hidden, **plan.settings(),
            )  # fmt: skip

        tiles.run(steps, plan.form, call)
        return [H, C, G, Y]

    def tangent(self, tangents: Maybes, arguments: Tensors, results: Tensors) -> list[Tensor]:
        """(R_h, R_c), each (T, *N, B, h), of (dX, dK, dh0, dc0)."""
        dX, dK, dh0, dc0 = tangents
        X, K, h0, c0 = arguments
        tiles.check(X=X, K=K, h0=h0, c0=c0, dX=dX, dK=dK, dh0=dh0, dc0=dc0)
        H, C, G, Y = (x.contiguous() for x in results)
        (steps, batch, hidden), vectors = H.shape, batch_of_vectors(tangents, arguments)
        R, Rc = (H.new_empty(with_vectors(H.shape, vectors)) for _ in range(2))
        Q = None
        if dX is not None or dK is not None:
            dW, dWx = (None, None) if dK is None else (dK[..., :hidden, :], dK[..., hidden:, :])
            Q = H.new_empty(*R.shape[:-1], 4 * hidden)
            projected(None, ((h0, H), dW), (X, dWx), *(() if dX is None else ((dX, K[hidden:]),)), out=Q)
        M, first, memory, c_first = K[:hidden].contiguous(), start_of(R, dh0), start_of(R, dc0), c0.contiguous()
        count = len(first)
        plan = tiles.plan(H, count, hidden, 4)

        def call(t: int, number: int) -> None:
            before = (R[t - 1], Rc[t - 1], C[t - 1]) if t else (first, memory, c_first)
            tiles.launch(
                lstm_kernels.tangent_kernel, plan.grid(count, hidden), H,
                R[t] if Q is None else Q[t], M, *before[:2], R[t], Rc[t], before[2], C[t], G[t], Y[t],
                number, count, batch, count * hidden, batch * hidden,
                HAS_Q=Q is not None, UNITS=hidden, **plan.settings(),
            )  # fmt: skip

        tiles.run(steps, plan.form, call)
        return [R, Rc]

    def adjoint(self, cotangents: Maybes, arguments: Tensors, results: Tensors, needed: Sequence[bool]) -> list[Tensor]:
        """(dX, dK, dh0, dc0) of (U, U_c), each (T, *N, B, h)."""
        X, K, h0, c0 = arguments
        tiles.check(X=X, K=K, h0=h0, c0=c0, U=cotangents[0], Uc=cotangents[1])
        H, C, G, Y = (x.contiguous() for x in results)
        U, Uc = (None if x is None else x.contiguous() for x in cotangents)
        (steps, batch, hidden), vectors = H.shape, batch_of_vectors(cotangents, (H, C))
        D = H.new_empty(with_vectors(G.shape, vectors))
        M, c_first = K[:hidden].t().contiguous(), c0.contiguous()
        count = D[0].numel() // (4 * hidden)
        last, carry = D.new_zeros(count, 4 * hidden), D.new_zeros(count, hidden)
        plan = tiles.plan(H, count, hidden, 4)

        def call(done: int, number: int) -> None:
            t = steps - 1 - done
            u, uc = (D if x is None else x[t] for x in (U, Uc))
            # C_{t-1} of the first and of the last step of this call.
            c, c_last = (C[k - 1] if k else c_first for k in (t, t - number + 1))
            tiles.launch(
                lstm_kernels.adjoint_kernel, plan.grid(count, hidden), H,
                u, uc, M, D[t + 1] if done else last, carry, D[t], c_last, c, G[t], Y[t],
                number, count, batch, count * hidden, batch * hidden,
                HAS_U=U is not None, HAS_UC=Uc is not None, UNITS=hidden, **plan.settings(),
            )  # fmt: skip

        tiles.run(steps, plan.form, call)
        none = H.new_empty(0)
        return [
            D @ K[hidden:].t() if needed[0] else none,
            correlated(D, (h0, H), X) if needed[1] else none,
            D[0] @ M if needed[2] else none,
            carry.view(D[0, ..., :hidden].shape) if needed[3] else none,
        ]


def cell(name: str) -> Passes:
    """The passes; there is one LSTM."""
    del name
    return _LSTM()
