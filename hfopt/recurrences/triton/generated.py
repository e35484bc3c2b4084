"""The passes of a defined cell on CUDA: what does not recur by torch, the rest by the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hfopt.recurrences import linearised
from hfopt.recurrences.expression import Expression
from hfopt.recurrences.generated import Generated
from hfopt.recurrences.products import lag
from hfopt.recurrences.registry import CELLS, Maybe, Maybes, Passes, Tensors, batch_of_vectors, with_vectors
from hfopt.recurrences.roles import Parts
from hfopt.recurrences.triton import cell_kernels, pointwise, tiles
from hfopt.recurrences.triton.sections import Sections


class Kernels:
    """As in `Passes`, for cells that `pointwise.served` knows."""

    def __init__(self, cell: Generated) -> None:
        self.cell, self.d = cell, cell.definition
        self.own = list(self.d.before.values()).index(self.d.products[0].vector)
        self._made = {"forward": pointwise.forward(self.d), "adjoint": pointwise.adjoint(self.d)}
        self._made |= {"tangent": pointwise.tangent(self.d, False), "tangent_q": pointwise.tangent(self.d, True)}
        self.columns = len(self.d.products[0].columns)
        self.away = pointwise.outside(self.d)

    def _values(
        self, which: str, arguments: Tensors, results: Tensors
    ) -> tuple[list[Tensor], list[int], list[int], list[bool]]:
        """The tensors that hold the values of a function, lengths of their rows and steps, and which have steps."""
        p, hidden = self.cell.parts(arguments), self.cell.parts(arguments).states[0].shape[-1]
        tensors: list[Tensor] = []
        for e in self._made[which].values:
            assert e.name is not None
            tensors.append(self._value(*e.name, p, results, hidden))
        wide = [t.stride(-2) if t.dim() > 1 else 0 for t in tensors]
        moving = [t.dim() == 3 for t in tensors]
        return tensors, wide, [w if on else 0 for w, on in zip(wide, moving, strict=True)], moving

    def _value(self, kind: str, name: Any, p: Parts, results: Tensors, hidden: int) -> Tensor:
        d = self.d
        if kind == "kept":
            return results[-1].contiguous()[..., name * hidden :]
        if kind == "state":
            i = list(d.states).index(name)
            return lag(results[i], p.states[i])
        if kind == "result":
            return results[list(d.returned).index(name)].contiguous()
        if kind == "parameter":
            found: Tensor = p.parameters[list(d.parameters).index(name)]
        elif kind == "mask":
            found = p.masks[list(d.masks).index(name)]
        else:
            found = p.X
        return found.contiguous()

    def _switches(self, which: str, widths: list[int], steps: list[int], hidden: int) -> dict[str, Any]:
        return {
            "POINTWISE": self._made[which].function, "OWN": self.own, "STATES": len(self.d.states),
            "VALUES": len(widths), "WIDTHS": tuple(widths), "STEPS": tuple(steps), "NM": self.columns, "UNITS": hidden,
        }  # fmt: skip

    def forward(self, arguments: Tensors) -> list[Tensor]:
        """As in `Passes`."""
        p = self.cell.parts(arguments)
        tiles.check(**{f"arguments[{i}]": x for i, x in enumerate(arguments)})
        hidden, (steps, batch, _) = p.states[0].shape[-1], p.X.shape
        results = [p.X.new_empty(shape) for shape in self.cell.shapes(arguments)]
        Q, M = self.cell.project(p.X, p.Kx), p.K[0].contiguous()
        kept = [results[-1][..., i * hidden :] for i in range(len(self.d.kept))]
        out = [*results[: self.cell.outputs], *kept]
        lengths = [hidden] * self.cell.outputs + [hidden * len(kept)] * len(kept)
        first = [s.contiguous() for s in p.states]
        tensors, widths, strides, moving = self._values("forward", arguments, results)
        plan = tiles.plan(p.X, batch, hidden, self.columns)

        def call(t: int, number: int) -> None:
            before = [r[t - 1] for r in results[: len(first)]] if t else first
            tiles.launch(
                cell_kernels.onward_kernel, plan.grid(batch, hidden), p.X,
                Q[t], M, tuple(before), tuple(x[t] for x in out), _at(tensors, moving, t), number, batch, batch,
                OUTPUTS=len(out), LENGTHS=tuple(lengths), NQ=len(self.d.input_columns),
                **self._switches("forward", widths, strides, hidden), **plan.settings(),
            )  # fmt: skip

        tiles.run(steps, plan.form, call)
        return results

    def tangent(self, tangents: Maybes, arguments: Tensors, results: Tensors) -> list[Tensor]:
        """As in `Passes`."""
        cell, p, moved = self.cell, self.cell.parts(arguments), self.cell.parts(tangents)
        hidden, vectors, (steps, batch, _) = p.states[0].shape[-1], batch_of_vectors(tangents, arguments), p.X.shape
        outputs = [p.X.new_empty(with_vectors(r.shape, vectors)) for r in results[: cell.outputs]]
        count = outputs[0][0].numel() // hidden
        Q = self._outside(p, moved, arguments, results, vectors)
        first = [
            p.X.new_zeros(count, hidden) if d is None else d.reshape(count, hidden).contiguous() for d in moved.states
        ]
        which = "tangent" if Q is None else "tangent_q"
        tensors, widths, strides, moving = self._values(which, arguments, results)
        M = p.K[0].contiguous()
        plan = tiles.plan(p.X, count, hidden, self.columns)

        def call(t: int, number: int) -> None:
            before = [r[t - 1] for r in outputs[: len(first)]] if t else first
            tiles.launch(
                cell_kernels.onward_kernel, plan.grid(count, hidden), p.X,
                M if Q is None else Q[t], M, tuple(before), tuple(x[t] for x in outputs), _at(tensors, moving, t),
                number, count, batch,
                OUTPUTS=len(outputs), LENGTHS=(hidden,) * len(outputs),
                NQ=0 if Q is None else len(self.away) + self.columns,
                **self._switches(which, widths, strides, hidden), **plan.settings(),
            )  # fmt: skip

        tiles.run(steps, plan.form, call)
        return outputs

    def _outside(
        self,
        p: Parts,
        moved: Parts,
        arguments: Tensors,
        results: Tensors,
        vectors: tuple[int, ...],
    ) -> Maybe:
        """Changes that do not recur, (T, *N, B, .): those from outside, then those of the product's columns."""
        away = (moved.X, moved.Kx, *moved.K, *moved.parameters)
        if all(x is None for x in away):
            return None
        d, hidden = self.d, p.states[0].shape[-1]
        rows = lag(results[self.own], p.states[self.own])
        sizes = self.cell.sizes(arguments)
        alone, columns = linearised.from_outside(self.cell, p, moved, (p.X, moved.X), [rows], sizes, vectors)
        shape = with_vectors((*p.X.shape[:2], hidden), vectors)
        parts: list[Tensor] = [p.X.new_zeros(shape) if a is None else a for a in alone]
        given = [p.X.new_zeros(hidden) if db is None else db.unsqueeze(-2) for db in moved.parameters]
        parts += [db.expand(shape) for db in given]
        if d.raw is not None:
            parts.append(p.X.new_zeros(shape) if moved.X is None else moved.X[..., :hidden])
        return torch.cat([*parts, columns[0]], -1) if parts else columns[0]

    def adjoint(self, cotangents: Maybes, arguments: Tensors, results: Tensors, needed: Sequence[bool]) -> list[Tensor]:
        """As in `Passes`."""
        cell, p = self.cell, self.cell.parts(arguments)
        hidden, (steps, batch, _) = p.states[0].shape[-1], p.X.shape
        vectors = batch_of_vectors(cotangents, results[: cell.outputs])
        shape = with_vectors((steps, batch, hidden), vectors)
        D = p.X.new_empty(*shape[:-1], self.columns * hidden)
        away = p.X.new_empty(*shape[:-1], len(self.away) * hidden) if self.away else D
        count = D[0].numel() // (self.columns * hidden)
        last = p.X.new_zeros(count, self.columns * hidden)
        carry = [p.X.new_zeros(*vectors, batch, hidden) for _ in p.states]
        U = [None if u is None else u.contiguous() for u in cotangents]
        M = p.K[0].t().contiguous()
        tensors, widths, strides, moving = self._values("adjoint", arguments, results)
        plan = tiles.plan(p.X, count, hidden, self.columns)

        def call(done: int, number: int) -> None:
            t = steps - 1 - done
            tiles.launch(
                cell_kernels.adjoint_kernel, plan.grid(count, hidden), p.X,
                tuple(D if u is None else u[t] for u in U), M, D[t + 1] if done else last, tuple(carry), D[t], away[t],
                _at(tensors, moving, t), number, count, batch,
                OUTPUTS=len(U), GIVEN=tuple(u is not None for u in U), NO=len(self.away),
                **self._switches("adjoint", widths, strides, hidden), **plan.settings(),
            )  # fmt: skip

        tiles.run(steps, plan.form, call)
        carry[self.own] += D[0] @ M
        return linearised.collected(cell, [self._block(p, results, D, away, carry)], arguments, needed, vectors)

    def _block(self, p: Parts, results: Tensors, D: Tensor, away: Tensor, carry: list[Tensor]) -> linearised.Block:
        """All steps as one block, for what is summed over them."""
        hidden, d = p.states[0].shape[-1], self.d
        parts: list[Tensor] = list(torch.split(away, hidden, -1)) if self.away else []
        found: dict[Expression, Tensor] = dict(zip(self.away, parts, strict=True))
        rows = lag(results[self.own], p.states[self.own])
        parameters = [found[d.graph.leaf("parameter", b)] for b in d.parameters]
        raw = None if d.raw is None else found[d.raw]
        return linearised.Block(0, len(D), [rows], [D], [found[c.node] for c in d.inputs], parameters, raw, carry)


def _at(tensors: list[Tensor], moving: list[bool], t: int) -> tuple[Tensor, ...]:
    """The tensors from step t on."""
    return tuple(x[t] if on else x for x, on in zip(tensors, moving, strict=True))


@cache
def cell(name: str) -> Passes | None:
    """The passes of the registered cell of this name; None for what is no traced cell."""
    found = CELLS.get(name)
    if not isinstance(found, Generated) or found.definition.untraceable is not None:
        return None
    return Kernels(found) if pointwise.served(found.definition) else Sections(found)
