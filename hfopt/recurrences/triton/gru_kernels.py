"""Kernels of the GRU's passes: see `hfopt.recurrences.gru` for the equations.

q_t (.., 3h) is what does not recur. M is K_h (h, 3h), or in the adjoint its blocks' transposes under each other, in
the order n, r, z (3h, h). The adjoint is kept as d = [dm, da_r, da_z, dx_n] (.., 4h): the first three blocks go with
K_h, the last three, which are in its order r, z, n, with K_x.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hfopt.recurrences.triton.products import gates, gathered, matrices, rows, sigmoid, step_end, store, tanh, wide


@triton.jit(do_not_specialize=["steps"])
def forward_kernel(
    Q: tl.tensor, M: tl.tensor, BIAS: tl.tensor, S: tl.tensor, H: tl.tensor, G: tl.tensor, N: tl.tensor,
    steps: tl.tensor, count: tl.tensor, stride: tl.tensor, UNITS: tl.constexpr,
    FORM: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PIECES: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
) -> None:  # fmt: skip
    """H, N = m (steps, count, h) and G (steps, count, 3h) from Q like G, BIAS = b_n (h,) and S = h_{-1} (count, h)."""
    WIDE: tl.constexpr = 3 * UNITS
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = row < count
    row = row.to(tl.int64)
    begin, end = 0, UNITS
    if FORM == "stepwise":
        begin = tl.program_id(1) * COLUMNS
        end = begin + 1
    s, W = 0, (0, 0, 0)
    if FORM == "resident":
        W = matrices(M, UNITS, 3, WIDE, UNITS, COLUMNS, PIECES)
        s = rows(S, row, inside, tl.arange(0, COLUMNS), UNITS, UNITS)
    for _ in range(steps):
        for c in range(begin, end, COLUMNS):
            column = c + tl.arange(0, COLUMNS)
            # Loads first: they arrive while the products are worked out.
            qr = rows(Q, row, inside, column, WIDE, UNITS)
            qz = rows(Q + UNITS, row, inside, column, WIDE, UNITS)
            qn = rows(Q + 2 * UNITS, row, inside, column, WIDE, UNITS)
            b = tl.load(BIAS + column, mask=column < UNITS, other=0.0)
            past = s
            if FORM != "resident":
                past = rows(S, row, inside, column, UNITS, UNITS)
            ar, az, m = gates(
                s, W, S, UNITS, row, inside, M, 3, UNITS, column,
                FORM, TILE, COLUMNS, DEPTH, PIECES, PRECISION, INTERPRETED,
            )  # fmt: skip
            r = sigmoid(ar + wide(qr))
            z = sigmoid(az + wide(qz))
            m += wide(b)[None, :]
            n = tanh(wide(qn) + r * m, INTERPRETED)
            h = (n + z * (wide(past) - n)).to(H.dtype.element_ty)
            store(G, row, inside, column, WIDE, UNITS, r)
            store(G + UNITS, row, inside, column, WIDE, UNITS, z)
            store(G + 2 * UNITS, row, inside, column, WIDE, UNITS, n)
            store(N, row, inside, column, UNITS, UNITS, m)
            store(H, row, inside, column, UNITS, UNITS, h)
            if FORM == "resident":
                s = h
        step_end(FORM)
        if FORM == "walked":
            S = H
        H += stride
        N += stride
        Q += 3 * stride
        G += 3 * stride


@triton.jit(do_not_specialize=["steps"])
def tangent_kernel(
    Q: tl.tensor, M: tl.tensor, S: tl.tensor, R: tl.tensor, H0: tl.tensor, H: tl.tensor, G: tl.tensor, N: tl.tensor,
    steps: tl.tensor, count: tl.tensor, batch: tl.tensor, stride: tl.tensor, sequence_stride: tl.tensor,
    HAS_Q: tl.constexpr, UNITS: tl.constexpr,
    FORM: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PIECES: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
) -> None:  # fmt: skip
    """R (steps, count, h) from Q (steps, count, 3h), S = its own at t = -1, and the point (steps, batch, ..)."""
    WIDE: tl.constexpr = 3 * UNITS
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = row < count
    sequence = (row % batch).to(tl.int64)
    row = row.to(tl.int64)
    begin, end = 0, UNITS
    if FORM == "stepwise":
        begin = tl.program_id(1) * COLUMNS
        end = begin + 1
    s, W = 0, (0, 0, 0)
    if FORM == "resident":
        W = matrices(M, UNITS, 3, WIDE, UNITS, COLUMNS, PIECES)
        s = rows(S, row, inside, tl.arange(0, COLUMNS), UNITS, UNITS)
    for _ in range(steps):
        for c in range(begin, end, COLUMNS):
            column = c + tl.arange(0, COLUMNS)
            r = rows(G, sequence, inside, column, WIDE, UNITS)
            z = rows(G + UNITS, sequence, inside, column, WIDE, UNITS)
            n = rows(G + 2 * UNITS, sequence, inside, column, WIDE, UNITS)
            m = rows(N, sequence, inside, column, UNITS, UNITS)
            h = rows(H0, sequence, inside, column, UNITS, UNITS)
            if HAS_Q:
                qr = rows(Q, row, inside, column, WIDE, UNITS)
                qz = rows(Q + UNITS, row, inside, column, WIDE, UNITS)
                qn = rows(Q + 2 * UNITS, row, inside, column, WIDE, UNITS)
            past = s
            if FORM != "resident":
                past = rows(S, row, inside, column, UNITS, UNITS)
            ar, az, an = gates(
                s, W, S, UNITS, row, inside, M, 3, UNITS, column,
                FORM, TILE, COLUMNS, DEPTH, PIECES, PRECISION, INTERPRETED,
            )  # fmt: skip
            r, z, n, m, h = wide(r), wide(z), wide(n), wide(m), wide(h)
            an *= r
            if HAS_Q:
                ar += wide(qr)
                az += wide(qz)
                an += wide(qn)
            an = (1.0 - n * n) * (an + m * r * (1.0 - r) * ar)
            moved = (1.0 - z) * an + z * (wide(past) + (h - n) * (1.0 - z) * az)
            x = moved.to(R.dtype.element_ty)
            store(R, row, inside, column, UNITS, UNITS, x)
            if FORM == "resident":
                s = x
        step_end(FORM)
        if FORM == "walked":
            S = R
        Q += 3 * stride
        R += stride
        H0 = H
        H += sequence_stride
        N += sequence_stride
        G += 3 * sequence_stride


@triton.jit(do_not_specialize=["steps"])
def adjoint_kernel(
    U: tl.tensor, M: tl.tensor, S: tl.tensor, CARRY: tl.tensor, D: tl.tensor,
    H0: tl.tensor, H: tl.tensor, G: tl.tensor, N: tl.tensor,
    steps: tl.tensor, count: tl.tensor, batch: tl.tensor, stride: tl.tensor, sequence_stride: tl.tensor,
    UNITS: tl.constexpr,
    FORM: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PIECES: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
) -> None:  # fmt: skip
    """D = d (steps, count, 4h), back in time, from U (steps, count, h) and S = D one step later.

    CARRY (count, h) is z_{t+1} gh_{t+1} before and z_t gh_t of the last step after. H is H_{t-1}, H0 that of the last.
    """
    OUT: tl.constexpr = 4 * UNITS
    WIDE: tl.constexpr = 3 * UNITS
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = row < count
    sequence = (row % batch).to(tl.int64)
    row = row.to(tl.int64)
    begin, end = 0, UNITS
    if FORM == "stepwise":
        begin = tl.program_id(1) * COLUMNS
        end = begin + 1
    s, carry, W = (0, 0, 0), 0, 0
    if FORM == "resident":
        W = matrices(M, UNITS * UNITS, 3, UNITS, UNITS, COLUMNS, PIECES)
        column = tl.arange(0, COLUMNS)
        s = (
            rows(S, row, inside, column, OUT, UNITS),
            rows(S + UNITS, row, inside, column, OUT, UNITS),
            rows(S + 2 * UNITS, row, inside, column, OUT, UNITS),
        )
        carry = wide(rows(CARRY, row, inside, column, UNITS, UNITS))
    for k in range(steps):
        if k == steps - 1:
            H = H0
        for c in range(begin, end, COLUMNS):
            column = c + tl.arange(0, COLUMNS)
            r = rows(G, sequence, inside, column, WIDE, UNITS)
            z = rows(G + UNITS, sequence, inside, column, WIDE, UNITS)
            n = rows(G + 2 * UNITS, sequence, inside, column, WIDE, UNITS)
            m = rows(N, sequence, inside, column, UNITS, UNITS)
            h = rows(H, sequence, inside, column, UNITS, UNITS)
            u = rows(U, row, inside, column, UNITS, UNITS)
            past = carry
            if FORM != "resident":
                past = rows(CARRY, row, inside, column, UNITS, UNITS)
            gh = gathered(
                s, W, S, OUT, row, inside, M, 3, UNITS, column,
                FORM, TILE, COLUMNS, DEPTH, PIECES, PRECISION, INTERPRETED,
            )  # fmt: skip
            gh += wide(u) + wide(past)
            r, z, n, m, h = wide(r), wide(z), wide(n), wide(m), wide(h)
            gn = (1.0 - z) * (1.0 - n * n) * gh
            dm = (gn * r).to(D.dtype.element_ty)
            dr = (gn * m * r * (1.0 - r)).to(D.dtype.element_ty)
            dz = ((h - n) * z * (1.0 - z) * gh).to(D.dtype.element_ty)
            gh *= z
            store(D, row, inside, column, OUT, UNITS, dm)
            store(D + UNITS, row, inside, column, OUT, UNITS, dr)
            store(D + 2 * UNITS, row, inside, column, OUT, UNITS, dz)
            store(D + 3 * UNITS, row, inside, column, OUT, UNITS, gn)
            if FORM == "resident":
                s = (dm, dr, dz)
                carry = gh
            else:
                store(CARRY, row, inside, column, UNITS, UNITS, gh)
        step_end(FORM)
        if FORM == "walked":
            S = D
        U -= stride
        D -= 4 * stride
        H -= sequence_stride
        N -= sequence_stride
        G -= 3 * sequence_stride
    if FORM == "resident":
        store(CARRY, row, inside, tl.arange(0, COLUMNS), UNITS, UNITS, carry)
