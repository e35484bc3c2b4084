"""Partial derivatives along an autograd graph: with respect to results inside it, each held fixed for the others.

``torch.autograd.grad`` gives total derivatives: what one of the inputs is computed from another one counts as well, and
so does all that lies beyond them. Here a walk back from the loss ends at every input that it meets. So a closure's
graph may stay whole, and still be taken apart into the loss and what it was computed from.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

Edge = tuple[Node, int]
Maybe = list["Tensor | None"]


def edge_of(t: Tensor) -> Edge:
    """Return the place of ``t`` in the graph: its node, and its number among the node's results."""
    edge = get_gradient_edge(t)
    return edge.node, edge.output_nr


def _successors(node: Node) -> Iterator[Edge]:
    return ((n, i) for n, i in node.next_functions if n is not None)


def walk(root: Tensor, stops: Collection[Edge]) -> tuple[list[Edge], list[Node]]:
    """Walk back from ``root`` and not beyond ``stops``: the stops that were met, and all nodes on this side of them."""
    met: dict[Edge, None] = {}
    nodes: dict[Node, None] = {}
    stack = [edge_of(root)]
    while stack:
        edge = stack.pop()
        if edge in stops:
            met[edge] = None
        elif edge[0] not in nodes:
            nodes[edge[0]] = None
            stack.extend(_successors(edge[0]))
    return list(met), list(nodes)


def partial_gradients(roots: Sequence[Tensor], cotangents: Sequence[Tensor], edges: Sequence[Edge]) -> Maybe:
    """``sum_r w_r' dr/dx`` for every ``x`` at ``edges``, all other ones held fixed; None where there is no way.

    The graph is kept, and the results have one themselves if gradients are enabled. Under ``torch.vmap`` cotangents
    may be batched.
    """
    place = {edge: i for i, edge in reversed(list(enumerate(edges)))}
    found: Maybe = [None] * len(edges)
    waiting: dict[Edge, Tensor] = {}
    known: dict[Node, Sequence[Any]] = {}

    def results_of(node: Node) -> Sequence[Any]:
        if node not in known:
            known[node] = node._input_metadata
        return known[node]

    def give(edge: Edge, g: Tensor | None) -> None:
        if g is None:
            return
        g = _like(g, results_of(edge[0])[edge[1]])
        if (i := place.get(edge)) is not None:
            old = found[i]
            found[i] = g if old is None else old + g
        elif edge[0] in leading:
            waiting[edge] = waiting[edge] + g if edge in waiting else g

    starts = [edge_of(r) for r in roots]
    order = _order(starts, place)
    leading = set(order)
    for start, w in zip(starts, cotangents, strict=True):
        give(start, w)
    for node in order:
        given = [waiting.pop((node, i), None) for i in range(len(results_of(node)))]
        if all(g is None for g in given):
            continue
        full = [_zeros(data) if g is None else g for data, g in zip(results_of(node), given, strict=True)]
        # A Python function's node cannot be called; what the engine calls is its method apply.
        backward: Any = node if callable(node) else node.apply  # type: ignore[attr-defined]
        results = backward(*full)
        for (n, i), g in zip(node.next_functions, results if isinstance(results, tuple) else (results,), strict=False):
            if n is not None:
                give((n, i), g)
    return found


def between(root: Tensor, leaves: Sequence[Tensor], stops: Collection[Edge]) -> list[Node]:
    """The nodes from which ``leaves`` are reached from ``root`` without passing ``stops``."""
    return _order([edge_of(root)], {edge_of(p) for p in leaves}, stops)


def _order(starts: Sequence[Edge], stops: Collection[Edge], closed: Collection[Edge] = ()) -> list[Node]:
    """The nodes between ``starts`` and ``stops`` from which a stop can be reached, each before those it leads to.

    ``closed``: where no way leads on.
    """
    leads: dict[Node, bool] = {}
    order: list[Node] = []
    stack: list[tuple[Node, Iterator[Edge]]] = []

    def enter(edge: Edge) -> None:
        if edge not in stops and edge not in closed and edge[0] not in leads:
            leads[edge[0]] = False
            stack.append((edge[0], _successors(edge[0])))

    for start in starts:
        enter(start)
        while stack:
            node, left = stack[-1]
            if (edge := next(left, None)) is not None:
                enter(edge)
                continue
            stack.pop()
            ways = (edge for edge in _successors(node) if edge not in closed)
            leads[node] = any(edge in stops or leads.get(edge[0], False) for edge in ways)
            if leads[node]:
                order.append(node)
    return order[::-1]


def _zeros(data: Any) -> Tensor:
    return torch.zeros(tuple(data.shape), dtype=data.dtype, device=data.device)


def _like(g: Tensor, data: Any) -> Tensor:
    """A cotangent in the shape and dtype of its result, as torch's engine brings it into."""
    shape = tuple(data.shape)
    if tuple(g.shape) != shape:
        g = g.sum_to_size(shape)
    return g if g.dtype == data.dtype else g.to(data.dtype)
