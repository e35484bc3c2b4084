"""Any registered cell over a whole sequence as one node of the autograd graph, and its passes as torch operators.

`hfopt::sequence_forward`, `hfopt::sequence_tangent` and `hfopt::sequence_adjoint` work on plain tensors and know no
derivative. With f the cell's function at its arguments x, U one cotangent per output, and H_U the Hessian of <U, f(x)>:

    forward   x -> f(x)          reverse: the adjoint            forward mode: the tangent
    tangent   d -> J d           in d: the adjoint               in x: H_U d
    adjoint   U -> J'U           in U: the tangent, alone        in x: H_U p for the cotangents p of J'U

Whatever holds H_U goes through the cell's `plain` form. A node of its own (`_Point`) keeps the dependence on x, visited
only when the path to x is asked for, so a Gauss-Newton product by cached double backward is one tangent and one adjoint
call and nothing else. Many vectors (vmap over tangents or cotangents) are carried together in one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import vjp

from hfopt.recurrences.backends import backend
from hfopt.recurrences.products import plus
from hfopt.recurrences.recorded import record
from hfopt.recurrences.registry import CELLS, Cell, Maybe, Maybes, Tensors, batch_of_vectors, with_vectors
from hfopt.recurrences.segments import apply


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


class _Forward(torch.autograd.Function):
    """(cell, *arguments) -> results; what is stored besides the outputs has no derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(cell: str, *arguments: Tensor) -> tuple[Tensor, ...]:
        return tuple(sequence_forward(cell, arguments))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        name, *arguments = inputs
        ctx.cell = CELLS[name]
        ctx.mark_non_differentiable(*output[ctx.cell.outputs :])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*arguments, *output)
        ctx.save_for_forward(*arguments, *output)

    @staticmethod
    def backward(ctx: Any, *U: Maybe) -> tuple[Maybe, ...]:
        arguments, results = _split(ctx.saved_tensors, ctx.cell.arguments)
        return None, *adjoint(ctx.cell, U[: ctx.cell.outputs], arguments, results, ctx.needs_input_grad[1:])

    @staticmethod
    def jvp(ctx: Any, _: None, *d: Maybe) -> tuple[Maybe, ...]:
        arguments, results = _split(ctx.saved_tensors, ctx.cell.arguments)
        return *tangent(ctx.cell, d, arguments, results), *(None,) * (ctx.cell.results - ctx.cell.outputs)


