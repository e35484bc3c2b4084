"""A traced cell as a registered one: its arguments and results, its reference, and its passes in torch's operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hfopt.recurrences import linearised, second
from hfopt.recurrences.definition import Definition
from hfopt.recurrences.expression import FUNCTIONS, OPERATIONS, Expression
from hfopt.recurrences.products import blocks
from hfopt.recurrences.registry import CELLS, Bent, Cell, Maybe, Maybes, Tensors, register
from hfopt.recurrences.roles import Roles, cut


class Generated(Roles, Cell):
    """(X (T, B, V), K_x, K_1, .., parameters, masks, first states) -> states (T, B, .), then outputs.

    K_x (V, .) has the definition's `input_columns`, K_j those of product j. Stored besides: what the definition keeps,
    in one tensor (T, B, .), if it is anything. Masks have no derivative.
    """

    def __init__(self, definition: Definition, name: str | None = None) -> None:
        super().__init__(definition)
        self.name, self.columns = name or f"cell.{definition.name}", definition.raw is None

    # -- reference -------------------------------------------------------------------------------------------------

    def plain(self, arguments: Tensors) -> tuple[Tensor, ...]:
        """The outputs by the definition, one step after the other."""
        d, p, sizes = self.definition, self.parts(arguments), self.sizes(arguments)
        names = {
            c.name: w
            for c, w in zip(d.input_columns, cut(self.project(p.X, p.Kx), d.input_columns, sizes), strict=True)
        }
        W: dict[str, Tensor] = {}
        for product, K in zip(d.products, p.K, strict=True):
            W |= {c.name: k for c, k in zip(product.columns, cut(K, product.columns, sizes), strict=True)}
        more = {**dict(zip(d.parameters, p.parameters, strict=True))}
        more |= {n: m.detach() for n, m in zip(d.masks, p.masks, strict=True)}
        states, found = list(p.states), []
        width = states[0].shape[-1]
        for t, x in enumerate(p.X.unbind()):
            after = d.reference({n: w[t] for n, w in names.items()}, x[:, :width], states, W, more)
            states = list(after[: len(states)])
            found.append(after)
        return tuple(torch.stack(each) for each in zip(*found, strict=True))

    # -- forward ---------------------------------------------------------------------------------------------------

    def forward(self, arguments: Tensors) -> list[Tensor]:
        """States, outputs and what is kept, each (T, B, .)."""
        d, p, sizes = self.definition, self.parts(arguments), self.sizes(arguments)
        results = [p.X.new_empty(shape) for shape in self.shapes(arguments)]
        place = {e: r.unbind() for e, r in zip(d.returned.values(), results, strict=False)}
        if d.kept:
            parts = torch.split(results[-1], self.kept_sizes(sizes), -1)
            place |= {e: k.unbind() for e, k in zip(d.kept, parts, strict=True)}
        fixed = self.constants(p)
        states, width = list(p.states), p.states[0].shape[-1]
        inputs = [d.graph.leaf("x", c.name) for c in d.input_columns]
        for start, stop in blocks(results[0]):
            X = p.X[start:stop]
            projected = [x.unbind() for x in cut(self.project(X, p.Kx), d.input_columns, sizes)]
            for t in range(start, stop):
                env: dict[Expression, Any] = dict(fixed)
                env |= zip(d.before.values(), states, strict=True)
                env |= {x: y[t - start] for x, y in zip(inputs, projected, strict=True)}
                if d.raw is not None:
                    env[d.raw] = X[t - start][:, :width]
                for e in d.order:
                    if e not in env:
                        self._value(e, env, p.K, sizes, place[e][t] if e in place else None)
                for e, where in place.items():
                    if env[e] is not where[t]:
                        where[t].copy_(env[e])
                states = [env[d.returned[s]] for s in d.states]
        return results

    def _value(
        self, e: Expression, env: dict[Expression, Any], K: Sequence[Tensor], sizes: dict[str, int], out: Maybe
    ) -> None:
        """Work out a node of a step, in ``out`` if that is given; all columns of a product at once."""
        graph = self.definition.graph
        if e.op == "linear":
            j = next(i for i, q in enumerate(self.definition.products) if q.vector is e.args[0])
            columns = self.definition.products[j].columns
            for c, y in zip(columns, cut(env[e.args[0]] @ K[j], columns, sizes), strict=True):
                env[graph.linear(e.args[0], c.name)] = y
        elif e.op == "constant":
            env[e] = e.value
        elif e.op == "copy":
            env[e] = env[e.args[0]]
        else:
            given = [env[a] for a in e.args]
            into = out is not None and e.op in _INTO and all(isinstance(x, Tensor) for x in given)
            env[e] = _INTO[e.op](*given, out=out) if into else OPERATIONS[e.op](*given)

    # -- derivatives -----------------------------------------------------------------------------------------------

    def tangent(self, tangents: Maybes, arguments: Tensors, results: Tensors) -> list[Tensor]:
        """As in `Passes`."""
        return linearised.tangent(self, tangents, arguments, results)

    def adjoint(self, cotangents: Maybes, arguments: Tensors, results: Tensors, needed: Sequence[bool]) -> list[Tensor]:
        """As in `Passes`."""
        return linearised.adjoint(self, cotangents, arguments, results, needed)

    @property
    def bends(self) -> bool:
        """As in `Cell`: where a step has one product."""
        return second.program_of(self.definition) is not None

    def bent(
        self, arguments: Tensors, outputs: Tensors, p: Maybes, R: Maybes, U: Maybes, alpha: Maybe,
        needed: Sequence[bool],
    ) -> Bent:  # fmt: skip
        """As in `Cell`."""
        return second.bent(self, arguments, outputs, p, R, U, alpha, needed)

    @property
    def weights(self) -> int:
        """How many weight matrices there are."""
        return 1 + len(self.definition.products)

    def rows_and_deltas(self, U: Maybes, arguments: Tensors, results: Tensors) -> linearised.PerSequence:
        """As in `linearised`."""
        return linearised.rows_and_deltas(self, U, arguments, results)


# Operations that write where they are told.
_INTO: dict[str, Callable[..., Tensor]] = {f: getattr(torch, f) for f in FUNCTIONS if f not in ("relu", "step")}
_INTO |= {"+": torch.add, "-": torch.sub, "*": torch.mul, "/": torch.div}


_known: dict[Definition, Generated] = {}


def generated(definition: Definition) -> Generated:
    """The registered cell of a definition; registered now if it is not yet, under a name of its own."""
    if definition not in _known:
        name, number = f"cell.{definition.name}", 1
        while name in CELLS:
            number += 1
            name = f"cell.{definition.name}.{number}"
        _known[definition] = Generated(definition, name)
        register(_known[definition])
    return _known[definition]
