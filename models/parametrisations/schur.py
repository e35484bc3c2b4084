"""Weights in real Schur form, near the orthogonal group and yet not normal."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from models.parametrisations.angles import skew_start
from models.parametrisations.exponential import exponential_of_skew, scattered, upper_places
from models.parametrisations.structure import Structure, impose, square


class Schur(Structure):
    """W = P (T + Gamma D) P': rotations D by theta_k and their moduli gamma_k in 2 x 2 blocks, T above the blocks.

    P = exp(A) with a skew-symmetric A. Block k of Gamma D is gamma_k [[cos theta_k, -sin theta_k], [sin theta_k,
    cos theta_k]], with the eigenvalues gamma_k exp(+-i theta_k) of W. T has what stands strictly above the blocks: the
    entries within them belong to Gamma D alone, so that the eigenvalues are those of Gamma D whatever T is. (The
    program of the authors lets T reach into them.) W is orthogonal for T = 0 and gamma = 1.

    The third free parameter is gamma - 1, so that weight decay 2 c of it is the penalty c sum_k (gamma_k - 1)^2.

    Args:
        start: what is above the diagonal of A, theta (n/2,), gamma - 1 (n/2,), and T's entries row by row.
        n: rows, an even number.

    Source: Kerg, Goyette et al., "Non-normal recurrent neural network (nnRNN)", NeurIPS 2019.
    """

    parts = ("orthogonal", "angle", "gamma", "triangular")
    places: Tensor
    above: Tensor
    blocks: Tensor

    def __init__(self, start: tuple[Tensor, Tensor, Tensor, Tensor], n: int) -> None:
        super().__init__(start)
        self.n = n
        self.register_buffer("places", upper_places(n), persistent=False)
        self.register_buffer("above", above_blocks(n), persistent=False)
        first = torch.arange(0, n, 2)
        corners = [first * n + first, first * n + first + 1, (first + 1) * n + first, (first + 1) * n + first + 1]
        self.register_buffer("blocks", torch.cat(corners), persistent=False)

    def forward(self, *free: Tensor) -> Tensor:
        """Form W (n, n), in the dtype of the free numbers."""
        skew, _, _, _ = free
        P = exponential_of_skew(skew, self.n, self.places)
        with torch.autocast(P.device.type, enabled=False):
            return (P @ self.form(*free).to(P.dtype) @ P.t()).to(skew.dtype)

    def form(self, skew: Tensor, theta: Tensor, deviation: Tensor, triangle: Tensor) -> Tensor:
        """Form T + Gamma D (n, n)."""
        gamma = 1 + deviation
        c, s = gamma * theta.cos(), gamma * theta.sin()
        values = torch.cat((c, -s, s, c, triangle))
        return scattered(values, self.n, torch.cat((self.blocks, self.above)))


def above_blocks(n: int) -> Tensor:
    """Positions in the flat matrix (n, n) of what is above the 2 x 2 blocks on the diagonal, row by row."""
    places = upper_places(n)
    return places[places // n // 2 < places % n // 2]


def schur(
    module: nn.Module, name: str = "weight", init: str = "henaff", generator: torch.Generator | None = None
) -> nn.Module:
    """Train a square weight in its real Schur form W = P (T + Gamma D) P'; see :class:`Schur`.

    It starts with T = 0, gamma = 1 and theta uniform from 0 to 2 pi.

    Args:
        module: that has the weight.
        name: of the weight (n, n).
        init: what P starts from, one of `models.parametrisations.INITS`.
        generator: on the CPU; None for torch's own.

    Returns:
        The module.

    Raises:
        ValueError: the weight is missing, not square, or has a parametrisation already; n is odd; or another init.

    Source: Kerg, Goyette et al., NeurIPS 2019.
    """
    n = len(square(module, name))
    if n % 2:
        raise ValueError(f"{name} has {n} rows; its Schur form is made of 2 x 2 blocks, so that n has to be even")
    skew = skew_start(n, init, generator)
    theta = 2 * math.pi * torch.rand(n // 2, generator=generator, dtype=torch.float64)
    return impose(module, name, Schur((skew, theta, torch.zeros(n // 2), torch.zeros(len(above_blocks(n)))), n))
