"""The passes of any registered cell as torch operators, on plain tensors: they know no derivative.

Many vectors (vmap over tangents or cotangents) are carried together in one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hfopt.recurrences.backends import backend
from hfopt.recurrences.registry import CELLS, Maybe, Maybes, Tensors, batch_of_vectors, with_vectors


def _own(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors, none of them a view: torch's forward mode cannot give a tangent to a view of what nobody sees."""
    return [x.clone() if x._is_view() else x for x in tensors]


@torch.library.custom_op("hfopt::sequence_forward", mutates_args=())
def sequence_forward(cell: str, arguments: Sequence[Tensor]) -> list[Tensor]:
    """The results of the cell: its outputs, then what the other passes want stored."""
    return backend(CELLS[cell], arguments[0]).forward(arguments)


@torch.library.custom_op("hfopt::sequence_tangent", mutates_args=())
def sequence_tangent(
    cell: str, tangents: Sequence[Tensor | None], arguments: Sequence[Tensor], results: Sequence[Tensor]
) -> list[Tensor]:
    """J d, one tensor per output, of one tangent per argument (None: zero)."""
    return _own(backend(CELLS[cell], arguments[0]).tangent(tangents, arguments, results))


@torch.library.custom_op("hfopt::sequence_adjoint", mutates_args=())
def sequence_adjoint(
    cell: str,
    cotangents: Sequence[Tensor | None],
    arguments: Sequence[Tensor],
    results: Sequence[Tensor],
    needed: Sequence[bool],
) -> list[Tensor]:
    """J' U, one tensor per argument (empty where not needed), of one cotangent per output (None: zero)."""
    return _own(backend(CELLS[cell], arguments[0]).adjoint(cotangents, arguments, results, needed))


@sequence_forward.register_fake
def _(cell: str, arguments: Sequence[Tensor]) -> list[Tensor]:
    return [arguments[0].new_empty(shape) for shape in CELLS[cell].shapes(arguments)]


@sequence_tangent.register_fake
def _(
    cell: str, tangents: Sequence[Tensor | None], arguments: Sequence[Tensor], results: Sequence[Tensor]
) -> list[Tensor]:
    vectors = batch_of_vectors(tangents, arguments)
    return [y.new_empty(with_vectors(y.shape, vectors)) for y in results[: CELLS[cell].outputs]]


@sequence_adjoint.register_fake
def _(
    cell: str,
    cotangents: Sequence[Tensor | None],
    arguments: Sequence[Tensor],
    results: Sequence[Tensor],
    needed: Sequence[bool],
) -> list[Tensor]:
    vectors = batch_of_vectors(cotangents, results[: CELLS[cell].outputs])
    return [
        x.new_empty(with_vectors(x.shape, vectors)) if wanted else x.new_empty(0)
        for x, wanted in zip(arguments, needed, strict=True)
    ]


Dims = Sequence[int | None]


def _one_by_one(operator: Callable[..., Any], size: int, lists: Sequence[tuple[Maybes, Dims]]) -> tuple[Any, Any]:
    """Call `operator` with the k-th elements of the batched tensors in `lists`, for each k, and stack the results."""
    rows = []
    for k in range(size):
        row = [
            [x if x is None or d is None else x.select(d, k) for x, d in zip(xs, dims, strict=True)]
            for xs, dims in lists
        ]
        rows.append(operator(*row))
    stacked = [torch.stack(parts) for parts in zip(*rows, strict=True)]
    return stacked, [0] * len(stacked)


def _together(vectors: Maybes, dims: Dims, size: int) -> list[Maybe]:
    """The vectors that are there with their batch dimension before the last two, added where there is none."""
    moved: list[Maybe] = []
    for x, dim in zip(vectors, dims, strict=True):
        if x is None:
            moved.append(None)
        elif dim is None:
            at = 1 if x.dim() == 3 else 0
            moved.append(x.unsqueeze(at).expand(*x.shape[:at], size, *x.shape[at:]))
        else:
            moved.append(x.movedim(dim, 1 if x.dim() == 4 else 0))
    return moved


def _batched_point(dims: Dims) -> bool:
    return any(d is not None for d in dims)


def _carrying(vectors: Maybes, dims: Dims, points: Tensors) -> bool:
    """Whether the vectors are many already, besides the dimension mapped over."""
    return any(
        x is not None and x.dim() - (d is not None) != y.dim() for x, d, y in zip(vectors, dims, points, strict=True)
    )


def _dims(dims: Any, count: int) -> Dims:
    """The batch dimensions of a list's tensors; a list without any may come as None."""
    return (None,) * count if dims is None else dims


@sequence_forward.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], cell: str, arguments: Tensors) -> Any:
    dims = _dims(in_dims[1], len(arguments))
    return _one_by_one(lambda x: sequence_forward(cell, x), info.batch_size, [(arguments, dims)])


@sequence_tangent.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], cell: str, tangents: Maybes, arguments: Tensors, results: Tensors) -> Any:
    lists = (tangents, arguments, results)
    on, *at = (_dims(d, len(xs)) for d, xs in zip(in_dims[1:], lists, strict=True))
    if any(map(_batched_point, at)) or _carrying(tangents, on, arguments):
        each = list(zip(lists, (on, *at), strict=True))
        return _one_by_one(lambda *x: sequence_tangent(cell, *x), info.batch_size, each)
    moved = sequence_tangent(cell, _together(tangents, on, info.batch_size), arguments, results)
    # A traced graph has `view` where the outputs had been contiguous, and so they have to be for each vector.
    return [y.movedim(1, 0).contiguous() if y.dim() == 4 else y for y in moved], [0] * len(moved)


@sequence_adjoint.register_vmap
def _(
    info: Any,
    in_dims: tuple[Any, ...],
    cell: str,
    cotangents: Maybes,
    arguments: Tensors,
    results: Tensors,
    needed: Sequence[bool],
) -> Any:
    lists = (cotangents, arguments, results)
    on, *at = (_dims(d, len(xs)) for d, xs in zip(in_dims[1:4], lists, strict=True))
    if any(map(_batched_point, at)) or _carrying(cotangents, on, results[: len(cotangents)]):
        each = list(zip(lists, (on, *at), strict=True))
        return _one_by_one(lambda *x: sequence_adjoint(cell, *x, needed), info.batch_size, each)
    pulled = sequence_adjoint(cell, _together(cotangents, on, info.batch_size), arguments, results, needed)
    pulled = [g if wanted else g.new_empty(info.batch_size, 0) for g, wanted in zip(pulled, needed, strict=True)]
    return pulled, [1 if g.dim() == 4 else 0 for g in pulled]