def _setup_compiled(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    name, arguments = inputs
    ctx.cell = CELLS[name]
    ctx.save_for_backward(*arguments, *output)


def _backward_compiled(ctx: Any, U: list[Maybe]) -> tuple[None, list[Maybe]]:
    arguments, results = _split(ctx.saved_tensors, ctx.cell.arguments)
    needed = ctx.needs_input_grad[1]
    return None, list(adjoint(ctx.cell, U[: ctx.cell.outputs], arguments, results, needed))


# torch.compile traces no function with a forward mode of its own; it takes the operator with this backward pass.
sequence_forward.register_autograd(_backward_compiled, setup_context=_setup_compiled)


def run(cell: str, *arguments: Tensor) -> tuple[Tensor, ...]:
    """The outputs of the registered cell, as differentiable functions of the arguments."""
    return results_of(cell, *arguments)[: CELLS[cell].outputs]


def results_of(cell: str, *arguments: Tensor) -> tuple[Tensor, ...]:
    """The outputs as of `run`, and what is stored besides, which has no derivative."""
    if torch.compiler.is_compiling():
        return tuple(sequence_forward(cell, arguments))
    results: tuple[Tensor, ...] = apply(_Forward, cell, *arguments)
    outputs = CELLS[cell].outputs
    return *record(cell, arguments, results, outputs), *results[outputs:]


def _split(tensors: Sequence[Any], count: int) -> tuple[Sequence[Any], Sequence[Any]]:
    return tensors[:count], tensors[count:]


def _all_none(tensors: Maybes) -> bool:
    return all(x is None for x in tensors)


def _refuse_batched_grads(vectors: Maybes) -> None:
    """Torch's own batching of cotangents knows no rule for an operator that takes lists."""
    if any(x is not None and torch._C._functorch.is_legacy_batchedtensor(x) for x in vectors):
        raise RuntimeError(
            "Batching rule not implemented for hfopt::sequence_adjoint under is_grads_batched=True; map over single "
            "cotangents instead: torch.vmap(lambda w: torch.autograd.grad(outputs, inputs, w, retain_graph=True))(ws)"
        )


def _watched() -> bool:
    """Whether what is computed now may be differentiated: by a graph that is recorded, or in forward mode."""
    return torch.is_grad_enabled() or forward_ad._current_level >= 0


def _carriers(cell: Cell, vectors: Maybes, arguments: Tensors, results: Tensors) -> tuple[Tensor, ...]:
    # Mapped over by vmap as soon as one tensor is: cotangents of tensors that are not would be summed.
    given = [x.new_empty(()) for x in (*vectors, *arguments, *results) if x is not None]
    mark = torch.stack(given).sum() if len(given) > 1 else given[0]
    carriers: tuple[Tensor, ...] = apply(_Point, cell.name, mark, *results[: cell.outputs], *arguments)
    return carriers


def tangent(cell: Cell, d: Maybes, arguments: Tensors, results: Tensors) -> tuple[Maybe, ...]:
    """J d, one tensor per output; all None if there is no tangent. Can be differentiated in d and the arguments."""
    _refuse_batched_grads(d)
    if _all_none(d):
        return (None,) * cell.outputs
    if not _watched():
        return tuple(sequence_tangent(cell.name, d, arguments, results))
    results = [r.detach() for r in results]
    carriers = _carriers(cell, d, arguments, results)
    moved: tuple[Tensor, ...] = apply(_Tangent, cell.name, *d, *carriers, *arguments, *results)
    return moved


def adjoint(cell: Cell, U: Maybes, arguments: Tensors, results: Tensors, needed: Sequence[bool]) -> tuple[Maybe, ...]:
    """J' U, one tensor per argument, None where not needed. Can be differentiated in U and the arguments."""
    _refuse_batched_grads(U)
    if _all_none(U):
        return (None,) * cell.arguments
    if _watched():
        results = [r.detach() for r in results]
        carriers = _carriers(cell, U, arguments, results)
        pulled = apply(_Adjoint, cell.name, *needed, *U, *carriers, *arguments, *results)
    else:
        pulled = sequence_adjoint(cell.name, U, arguments, results, needed)
    return tuple(g if wanted else None for g, wanted in zip(pulled, needed, strict=True))


class _Tangent(torch.autograd.Function):
    """(cell, tangents, carriers, arguments, results) -> J d; arguments and results get no gradient here.

    The carriers' values are not read: one for each argument and one for each output. Their tangents are the
    arguments', and their cotangents what `_Point` needs to work out the arguments'.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, *tensors: Any) -> tuple[Tensor, ...]:
        d, _, arguments, results = _parts(CELLS[name], tensors, CELLS[name].arguments)
        return tuple(sequence_tangent(name, d, arguments, results))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        name, *tensors = inputs
        ctx.cell = CELLS[name]
        d, _, arguments, results = _parts(ctx.cell, tensors, ctx.cell.arguments)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*d, *arguments, *results)
        ctx.save_for_forward(*d, *arguments, *results)

    @staticmethod
    def backward(ctx: Any, *U: Maybe) -> tuple[Maybe, ...]:
        cell, count = ctx.cell, ctx.cell.arguments
        d, rest = _split(ctx.saved_tensors, count)
        pulled = adjoint(cell, U, *_split(rest, count), ctx.needs_input_grad[1 : 1 + count])
        return None, *pulled, *d, *U, *(None,) * (count + cell.results)

    @staticmethod
    def jvp(ctx: Any, _: None, *changes: Maybe) -> tuple[Maybe, ...]:
        cell, count = ctx.cell, ctx.cell.arguments
        d, rest = _split(ctx.saved_tensors, count)
        arguments, results = _split(rest, count)
        p = changes[count : 2 * count]
        moved = tangent(cell, changes[:count], arguments, results)
        if _all_none(p):
            return moved
        bent = _second_tangent(cell, arguments, results, d, p)
        return tuple(plus(a, b) for a, b in zip(moved, bent, strict=True))


class _Adjoint(torch.autograd.Function):
    """(cell, *needed, cotangents, carriers, arguments, results) -> J' U; the carriers are as in `_Tangent`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, *given: Any) -> tuple[Tensor, ...]:
        needed, tensors = _split(given, CELLS[name].arguments)
        U, _, arguments, results = _parts(CELLS[name], tensors, CELLS[name].outputs)
        return tuple(sequence_adjoint(name, U, arguments, results, needed))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        name, *given = inputs
        ctx.cell = CELLS[name]
        ctx.needed, tensors = _split(given, ctx.cell.arguments)
        U, _, arguments, results = _parts(ctx.cell, tensors, ctx.cell.outputs)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*U, *arguments, *results)
        ctx.save_for_forward(*U, *arguments, *results)

    @staticmethod
    def backward(ctx: Any, *p: Maybe) -> tuple[Maybe, ...]:
        cell = ctx.cell
        U, rest = _split(ctx.saved_tensors, cell.outputs)
        moved = tangent(cell, p, *_split(rest, cell.arguments))
        on = (None if u is None else m for u, m in zip(U, moved, strict=True))
        return *(None,) * (1 + cell.arguments), *on, *p, *U, *(None,) * (cell.arguments + cell.results)

    @staticmethod
    def jvp(ctx: Any, _: None, *changes: Maybe) -> tuple[Maybe, ...]:
        cell = ctx.cell
        changes = changes[cell.arguments :]
        U, rest = _split(ctx.saved_tensors, cell.outputs)
        arguments, results = _split(rest, cell.arguments)
        pulled = adjoint(cell, changes[: cell.outputs], arguments, results, ctx.needed)
        p = changes[cell.outputs : cell.outputs + cell.arguments]
        bent: Maybes = (None,) * cell.arguments
        if not _all_none(p):
            bent = _second(cell, arguments, p, U, results)
        both = (plus(a, b) for a, b in zip(pulled, bent, strict=True))
        # An empty output has an empty tangent: under vmap, torch takes none for an integer.
        empty = arguments[0].new_empty(0)
        return tuple(g if wanted else empty for g, wanted in zip(both, ctx.needed, strict=True))


