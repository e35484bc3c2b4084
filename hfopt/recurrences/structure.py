"""What a recurrent cell is made of: columns, products, targets; and its arguments while it is traced or run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hfopt.recurrences.expression import Expression, Graph

UNITS = "units"


@dataclass(frozen=True)
class Column:
    """A column (a block of units) of projections or products.

    Attributes:
        name: that of the gate.
        kind: "x" of the inputs alone, "a" shared, "m" of a recurrent product alone.
        size: the name of its size.
        node: the node of the trace that it is.
        product: the index of its product; None for "x".
    """

    name: str
    kind: str
    size: str
    node: Expression
    product: int | None


@dataclass(frozen=True)
class Product:
    """A product of a vector with a recurrent matrix: its columns, shared ones first.

    Attributes:
        vector: the node; a state before the step, or a target.
        size: that of the vector.
        columns: in the order of the matrix.
    """

    vector: Expression
    size: str
    columns: tuple[Column, ...]

    @property
    def shared(self) -> int:
        """How many of the columns are shared with the inputs."""
        return sum(c.kind == "a" for c in self.columns)


@dataclass(frozen=True)
class Target:
    """A pointwise function of the step that is a vector of a product, a state, an output, or used at several stages.

    Attributes:
        node: of the trace.
        size: its size.
        section: it needs the products before this index, and no other.
        terms: input -> its derivative, for every column, state, parameter, raw input and other target it depends on.
    """

    node: Expression
    size: str
    section: int
    terms: dict[Expression, Expression]


def names_of(text: str) -> dict[str, str]:
    """Name -> size of "a b:size"."""
    found = {}
    for word in text.split():
        name, _, size = word.partition(":")
        if not name.isidentifier() or name in found:
            raise ValueError(f"{word!r} in {text!r} is no name, or there twice")
        found[name] = size or UNITS
    return found


class Inputs:
    """``x`` of a trace or of a step on tensors."""

    def __init__(self, get: Callable[[str], Any]) -> None:
        self._get = get

    def __getattr__(self, name: str) -> Any:
        return self._get(name)


class Weights:
    """``W``: ``W(v).name`` and ``W.name(v)`` are the same."""

    def __init__(self, get: Callable[[str, Any], Any]) -> None:
        self._get = get

    def __call__(self, vector: Any) -> Inputs:
        return Inputs(lambda name: self._get(name, vector))

    def __getattr__(self, name: str) -> Callable[[Any], Any]:
        return lambda vector: self._get(name, vector)


class Probe:
    """Arguments of a step that is called on small tensors to see what it uses.

    Args:
        widths: of the gates, by their names; every size has another.
        raw: width of the inputs themselves.
    """

    def __init__(self, widths: dict[str, int], raw: int) -> None:
        self.widths, self.width_of_raw, self.raw = widths, raw, False
        self.inputs: set[str] = set()
        self.vectors: list[tuple[Tensor, set[str]]] = []

    def of_input(self, name: str) -> Tensor:
        """``x.name``."""
        if name == "raw":
            self.raw = True
            return torch.rand(1, self.width_of_raw)
        self.inputs.add(name)
        return torch.rand(1, self._width(name))

    def of_product(self, name: str, vector: Tensor) -> Tensor:
        """``W.name(vector)``."""
        found = next((names for v, names in self.vectors if v is vector), None)
        if found is None:
            found = set()
            self.vectors.append((vector, found))
        found.add(name)
        return torch.rand(1, self._width(name))

    def _width(self, name: str) -> int:
        if name not in self.widths:
            raise ValueError(f"the step uses {name}, which is none of its gates")
        return self.widths[name]

    def structure(
        self, graph: Graph, gates: dict[str, str], by_width: dict[int, str]
    ) -> tuple[tuple[Column, ...], tuple[Product, ...]]:
        """The columns of the inputs and the products, none of them shared."""
        inputs = tuple(Column(n, "x", s, graph.leaf("x", n), None) for n, s in gates.items() if n in self.inputs)
        products = []
        for j, (vector, names) in enumerate(self.vectors):
            columns = tuple(Column(n, "m", s, graph.leaf("m", n), j) for n, s in gates.items() if n in names)
            products.append(Product(graph.leaf("vector", j), by_width[vector.shape[-1]], columns))
        return inputs, tuple(products)
