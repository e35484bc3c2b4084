"""The simple RNN's passes as one kernel, with the signatures of `hfopt.recurrences.loops`.

    x_t = f(a_t) | f'(a_t) a_t | f'(a_t) a_t + ua_t,   a_t = q_t + x_{t-1} M      (forward | tangent | adjoint)

with q_t all that does not recur, and M = W, or W' with time reversed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hfopt.recurrences.nonlinearities import Nonlinearity
from hfopt.recurrences.triton import tiles
from hfopt.recurrences.triton.outside import correlated, projected
from hfopt.recurrences.triton.products import (
    apply,
    matrix,
    recur,
    rows,
    slope,
    step_end,
    store,
    wide,
)

Maybe = Tensor | None


@triton.jit(do_not_specialize=["steps"])
def kernel(
    Q: tl.tensor, H: tl.tensor, U: tl.tensor, M: tl.tensor, S: tl.tensor, A: tl.tensor, OUT: tl.tensor,
    steps: tl.tensor, count: tl.tensor, batch: tl.tensor, row_stride: tl.tensor, sequence_stride: tl.tensor,
    F: tl.constexpr, FORWARD: tl.constexpr, HAS_Q: tl.constexpr, HAS_U: tl.constexpr, KEEP_A: tl.constexpr,
    UNITS: tl.constexpr,
    FORM: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PIECES: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
) -> None:  # fmt: skip
    """OUT = x and A = a (steps, count, h) from Q, U like them, H (steps, batch, h), M (h, h), S = x_{-1} (count, h)."""
    dtype: tl.constexpr = OUT.dtype.element_ty
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = row < count
    # Vectors that are carried together are further rows, which share the sequences' h_t.
    sequence = (row % batch).to(tl.int64)
    row = row.to(tl.int64)
    begin, end = 0, UNITS
    if FORM == "stepwise":
        begin = tl.program_id(1) * COLUMNS
        end = begin + 1
    s, W = 0, 0
    if FORM == "resident":
        W = matrix(M, UNITS, UNITS, UNITS, COLUMNS, PIECES)
        s = rows(S, row, inside, tl.arange(0, COLUMNS), UNITS, UNITS)
    for _ in range(steps):
        for c in range(begin, end, COLUMNS):
            column = c + tl.arange(0, COLUMNS)
            # Loads first: they arrive while the product is worked out.
            if HAS_Q:
                q = rows(Q, row, inside, column, UNITS, UNITS)
            if not FORWARD:
                h = rows(H, sequence, inside, column, UNITS, UNITS)
            if HAS_U:
                u = rows(U, row, inside, column, UNITS, UNITS)
            a = recur(
                s, W, S, UNITS, UNITS, row, inside, M, UNITS, UNITS, column,
                FORM, TILE, COLUMNS, DEPTH, PIECES, PRECISION, INTERPRETED,
            )  # fmt: skip
            if HAS_Q:
                a += wide(q)
            if KEEP_A:
                store(A, row, inside, column, UNITS, UNITS, a)
            x = apply(F, a, INTERPRETED) if FORWARD else slope(F, wide(h), a)
            if HAS_U:
                x += wide(u)
            store(OUT, row, inside, column, UNITS, UNITS, x)
            if FORM == "resident":
                s = x.to(dtype)
        step_end(FORM)
        if FORM == "walked":
            S = OUT
        Q += row_stride
        U += row_stride
        A += row_stride
        OUT += row_stride
        H += sequence_stride


def _pass(
    Q: Maybe, H: Tensor, U: Maybe, M: Tensor, first: Maybe, A: Maybe, out: Tensor, f: Nonlinearity, *,
    forward: bool = False, reverse: bool = False,
) -> None:  # fmt: skip
    """Fill out and A (T, *N, B, h), which may be one with Q; H (T, B, h)."""
    steps, units = len(out), out.shape[-1]
    count, batch = out[0].numel() // units, H.shape[1]
    start = out.new_zeros(count, units) if first is None else first.reshape(count, units).contiguous()
    plan = tiles.plan(out, count, units, 1)
    sign = -1 if reverse else 1

    def call(done: int, number: int) -> None:
        t = steps - 1 - done if reverse else done
        q, u, a = (out[t] if x is None else x[t] for x in (Q, U, A))
        tiles.launch(
            kernel, plan.grid(count, units), out,
            q, H[t], u, M, start if done == 0 else out[t - sign], a, out[t],
            number, count, batch, sign * count * units, sign * batch * units,
            F=f.name, FORWARD=forward, HAS_Q=Q is not None, HAS_U=U is not None, KEEP_A=A is not None, UNITS=units,
            **plan.settings(),
        )  # fmt: skip

    tiles.run(steps, plan.form, call)


def forward(P: Maybe, X: Tensor, K: Tensor, h0: Tensor, f: Nonlinearity) -> Tensor:
    """H (T, B, h) from P (T, B, h), which may be None (zero), X (T, B, V), K (h + V, h), h0 (B, h)."""
    tiles.check(K=K, P=P, X=X, h0=h0)
    hidden = K.shape[1]
    H = K.new_empty(*X.shape[:2], hidden)
    if X.shape[2]:
        P = projected(P, (X, K[hidden:]), out=H)
    _pass(None if P is None else P.contiguous(), H, None, K[:hidden].contiguous(), h0, None, H, f, forward=True)
    return H


def tangent(
    dP: Maybe,
    dK: Maybe,
    dh0: Maybe,
    X: Tensor,
    H: Tensor,
    h0: Tensor,
    K: Tensor,
    f: Nonlinearity,
    preactivations: bool,
) -> tuple[Tensor, Maybe]:
    """R_h (T, *N, B, h), and R_a if asked: R_a,t = dp_t + z_t dK + R_h,{t-1} W, R_h,t = f'(a_t) R_a,t.

    dP (T, *N, B, h), dK (h + V, h), dh0 (*N, B, h) may each be None (zero). N is nothing, or the number of tangents
    that are carried together, without dK then.
    """
    tiles.check(H=H, dP=dP, dK=dK, dh0=dh0, X=X, h0=h0, K=K)
    hidden = K.shape[1]
    R = H.new_empty(H.shape if dP is None else dP.shape)
    Ra = torch.empty_like(R) if preactivations else None
    H, Q = H.contiguous(), dP
    if dK is not None:
        Q = projected(dP, ((h0, H), dK[:hidden]), (X, dK[hidden:]), out=R if Ra is None else Ra)
    _pass(None if Q is None else Q.contiguous(), H, None, K[:hidden].contiguous(), dh0, Ra, R, f)
    return R, Ra


def adjoint(
    U: Maybe,
    Ua: Maybe,
    X: Tensor,
    H: Tensor,
    h0: Tensor,
    K: Tensor,
    f: Nonlinearity,
    inputs: bool,
) -> tuple[Maybe, Tensor, Tensor]:
    """Adjoint dA (T, *N, B, h) of the pre-activations if `inputs`, dK (*N, h + V, h) and dh0 (*N, B, h).

    dA_t = f'(a_t) (u_t + dA_{t+1} W') + ua_t, dK = sum_t z_t' dA_t, dh0 = dA_0 W'; U, Ua (T, *N, B, h) are cotangents
    of H and of the pre-activations, one of which may be None (zero).
    """
    given = Ua if U is None else U
    assert given is not None
    tiles.check(H=H, U=U, Ua=Ua, X=X, h0=h0, K=K)
    hidden = K.shape[1]
    H, Wt = H.contiguous(), K[:hidden].t().contiguous()
    dA = H.new_empty(given.shape)
    u, ua = (None if x is None else x.contiguous() for x in (U, Ua))
    _pass(u, H, ua, Wt, None, None, dA, f, reverse=True)
    return dA if inputs else None, correlated(dA, (h0, H), X), dA[0] @ Wt
