"""What a recurrent cell has to say about itself, the registry of cells, and the choice of who runs its passes.

A cell is a function of tensors, `arguments -> outputs`, over a whole sequence. Arguments and outputs with three
dimensions are sequences (T, B, .); those with two are weights or states. Where N vectors are carried together (tangents
of arguments, cotangents of outputs), N stands before the last two dimensions: (T, N, B, .), (N, B, h), (N, rows,
columns), and (N, h) for a vector; then every vector that is there has it, and the arguments have not.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor

Maybe = Tensor | None
Tensors = Sequence[Tensor]
Maybes = Sequence[Maybe]


class Passes(Protocol):
    """The three passes of a cell, on plain tensors that autograd does not see."""

    def forward(self, arguments: Tensors) -> list[Tensor]:
        """The results: the cell's outputs first, then what tangent and adjoint want stored."""

    def tangent(self, tangents: Maybes, arguments: Tensors, results: Tensors) -> list[Tensor]:
        """J d, one tensor per output, of one tangent per argument; a None is zero, not all are None."""

    def adjoint(self, cotangents: Maybes, arguments: Tensors, results: Tensors, needed: Sequence[bool]) -> list[Tensor]:
        """J' u, one tensor per argument, of one cotangent per output; a None is zero, not all are None.

        A tensor that is not `needed` is empty, shape (0,).
        """


class Cell(ABC):
    """A recurrent cell: its passes in torch's operations, and the same function as autograd can differentiate it.

    Attributes:
        name: under which it is registered.
        arguments: how many tensors it takes.
        outputs: how many it gives.
        results: how many its forward pass gives, outputs included.
    """

    name: str
    arguments: int
    outputs: int
    results: int

    @abstractmethod
    def shapes(self, arguments: Tensors) -> list[tuple[int, ...]]:
        """Shapes of the results."""

    @abstractmethod
    def plain(self, arguments: Tensors) -> tuple[Tensor, ...]:
        """The outputs, as a composition of torch's own operations."""

    @abstractmethod
    def forward(self, arguments: Tensors) -> list[Tensor]:
        """As in `Passes`."""

    @abstractmethod
    def tangent(self, tangents: Maybes, arguments: Tensors, results: Tensors) -> list[Tensor]:
        """As in `Passes`."""

    @abstractmethod
    def adjoint(self, cotangents: Maybes, arguments: Tensors, results: Tensors, needed: Sequence[bool]) -> list[Tensor]:
        """As in `Passes`."""


CELLS: dict[str, Cell] = {}

_FASTER = {"cpu": "hfopt.recurrences.native", "cuda": "hfopt.recurrences.triton"}


def register(cell: Cell) -> None:
    """Make the operators know `cell` by its name."""
    CELLS[cell.name] = cell


def backend(cell: Cell, like: Tensor) -> Passes:
    """Who runs the passes of `cell` on tensors like this one: compiled kernels where there are some, else the cell."""
    # Imported when it is needed: these modules know the cells.
    from hfopt.recurrences.backends import kernels_serve

    place = _FASTER.get(like.device.type)
    if place is None or (like.device.type == "cuda" and not kernels_serve(like)):
        return cell
    found = importlib.import_module(place).cell(cell.name)
    return cell if found is None else cast(Passes, found)


def carried(vectors: Maybes, arguments: Tensors) -> tuple[int, ...]:
    """(N,) if N vectors are carried together, otherwise (); `arguments` has what each is a tangent or cotangent of."""
    for vector, argument in zip(vectors, arguments, strict=True):
        if vector is not None:
            return tuple(vector.shape[_place(argument) : _place(argument) + vector.dim() - argument.dim()])
    return ()


def _place(argument: Tensor) -> int:
    """Where N stands among the dimensions of a vector: before the sequences, or first."""
    return 1 if argument.dim() == 3 else 0


def with_vectors(shape: Sequence[int], vectors: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of N tensors of this shape carried together."""
    place = 1 if len(shape) == 3 else 0
    return (*shape[:place], *vectors, *shape[place:])


def lagged(H: Tensor, first: Tensor, start: int, stop: int) -> Tensor:
    """H_{t-1} for t = start..stop-1, with H_{-1} = first (*N, B, h); a range that begins with step 0 ends there."""
    return first.unsqueeze(0) if start == 0 else H[start - 1 : stop - 1]


def project_(out: Tensor, *pairs: tuple[Maybe, Maybe]) -> Tensor:
    """Fill out (n, *N, B, m) with the sum of rows @ weight over the pairs; a pair with a None is zero.

    Either of rows (n, *N, B, k) and weight (*N, k, m) carries the vectors, the other has no N.
    """
    if out.numel() == 0:
        return out
    empty = True
    for rows, weight in pairs:
        if rows is None or weight is None or weight.shape[-2] == 0:
            continue
        if weight.dim() == 2:
            flat, left = out.view(-1, out.shape[-1]), rows.reshape(-1, rows.shape[-1])
            if empty:
                torch.mm(left, weight, out=flat)
            else:
                flat.addmm_(left, weight)
        elif empty:
            torch.matmul(rows.unsqueeze(1), weight, out=out)
        else:
            out.add_(rows.unsqueeze(1) @ weight)
        empty = False
    return out.zero_() if empty else out


def correlate_(total: Tensor, rows: Tensor, values: Tensor) -> None:
    """Add to total (*N, k, m) the sum over all steps of rows' values: rows (n, B, k), values (n, *N, B, m)."""
    if rows.shape[-1] == 0:
        return
    left = rows.reshape(-1, rows.shape[-1]).t()
    if total.dim() == 2:
        total.addmm_(left, values.reshape(-1, values.shape[-1]))
        return
    for one, value in zip(total.unbind(), values.unbind(1), strict=True):
        one.addmm_(left, value.reshape(-1, value.shape[-1]))


def steps_of(X: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The steps of a contiguous X (n, *N, B, m): as matrices (N B, m) for products, and as they are."""
    if X.dim() == 3:
        steps = X.unbind()
        return steps, steps
    return X.flatten(1, 2).unbind(), X.unbind()


def in_gates(X: Tensor, count: int) -> Tensor:
    """X (..., count h) as (..., count, h)."""
    return X.view(*X.shape[:-1], count, -1)


def pull_(u: Maybe, following: Maybe, Wt: Tensor, out: Tensor) -> None:
    """Fill out (N B, h) with u + following W'; a None is zero."""
    if following is None:
        if u is None:
            out.zero_()
        else:
            out.copy_(u)
    elif u is None:
        torch.mm(following, Wt, out=out)
    else:
        torch.addmm(u, following, Wt, out=out)
