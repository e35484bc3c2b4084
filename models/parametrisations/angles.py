"""Initial skew-symmetric matrices, whose exponentials are orthogonal: by the angles of their rotations, or random."""

from __future__ import annotations

import math

import torch
from torch import Tensor

INITS = ("henaff", "cayley", "random")


def skew_start(n: int, init: str, generator: torch.Generator | None = None) -> Tensor:
    """Draw what is strictly above the diagonal of a skew-symmetric matrix A, row by row, (n (n-1) / 2,) in float64.

    Blocks [[0, s], [-s, 0]] along the diagonal, which exp(A) turns into rotations by s: "henaff" with s uniform from
    -pi to 0; "cayley" with s = -tan(u / 2), u uniform from 0 to pi/2, so that angles are smaller than 1. Or "random":
    the logarithm of a random rotation, uniform over all of them (Haar measure).

    Args:
        n: rows of A.
        init: one of `INITS`.
        generator: on the CPU; None for torch's own.

    Raises:
        ValueError: another init.

    Source: Henaff, Szlam & LeCun, ICML 2016; Helfrich, Willmott & Ye, ICML 2018; Kerg, Goyette et al., NeurIPS 2019.
    """
    if init not in INITS:
        raise ValueError(f"init is {init!r}; an orthogonal matrix starts from {', '.join(map(repr, INITS))}")
    if init == "random":
        rows, columns = torch.triu_indices(n, n, 1)
        return skew_logarithm(random_rotation(n, generator))[rows, columns]
    u = torch.rand(n // 2, generator=generator, dtype=torch.float64)
    s = -math.pi * u if init == "henaff" else -torch.tan(math.pi / 4 * u)
    A = torch.zeros(n, n, dtype=torch.float64)
    even = torch.arange(0, n - 1, 2)
    A[even, even + 1] = s
    rows, columns = torch.triu_indices(n, n, 1)
    upper: Tensor = A[rows, columns]
    return upper


def random_rotation(n: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw an orthogonal matrix of determinant 1, uniformly, (n, n) in float64.

    Source: Mezzadri, "How to generate random matrices from the classical compact groups", Notices of the AMS 2007.
    """
    drawn, R = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    Q: Tensor = drawn * R.diagonal().sign()
    if torch.linalg.det(Q) < 0:
        Q[:, 0] = -Q[:, 0]
    return Q


def skew_logarithm(Q: Tensor) -> Tensor:
    """Compute the principal logarithm A of a rotation Q (n, n), exp(A) = Q: its angles are smaller than pi.

    Raises:
        ValueError: Q is not orthogonal, or its determinant is -1; or an eigenvalue is -1 to rounding.
    """
    Q = Q.detach().double().cpu()
    n = len(Q)
    eye = torch.eye(n, dtype=Q.dtype)
    # 1e-4: what is left of float32 in a long product is good enough to be taken for orthogonal.
    if not torch.allclose(Q.t() @ Q, eye, atol=1e-4) or torch.linalg.det(Q) < 0:
        raise ValueError("the matrix is no rotation: its transpose is its inverse, and its determinant 1")
    # Q is normal: a skew-symmetric part and a symmetric part that commute. i (Q - Q')/2 is Hermitian, and has Q's
    # eigenvectors but for angles t and pi - t, which have the same sine; a combination with the cosines tells them
    # apart for all but a null set of weights.
    S, C = (Q - Q.t()) / 2, (Q + Q.t()) / 2
    _, V = torch.linalg.eigh(torch.complex(0.7390851 * C, -S))
    values = torch.einsum("ji,jk,ki->i", V.conj(), Q.to(V.dtype), V)
    A: Tensor = ((V * (1j * torch.angle(values))) @ V.conj().t()).real
    A = (A - A.t()) / 2
    if not torch.allclose(torch.matrix_exp(A), Q, atol=1e-3):
        raise ValueError("the rotation has no logarithm to rounding: it turns a plane by half a circle")
    return A
