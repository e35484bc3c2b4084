"""The passes on CUDA of a defined cell with several products in a step, or vectors of several sizes.

A step is, section by section, one product of matrices by torch and one kernel for each size of vectors, which works out
all that is pointwise. A pass takes static shapes and never waits for the device, so that a CUDA graph takes all of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hfopt.recurrences import linearised
from hfopt.recurrences.expression import Expression, evaluate, ordered, pull, push
from hfopt.recurrences.generated import Generated
from hfopt.recurrences.products import lag
from hfopt.recurrences.registry import Maybes, Tensors, batch_of_vectors, with_vectors
from hfopt.recurrences.roles import cut
from hfopt.recurrences.triton import cell_kernels, pointwise, tiles

Tape = dict[Expression, Tensor]  # of every node its values (T, *N, B, .), or fewer dimensions where it is constant


class Group:
    """What is worked out together in a section: the goals of one size, as a function of other nodes."""

    def __init__(self, name: str, goals: Mapping[Expression, Expression], stop: Sequence[Expression]) -> None:
        self.goals = {e: formula for e, formula in goals.items() if formula.number != 0}
        self.made = pointwise.of_nodes(name, list(self.goals.values()), stop) if self.goals else None

    def launch(self, tape: Tape, places: Mapping[Expression, Tensor], t: int, batch: int) -> None:
        """Fill in the places (T, *N, B, .) of the goals at step t."""
        if self.made is None:
            return
        now = [x[t] if x.dim() > 2 else x for x in (tape[e] for e in self.made.values)]
        out = [places[e][t] for e in self.goals]
        units, count = out[0].shape[-1], out[0].numel() // out[0].shape[-1]
        plan = tiles.plan(out[0], count, units, 1)
        grid = (-(-count // plan.tile), -(-units // 64))
        tiles.launch(
            cell_kernels.section_kernel, grid, out[0], tuple(now), tuple(out), count, batch,
            FUNCTION=self.made.function, INPUTS=len(now), OUTPUTS=len(out), UNITS=units, TILE=plan.tile, COLUMNS=64,
            WIDTHS=tuple(x.stride(-2) if x.dim() > 1 else 0 for x in now),
            VECTORS=tuple(x.dim() > 1 and x.numel() // x.shape[-1] == count for x in now),
            LENGTHS=tuple(x.stride(-2) for x in out),
        )  # fmt: skip


class Sections:
    """As in `Passes`."""

    def __init__(self, cell: Generated) -> None:
        self.cell, self.d = cell, cell.definition
        d = self.d
        self.sections = range(len(d.products) + 1)
        self.columns = [c.node for c in (*d.inputs, *(c for q in d.products for c in q.columns))]
        self._forward = [self._groups_forward(k) for k in self.sections]
        self._tangent = [self._groups_tangent(k) for k in self.sections]
        self._adjoint = [self._groups_adjoint(k) for k in self.sections]

    def _by_size(self, nodes: Sequence[Expression]) -> dict[str, list[Expression]]:
        found: dict[str, list[Expression]] = {}
        for e in nodes:
            found.setdefault(self.d.size(e), []).append(e)
        return found

    def _targets(self, k: int) -> list[Expression]:
        return [t.node for t in self.d.targets if t.section == k]

    def _groups_forward(self, k: int) -> list[Group]:
        d = self.d
        nodes = [*self._targets(k), *(e for e in d.kept if d.section(e) == k)]
        known = [*self.columns, *(t.node for t in d.targets if t.section < k)]
        known += [e for e in d.kept if d.section(e) < k]
        return [
            Group(f"{d.name}_forward_{k}", {e: e for e in found}, known)
            for found in self._by_size(list(dict.fromkeys(nodes))).values()
        ]

    def change(self, e: Expression) -> Expression:
        """The change of a node, or its cotangent."""
        return self.d.graph.leaf("change", e.index)

    def _moving(self, k: int) -> list[Expression]:
        """What the targets of section k depend on: columns, states, parameters, raw inputs, targets of before."""
        d = self.d
        found = [*self.columns, *d.before.values(), *(d.graph.leaf("parameter", b) for b in d.parameters)]
        found += [] if d.raw is None else [d.raw]
        return found + [t.node for t in d.targets if t.section < k]

    def _groups_tangent(self, k: int) -> list[Group]:
        d = self.d
        seeds = {e: self.change(e) for e in self._moving(k)}
        groups = []
        for found in self._by_size(self._targets(k)).values():
            moved = push(ordered(found, seeds), seeds, d.slopes)
            goals = {e: moved.get(e, d.graph.constant(0)) for e in found}
            groups.append(Group(f"{d.name}_tangent_{k}", goals, []))
        return groups

    def _groups_adjoint(self, k: int) -> list[Group]:
        """Each adds to the cotangents of what its targets depend on."""
        d = self.d
        groups = []
        ends = frozenset((*self.columns, *(t.node for t in d.targets if t.section < k)))
        for found in self._by_size(self._targets(k)).values():
            others = ends | {e for e in self._targets(k) if e not in found}
            seeds = {e: self.change(e) for e in found}
            pulled = pull(ordered(found, others), seeds, frozenset(others), d.slopes)
            goals = {e: self.change(e) + pulled[e] for e in self._moving(k) if e in pulled}
            groups.append(Group(f"{d.name}_adjoint_{k}", goals, []))
        return groups

    def _values(self, arguments: Tensors, results: Tensors) -> Tape:
        """The leaves that derivatives are functions of."""
        d, p, sizes = self.d, self.cell.parts(arguments), self.cell.sizes(arguments)
        found: Tape = {e: x.contiguous() for e, x in self.cell.constants(p).items()}
        for s, first, H in zip(d.states, p.states, results, strict=False):
            found[d.before[s]] = lag(H, first)
        found |= {d.graph.leaf("result", n): H.contiguous() for n, H in zip(d.returned, results, strict=False)}
        if d.kept:
            parts = torch.split(results[-1].contiguous(), self.cell.kept_sizes(sizes), -1)
            found |= {d.graph.leaf("kept", i): x for i, x in enumerate(parts)}
        if d.raw is not None:
            found[d.raw] = p.X.contiguous()[..., : p.states[0].shape[-1]]
        return found

    def forward(self, arguments: Tensors) -> list[Tensor]:
        """As in `Passes`."""
        d, p, sizes = self.d, self.cell.parts(arguments), self.cell.sizes(arguments)
        tiles.check(**{f"arguments[{i}]": x for i, x in enumerate(arguments)})
        (steps, batch), tape = p.X.shape[:2], {e: x.contiguous() for e, x in self.cell.constants(p).items()}
        results = [p.X.new_empty(shape) for shape in self.cell.shapes(arguments)]
        places: Tape = dict(zip(d.returned.values(), results, strict=False))
        if d.kept:
            places |= zip(d.kept, torch.split(results[-1], self.cell.kept_sizes(sizes), -1), strict=True)
        wholes = self._columns(tape, sizes, (steps, batch), p.X, p.Kx)
        for target in d.targets:
            places.setdefault(target.node, p.X.new_empty(steps, batch, sizes[target.size]))
        tape = {**places, **tape}  # a column that is kept is read where the product has it
        if d.raw is not None:
            tape[d.raw] = p.X.contiguous()[..., : p.states[0].shape[-1]]
        starts = dict(zip(d.before.values(), (s.contiguous() for s in p.states), strict=True))
        for t in range(steps):
            before = {e: places[d.returned[s]][t - 1] if t else starts[e] for s, e in d.before.items()}
            now = {**tape, **before}
            for k in self.sections:
                if k:
                    vector = d.products[k - 1].vector
                    rows = before[vector] if vector in before else tape[vector][t]
                    wholes[k - 1][t].addmm_(rows, p.K[k - 1])
                for group in self._forward[k]:
                    group.launch(now, places, t, batch)
        return results

    def _columns(self, tape: Tape, sizes: dict[str, int], lead: tuple[int, ...], X: Tensor, Kx: Tensor) -> list[Tensor]:
        """The columns of every product (T, B, .), with the inputs' projections in those that are shared."""
        d = self.d
        pieces = dict(zip(d.input_columns, cut(self.cell.project(X, Kx), d.input_columns, sizes), strict=True))
        tape |= {c.node: pieces[c].contiguous() for c in d.inputs}
        wholes = []
        for q in d.products:
            whole = X.new_zeros(*lead, sum(sizes[c.size] for c in q.columns))
            for c, part in zip(q.columns, cut(whole, q.columns, sizes), strict=True):
                if c.kind == "a":
                    part.copy_(pieces[c])
                tape[c.node] = part
            wholes.append(whole)
        return wholes

    def tangent(self, tangents: Maybes, arguments: Tensors, results: Tensors) -> list[Tensor]:
        """As in `Passes`."""
        d, p, moved = self.d, self.cell.parts(arguments), self.cell.parts(tangents)
        sizes, vectors, (steps, batch) = (
            self.cell.sizes(arguments),
            batch_of_vectors(tangents, arguments),
            p.X.shape[:2],
        )
        tape = self._values(arguments, results)
        rows = [evaluate(v, dict(tape)) for v in d.vectors]
        alone, wholes = linearised.from_outside(self.cell, p, moved, (p.X, moved.X), rows, sizes, vectors)

        def like(size: str) -> Tensor:
            room: Tensor = p.X.new_zeros(with_vectors((steps, batch, sizes[size]), vectors))
            return room

        changes: Tape = {}
        for c, a in zip(d.inputs, alone, strict=True):
            changes[c.node] = like(c.size) if a is None else a.contiguous()
        for q, whole in zip(d.products, wholes, strict=True):
            changes |= zip([c.node for c in q.columns], cut(whole, q.columns, sizes), strict=True)
        for (name, size), db in zip(d.parameters.items(), moved.parameters, strict=True):
            room = like(size)
            changes[d.graph.leaf("parameter", name)] = room if db is None else room.add_(db.unsqueeze(-2))
        if d.raw is not None:
            width = p.states[0].shape[-1]
            changes[d.raw] = like(d.size(d.raw)) if moved.X is None else moved.X.contiguous()[..., :width]
        places = {t.node: like(t.size) for t in d.targets}
        changes |= places
        starts = {}
        for e, first, own in zip(d.before.values(), moved.states, p.states, strict=True):
            starts[e] = p.X.new_zeros(*vectors, *own.shape) if first is None else first.contiguous()
        for t in range(steps):
            before = {e: places[d.returned[s]][t - 1] if t else starts[e] for s, e in d.before.items()}
            now = {**tape, **{self.change(e): x for e, x in changes.items()}}
            now |= {self.change(e): x.unsqueeze(0).expand(t + 1, *x.shape) for e, x in before.items()}
            for k in self.sections:
                if k:
                    vector, whole = d.products[k - 1].vector, wholes[k - 1][t]
                    rows_k = before[vector] if vector in before else changes[vector][t]
                    whole.view(-1, whole.shape[-1]).addmm_(rows_k.reshape(-1, rows_k.shape[-1]), p.K[k - 1])
                for group in self._tangent[k]:
                    group.launch(now, places, t, batch)
        return [places[e] for e in d.returned.values()]

    def adjoint(self, cotangents: Maybes, arguments: Tensors, results: Tensors, needed: Sequence[bool]) -> list[Tensor]:
        """As in `Passes`."""
        d, p, sizes = self.d, self.cell.parts(arguments), self.cell.sizes(arguments)
        vectors, (steps, batch) = batch_of_vectors(cotangents, results[: self.cell.outputs]), p.X.shape[:2]
        tape = self._values(arguments, results)

        def like(width: int) -> Tensor:
            room: Tensor = p.X.new_zeros(with_vectors((steps, batch, width), vectors))
            return room

        on: Tape = {t.node: like(sizes[t.size]) for t in d.targets}
        for e, u in zip(d.returned.values(), cotangents, strict=True):
            if u is not None:
                on[e].copy_(u)
        wholes = [like(sum(sizes[c.size] for c in q.columns)) for q in d.products]
        alone = [like(sizes[c.size]) for c in d.inputs]
        on |= zip([c.node for c in d.inputs], alone, strict=True)
        for q, whole in zip(d.products, wholes, strict=True):
            on |= zip([c.node for c in q.columns], cut(whole, q.columns, sizes), strict=True)
        parameters = [like(sizes[s]) for s in d.parameters.values()]
        on |= zip([d.graph.leaf("parameter", b) for b in d.parameters], parameters, strict=True)
        raw = None if d.raw is None else like(p.states[0].shape[-1])
        if d.raw is not None and raw is not None:
            on[d.raw] = raw
        # The cotangents of the state before step t stand at t.
        carried = {e: like(s.shape[-1]) for e, s in zip(d.before.values(), p.states, strict=True)}
        on |= carried
        now = {**tape, **{self.change(e): x for e, x in on.items()}}
        for t in range(steps - 1, -1, -1):
            if t + 1 < steps:
                for s, e in d.before.items():
                    on[d.returned[s]][t].add_(carried[e][t + 1])
            for k in reversed(self.sections):
                for group in reversed(self._adjoint[k]):
                    group.launch(now, on, t, batch)
                if k:
                    vector, whole = on[d.products[k - 1].vector][t], wholes[k - 1][t]
                    flat = whole.view(-1, whole.shape[-1])
                    vector.view(-1, vector.shape[-1]).addmm_(flat, p.K[k - 1].t())
        rows = [evaluate(v, dict(tape)) for v in d.vectors]
        carry = [x[0] for x in carried.values()]
        block = linearised.Block(0, steps, rows, wholes, alone, parameters, raw, carry)
        return linearised.collected(self.cell, [block], arguments, needed, vectors)
