"""The exponential of a skew-symmetric matrix out of products alone, which torch differentiates as often as wanted."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_DEGREE = 12
_COEFFICIENTS = [1 / math.factorial(k) for k in range(_DEGREE + 1)]
_SQUARINGS = {torch.float32: 3, torch.float64: 6}


def exponential_of_skew(values: Tensor, n: int, places: Tensor) -> Tensor:
    """Compute Q = exp(A), A = U - U', U strictly upper triangular; Q is orthogonal with determinant 1.

    ``exp(A) = p(A / 2^s)^(2^s)`` with the Taylor polynomial p of degree 12: five products of matrices and s more. The
    truncation error is below rounding as long as no angle of A exceeds 10 in float32 (s = 3), 20 in float64 (s = 6).
    Torch's derivative of `torch.matrix_exp` is an exponential of twice the size, several times as expensive.

    Each squaring doubles the rounding error, and in float32 Q'Q - I would be some 1e-5: there, one Newton step
    Q (3 I - Q'Q) / 2 towards the nearest orthogonal matrix follows. It corrects a truncation error likewise, and has
    the same derivative along orthogonal matrices.

    Args:
        values: (n (n-1) / 2,), the entries of U.
        n: rows of Q.
        places: positions of `values` in U.flatten(), see `upper_places`.

    Returns:
        Q (n, n), in float64 if the values are, and otherwise in float32.

    Source: Moler & Van Loan, "Nineteen dubious ways to compute the exponential of a matrix", SIAM Review 2003, method
    3; Paterson & Stockmeyer, SIAM J. Comput. 1973; Higham, "Functions of matrices", 2008, section 8.3 (Newton-Schulz).
    """
    values = values if values.dtype == torch.float64 else values.float()
    # Under autocast products are in bfloat16, of which three digits are left.
    with torch.autocast(values.device.type, enabled=False):
        return _exponential(scattered(values, n, places), _SQUARINGS[values.dtype])


def _exponential(U: Tensor, squarings: int) -> Tensor:
    X = (U - U.t()) / 2**squarings
    X2 = X @ X
    eye = torch.eye(len(X), dtype=X.dtype, device=X.device)
    powers = (X, X2, X2 @ X)
    X4 = X2 @ X2
    blocks = []
    for j in range(0, 12, 4):
        block = _COEFFICIENTS[j] * eye
        for c, P in zip(_COEFFICIENTS[j + 1 : j + 4], powers, strict=True):
            block = torch.add(block, P, alpha=c)
        blocks.append(block)
    Q: Tensor = _COEFFICIENTS[_DEGREE] * X4 + blocks[2]
    Q = Q @ X4 + blocks[1]
    Q = Q @ X4 + blocks[0]
    for _ in range(squarings):
        Q = Q @ Q
    found: Tensor = Q if Q.dtype == torch.float64 else Q @ (1.5 * eye - 0.5 * (Q.t() @ Q))
    return found


def scattered(values: Tensor, n: int, places: Tensor) -> Tensor:
    """The matrix (n, n) with `values` at `places` of its flat form and zeros elsewhere."""
    # Its derivative is a gather, where that of an index would be a slow sum over equal indices.
    matrix: Tensor = torch.zeros(n * n, dtype=values.dtype, device=values.device).scatter(0, places, values).view(n, n)
    return matrix


def upper_places(n: int) -> Tensor:
    """Positions in the flat matrix (n, n) of what is strictly above the diagonal, row by row."""
    rows, columns = torch.triu_indices(n, n, 1)
    places: Tensor = rows * n + columns
    return places
