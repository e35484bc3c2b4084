"""Checkpointing over time: of a long sequence only the states at the borders of some sqrt(T) segments are kept.

A recurrence is a function of one segment, ``(x_a..x_b, s_a, K) -> (o_a..o_b, s_b)``, applied to one segment after the
other. Its derivatives need what happened inside the segments. Here that is worked out again whenever it is needed, one
segment at a time, from the state s_a that was kept:

    tangent   forwards over the segments:   (dx_a..dx_b, ds_a, dK) -> (do_a..do_b, ds_b)
    adjoint   backwards over the segments:  (do_a..do_b, ds_b)    -> (dx_a..dx_b, ds_a, and its share of dK)

With sqrt(T) segments of sqrt(T) steps, the borders and the work on one segment each take O(sqrt(T)) memory. A product
costs two forward passes more than one on a whole sequence. Structural damping joins the adjoint pass: the tangents of
a segment's pre-activations are computed again too, from the tangents of the states at the borders.

Reference: Griewank & Walther, "Evaluating Derivatives", 2nd ed. 2008, chapter 12.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hfopt import structural
from hfopt.recurrences.passes import Found, Given, Maybe, Part, Segments, Tensors

__all__ = ["Found", "Given", "Run", "Segments", "checkpointing", "over_time", "wanted"]


@dataclass
class Run:
    """What a run of a model showed: its recurrences over time, and their segments where they were checkpointed."""

    enabled: bool
    recurrences: int = 0
    checkpointed: list[Segments] = field(default_factory=list)


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """`function.apply(*args)`."""
    return function.apply(*args)  # type: ignore[no-untyped-call]


_run: ContextVar[Run | None] = ContextVar("hfopt_checkpointing", default=None)


@contextmanager
def checkpointing(enabled: bool = True) -> Iterator[Run]:
    """Checkpoint every :func:`over_time` inside the block; with ``enabled=False`` only count them."""
    run = Run(enabled)
    token = _run.set(run)
    try:
        yield run
    finally:
        _run.reset(token)


def wanted() -> bool:
    """Whether recurrences are to be checkpointed; if so, they go through :func:`over_time`."""
    if torch.compiler.is_compiling():
        return False
    run = _run.get()
    if run is None:
        return False
    if not run.enabled:
        run.recurrences += 1
    return run.enabled


def over_time(
    function: Part, sequences: Sequence[Maybe], states: Sequence[Tensor], parameters: Sequence[Maybe] = ()
) -> tuple[Tensors, Tensors]:
    """``function(sequences, states, parameters)``, computed segment by segment where memory asks for it.

    ``function`` must treat time as a recurrence does: what it makes of a sequence is what it makes of its first part
    and then, from the states that this ended in, of the rest. Under the linearisation ``"checkpoint"`` it is called
    again for every segment in every product, and nothing is kept but the arguments and the states at the borders, so
    a readout belongs inside it: ``(T, B, h)`` then never exists at once. Otherwise it is called once.

    Args:
        function: ``(sequences, states, parameters) -> (outputs, states)``, tuples of tensors. Whatever it
            differentiates must come in by its arguments.
        sequences: tensors (T, ...) that are cut along their first dimension; a None stays None.
        states: s_0, floating-point tensors.
        parameters: tensors that every segment gets whole; a None stays None.

    Returns:
        The outputs (T, ...), and the states after the last step.

    Raises:
        ValueError: no sequence, sequences of different lengths, or outputs that have not one row per step.
        TypeError: states that are not floating-point.
        RuntimeError: ``function`` uses a tensor that requires a gradient and is none of its arguments.
    """
    run = _run.get()
    sequences, states, parameters = tuple(sequences), tuple(states), tuple(parameters)
    if run is None or torch.compiler.is_compiling():
        outputs, after = function(sequences, states, parameters)
        return tuple(outputs), tuple(after)
    if not run.enabled:
        run.recurrences += 1
        outputs, after = _within(function)(sequences, states, parameters)
        return tuple(outputs), tuple(after)
    segments = Segments.of(_within(function), sequences, states, parameters)
    values = (*sequences, *states, *parameters)
    if not torch.is_grad_enabled() or not any(v is not None and v.requires_grad for v in values):
        found = segments.forward(values, keep=False)
    else:
        segments.marks = structural.wanted()
        found = apply(_OverTime, segments, *values)
        run.recurrences += 1
        run.checkpointed.append(segments)
        if segments.marks:
            # A head of the linearisation with no weight of its own: through it the adjoint pass always comes by here,
            # and adds what its own marks are worth.
            structural.mark(found[-1], torch.zeros_like(found[-1]), batch_dim=0)
    return tuple(found[: segments.outputs]), tuple(found[segments.outputs :])


def _within(function: Part) -> Part:
    """``function``, in which a recurrence is a part of this one."""

    def inner(*given: Given) -> Found:
        token = _run.set(None)
        try:
            return function(*given)
        finally:
            _run.reset(token)

    return inner


# -- autograd ------------------------------------------------------------------------------------------------------
#
# The adjoint is linear in the cotangents, and its derivative in them is one tangent pass. Its derivative in the point,
# which only a Hessian needs, is not worked out segment by segment; `_Guard` has a node of its own, so that autograd
# comes by only when that derivative is asked for, and says so.


class _OverTime(torch.autograd.Function):
    """values -> outputs and last states."""

    @staticmethod
    def forward(segments: Segments, *values: Maybe) -> Tensors:
        return segments.forward(values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        ctx.segments, *values = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*values)

    @staticmethod
    def backward(ctx: Any, *cotangents: Maybe) -> tuple[Maybe, ...]:
        needed = ctx.needs_input_grad[1:]
        if all(c is None for c in cotangents):
            return (None,) * (1 + len(needed))
        values = ctx.saved_tensors
        guard = apply(_Guard, *values)
        point = [None if v is None else v.detach() for v in values]
        pulled = iter(apply(_Adjoint, ctx.segments, needed, guard, len(cotangents), *cotangents, *point))
        return (None, *(next(pulled) if yes else None for yes in needed))


class _Guard(torch.autograd.Function):
    @staticmethod
    def forward(*values: Maybe) -> Tensor:
        some = next(v for v in values if v is not None and v.is_floating_point())
        return some.new_zeros(())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "a checkpointed recurrence has Gauss-Newton products, but no second derivative: use another linearisation"
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *values: Maybe) -> tuple[Tensor, None]:
        _one_point(in_dims)
        return apply(_Guard, *values), None


class _Adjoint(torch.autograd.Function):
    """(cotangents, values) -> the cotangents of the needed values."""

    @staticmethod
    def forward(segments: Segments, needed: tuple[bool, ...], guard: Tensor, count: int, *tensors: Maybe) -> Tensors:
        return segments.adjoint(needed, tensors[:count], tensors[count:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        ctx.segments, ctx.needed, _, count, *tensors = inputs
        ctx.given = [c is not None for c in tensors[:count]]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[count:])

    @staticmethod
    def backward(ctx: Any, *moved: Maybe) -> tuple[Maybe, ...]:
        values = ctx.saved_tensors
        if all(d is None for d in moved):
            return (None,) * (4 + len(ctx.given) + len(values))
        given = iter(moved)
        tangents = [next(given) if yes else None for yes in ctx.needed]
        found = apply(_Tangent, ctx.segments, *tangents, *values)
        along = [r if yes else None for r, yes in zip(found, ctx.given, strict=True)]
        return (None, None, found[0].new_zeros(()), None, *along, *(None for _ in values))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensors, tuple[int, ...]]:
        segments, needed, _, count, *tensors = inputs
        dims = in_dims[4:]
        _one_point(dims[count:])
        cotangents = [_first(c, d, info.batch_size) for c, d in zip(tensors[:count], dims[:count], strict=True)]
        found = segments.adjoint(needed, cotangents, tensors[count:], batched=True)
        return found, (0,) * len(found)


class _Tangent(torch.autograd.Function):
    """(tangents of the values, values) -> those of outputs and last states."""

    @staticmethod
    def forward(segments: Segments, *tensors: Maybe) -> Tensors:
        n = len(tensors) // 2
        return segments.tangent(tensors[:n], tensors[n:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensors, tuple[int, ...]]:
        segments, *tensors = inputs
        n, dims = len(tensors) // 2, in_dims[1:]
        _one_point(dims[n:])
        tangents = [_first(d, at, info.batch_size) for d, at in zip(tensors[:n], dims[:n], strict=True)]
        found = segments.tangent(tangents, tensors[n:], batched=True)
        return found, (0,) * len(found)


def _first(x: Maybe, dim: int | None, size: int) -> Maybe:
    """``x`` with its batch dimension, added if it has none, in front."""
    if x is None:
        return None
    return x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def _one_point(dims: Sequence[int | None]) -> None:
    if any(d is not None for d in dims):
        raise RuntimeError("a checkpointed recurrence can be mapped over its tangents and cotangents, not its point")
