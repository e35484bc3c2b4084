"""What the kernels are made of: products with a recurrent matrix, and the nonlinearities.

A product is either with a matrix that stays (`matrix`, `multiply`) or walks through one in memory (`walk`). The
compiler goes on behind a return inside a branch, so every function has one, at its end.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def zeros(TILE: tl.constexpr, COLUMNS: tl.constexpr, dtype: tl.constexpr) -> tl.tensor:
    """Zeros (TILE, COLUMNS) of the type that products and pointwise functions of `dtype` are worked out in."""
    a = tl.zeros((TILE, COLUMNS), tl.float32)
    if dtype == tl.float64:
        a = a.to(tl.float64)
    return a


@triton.jit
def wide(x: tl.tensor) -> tl.tensor:
    """Convert x to the type that it is worked on in."""
    if x.dtype != tl.float64:
        x = x.to(tl.float32)
    return x


@triton.jit
def rows(
    X: tl.tensor, row: tl.tensor, inside: tl.tensor, column: tl.tensor, width: tl.constexpr, last: tl.constexpr
) -> tl.tensor:
    """Rows of X, which have `width` numbers, at some columns; zero where not `inside`, and from column `last` on."""
    mask = inside[:, None] & (column < last)[None, :]
    return tl.load(X + row[:, None] * width + column[None, :], mask=mask, other=0.0)


@triton.jit
def store(
    X: tl.tensor,
    row: tl.tensor,
    inside: tl.tensor,
    column: tl.tensor,
    width: tl.constexpr,
    last: tl.constexpr,
    values: tl.tensor,
) -> None:
    """Store values where `rows` would load them from, in the type of X."""
    mask = inside[:, None] & (column < last)[None, :]
    tl.store(X + row[:, None] * width + column[None, :], values.to(X.dtype.element_ty), mask=mask)


@triton.jit
def matrix(
    M: tl.tensor, width: tl.constexpr, height: tl.constexpr, last: tl.constexpr,
    COLUMNS: tl.constexpr, PIECES: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """(COLUMNS, COLUMNS), in PIECES pieces of rows: `height` rows, `last` columns of a matrix, padded with zeros.

    A row of the matrix has `width` numbers.
    """
    column = tl.arange(0, COLUMNS)
    pieces = ()
    for i in tl.static_range(PIECES):
        row = i * (COLUMNS // PIECES) + tl.arange(0, COLUMNS // PIECES)
        pieces = pieces + (rows(M, row, row < height, column, width, last),)  # type: ignore[assignment]  # noqa: RUF005
    return pieces


@triton.jit
def matrices(
    M: tl.tensor, offset: tl.constexpr, COUNT: tl.constexpr, width: tl.constexpr, H: tl.constexpr,
    COLUMNS: tl.constexpr, PIECES: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """COUNT matrices (H, H), each `offset` numbers after the one before."""
    found = ()
    for i in tl.static_range(COUNT):
        found = found + (matrix(M + i * offset, width, H, H, COLUMNS, PIECES),)  # type: ignore[assignment]  # noqa: RUF005
    return found


@triton.jit
def dot(s: tl.tensor, m: tl.tensor, a: tl.tensor, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr) -> tl.tensor:
    """The sum a + s m, accumulated in the type of a."""
    if INTERPRETED:
        # The interpreter would multiply the bits of bfloat16 numbers.
        a = tl.dot(s.to(a.dtype), m.to(a.dtype), a, out_dtype=a.dtype)
    else:
        a = tl.dot(s, m, a, input_precision=PRECISION, out_dtype=a.dtype)
    return a


@triton.jit
def multiply(
    s: tl.tensor,
    M: tl.tensor,
    a: tl.tensor,
    WIDTH: tl.constexpr,
    PIECES: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> tl.tensor:
    """The sum a + s M for a matrix in pieces; s (rows, WIDTH) is halved until it fits a piece."""
    if PIECES == 1:
        a = dot(s, M[0], a, PRECISION, INTERPRETED)
    else:
        half: tl.constexpr = WIDTH // 2
        n: tl.constexpr = PIECES // 2
        left, right = tl.split(tl.permute(tl.reshape(s, (s.shape[0], 2, half)), (0, 2, 1)))
        a = multiply(left, M[:n], a, half, n, PRECISION, INTERPRETED)
        a = multiply(right, M[n:], a, half, n, PRECISION, INTERPRETED)
    return a


@triton.jit
def walk(
    S: tl.tensor, stride: tl.constexpr, LENGTH: tl.constexpr, row: tl.tensor, inside: tl.tensor,
    M: tl.tensor, width: tl.constexpr, last: tl.constexpr, column: tl.tensor, a: tl.tensor,
    DEPTH: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The sum a + s M, both in memory: the first LENGTH of `stride` numbers of rows of S, columns of M."""
    for k in tl.range(0, LENGTH, DEPTH, num_stages=3):
        along = k + tl.arange(0, DEPTH)
        s = rows(S, row, inside, along, stride, LENGTH)
        m = rows(M, along, along < LENGTH, column, width, last)
        a = dot(s, m, a, PRECISION, INTERPRETED)
    return a


