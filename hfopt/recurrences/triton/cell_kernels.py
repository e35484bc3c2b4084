"""Kernels of every defined cell with one product in a step; what is pointwise is a function given at compile time.

Tensors of one kind come as tuples of pointers. A value of the point, (steps, batch, .), has a row length and a length
of a step for each, 0 where it does not change over sequences or steps.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hfopt.recurrences.triton.products import gates, gathered, matrices, rows, step_end, store, wide


@triton.jit
def values(
    V: tl.tuple, at: tl.tensor, COUNT: tl.constexpr, WIDTHS: tl.constexpr, STEPS: tl.constexpr,
    batch: tl.tensor, sequence: tl.tensor, inside: tl.tensor, column: tl.tensor, UNITS: tl.constexpr,
) -> tl.tuple:  # fmt: skip
    """The values of the point, at steps after the one that is pointed to."""
    found = ()
    for i in tl.static_range(COUNT):
        start = V[i] + at * batch * STEPS[i]
        found = found + (wide(rows(start, sequence, inside, column, WIDTHS[i], UNITS)),)  # type: ignore[assignment]  # noqa: RUF005
    return found


@triton.jit
def states(
    S: tl.tuple, COUNT: tl.constexpr, row: tl.tensor, inside: tl.tensor, column: tl.tensor, UNITS: tl.constexpr
) -> tl.tuple:
    """COUNT states at some columns."""
    found = ()
    for i in tl.static_range(COUNT):
        found = found + (wide(rows(S[i], row, inside, column, UNITS, UNITS)),)  # type: ignore[assignment]  # noqa: RUF005
    return found


@triton.jit(do_not_specialize=["steps"])
def onward_kernel(
    Q: tl.tensor, M: tl.tensor, S: tl.tuple, OUT: tl.tuple, V: tl.tuple,
    steps: tl.tensor, count: tl.tensor, batch: tl.tensor,
    POINTWISE: tl.constexpr, OWN: tl.constexpr, STATES: tl.constexpr, OUTPUTS: tl.constexpr, LENGTHS: tl.constexpr,
    VALUES: tl.constexpr, WIDTHS: tl.constexpr, STEPS: tl.constexpr, NQ: tl.constexpr, NM: tl.constexpr,
    UNITS: tl.constexpr,
    FORM: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PIECES: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
) -> None:  # fmt: skip
    """OUT, of rows with LENGTHS numbers, from Q (steps, count, NQ h), states S (count, h) before, and the point V.

    The first STATES of OUT are the states after a step; M (h, NM h) multiplies the one before of the index OWN.
    """
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = row < count
    sequence = (row % batch).to(tl.int64)
    row = row.to(tl.int64)
    start_of_all = (tl.program_id(0) * 0).to(tl.int64)  # places beyond 2^31 are reached from here
    begin, end = 0, UNITS
    if FORM == "stepwise":
        begin = tl.program_id(1) * COLUMNS
        end = begin + 1
    W = (0,) * NM
    d = (0,) * STATES
    s = 0
    if FORM == "resident":
        W = matrices(M, UNITS, NM, NM * UNITS, UNITS, COLUMNS, PIECES)
        d = states(S, STATES, row, inside, tl.arange(0, COLUMNS), UNITS)
        s = d[OWN].to(M.dtype.element_ty)
    for k in range(steps):
        at = start_of_all + k
        for n in range(begin, end, COLUMNS):
            column = n + tl.arange(0, COLUMNS)
            v = values(V, at, VALUES, WIDTHS, STEPS, batch, sequence, inside, column, UNITS)
            q = ()
            for i in tl.static_range(NQ):
                start = Q + at * count * NQ * UNITS + i * UNITS
                q = q + (wide(rows(start, row, inside, column, NQ * UNITS, UNITS)),)  # type: ignore[assignment]  # noqa: RUF005
            before = d
            if FORM != "resident":
                before = states(S, STATES, row, inside, column, UNITS)
            g = gates(
                s, W, S[OWN], UNITS, row, inside, M, NM, UNITS, column,
                FORM, TILE, COLUMNS, DEPTH, PIECES, PRECISION, INTERPRETED,
            )  # fmt: skip
            r = POINTWISE(q, g, v, before, INTERPRETED)
            for i in tl.static_range(OUTPUTS):
                store(OUT[i] + at * count * LENGTHS[i], row, inside, column, LENGTHS[i], UNITS, r[i])
            if FORM == "resident":
                d = r[:STATES]
                s = r[OWN].to(M.dtype.element_ty)
        step_end(FORM)
        if FORM == "walked":
            after = ()
            for i in tl.static_range(STATES):
                after = after + (OUT[i] + at * count * UNITS,)  # type: ignore[assignment]  # noqa: RUF005
            S = after


@triton.jit(do_not_specialize=["steps"])
def adjoint_kernel(
    U: tl.tuple, M: tl.tensor, LATER: tl.tensor, CARRY: tl.tuple, D: tl.tensor, OUTSIDE: tl.tensor, V: tl.tuple,
    steps: tl.tensor, count: tl.tensor, batch: tl.tensor,
    POINTWISE: tl.constexpr, OWN: tl.constexpr, STATES: tl.constexpr, OUTPUTS: tl.constexpr, GIVEN: tl.constexpr,
    VALUES: tl.constexpr, WIDTHS: tl.constexpr, STEPS: tl.constexpr, NO: tl.constexpr, NM: tl.constexpr,
    UNITS: tl.constexpr,
    FORM: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PIECES: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
) -> None:  # fmt: skip
    """D (steps, count, NM h) and OUTSIDE (steps, count, NO h), back in time from the step that is pointed to.

    U: cotangents (steps, count, h) of states and outputs, those that are GIVEN. LATER is D one step later. CARRY:
    (count, h) for each state, what comes from the step after without the product, and then from the first step done.
    """
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = row < count
    sequence = (row % batch).to(tl.int64)
    row = row.to(tl.int64)
    start_of_all = (tl.program_id(0) * 0).to(tl.int64)  # places beyond 2^31 are reached from here
    begin, end = 0, UNITS
    if FORM == "stepwise":
        begin = tl.program_id(1) * COLUMNS
        end = begin + 1
    W = (0,) * NM
    s = (0,) * NM
    memory = (0,) * STATES
    if FORM == "resident":
        W = matrices(M, UNITS * UNITS, NM, UNITS, UNITS, COLUMNS, PIECES)
        column = tl.arange(0, COLUMNS)
        first = ()
        for i in tl.static_range(NM):
            first = first + (rows(LATER + i * UNITS, row, inside, column, NM * UNITS, UNITS),)  # type: ignore[assignment]  # noqa: RUF005
        s = first
        memory = states(CARRY, STATES, row, inside, column, UNITS)
    for k in range(steps):
        at = start_of_all - k
        for n in range(begin, end, COLUMNS):
            column = n + tl.arange(0, COLUMNS)
            v = values(V, at, VALUES, WIDTHS, STEPS, batch, sequence, inside, column, UNITS)
            past = memory
            if FORM != "resident":
                past = states(CARRY, STATES, row, inside, column, UNITS)
            back = gathered(
                s, W, LATER, NM * UNITS, row, inside, M, NM, UNITS, column,
                FORM, TILE, COLUMNS, DEPTH, PIECES, PRECISION, INTERPRETED,
            )  # fmt: skip
            u = ()
            for i in tl.static_range(OUTPUTS):
                total = back * 0.0
                if i < STATES:
                    total += past[i]
                if i == OWN:
                    total += back
                if GIVEN[i]:
                    total += wide(rows(U[i] + at * count * UNITS, row, inside, column, UNITS, UNITS))
                u = u + (total,)  # type: ignore[assignment]  # noqa: RUF005
            r = POINTWISE(u, v, INTERPRETED)
            now = ()
            for i in tl.static_range(NM):
                da = r[i].to(D.dtype.element_ty)
                store(D + at * count * NM * UNITS + i * UNITS, row, inside, column, NM * UNITS, UNITS, da)
                now = now + (da,)  # type: ignore[assignment]  # noqa: RUF005
            for i in tl.static_range(NO):
                start = OUTSIDE + at * count * NO * UNITS + i * UNITS
                store(start, row, inside, column, NO * UNITS, UNITS, r[NM + STATES + i])
            if FORM == "resident":
                s = now
                memory = r[NM : NM + STATES]
            else:
                for i in tl.static_range(STATES):
                    store(CARRY[i], row, inside, column, UNITS, UNITS, r[NM + i])
        step_end(FORM)
        if FORM == "walked":
            LATER = D + at * count * NM * UNITS
    if FORM == "resident":
        for i in tl.static_range(STATES):
            store(CARRY[i], row, inside, tl.arange(0, COLUMNS), UNITS, UNITS, memory[i])


@triton.jit
def section_kernel(
    X: tl.tuple, OUT: tl.tuple, count: tl.tensor, batch: tl.tensor,
    FUNCTION: tl.constexpr, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, UNITS: tl.constexpr,
    TILE: tl.constexpr, COLUMNS: tl.constexpr, WIDTHS: tl.constexpr, VECTORS: tl.constexpr, LENGTHS: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:  # fmt: skip
    """OUT (count, UNITS), of rows with LENGTHS numbers, by a function of X: of each row, or of its sequence's."""
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = row < count
    sequence = (row % batch).to(tl.int64)
    row = row.to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    x = ()
    for i in tl.static_range(INPUTS):
        if VECTORS[i]:
            x = x + (wide(rows(X[i], row, inside, column, WIDTHS[i], UNITS)),)  # type: ignore[assignment]  # noqa: RUF005
        else:
            x = x + (wide(rows(X[i], sequence, inside, column, WIDTHS[i], UNITS)),)  # type: ignore[assignment]  # noqa: RUF005
    r = FUNCTION(x, INTERPRETED)
    for i in tl.static_range(OUTPUTS):
        store(OUT[i], row, inside, column, LENGTHS[i], UNITS, r[i])
