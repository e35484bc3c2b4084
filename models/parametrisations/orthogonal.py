"""Orthogonal weights: the exponential of a skew-symmetric matrix."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.parametrisations.angles import skew_logarithm, skew_start
from models.parametrisations.exponential import exponential_of_skew, upper_places
from models.parametrisations.structure import Structure, impose, square


class SkewExponential(Structure):
    """W = exp(A), A = U - U': every orthogonal matrix of determinant 1, from n (n-1) / 2 free numbers.

    Args:
        start: (n (n-1) / 2,), what is strictly above the diagonal of A, row by row.
        n: rows.
    """

    parts = ("orthogonal",)
    places: Tensor

    def __init__(self, start: Tensor, n: int) -> None:
        super().__init__((start,))
        self.n = n
        self.register_buffer("places", upper_places(n), persistent=False)

    def forward(self, *free: Tensor) -> Tensor:
        """Form W (n, n), in the dtype of the free numbers."""
        (values,) = free
        return exponential_of_skew(values, self.n, self.places).to(values.dtype)

    def inverted(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Find the free numbers of a rotation.

        Raises:
            ValueError: the weight is no rotation.
        """
        return (skew_logarithm(weight).flatten()[self.places.cpu()].to(weight),)


def orthogonal(
    module: nn.Module, name: str = "weight", init: str = "random", generator: torch.Generator | None = None
) -> nn.Module:
    """Keep a square weight orthogonal: W = exp(A) with a skew-symmetric A, whose upper part is trained.

    ``orthogonal(torch.nn.RNN(3, 64), "weight_hh_l0")``. A module that uses its weight several times in a pass forms the
    matrix each time, unless `torch.nn.utils.parametrize.cached` surrounds the pass. A rotation may be assigned to the
    weight later. `torch.nn.utils.parametrizations.orthogonal` has other maps, and weights that are not square.

    Args:
        module: that has the weight.
        name: of the weight (n, n).
        init: what it starts from, one of `models.parametrisations.INITS`; what it was is lost.
        generator: on the CPU; None for torch's own.

    Returns:
        The module.

    Raises:
        ValueError: the weight is missing, not square, or has a parametrisation already; or another init.

    Source: Lezcano-Casado & Martinez-Rubio, "Cheap orthogonal constraints in neural networks" (expRNN), ICML 2019.
    """
    n = len(square(module, name))
    return impose(module, name, SkewExponential(skew_start(n, init, generator), n))