@triton.jit
def recur(
    s: tl.tensor, W: tl.tensor,
    S: tl.tensor, stride: tl.constexpr, LENGTH: tl.constexpr, row: tl.tensor, inside: tl.tensor,
    M: tl.tensor, width: tl.constexpr, last: tl.constexpr, column: tl.tensor,
    FORM: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PIECES: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The product s M at some columns: of s and W, which stay, in the resident form, otherwise of S and M in memory."""
    a = zeros(TILE, COLUMNS, S.dtype.element_ty)
    if FORM == "resident":
        a = multiply(s, W, a, COLUMNS, PIECES, PRECISION, INTERPRETED)
    else:
        a = walk(S, stride, LENGTH, row, inside, M, width, last, column, a, DEPTH, PRECISION, INTERPRETED)
    return a


@triton.jit
def gates(
    s: tl.tensor, W: tl.tensor,
    S: tl.tensor, stride: tl.constexpr, row: tl.tensor, inside: tl.tensor,
    M: tl.tensor, COUNT: tl.constexpr, H: tl.constexpr, column: tl.tensor,
    FORM: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PIECES: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The COUNT products of s (.., H) with the matrices beside each other in M (H, COUNT H), or in W if they stay."""
    found = ()
    for i in tl.static_range(COUNT):
        a = recur(
            s, W[i], S, stride, H, row, inside, M + i * H, COUNT * H, H, column,
            FORM, TILE, COLUMNS, DEPTH, PIECES, PRECISION, INTERPRETED,
        )  # fmt: skip
        found = found + (a,)  # type: ignore[assignment]  # noqa: RUF005
    return found


@triton.jit
def gathered(
    s: tl.tensor, W: tl.tensor,
    S: tl.tensor, stride: tl.constexpr, row: tl.tensor, inside: tl.tensor,
    M: tl.tensor, COUNT: tl.constexpr, H: tl.constexpr, column: tl.tensor,
    FORM: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PIECES: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The sum of COUNT products, s[i] (.., H) with the i-th of the matrices under each other in M (COUNT H, H)."""
    a = zeros(TILE, COLUMNS, S.dtype.element_ty)
    if FORM == "resident":
        for i in tl.static_range(COUNT):
            a = multiply(s[i], W[i], a, COLUMNS, PIECES, PRECISION, INTERPRETED)
    else:
        a = walk(S, stride, COUNT * H, row, inside, M, H, H, column, a, DEPTH, PRECISION, INTERPRETED)
    return a


@triton.jit
def step_end(FORM: tl.constexpr) -> None:
    """Wait for all threads of the program, where what follows reads what they have stored."""
    if FORM == "walked":
        tl.debug_barrier()


@triton.jit
def sigmoid(a: tl.tensor) -> tl.tensor:
    """1 / (1 + exp(-a)), of a positive exponent never."""
    e = tl.exp(-tl.abs(a))
    return tl.where(a >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def tanh(a: tl.tensor, INTERPRETED: tl.constexpr) -> tl.tensor:
    """The hyperbolic tangent, to 3e-7 of its value in float32.

    Without a branch: behind those of CUDA's own function the compiler moves products, and runs out of registers.
    """
    e = tl.exp(2.0 * tl.abs(a))
    x = tl.where(a >= 0, 1.0, -1.0) * (1.0 - 2.0 / (e + 1.0))
    if a.dtype == tl.float64:
        # The interpreter does not know CUDA's own.
        if not INTERPRETED:
            x = libdevice.tanh(a)
    else:
        # Near zero the difference cancels: tanh(a) / a - 1 by a polynomial in a^2, the best for |a| < 0.6.
        y = a * a
        p = -0.006269119679927826 * y + 0.021110959351062775
        p = p * y - 0.053873948752880096
        p = p * y + 0.13332915306091309
        p = p * y - 0.3333333134651184
        x = tl.where(y < 0.36, a + a * (y * p), x)
    return x
