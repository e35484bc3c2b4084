"""Tangent and adjoint of a traced cell over a whole sequence, in torch's operations.

Of a block of steps all derivatives (`Target.terms`) are worked out at once, and what does not recur is a few large
products. A step is then, section by section, the products with the recurrent matrices and multiply-adds:

    tangent    da_j = dv_j K_j + (v_j dK_j + x dK_x + dx K_x),    dy = sum over the terms of y: derivative * change
    adjoint    g_input += derivative * g_y from the last section to the first,    g_v += g_aj K_j'

with v_j the vector that product j takes, and y a target.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hfopt.recurrences.definition import Definition, Target
from hfopt.recurrences.expression import Expression, evaluate
from hfopt.recurrences.products import blocks, correlate_, project_
from hfopt.recurrences.registry import Maybe, Maybes, Tensors, batch_of_vectors, with_vectors
from hfopt.recurrences.roles import Parts, Roles

Values = dict[Expression, Any]


@dataclass(frozen=True)
class Group:
    """Terms of a target by columns of one product that lie beside each other, from first to last."""

    product: int
    first: int
    last: int
    terms: tuple[Expression, ...]
    alone: bool  # no other target has these columns


class Program:
    """The terms of every target, sorted: by columns of products, by what else recurs, by what comes from outside."""

    def __init__(self, definition: Definition) -> None:
        self.definition = d = definition
        uses: dict[Expression, int] = {}
        for t in d.targets:
            for e in t.terms:
                uses[e] = uses.get(e, 0) + 1
        self.groups = [self._grouped(t, uses) for t in d.targets]
        self.index = {t.node: i for i, t in enumerate(d.targets)}
        states = set(d.before.values())
        self.within = [[(e, c) for e, c in t.terms.items() if e in states or e in self.index] for t in d.targets]
        self.outside = [
            [(e, c) for e, c in t.terms.items() if e not in states and e not in self.index and not self._recurs(e)]
            for t in d.targets
        ]
        self.sections = [[i for i, t in enumerate(d.targets) if t.section == k] for k in range(len(d.products) + 1)]

        # Of every product: whether each of its columns is in one target, so that its cotangent is set at once.
        own = [[g for found in self.groups for g in found if g.product == j] for j in range(len(d.products))]
        self.lonely = [
            all(g.alone for g in found) and sum(g.last - g.first for g in found) == len(q.columns)
            for q, found in zip(d.products, own, strict=True)
        ]

    def _recurs(self, e: Expression) -> bool:
        column = self.definition.column(e)
        return column is not None and column.product is not None

    def _grouped(self, target: Target, uses: dict[Expression, int]) -> list[Group]:
        found = []
        for j, product in enumerate(self.definition.products):
            columns = [c.node for c in product.columns]
            here = [i for i, e in enumerate(columns) if e in target.terms]
            while here:
                run = [here.pop(0)]
                alone = uses[columns[run[0]]] == 1
                while here and here[0] == run[-1] + 1 and (uses[columns[here[0]]] == 1) is alone:
                    run.append(here.pop(0))
                terms = tuple(target.terms[columns[i]] for i in run)
                found.append(Group(j, run[0], run[-1] + 1, terms, alone))
        return found


@cache
def program_of(definition: Definition) -> Program:
    """The program of a definition."""
    return Program(definition)


class Derivatives(NamedTuple):
    """The derivatives of all targets in a block of steps; a vector's place, if there are vectors, is of size 1.

    Attributes:
        groups: of every target and group, (n, (1,) B, c, .).
        within, outside: of every target, (input, derivative (n, (1,) B, .) or smaller, or a number).
    """

    groups: list[list[Tensor]]
    within: list[list[tuple[Expression, Any]]]
    outside: list[list[tuple[Expression, Any]]]


def _derivatives(program: Program, known: Values, shape: tuple[int, ...], sizes: dict[str, int]) -> Derivatives:
    """Those of a block; `shape` is (n, (1,) B)."""
    lead = len(shape)

    def at(e: Expression) -> Any:
        y = evaluate(e, known)
        return y.unsqueeze(1) if isinstance(y, Tensor) and y.dim() == 3 and lead == 3 else y

    some = next(x for x in known.values() if isinstance(x, Tensor) and x.dim() == 3)
    groups = []
    for t, found in zip(program.definition.targets, program.groups, strict=True):
        stacked = []
        for g in found:
            whole = some.new_empty(*shape, len(g.terms), sizes[t.size])
            for i, e in enumerate(g.terms):
                y = at(e)
                whole[..., i, :] = y
            stacked.append(whole)
        groups.append(stacked)
    within = [[(e, at(c)) for e, c in terms] for terms in program.within]
    return Derivatives(groups, within, [[(e, at(c)) for e, c in terms] for terms in program.outside])


def _at(c: Any, k: int) -> Any:
    """A derivative at the k-th step of the block."""
    return c[k] if isinstance(c, Tensor) and c.dim() > 2 else c


def _add(total: Tensor, c: Any, x: Tensor, fresh: bool) -> None:
    """``total += c x``, or ``total = c x`` if it is fresh."""
    if isinstance(c, Tensor):
        torch.mul(c, x, out=total) if fresh else total.addcmul_(c, x)
    elif fresh:
        torch.mul(x, c, out=total)
    else:
        total.add_(x, alpha=c)


def _split(a: Tensor, widths: Sequence[int], g: Group) -> Tensor:
    """The columns of a group in a (..., all columns of the product) as (..., c, .)."""
    first = sum(widths[: g.first])
    part = a[..., first : first + sum(widths[g.first : g.last])]
    return part.view(*part.shape[:-1], g.last - g.first, widths[g.first])


# -- tangent -----------------------------------------------------------------------------------------------------------


def tangent(cell: Roles, tangents: Maybes, arguments: Tensors, results: Tensors) -> list[Tensor]:
    """J d, each (T, *N, B, .), of the tangents of the arguments."""
    d, program, p, moved = cell.definition, program_of(cell.definition), cell.parts(arguments), cell.parts(tangents)
    sizes, vectors, batch = cell.sizes(arguments), batch_of_vectors(tangents, arguments), p.X.shape[1]
    widths = [[sizes[c.size] for c in q.columns] for q in d.products]
    outputs = [p.X.new_empty(with_vectors(r.shape, vectors)) for r in results[: cell.outputs]]
    place = dict(zip(d.returned.values(), outputs, strict=True))
    state: Values = dict(zip(d.before.values(), moved.states, strict=True))
    spare = [p.X.new_empty(*vectors, batch, sizes[t.size]) for t in d.targets]
    for start, stop in blocks(results[0]):
        n = stop - start
        known = cell.values(arguments, results, sizes, start, stop)
        rows: list[Tensor] = [evaluate(v, known) for v in d.vectors]
        x, dx = p.X[start:stop], None if moved.X is None else moved.X[start:stop]
        alone, columns = from_outside(cell, p, moved, (x, dx), rows, sizes, vectors)
        parts = [[_split(columns[g.product], widths[g.product], g) for g in found] for found in program.groups]
        by = _derivatives(program, known, (n, 1, batch) if vectors else (n, batch), sizes)
        change: Values = {c.node: a for c, a in zip(d.inputs, alone, strict=True)}
        for name, db in zip(d.parameters, moved.parameters, strict=True):
            change[d.graph.leaf("parameter", name)] = None if db is None else db.unsqueeze(-2)
        if d.raw is not None:
            change[d.raw] = None if dx is None else dx[..., : p.states[0].shape[-1]]
        fresh = [
            _sum(terms, change, p.X, (n, *vectors, batch, sizes[t.size]))
            for t, terms in zip(d.targets, by.outside, strict=True)
        ]
        for k in range(n):
            now: Values = dict(state)
            for section, targets in enumerate(program.sections):
                if section:
                    a, vector = columns[section - 1][k], now[d.products[section - 1].vector]
                    if vector is not None:
                        a.view(-1, a.shape[-1]).addmm_(vector.reshape(-1, vector.shape[-1]), p.K[section - 1])
                for i in targets:
                    node = d.targets[i].node
                    r = place[node][start + k] if node in place else spare[i]
                    empty = True
                    for g, part, c in zip(program.groups[i], parts[i], by.groups[i], strict=True):
                        inner = part[k].mul_(c[k]) if g.alone else part[k] * c[k]
                        if empty:
                            torch.sum(inner, -2, out=r)
                        else:
                            r.add_(inner.sum(-2))
                        empty = False
                    for e, c in by.within[i]:
                        if now[e] is not None:
                            _add(r, _at(c, k), now[e], empty)
                            empty = False
                    if (f := fresh[i]) is not None:
                        r.copy_(f[k]) if empty else r.add_(f[k])
                        empty = False
                    now[node] = r.zero_() if empty else r
            state = {e: now[d.returned[s]] for s, e in d.before.items()}
    return outputs


def from_outside(
    cell: Roles, p: Parts, moved: Parts, inputs: tuple[Tensor, Maybe], rows: list[Tensor], sizes: dict[str, int],
    vectors: tuple[int, ...],
) -> tuple[list[Maybe], list[Tensor]]:  # fmt: skip
    """What does not recur: changes of the columns of the inputs alone, and of the products' columns."""
    d, (x, dx), dKx = cell.definition, inputs, moved.Kx
    edges = [0]
    for c in d.input_columns:
        edges.append(edges[-1] + sizes[c.size])
    projected = p.Kx.shape[0] == 0  # x are the columns themselves
    some = dx is not None or (dKx is not None and not projected)

    def projections(first: int, last: int) -> tuple[tuple[Maybe, Maybe], tuple[Maybe, Maybe]]:
        a, b = edges[first], edges[last]
        return (x, None if dKx is None else dKx[..., a:b]), (dx, p.Kx[:, a:b])

    def empty(width: int) -> Tensor:
        return x.new_empty(with_vectors((*x.shape[:2], width), vectors))

    def projection(first: int, last: int) -> Tensor:
        if projected:
            assert dx is not None
            return dx[..., edges[first] : edges[last]]
        return project_(empty(edges[last] - edges[first]), *projections(first, last))

    alone: list[Maybe] = [projection(i, i + 1) if some else None for i in range(len(d.inputs))]
    columns, at = [], len(d.inputs)
    for product, v, dK in zip(d.products, rows, moved.K, strict=True):
        whole, after = empty(sum(sizes[c.size] for c in product.columns)), at + product.shared
        if some and product.shared == len(product.columns) and not projected:
            project_(whole, (v, dK), *projections(at, after))
        elif some and product.shared == len(product.columns) and dK is None:
            whole.copy_(projection(at, after))
        else:
            project_(whole, (v, dK))
            if some and product.shared:
                whole[..., : edges[after] - edges[at]].add_(projection(at, after))
        at = after
        columns.append(whole)
    return alone, columns


