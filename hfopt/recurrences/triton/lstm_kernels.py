"""Kernels of the LSTM's passes: see `hfopt.recurrences.lstm` for the equations.

q_t (.., 4h) is what does not recur. M is the recurrent part of K, (h, 4h), or its transpose (4h, h) in the adjoint.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hfopt.recurrences.triton.products import gates, gathered, matrices, rows, sigmoid, step_end, store, tanh, wide


@triton.jit(do_not_specialize=["steps"])
def forward_kernel(
    Q: tl.tensor, M: tl.tensor, S: tl.tensor, C0: tl.tensor,
    H: tl.tensor, C: tl.tensor, G: tl.tensor, Y: tl.tensor,
    steps: tl.tensor, count: tl.tensor, stride: tl.tensor, UNITS: tl.constexpr,
    FORM: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PIECES: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
) -> None:  # fmt: skip
    """H, C, Y (steps, count, h) and G (steps, count, 4h) from Q like G, S = h_{-1} and C0 = c_{-1} (count, h)."""
    WIDE: tl.constexpr = 4 * UNITS
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = row < count
    row = row.to(tl.int64)
    begin, end = 0, UNITS
    if FORM == "stepwise":
        begin = tl.program_id(1) * COLUMNS
        end = begin + 1
    s, memory, W = 0, 0, (0, 0, 0, 0)
    if FORM == "resident":
        W = matrices(M, UNITS, 4, WIDE, UNITS, COLUMNS, PIECES)
        s = rows(S, row, inside, tl.arange(0, COLUMNS), UNITS, UNITS)
        memory = wide(rows(C0, row, inside, tl.arange(0, COLUMNS), UNITS, UNITS))
    for _ in range(steps):
        for n in range(begin, end, COLUMNS):
            column = n + tl.arange(0, COLUMNS)
            # Loads first: they arrive while the products are worked out.
            qi = rows(Q, row, inside, column, WIDE, UNITS)
            qf = rows(Q + UNITS, row, inside, column, WIDE, UNITS)
            qg = rows(Q + 2 * UNITS, row, inside, column, WIDE, UNITS)
            qo = rows(Q + 3 * UNITS, row, inside, column, WIDE, UNITS)
            past = memory
            if FORM != "resident":
                past = rows(C0, row, inside, column, UNITS, UNITS)
            ai, af, ag, ao = gates(
                s, W, S, UNITS, row, inside, M, 4, UNITS, column,
                FORM, TILE, COLUMNS, DEPTH, PIECES, PRECISION, INTERPRETED,
            )  # fmt: skip
            i = sigmoid(ai + wide(qi))
            f = sigmoid(af + wide(qf))
            g = tanh(ag + wide(qg), INTERPRETED)
            o = sigmoid(ao + wide(qo))
            c = f * wide(past) + i * g
            y = tanh(c, INTERPRETED)
            h = (o * y).to(H.dtype.element_ty)
            store(G, row, inside, column, WIDE, UNITS, i)
            store(G + UNITS, row, inside, column, WIDE, UNITS, f)
            store(G + 2 * UNITS, row, inside, column, WIDE, UNITS, g)
            store(G + 3 * UNITS, row, inside, column, WIDE, UNITS, o)
            store(C, row, inside, column, UNITS, UNITS, c)
            store(Y, row, inside, column, UNITS, UNITS, y)
            store(H, row, inside, column, UNITS, UNITS, h)
            if FORM == "resident":
                s = h
                memory = c
        step_end(FORM)
        if FORM == "walked":
            S = H
            C0 = C
        H += stride
        C += stride
        Y += stride
        Q += 4 * stride
        G += 4 * stride


@triton.jit(do_not_specialize=["steps"])
def tangent_kernel(
    Q: tl.tensor, M: tl.tensor, S: tl.tensor, SC: tl.tensor, R: tl.tensor, RC: tl.tensor,
    C0: tl.tensor, C: tl.tensor, G: tl.tensor, Y: tl.tensor,
    steps: tl.tensor, count: tl.tensor, batch: tl.tensor, stride: tl.tensor, sequence_stride: tl.tensor,
    HAS_Q: tl.constexpr, UNITS: tl.constexpr,
    FORM: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PIECES: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
) -> None:  # fmt: skip
    """R, RC (steps, count, h) from Q (steps, count, 4h), S, SC = theirs at t = -1, and the point (steps, batch, ..)."""
    WIDE: tl.constexpr = 4 * UNITS
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = row < count
    sequence = (row % batch).to(tl.int64)
    row = row.to(tl.int64)
    begin, end = 0, UNITS
    if FORM == "stepwise":
        begin = tl.program_id(1) * COLUMNS
        end = begin + 1
    s, memory, W = 0, 0, (0, 0, 0, 0)
    if FORM == "resident":
        W = matrices(M, UNITS, 4, WIDE, UNITS, COLUMNS, PIECES)
        s = rows(S, row, inside, tl.arange(0, COLUMNS), UNITS, UNITS)
        memory = wide(rows(SC, row, inside, tl.arange(0, COLUMNS), UNITS, UNITS))
    for _ in range(steps):
        for n in range(begin, end, COLUMNS):
            column = n + tl.arange(0, COLUMNS)
            i = rows(G, sequence, inside, column, WIDE, UNITS)
            f = rows(G + UNITS, sequence, inside, column, WIDE, UNITS)
            g = rows(G + 2 * UNITS, sequence, inside, column, WIDE, UNITS)
            o = rows(G + 3 * UNITS, sequence, inside, column, WIDE, UNITS)
            c = rows(C0, sequence, inside, column, UNITS, UNITS)
            y = rows(Y, sequence, inside, column, UNITS, UNITS)
            if HAS_Q:
                qi = rows(Q, row, inside, column, WIDE, UNITS)
                qf = rows(Q + UNITS, row, inside, column, WIDE, UNITS)
                qg = rows(Q + 2 * UNITS, row, inside, column, WIDE, UNITS)
                qo = rows(Q + 3 * UNITS, row, inside, column, WIDE, UNITS)
            past = memory
            if FORM != "resident":
                past = rows(SC, row, inside, column, UNITS, UNITS)
            ai, af, ag, ao = gates(
                s, W, S, UNITS, row, inside, M, 4, UNITS, column,
                FORM, TILE, COLUMNS, DEPTH, PIECES, PRECISION, INTERPRETED,
            )  # fmt: skip
            if HAS_Q:
                ai += wide(qi)
                af += wide(qf)
                ag += wide(qg)
                ao += wide(qo)
            i, f, g, o = wide(i), wide(f), wide(g), wide(o)
            c, y = wide(c), wide(y)
            rc = f * (wide(past) + c * (1.0 - f) * af) + i * (g * (1.0 - i) * ai + (1.0 - g * g) * ag)
            r = (o * (y * (1.0 - o) * ao + (1.0 - y * y) * rc)).to(R.dtype.element_ty)
            store(RC, row, inside, column, UNITS, UNITS, rc)
            store(R, row, inside, column, UNITS, UNITS, r)
            if FORM == "resident":
                s = r
                memory = rc
        step_end(FORM)
        if FORM == "walked":
            S = R
            SC = RC
        Q += 4 * stride
        R += stride
        RC += stride
        C0 = C
        C += sequence_stride
        Y += sequence_stride
        G += 4 * sequence_stride


@triton.jit(do_not_specialize=["steps"])
def adjoint_kernel(
    U: tl.tensor, UC: tl.tensor, M: tl.tensor, S: tl.tensor, CARRY: tl.tensor, D: tl.tensor,
    C0: tl.tensor, C: tl.tensor, G: tl.tensor, Y: tl.tensor,
    steps: tl.tensor, count: tl.tensor, batch: tl.tensor, stride: tl.tensor, sequence_stride: tl.tensor,
    HAS_U: tl.constexpr, HAS_UC: tl.constexpr, UNITS: tl.constexpr,
    FORM: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PIECES: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
) -> None:  # fmt: skip
    """D = da (steps, count, 4h), back in time, from U, UC (steps, count, h) and S = D one step later.

    CARRY (count, h) is f_{t+1} gc_{t+1} before and f_t gc_t of the last step after. C0 is C_{t-1} of the last step.
    """
    WIDE: tl.constexpr = 4 * UNITS
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = row < count
    sequence = (row % batch).to(tl.int64)
    row = row.to(tl.int64)
    begin, end = 0, UNITS
    if FORM == "stepwise":
        begin = tl.program_id(1) * COLUMNS
        end = begin + 1
    s, memory, W = (0, 0, 0, 0), 0, 0
    if FORM == "resident":
        W = matrices(M, UNITS * UNITS, 4, UNITS, UNITS, COLUMNS, PIECES)
        column = tl.arange(0, COLUMNS)
        s = (
            rows(S, row, inside, column, WIDE, UNITS),
            rows(S + UNITS, row, inside, column, WIDE, UNITS),
            rows(S + 2 * UNITS, row, inside, column, WIDE, UNITS),
            rows(S + 3 * UNITS, row, inside, column, WIDE, UNITS),
        )
        memory = wide(rows(CARRY, row, inside, column, UNITS, UNITS))
    for k in range(steps):
        if k == steps - 1:
            C = C0
        for n in range(begin, end, COLUMNS):
            column = n + tl.arange(0, COLUMNS)
            i = rows(G, sequence, inside, column, WIDE, UNITS)
            f = rows(G + UNITS, sequence, inside, column, WIDE, UNITS)
            g = rows(G + 2 * UNITS, sequence, inside, column, WIDE, UNITS)
            o = rows(G + 3 * UNITS, sequence, inside, column, WIDE, UNITS)
            c = rows(C, sequence, inside, column, UNITS, UNITS)
            y = rows(Y, sequence, inside, column, UNITS, UNITS)
            if HAS_U:
                u = rows(U, row, inside, column, UNITS, UNITS)
            if HAS_UC:
                uc = rows(UC, row, inside, column, UNITS, UNITS)
            past = memory
            if FORM != "resident":
                past = rows(CARRY, row, inside, column, UNITS, UNITS)
            gh = gathered(
                s, W, S, WIDE, row, inside, M, 4, UNITS, column,
                FORM, TILE, COLUMNS, DEPTH, PIECES, PRECISION, INTERPRETED,
            )  # fmt: skip
            gc = wide(past)
            if HAS_U:
                gh += wide(u)
            if HAS_UC:
                gc += wide(uc)
            i, f, g, o = wide(i), wide(f), wide(g), wide(o)
            c, y = wide(c), wide(y)
            gc += o * (1.0 - y * y) * gh
            di = (g * i * (1.0 - i) * gc).to(D.dtype.element_ty)
            df = (c * f * (1.0 - f) * gc).to(D.dtype.element_ty)
            dg = (i * (1.0 - g * g) * gc).to(D.dtype.element_ty)
            do = (y * o * (1.0 - o) * gh).to(D.dtype.element_ty)
            gc *= f
            store(D, row, inside, column, WIDE, UNITS, di)
            store(D + UNITS, row, inside, column, WIDE, UNITS, df)
            store(D + 2 * UNITS, row, inside, column, WIDE, UNITS, dg)
            store(D + 3 * UNITS, row, inside, column, WIDE, UNITS, do)
            if FORM == "resident":
                s = (di, df, dg, do)
                memory = gc
            else:
                store(CARRY, row, inside, column, UNITS, UNITS, gc)
        step_end(FORM)
        if FORM == "walked":
            S = D
        U -= stride
        UC -= stride
        D -= 4 * stride
        C -= sequence_stride
        Y -= sequence_stride
        G -= 4 * sequence_stride
    if FORM == "resident":
        store(CARRY, row, inside, tl.arange(0, COLUMNS), UNITS, UNITS, memory)
