"""The gated and multiplicative cells by their definitions, one step after the other, and small problems for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from hfopt.recurrences.sequence import run

Tensors = tuple[Tensor, ...]


class Sizes(NamedTuple):
    """T, B, V, h and F."""

    steps: int = 5
    batch: int = 3
    inputs: int = 2
    hidden: int = 4
    factors: int = 3


def sigma(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


SMALL = Sizes()


def lstm(X: Tensor, K: Tensor, h: Tensor, c: Tensor) -> Tensors:
    hs, cs, n = [], [], h.shape[1]
    for x in X.unbind():
        a = torch.cat((h, x), 1) @ K
        i, f, o = sigma(a[:, :n]), sigma(a[:, n : 2 * n]), sigma(a[:, 3 * n :])
        c = f * c + i * torch.tanh(a[:, 2 * n : 3 * n])
        h = o * torch.tanh(c)
        hs.append(h)
        cs.append(c)
    return torch.stack(hs), torch.stack(cs)


def gru(X: Tensor, Kh: Tensor, Kx: Tensor, b: Tensor, h: Tensor) -> Tensors:
    hs, n = [], h.shape[1]
    for x in X.unbind():
        a, m = x @ Kx, h @ Kh
        r, z = sigma(a[:, :n] + m[:, :n]), sigma(a[:, n : 2 * n] + m[:, n : 2 * n])
        candidate = torch.tanh(a[:, 2 * n :] + r * (m[:, 2 * n :] + b))
        h = (1 - z) * candidate + z * h
        hs.append(h)
    return (torch.stack(hs),)


def mrnn(f: Callable[[Tensor], Tensor], preactivations: bool) -> Callable[..., Tensors]:
    def of(X: Tensor, Wxf: Tensor, Whf: Tensor, K: Tensor, h: Tensor) -> Tensors:
        hs, inputs = [], []
        for x in X.unbind():
            a = torch.cat(((x @ Wxf) * (h @ Whf), x), 1) @ K
            h = f(a)
            hs.append(h)
            inputs.append(a)
        return (torch.stack(hs), torch.stack(inputs)) if preactivations else (torch.stack(hs),)

    return of


PLAIN: Mapping[str, Callable[..., Tensors]] = {
    "lstm": lstm,
    "gru": gru,
    **{
        f"mrnn_{name}" + "+a" * marked: mrnn(f, marked)
        for name, f in (("tanh", torch.tanh), ("relu", torch.relu), ("sigmoid", sigma))
        for marked in (False, True)
    },
}
NAMES = tuple(PLAIN)


def shapes(name: str, sizes: Sizes) -> tuple[tuple[int, ...], ...]:
    T, B, V, h, F = sizes
    if name == "lstm":
        return (T, B, V), (h + V, 4 * h), (B, h), (B, h)
    if name == "gru":
        return (T, B, V), (h, 3 * h), (V, 3 * h), (h,), (B, h)
    return (T, B, V), (V, F), (h, F), (F + V, h), (B, h)


def arguments(name: str, sizes: Sizes = SMALL, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensors:
    """Random arguments of the cell, drawn alike in every dtype, away from relu's corner at these seeds."""
    draws = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(shape, generator=draws, dtype=torch.float64).to(dtype) / (2 if len(shape) == 2 else 1)
        for shape in shapes(name, sizes)
    )


def cell(name: str) -> Callable[..., Tensors]:
    """The registered cell as a function of its arguments."""
    return lambda *x: run(name, *x)