def _sum(terms: list[tuple[Expression, Any]], change: Values, like: Tensor, shape: tuple[int, ...]) -> Maybe:
    """The sum of derivative * change over the terms whose change is there; None for none."""
    total: Maybe = None
    for e, c in terms:
        if (x := change[e]) is not None:
            total = like.new_zeros(shape) if total is None else total
            total += c * x
    return total


# -- adjoint -----------------------------------------------------------------------------------------------------------


class Block(NamedTuple):
    """What an adjoint pass finds in a block of steps, with `carry`, the states' cotangents before it.

    Attributes:
        rows: v_j (n, B, .) of every product.
        columns: cotangents (n, *N, B, .) of the columns of every product.
        alone: of every column of the inputs alone.
        parameters: of every parameter, at every step and sequence.
        raw: of the raw inputs; None if they are not used.
        carry: of the states before step `start`, (*N, B, .).
    """

    start: int
    stop: int
    rows: list[Tensor]
    columns: list[Tensor]
    alone: list[Tensor]
    parameters: list[Tensor]
    raw: Maybe
    carry: list[Tensor]


def sweep(cell: Roles, cotangents: Maybes, arguments: Tensors, results: Tensors) -> Iterator[Block]:
    """Go back in time, block by block; what a block has is overwritten by the next."""
    d, program, p = cell.definition, program_of(cell.definition), cell.parts(arguments)
    sizes, vectors, batch = cell.sizes(arguments), batch_of_vectors(cotangents, results[: cell.outputs]), p.X.shape[1]
    widths = [[sizes[c.size] for c in q.columns] for q in d.products]
    ranges = blocks(results[0])
    longest = max(stop - start for start, stop in ranges)
    Kt = [K.t().contiguous() for K in p.K]

    def space(width: int) -> Tensor:
        room: Tensor = p.X.new_empty(longest, *vectors, batch, width)
        return room

    everywhere = [space(sizes[t.size]) for t in d.targets], [space(sum(w)) for w in widths]
    U = dict(zip(d.returned.values(), cotangents, strict=True))
    carry = {e: p.X.new_zeros(*vectors, *s.shape) for e, s in zip(d.before.values(), p.states, strict=True)}
    for start, stop in reversed(ranges):
        n = stop - start
        known = cell.values(arguments, results, sizes, start, stop)
        rows: list[Tensor] = [evaluate(v, known) for v in d.vectors]
        by = _derivatives(program, known, (n, 1, batch) if vectors else (n, batch), sizes)
        on, columns = ([x[:n] for x in xs] for xs in everywhere)
        for t, G in zip(d.targets, on, strict=True):
            u = U.get(t.node)
            G.zero_() if u is None else G.copy_(u[start:stop])
        for a, found in zip(columns, program.lonely, strict=True):
            if not found:
                a.zero_()
        parts = [[_split(columns[g.product], widths[g.product], g) for g in found] for found in program.groups]
        for k in range(n - 1, -1, -1):
            _step_back(program, k, on, columns, parts, by, carry, Kt)
        alone, parameters, raw = _to_outside(cell, on, by, sizes)
        yield Block(start, stop, rows, columns, alone, parameters, raw, list(carry.values()))