def _parts(cell: Cell, tensors: Sequence[Any], vectors: int) -> tuple[Sequence[Any], ...]:
    """Vectors, carriers, arguments and results."""
    given, rest = _split(tensors, vectors)
    carriers, rest = _split(rest, cell.arguments + cell.outputs)
    return given, carriers, *_split(rest, cell.arguments)


class _Point(torch.autograd.Function):
    """Carriers of what tangent and adjoint are as functions of the arguments.

    There is no edge from here to the vectors, so a derivative in those alone never comes by. What they contribute
    arrives as the carriers' cotangents: p for the arguments, U for the outputs; <U, J p> is the function whose gradient
    is wanted. `mark` and `outputs` have a dtype, a device and shapes, and no values.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, mark: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        outputs, arguments = _split(tensors, CELLS[name].outputs)
        return tuple(mark.new_empty(x.shape) for x in (*arguments, *outputs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        name, _, *tensors = inputs
        ctx.cell = CELLS[name]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *carried: Maybe) -> tuple[Maybe, ...]:
        cell = ctx.cell
        p, U = _split(carried, cell.arguments)
        outputs, arguments = _split(ctx.saved_tensors, cell.outputs)
        by_arguments: Maybes = (None,) * cell.arguments
        if not _all_none(p) and not _all_none(U):
            by_arguments = _second(cell, arguments, p, U, outputs)
        return None, None, *(None,) * cell.outputs, *by_arguments

    @staticmethod
    def jvp(ctx: Any, _: None, __: Maybe, *changes: Maybe) -> tuple[Tensor, ...]:
        outputs, arguments = _split(ctx.saved_tensors, ctx.cell.outputs)
        moved = zip((*changes[ctx.cell.outputs :], *(None,) * ctx.cell.outputs), (*arguments, *outputs), strict=True)
        return tuple(torch.zeros_like(x) if d is None else d for d, x in moved)


def _full(vectors: Maybes, like: Tensors) -> tuple[Tensor, ...]:
    return tuple(torch.zeros_like(y) if x is None else x for x, y in zip(vectors, like, strict=False))


def _second(cell: Cell, arguments: Tensors, p: Maybes, U: Maybes, outputs: Tensors) -> tuple[Tensor, ...]:
    """H_U p, the gradient in the arguments of <U, J p>, by two reverse passes: forward modes must not be nested."""

    def gradient(*x: Tensor) -> tuple[Tensor, ...]:
        pulled: tuple[Tensor, ...] = vjp(lambda *y: cell.plain(y), *x)[1](_full(U, outputs))
        return pulled

    bent: tuple[Tensor, ...] = vjp(gradient, *arguments)[1](_full(p, arguments))
    return bent


def _second_tangent(cell: Cell, arguments: Tensors, outputs: Tensors, d: Maybes, p: Maybes) -> tuple[Tensor, ...]:
    """The change of J d along p: d'H_U p is linear in U, and its gradient in U is this."""

    def bent(*U: Tensor) -> tuple[Tensor, ...]:
        return _second(cell, arguments, p, U, outputs)

    start = _full((None,) * cell.outputs, outputs)
    moved: tuple[Tensor, ...] = vjp(bent, *start)[1](_full(d, arguments))
    return moved
