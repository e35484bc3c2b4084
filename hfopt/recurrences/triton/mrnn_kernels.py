"""Kernels of the MRNN's passes: see `hfopt.recurrences.mrnn` for the equations.

A step has two products, from h units to F factors (W_hf, or K_f' in the adjoint) and back (K_f, or W_hf'). In the
resident form both matrices stay, and what is between them too; in the others that goes through memory, and the
stepwise form has a launch for each (PHASE 1 and 2; 0 is both).
"""

from __future__ import annotations

import triton
import triton.language as tl

from hfopt.recurrences.triton.products import apply, matrix, recur, rows, slope, step_end, store, wide


@triton.jit(do_not_specialize=["steps"])
def onward_kernel(
    E: tl.tensor, P: tl.tensor, Q: tl.tensor, H: tl.tensor, M1: tl.tensor, M2: tl.tensor, S: tl.tensor,
    G: tl.tensor, BETWEEN: tl.tensor, A: tl.tensor, OUT: tl.tensor,
    steps: tl.tensor, count: tl.tensor, batch: tl.tensor,
    by_row: tl.tensor, by_factor_row: tl.tensor, by_sequence: tl.tensor, by_factor_sequence: tl.tensor,
    F: tl.constexpr, FORWARD: tl.constexpr, HAS_P: tl.constexpr, HAS_Q: tl.constexpr, KEEP_A: tl.constexpr,
    PHASE: tl.constexpr, UNITS: tl.constexpr, FACTORS: tl.constexpr,
    FORM: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PIECES: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
) -> None:  # fmt: skip
    """OUT = x = f(a) | f'(h) a (steps, count, h) with A = a = q + (p + e g) M2, g = x_{t-1} M1 (kept in G if FORWARD).

    P (steps, count, F), Q (steps, count, h), S = x_{-1} (count, h), BETWEEN (count, F) is scratch, and of the point
    E (steps, batch, F) and H (steps, batch, h).
    """
    dtype: tl.constexpr = OUT.dtype.element_ty
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = row < count
    sequence = (row % batch).to(tl.int64)
    row = row.to(tl.int64)
    begin, end, f_end = 0, UNITS, FACTORS
    if FORM == "stepwise":
        begin = tl.program_id(1) * COLUMNS
        end = begin + 1
        f_end = begin + 1
    s, between, W1, W2 = 0, 0, 0, 0
    if FORM == "resident":
        W1 = matrix(M1, FACTORS, UNITS, FACTORS, COLUMNS, PIECES)
        W2 = matrix(M2, UNITS, FACTORS, UNITS, COLUMNS, PIECES)
        s = rows(S, row, inside, tl.arange(0, COLUMNS), UNITS, UNITS)
        between = tl.zeros((TILE, COLUMNS), dtype)
    for _ in range(steps):
        if PHASE != 2:
            for c in range(begin, f_end, COLUMNS):
                column = c + tl.arange(0, COLUMNS)
                # Loads first: they arrive while the product is worked out.
                e = rows(E, sequence, inside, column, FACTORS, FACTORS)
                if HAS_P:
                    p = rows(P, row, inside, column, FACTORS, FACTORS)
                g = recur(
                    s, W1, S, UNITS, UNITS, row, inside, M1, FACTORS, FACTORS, column,
                    FORM, TILE, COLUMNS, DEPTH, PIECES, PRECISION, INTERPRETED,
                )  # fmt: skip
                if FORWARD:
                    store(G, row, inside, column, FACTORS, FACTORS, g)
                x = wide(e) * g
                if HAS_P:
                    x += wide(p)
                if FORM == "resident":
                    between = x.to(dtype)
                else:
                    store(BETWEEN, row, inside, column, FACTORS, FACTORS, x)
            step_end(FORM)
        if PHASE != 1:
            for c in range(begin, end, COLUMNS):
                column = c + tl.arange(0, COLUMNS)
                if HAS_Q:
                    q = rows(Q, row, inside, column, UNITS, UNITS)
                if not FORWARD:
                    h = rows(H, sequence, inside, column, UNITS, UNITS)
                a = recur(
                    between, W2, BETWEEN, FACTORS, FACTORS, row, inside, M2, UNITS, UNITS, column,
                    FORM, TILE, COLUMNS, DEPTH, PIECES, PRECISION, INTERPRETED,
                )  # fmt: skip
                if HAS_Q:
                    a += wide(q)
                if KEEP_A:
                    store(A, row, inside, column, UNITS, UNITS, a)
                x = apply(F, a, INTERPRETED) if FORWARD else slope(F, wide(h), a)
                store(OUT, row, inside, column, UNITS, UNITS, x)
                if FORM == "resident":
                    s = x.to(dtype)
            step_end(FORM)
            if FORM == "walked":
                S = OUT
        Q += by_row
        A += by_row
        OUT += by_row
        P += by_factor_row
        H += by_sequence
        E += by_factor_sequence
        G += by_factor_sequence