def _step_back(
    program: Program, k: int, on: list[Tensor], columns: list[Tensor], parts: list[list[Tensor]], by: Derivatives,
    carry: dict[Expression, Tensor], Kt: list[Tensor],
) -> None:  # fmt: skip
    """One step: from what came from later steps to the cotangents of columns, targets and states before."""
    d = program.definition
    for s, e in d.before.items():
        on[program.index[d.returned[s]]][k].add_(carry[e])
    written: set[Expression] = set()
    for section in range(len(program.sections) - 1, -1, -1):
        for i in reversed(program.sections[section]):
            G = on[i][k]
            for g, part, c in zip(program.groups[i], parts[i], by.groups[i], strict=True):
                if program.lonely[g.product]:
                    torch.mul(c[k], G.unsqueeze(-2), out=part[k])
                else:
                    part[k].addcmul_(c[k], G.unsqueeze(-2))
            for e, c in by.within[i]:
                if e in carry:
                    _add(carry[e], _at(c, k), G, e not in written)
                    written.add(e)
                else:
                    _add(on[program.index[e]][k], _at(c, k), G, False)
        if section:
            vector = d.products[section - 1].vector
            if vector in carry:
                total = carry[vector] if vector in written else carry[vector].zero_()
                written.add(vector)
            else:
                total = on[program.index[vector]][k]
            a = columns[section - 1][k]
            total.view(-1, total.shape[-1]).addmm_(a.view(-1, a.shape[-1]), Kt[section - 1])
    for e, total in carry.items():
        if e not in written:
            total.zero_()


