"""Orthogonal weights as products of few layers of parallel plane rotations."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from models.parametrisations.structure import Structure, impose, square

STYLES = ("tunable", "fft")


class Givens(Structure):
    """W = F_1 F_2 .. F_L: each layer rotates pairs of coordinates, all pairs at once.

    "tunable": L = capacity layers whose pairs are in turn (0, 1), (2, 3), .. and (1, 2), (3, 4), ..; in the latter the
    first and the last coordinate are left alone. "fft": log2 n layers as in a fast Fourier transform, layer l with
    pairs (i, i + 2^l). The rotation of a pair (i, j), i < j, by an angle t takes row vectors (x_i, x_j) to
    (x_i cos t + x_j sin t, x_j cos t - x_i sin t).

    Args:
        start: the angles of all layers, one after the other.
        pairs: the pairs of each layer, (2, .).
        n: rows.
    """

    parts = ("angle",)

    def __init__(self, start: Tensor, pairs: list[Tensor], n: int) -> None:
        super().__init__((start,))
        self.n, self._counts = n, [p.shape[1] for p in pairs]
        for l, (first, second) in enumerate(pairs):
            alone = torch.ones(n, dtype=torch.bool)
            alone[torch.cat((first, second))] = False
            partner = torch.arange(n)
            partner[first], partner[second] = second, first
            self.register_buffer(f"places{l}", torch.cat((first, second)), persistent=False)
            self.register_buffer(f"alone{l}", alone.to(torch.float64), persistent=False)
            self.register_buffer(f"partner{l}", partner, persistent=False)

    def forward(self, *free: Tensor) -> Tensor:
        """Form W (n, n), in the dtype of the angles."""
        (angles,) = free
        W = torch.eye(self.n, dtype=torch.float64, device=angles.device)
        zeros = torch.zeros(self.n, dtype=torch.float64, device=angles.device)
        for l, t in enumerate(torch.split(angles.double(), self._counts)):
            places, partner = self.get_buffer(f"places{l}"), self.get_buffer(f"partner{l}")
            c = zeros.scatter(0, places, torch.cat((t.cos(), t.cos()))) + self.get_buffer(f"alone{l}").double()
            s = zeros.scatter(0, places, torch.cat((t.sin(), -t.sin())))
            W = W * c + W.index_select(1, partner) * s
        return W.to(angles.dtype)


def pairs_of(n: int, style: str, capacity: int) -> list[Tensor]:
    """The pairs of coordinates that each layer rotates, (2, .) each.

    Raises:
        ValueError: an n or a capacity that the style does not have, or another style.
    """
    if style not in STYLES:
        raise ValueError(f"style is {style!r}; choose {' or '.join(map(repr, STYLES))}")
    if style == "fft":
        if n < 2 or n & (n - 1):
            raise ValueError(f"n is {n}; rotations in the style of the FFT need a power of 2, or style 'tunable'")
        places = torch.arange(n)
        return [
            torch.stack((low, low + 2**l)) for l in range(n.bit_length() - 1) for low in [places[places & 2**l == 0]]
        ]
    if n < 2 or n % 2:
        raise ValueError(f"n is {n}; rotations in the tunable style need an even number of units")
    if capacity < 2 or capacity % 2:
        raise ValueError(f"capacity is {capacity}; the tunable style has layers of two kinds in turn: an even number")
    even, odd = torch.arange(0, n, 2), torch.arange(1, n - 1, 2)
    return [torch.stack((p, p + 1)) for p in (even, odd)] * (capacity // 2)


def givens(
    module: nn.Module,
    name: str = "weight",
    style: str = "tunable",
    capacity: int = 2,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Let a square weight be a product of layers of plane rotations, whose angles are trained; see :class:`Givens`.

    It starts with angles uniform from -3.14 to 3.14.

    Args:
        module: that has the weight.
        name: of the weight (n, n).
        style: "tunable" or "fft".
        capacity: layers of the tunable style.
        generator: on the CPU; None for torch's own.

    Returns:
        The module.

    Raises:
        ValueError: the weight is missing, not square, or has a parametrisation already; or n or the capacity does not
            suit the style.

    Source: Jing et al., "Tunable efficient unitary neural networks (EUNN) and their application to RNNs", ICML 2017,
    with real numbers.
    """
    n = len(square(module, name))
    pairs = pairs_of(n, style, capacity)
    count = sum(p.shape[1] for p in pairs)
    angles = 3.14 * (2 * torch.rand(count, generator=generator, dtype=torch.float64) - 1)
    if math.prod(p.shape[1] for p in pairs) == 0:  # n = 2: the second kind of layer has no pair
        pairs = [p for p in pairs if p.shape[1]]
    return impose(module, name, Givens(angles, pairs, n))
