"""The arguments and results of a traced cell by their roles, and the values that its derivatives are functions of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hfopt.recurrences.definition import Definition
from hfopt.recurrences.expression import Expression
from hfopt.recurrences.products import lagged
from hfopt.recurrences.registry import Tensors
from hfopt.recurrences.structure import Column


class Parts(NamedTuple):
    """The arguments of a generated cell, or what belongs to each: X, K_x, K_j, parameters, masks, first states."""

    X: Any
    Kx: Any
    K: Sequence[Any]
    parameters: Sequence[Any]
    masks: Sequence[Any]
    states: Sequence[Any]


class Roles:
    """What stands where: X, K_x, K_1, .., parameters, masks, first states; then states, outputs, and what is kept.

    A K_x without rows, (0, .), says that X (T, B, .) are the inputs' projections themselves.

    Attributes:
        arguments, outputs, results: how many there are.
        places: place of every first state among the arguments -> the output that it goes on from.
    """

    def __init__(self, definition: Definition) -> None:
        self.definition = d = definition
        self.arguments = 2 + len(d.products) + len(d.parameters) + len(d.masks) + len(d.states)
        self.outputs = len(d.returned)
        self.results = self.outputs + bool(d.kept)
        self.places: Mapping[int, int] = {self.arguments - len(d.states) + i: i for i in range(len(d.states))}

    def parts(self, given: Sequence[Any]) -> Parts:
        """The arguments, or one thing for each, by their roles."""
        d, rest = self.definition, list(given[2:])
        cut = [len(d.products), len(d.parameters), len(d.masks), len(d.states)]
        lists = []
        for n in cut:
            lists.append(rest[:n])
            rest = rest[n:]
        return Parts(given[0], given[1], *lists)

    def sizes(self, arguments: Tensors) -> dict[str, int]:
        """Numbers of units by the names of sizes."""
        p, d = self.parts(arguments), self.definition
        found = {size: s.shape[-1] for size, s in zip(d.states.values(), p.states, strict=True)}
        for product, K in zip(d.products, p.K, strict=True):
            found.setdefault(product.size, K.shape[0])
            unknown = [c for c in product.columns if c.size not in found]
            if len({c.size for c in unknown}) == 1:
                width = K.shape[1] - sum(found[c.size] for c in product.columns if c.size in found)
                found[unknown[0].size] = width // len(unknown)
        unknown = [c for c in d.input_columns if c.size not in found]
        if len({c.size for c in unknown}) == 1:
            width = p.Kx.shape[1] - sum(found[c.size] for c in d.input_columns if c.size in found)
            found[unknown[0].size] = width // len(unknown)
        return found

    def project(self, X: Tensor, Kx: Tensor) -> Tensor:
        """The projections of inputs X (n, B, .).

        Raises:
            ValueError: the cell takes the inputs themselves too, and only their projections are there.
        """
        if Kx.shape[0]:
            return X @ Kx
        if self.definition.raw is not None:
            raise ValueError(f"the cell {self.definition.name} takes its inputs themselves, not their projections")
        return X

    def kept_sizes(self, sizes: dict[str, int]) -> list[int]:
        return [sizes[self.definition.size(e)] for e in self.definition.kept]

    def shapes(self, arguments: Tensors) -> list[tuple[int, ...]]:
        """(T, B, .) of every state and output, and of what is kept."""
        sizes, lead = self.sizes(arguments), tuple(arguments[0].shape[:2])
        found = [(*lead, sizes[self.definition.size(e)]) for e in self.definition.returned.values()]
        if self.definition.kept:
            found.append((*lead, sum(self.kept_sizes(sizes))))
        return found

    def constants(self, p: Parts) -> dict[Expression, Any]:
        """Parameters and masks."""
        d = self.definition
        known = {d.graph.leaf("parameter", n): x for n, x in zip(d.parameters, p.parameters, strict=True)}
        return known | {d.graph.leaf("mask", n): x for n, x in zip(d.masks, p.masks, strict=True)}

    def values(
        self, arguments: Tensors, results: Tensors, sizes: dict[str, int], start: int, stop: int
    ) -> dict[Expression, Any]:
        """What derivatives at the steps from start to stop are functions of, each (n, B, .); parameters (.,)."""
        d, p = self.definition, self.parts(arguments)
        known = self.constants(p)
        for s, first, H in zip(d.states, p.states, results, strict=False):
            known[d.before[s]] = lagged(H, first, start, stop)
        for name, H in zip(d.returned, results, strict=False):
            known[d.graph.leaf("result", name)] = H[start:stop]
        if d.kept:
            parts = torch.split(results[-1][start:stop], self.kept_sizes(sizes), -1)
            known |= {d.graph.leaf("kept", i): k for i, k in enumerate(parts)}
        if d.raw is not None:
            known[d.raw] = p.X[start:stop, :, : p.states[0].shape[-1]]
        return known


def cut(x: Tensor, columns: Sequence[Column], sizes: dict[str, int]) -> Sequence[Tensor]:
    """The columns of x (..., all of them)."""
    return torch.split(x, [sizes[c.size] for c in columns], -1) if columns else ()