@triton.jit(do_not_specialize=["steps"])
def adjoint_kernel(
    U: tl.tensor, UA: tl.tensor, H: tl.tensor, E: tl.tensor, G: tl.tensor, M1: tl.tensor, M2: tl.tensor, S: tl.tensor,
    D: tl.tensor, DG: tl.tensor, DE: tl.tensor,
    steps: tl.tensor, count: tl.tensor, batch: tl.tensor,
    by_row: tl.tensor, by_factor_row: tl.tensor, by_sequence: tl.tensor, by_factor_sequence: tl.tensor,
    F: tl.constexpr, HAS_U: tl.constexpr, HAS_UA: tl.constexpr,
    PHASE: tl.constexpr, UNITS: tl.constexpr, FACTORS: tl.constexpr,
    FORM: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PIECES: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
) -> None:  # fmt: skip
    """Back in time: D = f'(h) (u + dg_{t+1} M1) + ua (steps, count, h), dp = D M2, DG = e dp, DE = g dp (.., F).

    S = DG one step later (count, F).
    """
    dtype: tl.constexpr = D.dtype.element_ty
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = row < count
    sequence = (row % batch).to(tl.int64)
    row = row.to(tl.int64)
    begin, end, f_end = 0, UNITS, FACTORS
    if FORM == "stepwise":
        begin = tl.program_id(1) * COLUMNS
        end = begin + 1
        f_end = begin + 1
    s, between, W1, W2 = 0, 0, 0, 0
    if FORM == "resident":
        W1 = matrix(M1, UNITS, FACTORS, UNITS, COLUMNS, PIECES)
        W2 = matrix(M2, FACTORS, UNITS, FACTORS, COLUMNS, PIECES)
        s = rows(S, row, inside, tl.arange(0, COLUMNS), FACTORS, FACTORS)
        between = tl.zeros((TILE, COLUMNS), dtype)
    for _ in range(steps):
        if PHASE != 2:
            for c in range(begin, end, COLUMNS):
                column = c + tl.arange(0, COLUMNS)
                h = rows(H, sequence, inside, column, UNITS, UNITS)
                if HAS_U:
                    u = rows(U, row, inside, column, UNITS, UNITS)
                if HAS_UA:
                    ua = rows(UA, row, inside, column, UNITS, UNITS)
                x = recur(
                    s, W1, S, FACTORS, FACTORS, row, inside, M1, UNITS, UNITS, column,
                    FORM, TILE, COLUMNS, DEPTH, PIECES, PRECISION, INTERPRETED,
                )  # fmt: skip
                if HAS_U:
                    x += wide(u)
                x = slope(F, wide(h), x)
                if HAS_UA:
                    x += wide(ua)
                store(D, row, inside, column, UNITS, UNITS, x)
                if FORM == "resident":
                    between = x.to(dtype)
            step_end(FORM)
        if PHASE != 1:
            for c in range(begin, f_end, COLUMNS):
                column = c + tl.arange(0, COLUMNS)
                e = rows(E, sequence, inside, column, FACTORS, FACTORS)
                g = rows(G, sequence, inside, column, FACTORS, FACTORS)
                dp = recur(
                    between, W2, D, UNITS, UNITS, row, inside, M2, FACTORS, FACTORS, column,
                    FORM, TILE, COLUMNS, DEPTH, PIECES, PRECISION, INTERPRETED,
                )  # fmt: skip
                dg = (wide(e) * dp).to(dtype)
                store(DG, row, inside, column, FACTORS, FACTORS, dg)
                store(DE, row, inside, column, FACTORS, FACTORS, wide(g) * dp)
                if FORM == "resident":
                    s = dg
            step_end(FORM)
            if FORM == "walked":
                S = DG
        U -= by_row
        UA -= by_row
        D -= by_row
        DG -= by_factor_row
        DE -= by_factor_row
        H -= by_sequence
        E -= by_factor_sequence
        G -= by_factor_sequence