def _to_outside(
    cell: Roles, on: list[Tensor], by: Derivatives, sizes: dict[str, int]
) -> tuple[list[Tensor], list[Tensor], Maybe]:
    """Cotangents of the columns of the inputs alone, of parameters at every step, and of raw inputs."""
    d = cell.definition
    found: Values = {}
    for terms, G in zip(by.outside, on, strict=True):
        for e, c in terms:
            found[e] = found[e] + c * G if e in found else c * G
    some = on[0]

    def of(e: Expression, size: str) -> Tensor:
        y: Maybe = found.get(e)
        zeros: Tensor = some.new_zeros(*some.shape[:-1], sizes[size])
        return zeros if y is None else y

    alone = [of(c.node, c.size) for c in d.inputs]
    parameters = [of(d.graph.leaf("parameter", n), size) for n, size in d.parameters.items()]
    return alone, parameters, None if d.raw is None else of(d.raw, next(iter(d.states.values())))


def adjoint(
    cell: Roles, cotangents: Maybes, arguments: Tensors, results: Tensors, needed: Sequence[bool]
) -> list[Tensor]:
    """J' U, one tensor per argument, those not needed empty; that of a mask is zero."""
    vectors = batch_of_vectors(cotangents, results[: cell.outputs])
    return collected(cell, sweep(cell, cotangents, arguments, results), arguments, needed, vectors)


