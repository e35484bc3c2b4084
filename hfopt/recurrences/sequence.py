"""Any registered cell over a whole sequence as one node of the autograd graph.

The passes are operators on plain tensors. With f the cell's function at its arguments x, U one cotangent per output and
H_U the Hessian of <U, f(x)>:

    forward   x -> f(x)          reverse: the adjoint            forward mode: the tangent
    tangent   d -> J d           in d: the adjoint               in x: H_U d
    adjoint   U -> J'U           in U: the tangent, alone        in x: H_U p for the cotangents p of J'U

H_U is in closed form where the cell knows it (`Cell.bent`), and otherwise goes through the cell's `plain` form. A node
of its own (`_Point`) keeps the dependence on x, visited only when the path to x is asked for, so a Gauss-Newton product
by cached double backward is one tangent and one adjoint call and nothing else; a Hessian product in closed form is no
more passes than that, since what the loss gives for the outputs and what H_U gives for them are pulled back together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import vjp

from hfopt.recurrences.operators import sequence_adjoint, sequence_forward, sequence_tangent
from hfopt.recurrences.products import correlate, plus, projected
from hfopt.recurrences.recorded import record
from hfopt.recurrences.registry import CELLS, Bent, Cell, Maybe, Maybes, Tensors
from hfopt.recurrences.segments import apply


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
    carriers: tuple[Tensor, ...] = apply(_Point, cell.name, mark, *results, *arguments)
    return carriers


def _count(cell: Cell) -> int:
    """How many carriers there are: of arguments, of outputs twice, and of the columns' cotangents."""
    return cell.arguments + 2 * cell.outputs + 1


def tangent(cell: Cell, d: Maybes, arguments: Tensors, results: Tensors) -> tuple[Maybe, ...]:
    """J d, one tensor per output; all None if there is no tangent. Can be differentiated in d and the arguments."""
    _refuse_batched_grads(d)
    if _all_none(d):
        return (None,) * cell.outputs
    if not _watched():
        return tuple(sequence_tangent(cell.name, d, arguments, results))
    carriers = _carriers(cell, d, arguments, results)
    moved: tuple[Tensor, ...] = apply(_Tangent, cell.name, *d, *carriers, *arguments, *results)
    return moved


def adjoint(cell: Cell, U: Maybes, arguments: Tensors, results: Tensors, needed: Sequence[bool]) -> tuple[Maybe, ...]:
    """J' U, one tensor per argument, None where not needed. Can be differentiated in U and the arguments."""
    return _adjoint(cell, U, arguments, results, needed)[0]


def _adjoint(
    cell: Cell, U: Maybes, arguments: Tensors, results: Tensors, needed: Sequence[bool]
) -> tuple[tuple[Maybe, ...], Maybe]:
    """J' U, and the cotangents of the inputs' columns (T, B, .), which have no derivative, where they are at hand."""
    _refuse_batched_grads(U)
    if _all_none(U):
        return (None,) * cell.arguments, None
    alpha: Maybe = None
    if _watched():
        carriers = _carriers(cell, U, arguments, results)
        *pulled, alpha = apply(_Adjoint, cell.name, *needed, *U, *carriers, *arguments, *results)
        if not _apart(cell, arguments):
            alpha = pulled[0] if _has_columns(cell, needed, arguments) else None
    else:
        pulled = sequence_adjoint(cell.name, U, arguments, results, needed)
    return tuple(g if wanted else None for g, wanted in zip(pulled, needed, strict=True)), alpha


