"""What a recurrent cell has to say about itself, and the registry of cells.

A cell is a function of tensors, `arguments -> outputs`, over a whole sequence. Arguments and outputs with three
dimensions are sequences (T, B, .); those with two are weights or states. Where N vectors are carried together (tangents
of arguments, cotangents of outputs), N stands before the last two dimensions: (T, N, B, .), (N, B, h), (N, rows,
columns), and (N, h) for a vector; then every vector that is there has it, and the arguments have not.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple, Protocol

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


class Bent(NamedTuple):
    """H_U p in parts: gradients in the arguments, and cotangents of the outputs whose J' times is the rest."""

    outputs: Sequence[Maybe]
    arguments: Sequence[Maybe]


class Cell(ABC):
    """A recurrent cell: its passes in torch's operations, and the same function as autograd can differentiate it.

    Attributes:
        name: under which it is registered.
        arguments: how many tensors it takes.
        outputs: how many it gives.
        results: how many its forward pass gives, outputs included.
        columns: whether it also takes X @ K_x and a K_x without rows instead of X and K_x, its first two arguments.
    """

    name: str
    arguments: int
    outputs: int
    results: int
    columns: bool = False

    @abstractmethod
    def shapes(self, arguments: Tensors) -> list[tuple[int, ...]]:
        """Shapes of the results."""

    @abstractmethod
    def plain(self, arguments: Tensors) -> tuple[Tensor, ...]:
        """The outputs, as a composition of torch's own operations."""

    @property
    def bends(self) -> bool:
        """Whether `bent` knows second derivatives."""
        return False

    def bent(
        self, arguments: Tensors, outputs: Tensors, p: Maybes, R: Maybes, U: Maybes, alpha: Maybe,
        needed: Sequence[bool],
    ) -> Bent:  # fmt: skip
        """H_U p in closed form, H_U the Hessian of <U, f>, but for one adjoint pass.

        Args:
            p, R: tangents of arguments and outputs, R = J p; a None is zero.
            U: cotangents of the outputs; a None is zero.
            alpha: cotangents of X @ K_x in J'U, if the cell takes these `columns`, else None.
            needed: of every argument.
        """
        raise NotImplementedError

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


def register(cell: Cell) -> None:
    """Make the operators know `cell` by its name."""
    CELLS[cell.name] = cell


def batch_of_vectors(vectors: Maybes, arguments: Tensors) -> tuple[int, ...]:
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