def collected(
    cell: Roles, found: Iterable[Block], arguments: Tensors, needed: Sequence[bool], vectors: tuple[int, ...]
) -> list[Tensor]:
    """The cotangents of the arguments from those of the blocks, the last steps first; those not needed are empty."""
    p, want, sizes = cell.parts(arguments), cell.parts(needed), cell.sizes(arguments)

    def zeros(x: Tensor, on: bool) -> Tensor:
        return x.new_zeros(with_vectors(x.shape, vectors) if on else (0,))

    dX, dKx = zeros(p.X, want.X), zeros(p.Kx, want.Kx)
    dK = [zeros(K, on) for K, on in zip(p.K, want.K, strict=True)]
    parameters = [zeros(b, on) for b, on in zip(p.parameters, want.parameters, strict=True)]
    carry: list[Tensor] = []
    for block in found:
        carry = block.carry
        x = p.X[block.start : block.stop]
        pieces = _input_columns(cell, block, sizes)
        at = 0
        if want.X and p.Kx.shape[0] == 0:
            torch.cat(pieces, -1, out=dX[block.start : block.stop])
        elif want.X:
            target, pairs, edge = dX[block.start : block.stop], [], 0
            for piece in pieces:
                pairs.append((piece, p.Kx[:, edge : edge + piece.shape[-1]].t()))
                edge += piece.shape[-1]
            project_(target, *pairs)
            if block.raw is not None:
                target[..., : block.raw.shape[-1]].add_(block.raw)
        if want.Kx and p.Kx.shape[0]:
            for piece in pieces:
                correlate_(dKx[..., at : at + piece.shape[-1]], x, piece)
                at += piece.shape[-1]
        for total, rows, a, on in zip(dK, block.rows, block.columns, want.K, strict=True):
            if on:
                correlate_(total, rows, a)
        for total, b, on in zip(parameters, block.parameters, want.parameters, strict=True):
            if on:
                total.add_(b.sum(-2).sum(0))
    masks = [zeros(m, on) for m, on in zip(p.masks, want.masks, strict=True)]
    states = [c.clone() if on else c.new_empty(0) for c, on in zip(carry, want.states, strict=True)]
    return [dX, dKx, *dK, *parameters, *masks, *states]


def _input_columns(cell: Roles, block: Block, sizes: dict[str, int]) -> list[Tensor]:
    """Cotangents of the projections of the inputs, in their order, in as few pieces as there are."""
    found = list(block.alone)
    for product, a in zip(cell.definition.products, block.columns, strict=True):
        if product.shared:
            found.append(a[..., : sum(sizes[c.size] for c in product.columns[: product.shared])])
    return found


# Rows and deltas of every weight, gradients of parameters and of first states.
PerSequence = tuple[list[tuple[Tensor, Tensor]], list[Tensor], list[Tensor]]


def rows_and_deltas(cell: Roles, cotangents: Maybes, arguments: Tensors, results: Tensors) -> PerSequence:
    """What the gradients of single sequences are made of, for one cotangent per output.

    Returns:
        Rows (T, B, k) and deltas (T, B, m) of K_x and of every K_j, whose gradient for sequence b is the sum over t of
        rows' deltas; the parameters' gradients of every sequence (B, .); and the first states' (B, .).
    """
    p, sizes = cell.parts(arguments), cell.sizes(arguments)
    X = p.X
    deltas = [X.new_empty(*X.shape[:2], K.shape[1]) for K in (p.Kx, *p.K)]
    rows = [X, *(X.new_empty(*X.shape[:2], K.shape[0]) for K in p.K)]
    parameters = [X.new_zeros(X.shape[1], b.shape[-1]) for b in p.parameters]
    carry: list[Tensor] = []
    for block in sweep(cell, cotangents, arguments, results):
        here = slice(block.start, block.stop)
        if p.Kx.shape[1]:
            deltas[0][here] = torch.cat(_input_columns(cell, block, sizes), -1)
        for to, delta, row, a in zip(rows[1:], deltas[1:], block.rows, block.columns, strict=True):
            to[here], delta[here] = row, a
        for total, b in zip(parameters, block.parameters, strict=True):
            total.add_(b.sum(0))
        carry = [c.clone() for c in block.carry]
    return list(zip(rows, deltas, strict=True)), parameters, carry
