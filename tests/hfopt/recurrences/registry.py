"""All defined cells, small problems for them, and their steps one after the other as the reference.

Beside the cells themselves: "+a" with the pre-activations that structural damping limits as another output,
".projected" with projections in place of inputs, ".read" and ".read6" with a readout of 2 and 6 outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hfopt.recurrences.cells import EXAMPLES
from hfopt.recurrences.generated import Generated, generated
from hfopt.recurrences.readout import Read, generated_readout

NAMES = tuple(EXAMPLES)
MARKED = ("tanh+a", "relu+a", "sigmoid+a", "identity+a", "mrnn+a")
PROJECTED = tuple(f"{name}.projected" for name in NAMES if name != "intersection")
READ = ("tanh.read", "tanh+a.read", "tanh.projected.read6", "lstm.read6", "gru.read", "rhn_uncoupled_dropout.read",
        "intersection.read6", "mrnn+a.read6")  # fmt: skip
Tensors = tuple[Tensor, ...]


def cell(name: str) -> Generated:
    """The cell, without its readout."""
    definition = EXAMPLES[name.partition("+")[0].partition(".")[0]]()
    return generated(definition.marked if "+a" in name else definition)


def whole(name: str) -> Generated | Read:
    """The cell, with its readout if the name has one."""
    return generated_readout(cell(name).definition) if ".read" in name else cell(name)


def arguments(
    name: str, steps: int = 5, batch: int = 3, inputs: int = 5, units: int = 4, factors: int = 3, seed: int = 0
) -> Tensors:
    """Random arguments of `whole` in float64, away from corners at these seeds; masks are 0 and 2."""
    c, draws = cell(name), torch.Generator().manual_seed(seed)
    sizes = {"units": units, "factors": factors}

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draws, dtype=torch.float64)

    d = c.definition
    width = sum(sizes[k.size] for k in d.input_columns)
    K = [randn(sizes[p.size], sum(sizes[k.size] for k in p.columns)) * sizes[p.size] ** -0.5 for p in d.products]
    masks = [2.0 * (randn(batch, sizes[s]) > 0).double() for s in d.masks.values()]
    parameters = [randn(sizes[s]) / 2 for s in d.parameters.values()]
    states = [randn(batch, sizes[s]).tanh() for s in d.states.values()]
    X, Kx = randn(steps, batch, inputs), randn(inputs, width) * inputs**-0.5
    if ".projected" in name:
        X, Kx = X @ Kx, Kx[:0]
    read = [randn(units + 1, 6 if "read6" in name else 2)] if ".read" in name else []
    return (X, Kx, *K, *parameters, *masks, *states, *read)


def of_masks(c: Generated | Read) -> list[int]:
    """The places of the masks, which have no derivative."""
    c = c.base if isinstance(c, Read) else c
    first = 2 + len(c.definition.products) + len(c.definition.parameters)
    return list(range(first, first + len(c.definition.masks)))


def like(tensors: Sequence[Tensor], seed: int, vectors: tuple[int, ...] = ()) -> list[Tensor]:
    """Random tensors of the same shapes; N vectors stand before the last two dimensions."""
    draws = torch.Generator().manual_seed(seed)

    def shape(x: Tensor) -> tuple[int, ...]:
        at = 1 if x.dim() == 3 else 0
        return (*x.shape[:at], *vectors, *x.shape[at:])

    return [torch.randn(shape(x), generator=draws, dtype=x.dtype) for x in tensors]


def tangent_by_autograd(c: Generated | Read, given: Tensors, d: Sequence[Tensor | None]) -> Tensors:
    """J d through the definition, in forward mode; a mask's tangent is none."""
    masks = of_masks(c)
    full = tuple(
        torch.zeros_like(x) if v is None or i in masks else v for i, (x, v) in enumerate(zip(given, d, strict=True))
    )
    moved: Tensors = torch.func.jvp(lambda *x: c.plain(x), given, full)[1]
    return moved


def adjoint_by_autograd(
    c: Generated | Read, given: Tensors, u: Sequence[Tensor | None], outputs: Sequence[Tensor]
) -> Tensors:
    """J'u through the definition, in reverse mode."""
    full = tuple(torch.zeros_like(y) if v is None else v for y, v in zip(outputs, u, strict=True))
    pulled: Tensors = torch.func.vjp(lambda *x: c.plain(x), *given)[1](full)
    return pulled


def each(vectors: Sequence[Any], k: int) -> list[Any]:
    """The k-th of N vectors that stand before the last two dimensions (first for (N, .))."""
    return [None if x is None else x[:, k] if x.dim() == 4 else x[k] for x in vectors]


Passes = Callable[..., Any]
