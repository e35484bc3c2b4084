"""What all compiled passes share: which tensors they take, how they are cut into tiles, and how they are called."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hfopt.recurrences.native.build import library
from hfopt.recurrences.native.threads import parts, run

Maybe = Tensor | None

_SUFFIX = {torch.float32: "float32", torch.float64: "float64"}


def serves(like: Tensor) -> bool:
    """Whether the compiled passes take tensors like this one: on the CPU, in float32 or float64."""
    return like.device.type == "cpu" and like.dtype in _SUFFIX and library() is not None


def padded(columns: int) -> int:
    """Length of a row that is read panel by panel (up to 32 numbers), off the multiples of a page."""
    length = -(-columns // 32) * 32
    return length + 32 if length % 256 == 0 else length


def tile(row_bytes: int, ranges: Sequence[tuple[int, int]]) -> int:
    """Sequences that go through time together: enough for the products' speed, few enough for the caches, and so that
    the longest of `ranges` is cut evenly."""
    wanted = max(12, min(120, 24576 // row_bytes))
    rows = max(last - first for first, last in ranges)
    return -(-rows // max(1, round(rows / wanted)))


def accumulation_steps(rows: int) -> int:
    """Steps of a tile of `rows` sequences after which sums over both are added up: enough to make up for reading and
    writing the sums; LONGEST_BLOCK of kernels.c is the most."""
    return max(2, min(32, -(-192 // rows)))


def contiguous(tensors: Iterable[Maybe]) -> list[Maybe]:
    """The tensors as C reads them."""
    return [None if x is None else x.contiguous() for x in tensors]


@dataclass(frozen=True)
class Vectors:
    """How many vectors tangents or cotangents carry: N before the last two dimensions, or none.

    Attributes:
        shape: (N,) or ().
        count: N, or 1.
    """

    shape: tuple[int, ...]

    @classmethod
    def of(cls, given: Iterable[Maybe], dims: Iterable[int]) -> Vectors:
        """Those of the tensors given; `dims` says how many dimensions each has without N."""
        for x, dim in zip(given, dims, strict=True):
            if x is not None:
                return cls((x.shape[-3],) if x.dim() > dim and dim > 1 else tuple(x.shape[: x.dim() - dim]))
        return cls(())

    @property
    def count(self) -> int:
        return self.shape[0] if self.shape else 1

    def sequence(self, steps: int, *rest: int) -> tuple[int, ...]:
        """(T, *N, ...)."""
        return (steps, *self.shape, *rest)

    def matrix(self, *rest: int) -> tuple[int, ...]:
        """(*N, ...)."""
        return (*self.shape, *rest)


def total(sums: Tensor, many: Vectors, columns: int) -> Tensor:
    """What all ranges summed up, (ranges, N, rows, padded columns), as one matrix (*N, rows, columns)."""
    return sums.sum(0)[..., :columns].reshape(many.matrix(sums.shape[-2], columns)).contiguous()


def call(
    name: str,
    like: Tensor,
    sizes: Sequence[int],
    settings: Sequence[int],
    tensors: Sequence[Maybe],
    ranges: Sequence[tuple[int, int]],
    own: Sequence[Sequence[Maybe]] | None = None,
    compiled: ctypes.CDLL | None = None,
) -> None:
    """Run a pass on ranges of sequences: numbers (*sizes, first, last, *settings), pointers (*tensors, *own[k]).

    `own`: tensors that the k-th range has for itself, such as sums. `compiled`: the library, if not the package's.
    """
    mine: Sequence[Sequence[Maybe]] = [()] * len(ranges) if own is None else own
    run(
        f"{name}_{_SUFFIX[like.dtype]}",
        [((*sizes, *r, *settings), (*tensors, *extra)) for r, extra in zip(ranges, mine, strict=True)],
        compiled,
    )


__all__ = ["Maybe", "Vectors", "accumulation_steps", "call", "contiguous", "padded", "parts", "serves", "tile", "total"]
