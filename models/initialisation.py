"""Sparse random initialisation of weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def generator_of(seed: int | torch.Generator) -> torch.Generator:
    """A CPU generator: the one given, or a new one started from `seed`."""
    if isinstance(seed, torch.Generator):
        if seed.device.type != "cpu":
            raise ValueError(
                f"seed is a generator on {seed.device}; weights are drawn on the CPU, give a CPU generator"
            )
        return seed
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def sparse_(weight: Tensor, connections: int, deviation: float, generator: torch.Generator) -> Tensor:
    """Fill `weight` in place: `connections` entries of every column, in random rows, from N(0, deviation^2); else zero.

    A column holds the weights into one unit. With fewer rows than `connections`, all are filled. The draws depend on
    the generator and the shape, not on dtype or device.

    Args:
        weight: (rows, columns).
        connections: incoming connections of each unit, at least 1.
        deviation: standard deviation of the entries that are there.
        generator: a CPU generator.

    Raises:
        ValueError: if `connections` is below 1 or `deviation` is negative or not finite.

    Source: Martens, "Deep learning via Hessian-free optimization", ICML 2010, section 5.
    """
    if connections < 1:
        raise ValueError(f"connections is {connections}; a unit has at least 1 incoming connection")
    if not (math.isfinite(deviation) and deviation >= 0):
        raise ValueError(f"a scale gives the standard deviation {deviation}; it is finite and not negative")
    rows, columns = weight.shape
    values = torch.randn(rows, columns, generator=generator, dtype=torch.float64) * deviation
    ranks = torch.rand(rows, columns, generator=generator, dtype=torch.float64).argsort(0).argsort(0)
    return weight.copy_(torch.where(ranks < connections, values, 0.0))
