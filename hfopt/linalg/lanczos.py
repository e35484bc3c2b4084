"""The Lanczos process: a small tridiagonal matrix that has the extreme eigenvalues of a large symmetric one.

From a unit vector v, m products with A give orthonormal V (P, m) with ``V'AV = T`` tridiagonal. With
``T = U diag(t) U'`` and the weights ``w_i = U_1i^2``, the Gauss quadrature

    v' f(A) v  =  sum_i w_i f(t_i)

is exact for polynomials f of degree below 2m (Golub & Meurant, "Matrices, Moments and Quadrature", 2010). Averaged over
random v, the t_i with their weights are a picture of A's spectral density (Lin, Saad & Yang, SIAM Review 2016).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hfopt.linalg.vector import dot, norm


def lanczos(multiply: Callable[[Tensor], Tensor], start: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Return ``(t, w)``: nodes and weights (m,) of the quadrature that belongs to A and `start`, nodes ascending.

    Every vector is made orthogonal to all before it, twice, so that no eigenvalue occurs again by rounding; all m
    vectors are held. The process ends early, m < `iterations`, where the vectors span an invariant space.

    Args:
        multiply: ``v (P,) -> A v``, A symmetric.
        start: any nonzero v (P,).
        iterations: at most so many products.

    Raises:
        ValueError: `start` is zero or not finite, or `iterations` below 1.
    """
    size = norm(start)
    if iterations < 1 or not 0 < size < float("inf"):
        raise ValueError(f"iterations is {iterations}, |start| {size}; both must be above 0, and |start| finite")
    basis = [start / size]
    diagonal, beside = [], []
    scale = 0.0
    for k in range(min(iterations, len(start))):
        v = multiply(basis[k]).clone()
        diagonal.append(dot(basis[k], v))
        known = torch.stack(basis)
        for _ in range(2):
            v -= known.t() @ (known @ v)
        rest = norm(v)
        scale = max(scale, abs(diagonal[-1]), rest)
        # What is left of an invariant space is rounding.
        if k + 1 == min(iterations, len(start)) or rest <= 100 * torch.finfo(v.dtype).eps * scale:
            break
        beside.append(rest)
        basis.append(v / rest)
    m = len(diagonal)
    small = torch.zeros(m, m, dtype=torch.float64)
    small.diagonal().copy_(torch.tensor(diagonal, dtype=torch.float64))
    for offset in (-1, 1):
        small.diagonal(offset).copy_(torch.tensor(beside[: m - 1], dtype=torch.float64))
    nodes, vectors = torch.linalg.eigh(small)
    return nodes, vectors[0].square()