class _Tangent(torch.autograd.Function):
    """(cell, tangents, carriers, arguments, results) -> J d; arguments and results get no gradient here.

    The carriers' values are not read. Their tangents are the arguments', and their cotangents what `_Point` needs to
    work out the arguments'.
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
        # Under vmap, torch wants the same tensors saved for both modes.
        ctx.save_for_backward(*d, *arguments, *results, *output)
        ctx.save_for_forward(*d, *arguments, *results, *output)

    @staticmethod
    def backward(ctx: Any, *U: Maybe) -> tuple[Maybe, ...]:
        cell, count = ctx.cell, ctx.cell.arguments
        d, rest = _split(ctx.saved_tensors, count)
        arguments, rest = _split(rest, count)
        results, R = _split(rest, cell.results)
        pulled, alpha = _adjoint(cell, U, arguments, results, ctx.needs_input_grad[1 : 1 + count])
        return None, *pulled, *d, *U, *R, alpha, *(None,) * (count + cell.results)

    @staticmethod
    def jvp(ctx: Any, _: None, *changes: Maybe) -> tuple[Maybe, ...]:
        cell, count = ctx.cell, ctx.cell.arguments
        d, rest = _split(ctx.saved_tensors, count)
        arguments, rest = _split(rest, count)
        results = rest[: cell.results]
        p = changes[count : 2 * count]
        moved = tangent(cell, changes[:count], arguments, results)
        if _all_none(p):
            return moved
        bent = _second_tangent(cell, arguments, results[: cell.outputs], d, p)
        return tuple(plus(a, b) for a, b in zip(moved, bent, strict=True))


class _Adjoint(torch.autograd.Function):
    """(cell, *needed, cotangents, carriers, arguments, results) -> J' U, and the cotangents of the inputs' columns.

    The carriers are as in `_Tangent`. The columns' cotangents are empty if the inputs are the columns themselves or the
    cell does not take columns. They get no derivative here: `_bent` works them out again where that is wanted.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, *given: Any) -> tuple[Tensor, ...]:
        cell = CELLS[name]
        needed, tensors = _split(given, cell.arguments)
        U, _, arguments, results = _parts(cell, tensors, cell.outputs)
        if not _apart(cell, arguments):
            return *sequence_adjoint(name, U, arguments, results, needed), arguments[0].new_empty(0)
        X, Kx, *others = arguments
        columns = [X.new_empty(*X.shape[:2], Kx.shape[1]), Kx[:0], *others]
        alpha, _, *pulled = sequence_adjoint(name, U, columns, results, [True, False, *needed[2:]])
        dX = alpha @ Kx.t() if needed[0] else X.new_empty(0)
        dKx = correlate(X, alpha) if needed[1] else X.new_empty(0)
        return dX, dKx, *pulled, alpha

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        name, *given = inputs
        ctx.cell = CELLS[name]
        ctx.needed, tensors = _split(given, ctx.cell.arguments)
        U, _, arguments, results = _parts(ctx.cell, tensors, ctx.cell.outputs)
        ctx.set_materialize_grads(False)
        alpha = output[-1] if _apart(ctx.cell, arguments) else output[0]
        # The same for both modes, as in `_Tangent`: backward uses the first, forward mode the last.
        ctx.save_for_backward(*U, *arguments, *results, alpha, output[-1])
        ctx.save_for_forward(*U, *arguments, *results, alpha, output[-1])

    @staticmethod
    def backward(ctx: Any, *p: Maybe) -> tuple[Maybe, ...]:
        cell, p = ctx.cell, p[:-1]
        U, rest = _split(ctx.saved_tensors, cell.outputs)
        arguments, (*results, alpha, _) = _split(rest, cell.arguments)
        moved = tangent(cell, p, arguments, results)
        on = (None if u is None else m for u, m in zip(U, moved, strict=True))
        carried = *p, *U, *moved, alpha if _has_columns(cell, ctx.needed, arguments) else None
        return *(None,) * (1 + cell.arguments), *on, *carried, *(None,) * (cell.arguments + cell.results)

    @staticmethod
    def jvp(ctx: Any, _: None, *changes: Maybe) -> tuple[Maybe, ...]:
        cell = ctx.cell
        changes = changes[cell.arguments :]
        U, rest = _split(ctx.saved_tensors, cell.outputs)
        arguments, (*results, _, alpha) = _split(rest, cell.arguments)
        pulled = adjoint(cell, changes[: cell.outputs], arguments, results, ctx.needed)
        p = changes[cell.outputs : cell.outputs + cell.arguments]
        bent: Maybes = (None,) * cell.arguments
        if not _all_none(p):
            bent = _second(cell, arguments, p, U, results)
        both = (plus(a, b) for a, b in zip(pulled, bent, strict=True))
        # An empty output has an empty tangent: under vmap, torch takes none for an integer.
        empty = arguments[0].new_empty(0)
        moved = (g if wanted else empty for g, wanted in zip(both, ctx.needed, strict=True))
        return *moved, torch.zeros_like(alpha)


def _apart(cell: Cell, arguments: Tensors) -> bool:
    """Whether inputs and weights are to be made columns, so that the adjoint pass gives the cotangents of these."""
    return cell.bends and cell.columns and arguments[1].shape[0] > 0


def _has_columns(cell: Cell, needed: Sequence[bool], arguments: Tensors) -> bool:
    """Whether the adjoint gives the cotangents of columns: apart, or because the inputs are columns."""
    return _apart(cell, arguments) or (cell.bends and cell.columns and needed[0])


def _parts(cell: Cell, tensors: Sequence[Any], vectors: int) -> tuple[Sequence[Any], ...]:
    """Vectors, carriers, arguments and results."""
    given, rest = _split(tensors, vectors)
    carriers, rest = _split(rest, _count(cell))
    return given, carriers, *_split(rest, cell.arguments)


def _shapes(cell: Cell, arguments: Tensors, outputs: Tensors) -> list[Sequence[int]]:
    """Those of the carriers."""
    width = arguments[1].shape[-1] if cell.bends and cell.columns else 0
    return [*(x.shape for x in (*arguments, *outputs, *outputs)), (*arguments[0].shape[:2], width)]


