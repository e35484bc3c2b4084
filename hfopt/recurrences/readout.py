"""A cell with the linear readout of what its layer gives as one operator, o_t = [h_t, 1] K_o.

Where the passes are compiled, neither the changes nor the cotangents of the hidden states go through memory:

    tangent:  R_o,t = R_h,t K_o[:h] + [h_t, 1] dK_o
    adjoint:  u_t = uo_t K_o[:h]',   dK_o = sum_t [h_t, 1]' uo_t

Reference: Martens & Sutskever, "Learning recurrent neural networks with Hessian-free optimization", ICML 2011.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hfopt.recurrences.backends import backend
from hfopt.recurrences.definition import Definition
from hfopt.recurrences.generated import Generated, generated
from hfopt.recurrences.linearised import PerSequence, rows_and_deltas
from hfopt.recurrences.products import correlate_
from hfopt.recurrences.registry import Cell, Maybe, Maybes, Tensors, batch_of_vectors, register, with_vectors


class Read(Cell):
    """(the cell's arguments, K_o (h + 1, O)) -> (O (T, B, O),), and the pre-activations that structural damping limits.

    Stored besides: the cell's other results.

    Attributes:
        base: the cell.
        order: places of the cell's results, those that are shown first.
    """

    def __init__(self, base: Generated) -> None:
        self.base, d = base, base.definition
        self.name = f"{base.name}.read"
        shown = [d.damped] if d.damped else []
        self.order = [*shown, *(i for i in range(base.results) if i not in shown)]
        self.arguments, self.outputs, self.results = base.arguments + 1, 1 + len(shown), 1 + base.results

    def of_base(self, results: Sequence[Any]) -> list[Any]:
        """The cell's results, or what belongs to each of its outputs that are shown, in its own order; or None."""
        found: list[Any] = [None] * self.base.results
        for place, result in zip(self.order, results[1:], strict=False):
            found[place] = result
        return found

    def _states(self, results: Tensors) -> Tensor:
        h: Tensor = self.of_base(results)[self.base.definition.output]
        return h

    def shapes(self, arguments: Tensors) -> list[tuple[int, ...]]:
        """(T, B, O), then the cell's."""
        own = self.base.shapes(arguments[:-1])
        return [(*own[0][:2], arguments[-1].shape[1]), *(own[i] for i in self.order)]

    def plain(self, arguments: Tensors) -> tuple[Tensor, ...]:
        """The readout applied to all steps at once."""
        found = self.base.plain(arguments[:-1])
        return self.read(found[self.base.definition.output], arguments[-1]), *(
            found[i] for i in self.order[: self.outputs - 1]
        )

    @staticmethod
    def read(H: Tensor, K_o: Tensor) -> Tensor:
        """[h_t, 1] K_o."""
        return torch.addmm(K_o[-1], H.flatten(0, 1), K_o[:-1]).view(*H.shape[:2], -1)

    def forward(self, arguments: Tensors) -> list[Tensor]:
        """As in `Passes`."""
        found = backend(self.base, arguments[0]).forward(arguments[:-1])
        return [self.read(found[self.base.definition.output], arguments[-1]), *(found[i] for i in self.order)]

    def tangent(self, tangents: Maybes, arguments: Tensors, results: Tensors) -> list[Tensor]:
        """As in `Passes`."""
        *moved, dK_o = tangents
        K_o, vectors = arguments[-1], batch_of_vectors(tangents, arguments)
        found: list[Maybe] = [None] * self.base.outputs
        if any(d is not None for d in moved):
            found = [*backend(self.base, K_o).tangent(moved, arguments[:-1], self.of_base(results))]
        R = found[self.base.definition.output]
        read = K_o.new_zeros(with_vectors(results[0].shape, vectors)) if R is None else R @ K_o[:-1]
        if dK_o is not None:
            states = self._states(results)
            read = read.add_((states.unsqueeze(1) if vectors else states) @ dK_o[..., :-1, :]).add_(dK_o[..., -1:, :])
        shown = zip(self.order, results[1 : self.outputs], strict=False)
        others = [(found[i], y) for i, y in shown]
        return [read, *(y.new_zeros(with_vectors(y.shape, vectors)) if r is None else r for r, y in others)]

    def cotangents(self, U: Maybes, K_o: Tensor) -> list[Maybe]:
        """Those of the cell's outputs."""
        given = self.of_base(U)[: self.base.outputs]
        if U[0] is not None:
            given[self.base.definition.output] = U[0] @ K_o[:-1].t()
        return given

    def adjoint(self, cotangents: Maybes, arguments: Tensors, results: Tensors, needed: Sequence[bool]) -> list[Tensor]:
        """As in `Passes`."""
        *given, K_o = arguments
        Uo = cotangents[0]
        U = self.cotangents(cotangents, K_o)
        found = backend(self.base, K_o).adjoint(U, given, self.of_base(results), needed[:-1])
        if not needed[-1]:
            return [*found, K_o.new_empty(0)]
        dK_o = K_o.new_zeros(with_vectors(K_o.shape, batch_of_vectors(cotangents, results[: self.outputs])))
        if Uo is not None:
            correlate_(dK_o[..., :-1, :], self._states(results), Uo)
            dK_o[..., -1, :] = Uo.sum((0, -2))
        return [*found, dK_o]

    def rows_and_deltas(self, U: Maybes, arguments: Tensors, results: Tensors) -> PerSequence:
        """As of the cell, with those of K_o last among the weights."""
        *given, K_o = arguments
        found = rows_and_deltas(self.base, self.cotangents(U, K_o), given, self.of_base(results))
        H, Uo = self._states(results), U[0]
        rows = torch.cat((H, H.new_ones(*H.shape[:2], 1)), -1)
        deltas = H.new_zeros(*H.shape[:2], K_o.shape[1]) if Uo is None else Uo
        return [*found[0], (rows, deltas)], *found[1:]


@cache
def generated_readout(definition: Definition) -> Read:
    """The registered readout of a definition's cell; registered now if it is not yet."""
    found = Read(generated(definition))
    register(found)
    return found
