"""Derivatives along an autograd graph, and walks over it: which parameters it reaches, and what it holds in memory."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node


def leaf_hooks(t: Tensor) -> dict[int, Any]:
    """The hooks by which a leaf changes its gradient; empty for other tensors."""
    return (t._backward_hooks or {}) if t.is_leaf else {}


@contextmanager
def unhooked(inputs: Iterable[Tensor]) -> Iterator[None]:
    """The block in which derivatives in leaves are those of the function, whatever hooks would make of them."""
    hooked = [leaf_hooks(t) for t in inputs]
    held = [(hooks, dict(hooks)) for hooks in hooked if hooks]
    for hooks, kept in held:
        hooks.clear()
        hooks.update((key, hook) for key, hook in kept.items() if hook is stop)
    try:
        yield
    finally:
        for hooks, kept in held:
            hooks.clear()
            hooks.update(kept)


def stop(g: Tensor) -> Tensor:
    """A hook of hfopt's own that lets no gradient through; it stays in :func:`unhooked`."""
    return torch.zeros_like(g)


def gradients(
    heads: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor], batched: bool = False
) -> list[Tensor | None]:
    """Return ``autograd.grad`` and keep the graph; None for an input that ``heads`` do not depend on.

    Hooks of leaves among ``inputs`` are left out. ``batched``: k cotangents at once, along a new first dimension of
    each, and so the results. This is torch.func's vmap, which the operators of hfopt have rules for;
    ``is_grads_batched`` would call them k times.
    """
    if not heads or not inputs:
        return [None] * len(inputs)
    for t in inputs:
        if leaf_hooks(t):
            with unhooked(inputs):
                return _gradients(heads, inputs, cotangents, batched)
    return _gradients(heads, inputs, cotangents, batched)  # without a context, which torch.compile would stop at


def _gradients(
    heads: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor], batched: bool
) -> list[Tensor | None]:
    if not batched:
        return list(torch.autograd.grad(heads, inputs, cotangents, retain_graph=True, allow_unused=True))
    live: list[int] = []
    keep = {"retain_graph": True, "allow_unused": True}

    def one(*w: Tensor) -> tuple[Tensor, ...]:
        grads: Sequence[Tensor | None] = torch.autograd.grad(heads, inputs, w, **keep)
        live[:] = [i for i, g in enumerate(grads) if g is not None]
        return tuple(g for g in grads if g is not None)

    found = torch.vmap(one)(*cotangents)
    result: list[Tensor | None] = [None] * len(inputs)
    for i, g in zip(live, found, strict=True):
        result[i] = g
    return result


def nodes(roots: Iterable[Tensor], stop: Collection[Node] = ()) -> Iterator[Node]:
    """Yield every node from which ``roots`` were computed, without passing the nodes of ``stop`` (not yielded)."""
    seen: set[Node] = set(stop)
    stack = [t.grad_fn for t in roots if t.grad_fn is not None]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        stack.extend(n for n, _ in node.next_functions if n is not None)


def is_leaf_node(node: Node) -> bool:
    """Return whether ``node`` stands for a leaf tensor (a parameter) and not for an operation."""
    return hasattr(node, "variable")


def reached_leaves(roots: Iterable[Tensor], stop: Collection[Node] = ()) -> set[int]:
    """Return identities of the leaf tensors that ``roots`` depend on other than through ``stop``."""
    return {id(n.variable) for n in nodes(roots, stop) if hasattr(n, "variable")}


def refuse_once_differentiable(gradients: Iterable[Tensor]) -> None:
    """Raise for gradients whose graph was cut by a backward pass marked ``once_differentiable``.

    Such a pass is replaced by a node that raises, but one without a way to the inputs, so that a derivative in them
    never meets it and lacks a part without a word.

    Raises:
        RuntimeError: there is such a node.
    """
    if any(node.name() == "torch::autograd::Error" for node in nodes(gradients)):
        raise RuntimeError(
            "a function of the model is marked once_differentiable, so that double backward is undefined"
        )


def has_custom_backward(roots: Iterable[Tensor]) -> bool:
    """Tell whether ``roots`` come from a ``torch.autograd.Function`` that is not of this package."""
    classes = (getattr(type(node), "_forward_cls", None) for node in nodes(roots))
    return any(own is not None and not own.__module__.startswith("hfopt.") for own in classes)


def coarsest_eps(roots: Iterable[Tensor]) -> float:
    """Return the largest machine epsilon among the tensors that ``roots`` were computed from; 0 without a graph."""
    found = {m.dtype for node in nodes(roots) for m in getattr(node, "_input_metadata", ())}
    return max((torch.finfo(dtype).eps for dtype in found if dtype.is_floating_point), default=0.0)


def directly_used(roots: Iterable[Tensor], among: Sequence[Tensor]) -> list[Tensor]:
    """Return those of ``among`` that ``roots`` use other than through another one of them; all are leaves."""
    roots = list(roots)
    used = {(t.grad_fn, t.output_nr) for t in roots}
    for node in nodes(roots, {t.grad_fn for t in among if t.grad_fn is not None}):
        used.update(node.next_functions)
    return [t for t in among if t.grad_fn is None or (t.grad_fn, t.output_nr) in used]


def saved_bytes(roots: Iterable[Tensor], ignore: Iterable[Tensor]) -> int:
    """Return the bytes of distinct dense tensors that the graph of ``roots`` saves, less those of ``ignore``."""
    storages = {t.untyped_storage().data_ptr() for t in ignore}
    total = 0
    for node in nodes(roots):
        for t in _saved_tensors(node):
            storage = t.untyped_storage()
            if storage.data_ptr() not in storages:
                storages.add(storage.data_ptr())
                total += storage.nbytes()
    return total


def _saved_tensors(node: Node) -> Iterator[Tensor]:
    values = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
    values += [getattr(node, "saved_tensors", ())]
    for value in values:
        for t in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(t, Tensor) and t.layout == torch.strided:
                yield t