class _Point(torch.autograd.Function):
    """Carriers of what tangent and adjoint are as functions of the arguments and the outputs.

    There is no edge from here to the vectors, so a derivative in those alone never comes by. What they contribute
    arrives as the carriers' cotangents: p for the arguments, U for the outputs, then R = J p and the cotangents of the
    inputs' columns, where they are at hand; <U, J p> is the function whose gradient is wanted. Where the cell knows it
    in closed form, a part of it is a cotangent of the outputs, which goes the way of those that the outputs have
    besides. `mark` has a dtype and a device, and no value.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, mark: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        cell = CELLS[name]
        results, arguments = _split(tensors, cell.results)
        outputs = results[: cell.outputs]
        return tuple(mark.new_empty(shape) for shape in _shapes(cell, arguments, outputs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        name, _, *tensors = inputs
        ctx.cell = CELLS[name]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *carried: Maybe) -> tuple[Maybe, ...]:
        cell, nothing = ctx.cell, (None, None)
        p, rest = _split(carried, cell.arguments)
        U, (*R, alpha) = _split(rest, cell.outputs)
        results, arguments = _split(ctx.saved_tensors, cell.results)
        if _all_none(p) or _all_none(U):
            return *nothing, *(None,) * (cell.results + cell.arguments)
        if not cell.bends:
            return *nothing, *(None,) * cell.results, *_second(cell, arguments, p, U, results)
        needed = ctx.needs_input_grad[2 + cell.results :]
        found = _bent(cell, arguments, p, U, results, needed, R, alpha)
        return *nothing, *found.outputs, *(None,) * (cell.results - cell.outputs), *found.arguments

    @staticmethod
    def jvp(ctx: Any, _: None, __: Maybe, *changes: Maybe) -> tuple[Tensor, ...]:
        cell = ctx.cell
        results, arguments = _split(ctx.saved_tensors, cell.results)
        shapes = _shapes(cell, arguments, results[: cell.outputs])
        moved = (*changes[cell.results :], *(None,) * (_count(cell) - cell.arguments))
        return tuple(arguments[0].new_zeros(n) if d is None else d for d, n in zip(moved, shapes, strict=True))


def _full(vectors: Maybes, like: Tensors) -> tuple[Tensor, ...]:
    return tuple(torch.zeros_like(y) if x is None else x for x, y in zip(vectors, like, strict=False))


def _bent(
    cell: Cell, arguments: Tensors, p: Maybes, U: Maybes, results: Tensors, needed: Sequence[bool],
    R: Maybes, alpha: Maybe,
) -> Bent:  # fmt: skip
    """H_U p in the parts that the cell knows; R and the columns' cotangents as functions if that is differentiated."""
    if _watched() or _all_none(R):
        R = tangent(cell, p, arguments, results)
    if cell.columns and (_watched() or alpha is None):
        alpha = adjoint(cell, U, projected(arguments), results, (True, *(False,) * (cell.arguments - 1)))[0]
    return cell.bent(arguments, results[: cell.outputs], p, R, U, alpha, needed)


def _second(cell: Cell, arguments: Tensors, p: Maybes, U: Maybes, results: Tensors) -> tuple[Maybe, ...]:
    """H_U p, the gradient in the arguments of <U, J p>."""
    if not cell.bends:
        return _second_of_plain(cell, arguments, p, U, results[: cell.outputs])
    needed = (True,) * cell.arguments
    found = _bent(cell, arguments, p, U, results, needed, (None,) * cell.outputs, None)
    rest = adjoint(cell, found.outputs, arguments, results, needed)
    return tuple(plus(a, b) for a, b in zip(rest, found.arguments, strict=True))


def _second_of_plain(cell: Cell, arguments: Tensors, p: Maybes, U: Maybes, outputs: Tensors) -> tuple[Tensor, ...]:
    """The same by two reverse passes: forward modes must not be nested."""

    def gradient(*x: Tensor) -> tuple[Tensor, ...]:
        pulled: tuple[Tensor, ...] = vjp(lambda *y: cell.plain(y), *x)[1](_full(U, outputs))
        return pulled

    bent: tuple[Tensor, ...] = vjp(gradient, *arguments)[1](_full(p, arguments))
    return bent


def _second_tangent(cell: Cell, arguments: Tensors, outputs: Tensors, d: Maybes, p: Maybes) -> tuple[Tensor, ...]:
    """The change of J d along p: d'H_U p is linear in U, and its gradient in U is this."""

    def bent(*U: Tensor) -> tuple[Tensor, ...]:
        return _second_of_plain(cell, arguments, p, U, outputs)

    start = _full((None,) * cell.outputs, outputs)
    moved: tuple[Tensor, ...] = vjp(bent, *start)[1](_full(d, arguments))
    return moved
