"""The MRNN's passes on CUDA: what does not recur by torch, the rest by the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hfopt.recurrences.registry import Maybes, Passes, Tensors, batch_of_vectors, with_vectors
from hfopt.recurrences.triton import mrnn_kernels, tiles
from hfopt.recurrences.triton.outside import correlated, projected, start_of


class _MRNN:
    """`hfopt.recurrences.mrnn.MRNNCell`'s passes, of the same arguments and results."""

    def __init__(self, nonlinearity: str, preactivations: bool) -> None:
        self.nonlinearity, self.preactivations = nonlinearity, preactivations

    def forward(self, arguments: Tensors) -> list[Tensor]:
        """(H, E, G) or (H, A, E, G)."""
        X, Wxf, Whf, K, h0 = arguments
        tiles.check(X=X, W_xf=Wxf, W_hf=Whf, K=K, h0=h0)
        (steps, batch, _), (hidden, factors) = X.shape, Whf.shape
        E, G = (X.new_empty(steps, batch, factors) for _ in range(2))
        H = X.new_empty(steps, batch, hidden)
        A = X.new_empty(steps, batch, hidden) if self.preactivations else H
        projected(None, (X, Wxf), out=E)
        projected(None, (X, K[factors:]), out=A)
        M1, M2 = Whf.contiguous(), K[:factors].contiguous()
        first, between = h0.contiguous(), E.new_empty(batch, factors)

        def pointers(t: int, _: int) -> tuple[Tensor, ...]:
            before = H[t - 1] if t else first
            return E[t], E[t], A[t], H[t], M1, M2, before, G[t], between, A[t], H[t]

        self._launch(
            mrnn_kernels.onward_kernel, pointers, H, batch, factors,
            FORWARD=True, HAS_P=False, HAS_Q=True, KEEP_A=self.preactivations,
        )  # fmt: skip
        return [H, A, E, G] if self.preactivations else [H, E, G]

    def tangent(self, tangents: Maybes, arguments: Tensors, results: Tensors) -> list[Tensor]:
        """(R_h,) or (R_h, R_a), each (T, *N, B, h), of (dX, dW_xf, dW_hf, dK, dh0)."""
        dX, dWxf, dWhf, dK, dh0 = tangents
        X, Wxf, Whf, K, h0 = arguments
        tiles.check(X=X, W_xf=Wxf, W_hf=Whf, K=K, h0=h0, dX=dX, dW_xf=dWxf, dW_hf=dWhf, dK=dK, dh0=dh0)
        H, E, G = (x.contiguous() for x in (results[0], *results[-2:]))
        factors, vectors = E.shape[2], batch_of_vectors(tangents, arguments)
        R = H.new_empty(with_vectors(H.shape, vectors))
        Ra = R.new_empty(R.shape) if self.preactivations else R
        e, g = (x.unsqueeze(1) if vectors else x for x in (E, G))
        # p = e (h_{t-1} dW_hf) + g (x dW_xf + dx W_xf), q = [e g, x] dK + dx K_x.
        P = Q = None
        if dWhf is not None:
            P = projected(None, ((h0, H), dWhf), out=E.new_empty(with_vectors(E.shape, vectors))).mul_(e)
        if dWxf is not None or dX is not None:
            moved = E.new_empty(with_vectors(E.shape, vectors))
            projected(None, (X, dWxf), *(() if dX is None else ((dX, Wxf),)), out=moved)
            P = moved.mul_(g) if P is None else P.addcmul_(g, moved)
        if dK is not None or dX is not None:
            Q = Ra
            terms = () if dK is None else ((E * G, dK[..., :factors, :]), (X, dK[..., factors:, :]))
            projected(None, *terms, *(() if dX is None else ((dX, K[factors:]),)), out=Q)
        M1, M2, first = Whf.contiguous(), K[:factors].contiguous(), start_of(R, dh0)
        between = E.new_empty(len(first), factors)

        def pointers(t: int, _: int) -> tuple[Tensor, ...]:
            p, q = (R[t] if x is None else x[t] for x in (P, Q))
            return E[t], p, q, H[t], M1, M2, R[t - 1] if t else first, E[t], between, Ra[t], R[t]

        self._launch(
            mrnn_kernels.onward_kernel, pointers, R, H.shape[1], factors,
            FORWARD=False, HAS_P=P is not None, HAS_Q=Q is not None, KEEP_A=self.preactivations,
        )  # fmt: skip
        return [R, Ra] if self.preactivations else [R]

    def adjoint(self, cotangents: Maybes, arguments: Tensors, results: Tensors, needed: Sequence[bool]) -> list[Tensor]:
        """(dX, dW_xf, dW_hf, dK, dh0) of (U,) or (U, U_a), each (T, *N, B, h)."""
        X, Wxf, Whf, K, h0 = arguments
        U, Ua = (None if x is None else x.contiguous() for x in (*cotangents, None)[:2])
        tiles.check(X=X, W_xf=Wxf, W_hf=Whf, K=K, h0=h0, U=U, Ua=Ua)
        H, E, G = (x.contiguous() for x in (results[0], *results[-2:]))
        factors, vectors = E.shape[2], batch_of_vectors(cotangents, results[: len(cotangents)])
        D = H.new_empty(with_vectors(H.shape, vectors))
        Dg, De = (E.new_empty(with_vectors(E.shape, vectors)) for _ in range(2))
        M1, M2 = Whf.t().contiguous(), K[:factors].t().contiguous()
        last, steps = Dg.new_zeros(Dg[0].numel() // factors, factors), len(H)

        def pointers(done: int, _: int) -> tuple[Tensor, ...]:
            t = steps - 1 - done
            u, ua = (D[t] if x is None else x[t] for x in (U, Ua))
            return u, ua, H[t], E[t], G[t], M1, M2, Dg[t + 1] if done else last, D[t], Dg[t], De[t]

        self._launch(
            mrnn_kernels.adjoint_kernel, pointers, D, H.shape[1], factors,
            HAS_U=U is not None, HAS_UA=Ua is not None,
        )  # fmt: skip
        none = H.new_empty(0)
        return [
            D @ K[factors:].t() + De @ Wxf.t() if needed[0] else none,
            correlated(De, X) if needed[1] else none,
            correlated(Dg, (h0, H)) if needed[2] else none,
            correlated(D, E * G, X) if needed[3] else none,
            Dg[0] @ M1 if needed[4] else none,
        ]

    def _launch(self, kernel: Any, pointers: Any, like: Tensor, batch: int, factors: int, **flags: bool) -> None:
        """Run a kernel over all steps of sequences like (T, *N, B, h)."""
        hidden = like.shape[-1]
        count, widest = like[0].numel() // hidden, max(hidden, factors)
        plan = tiles.plan(like, count, widest, 2)

        def call(done: int, number: int) -> None:
            for phase in (1, 2) if plan.form == "stepwise" else (0,):
                tiles.launch(
                    kernel, plan.grid(count, widest), like, *pointers(done, number), number, count, batch,
                    count * hidden, count * factors, batch * hidden, batch * factors,
                    F=self.nonlinearity, PHASE=phase, UNITS=hidden, FACTORS=factors, **flags, **plan.settings(),
                )  # fmt: skip

        tiles.run(len(like), plan.form, call)


def cell(name: str) -> Passes:
    """The passes of "mrnn_tanh", "mrnn_relu" or "mrnn_sigmoid", with "+a" also of the pre-activations."""
    return _MRNN(name.removeprefix("mrnn_").removesuffix("+a"), name.endswith("+a"))
