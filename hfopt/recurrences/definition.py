"""A recurrent cell from one definition: a step written once, traced to stages of products and pointwise formulas.

    @cell(states="h", gates="g c")
    def ugrnn(x, h, W):
        m = W(h)
        g, c = sigmoid(x.g + m.g), tanh(x.c + m.c)
        return g * h + (1 - g) * c

``x`` has the projections of the inputs by name, ``W(v)`` is the product of any vector with its recurrent matrix, its
columns by name (``W.g(v)`` is a single one). The function of tensors is the reference. Traced, it shows

- the products: all columns of one vector have one matrix, and a product that needs another one's result comes later;
- the columns: those of the inputs alone, those shared (x.g and m.g only ever enter as a sum, which is one column of
  both matrices), and those of the recurrent product alone;
- the targets: vectors that products take, states and outputs, each a function of columns, states and other targets;
- what is kept of a step for its derivatives: values of nonlinearities, and what depends on columns otherwise. What
  takes a few multiplications of these and of the states is worked out again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from hfopt.recurrences.expression import (
    CHEAP,
    Expression,
    Graph,
    Untraceable,
    ordered,
    partials,
    pull,
)
from hfopt.recurrences.structure import Column, Inputs, Probe, Product, Target, Weights, names_of

# Multiplications and additions up to which a value is worked out again instead of kept.
_CHEAP_ENOUGH = 5


class Definition:
    """A traced cell.

    Args:
        step: ``step(x, *states, W)``, and ``p`` behind if there are parameters or masks; it returns the states after
            the step, then the outputs.
        states, gates, outputs, parameters, masks: names, separated by spaces, each ``name`` or ``name:size``. Gates
            are columns of ``x`` and ``W``; outputs what is no state; parameters ``p.name`` (units,); masks ``p.name``
            (B, units), constants without a derivative. ``x.raw`` is the input itself, of the first state's size.
        name: under which the cell is registered.
        distance: D'' of structural damping, of the first state: the curvature of the distance between two hidden states
            in the sum that the last product is a part of, which the step's first state must be a function of; None if
            the distance is half the square of the first state itself.
        made_by: a function of a module and its arguments, if the definition is what that returns: for pickle.

    Attributes:
        untraceable: why the step cannot be traced; None if it is.
        damped: the place among states and outputs of what structural damping limits.

    Raises:
        ValueError: names that do not fit what the step uses or returns.
    """

    def __init__(
        self,
        step: Callable[..., Any],
        *,
        states: str,
        gates: str,
        outputs: str = "",
        parameters: str = "",
        masks: str = "",
        name: str | None = None,
        distance: Callable[[Tensor], Tensor] | None = None,
        made_by: tuple[Callable[..., Definition], tuple[Any, ...]] | None = None,
    ) -> None:
        self.made_by, self.__module__ = made_by, step.__module__
        self.distance, self.damped = distance, 0
        self.step, self.name = step, name or step.__name__
        self.__doc__ = step.__doc__
        self.states, self.gates, self.extra = names_of(states), names_of(gates), names_of(outputs)
        self.parameters, self.masks = names_of(parameters), names_of(masks)
        if not self.states:
            raise ValueError(f"{self.name}: states is empty; what has no state is no recurrence")
        self.graph = Graph()
        self.raw: Expression | None = None
        self._sizes: dict[Expression, str] = {}
        self._columns: dict[Expression, Column] = {}
        self.kept: list[Expression] = []
        self.vectors: tuple[Expression, ...] = ()
        self.untraceable: str | None = None
        try:
            self._trace()
        except (TypeError, AttributeError) as error:  # what Python says to operations that expressions have not
            self.untraceable = str(error)
            self._probe()
            return
        self._find_columns()
        self._find_targets()
        self._keep_what_is_needed()

    # -- tracing ---------------------------------------------------------------------------------------------------

    def _declared(self, name: str, what: str) -> None:
        if name not in self.gates:
            raise ValueError(f"{self.name}: the step uses {what}.{name}, but gates has no {name!r}")

    def _trace(self) -> None:
        g = self.graph

        def of_input(name: str) -> Expression:
            if name == "raw":
                self.raw = g.leaf("raw")
                return self.raw
            self._declared(name, "x")
            return g.leaf("x", name)

        def of_product(name: str, vector: Any) -> Expression:
            self._declared(name, "W")
            vector = g.of(vector)
            plain = vector.op == "linear" or (vector.op == "leaf" and vector not in self.before.values())
            return g.linear(g.node("copy", vector) if plain else vector, name)

        self.before = {s: g.leaf("state", s) for s in self.states}
        given = SimpleNamespace(
            **{b: g.leaf("parameter", b) for b in self.parameters}, **{m: g.leaf("mask", m) for m in self.masks}
        )
        returned = self._call(Inputs(of_input), list(self.before.values()), Weights(of_product), given)
        found: list[Expression] = []
        for e in map(g.of, returned):
            # A leaf, or what is returned twice, becomes a node of its own.
            while not e.args or e.op == "linear" or e in found:
                e = g.node("copy", e)
            found.append(e)
        self.returned = dict(zip((*self.states, *self.extra), found, strict=True))

    def _probe(self) -> None:
        """Find columns and products of a step that cannot be traced, by calling it on small tensors."""
        names = [*self.states.values(), *self.gates.values(), *self.parameters.values(), *self.masks.values()]
        sizes = {size: 2 * k + 3 for k, size in enumerate(dict.fromkeys(names))}
        before = [torch.rand(1, sizes[s]) for s in self.states.values()]
        p = {b: torch.rand(sizes[s]) for b, s in self.parameters.items()}
        p |= {m: torch.rand(1, sizes[s]) for m, s in self.masks.items()}
        probe = Probe({n: sizes[s] for n, s in self.gates.items()}, before[0].shape[-1])
        self._call(Inputs(probe.of_input), before, Weights(probe.of_product), SimpleNamespace(**p))
        self.raw = self.graph.leaf("raw") if probe.raw else None
        self.returned = {s: self.graph.leaf("returned", s) for s in (*self.states, *self.extra)}
        self.inputs, self.products = probe.structure(self.graph, self.gates, {n: size for size, n in sizes.items()})

    def _call(self, x: Any, states: Sequence[Any], W: Any, p: Any) -> tuple[Any, ...]:
        more = (p,) if self.parameters or self.masks else ()
        returned = self.step(x, *states, W, *more)
        returned = returned if isinstance(returned, tuple) else (returned,)
        wanted = len(self.states) + len(self.extra)
        if len(returned) != wanted:
            raise ValueError(f"{self.name}: the step returns {len(returned)} values; states and outputs are {wanted}")
        return returned

    # -- products and columns --------------------------------------------------------------------------------------

    def _find_columns(self) -> None:
        g = self.graph
        order = ordered(self.returned.values())
        consumers: dict[Expression, list[Expression]] = {}
        for e in order:
            for a in e.args:
                consumers.setdefault(a, []).append(e)
        vectors: dict[Expression, list[Expression]] = {}
        for e in sorted((e for e in order if e.op == "linear"), key=lambda e: e.index):
            vectors.setdefault(e.args[0], []).append(e)
        used: dict[str, Expression] = {}
        for e in order:
            if e.op == "linear":
                assert e.name is not None
                if e.name[1] in used:
                    raise ValueError(f"{self.name}: W.{e.name[1]} multiplies two vectors; name a gate for each")
                used[e.name[1]] = e
        xs = {n: x for n in self.gates if (x := g.leaf("x", n)) in consumers}
        sums = {}
        for n, m in used.items():
            both = consumers.get(m, [])
            alone = n in xs and consumers[xs[n]] == both and len(both) == 1 and both[0] not in vectors
            if alone and both[0].op == "+" and set(both[0].args) == {xs[n], m}:
                sums[n] = both[0]
        products = []
        for j, (vector, found) in enumerate(vectors.items()):
            names = [n for n in self.gates if used.get(n) in found]
            columns = [Column(n, "a", self.gates[n], sums[n], j) for n in names if n in sums]
            columns += [Column(n, "m", self.gates[n], used[n], j) for n in names if n not in sums]
            products.append((vector, tuple(columns)))
        self.inputs = tuple(Column(n, "x", self.gates[n], x, None) for n, x in xs.items() if n not in sums)
        self._columns = {c.node: c for c in (*self.inputs, *(c for _, cs in products for c in cs))}
        self.products = tuple(Product(v, self.size(v), cs) for v, cs in products)
        self._stage: dict[Expression, int] = {}
        for e in order:
            column = self._columns.get(e)
            if column is not None:
                self._stage[e] = 0 if column.product is None else column.product + 1
            elif e.op == "linear":
                self._stage[e] = next(j for j, p in enumerate(self.products) if p.vector is e.args[0]) + 1
            else:
                self._stage[e] = max((self._stage[a] for a in e.args), default=0)
        self.order, self._consumers = order, consumers

    @property
    def input_columns(self) -> tuple[Column, ...]:
        """The columns of the input weights, in their order: those of the inputs alone, then the products' shared."""
        return (*self.inputs, *(c for p in self.products for c in p.columns if c.kind == "a"))

    def size(self, e: Expression) -> str:
        """The name of a node's size.

        Raises:
            ValueError: the step combines vectors of different sizes.
        """
        if e not in self._sizes:
            self._sizes[e] = self._sized(e)
        return self._sizes[e]

    def _sized(self, e: Expression) -> str:
        if e.op == "leaf":
            kind, name = e.name or ("", "")
            if kind == "returned":
                return {**self.states, **self.extra}[name]
            known = {"x": self.gates, "state": self.states, "parameter": self.parameters, "mask": self.masks}
            return known[kind][name] if kind in known else next(iter(self.states.values()))
        if e.op == "linear":
            assert e.name is not None
            return self.gates[e.name[1]]
        sizes = {self.size(a) for a in e.args if a.op != "constant"}
        if len(sizes) != 1:
            raise ValueError(f"{self.name}: the step combines vectors of the sizes {', '.join(sorted(sizes))}")
        return sizes.pop()

    # -- targets ---------------------------------------------------------------------------------------------------

    def _find_targets(self) -> None:
        """States after the step and outputs, vectors of products, and what is used at several stages."""
        last = len(self.products)
        nodes: dict[Expression, None] = {}
        for p in self.products:
            if p.vector.op != "leaf":
                nodes[p.vector] = None
        vectors = {p.vector for p in self.products}
        for e in self.order:
            if e.op in ("+", "-", "*", "/") and e not in self._columns:
                stages = {self._stage[c] for c in self._consumers.get(e, []) if c.op != "linear"}
                stages |= {self._stage[e]} if e in vectors or e in self.returned.values() else set()
                if len(stages) > 1:
                    nodes[e] = None
        for name, e in list(self.returned.items()):
            if name in self.states and self._stage[e] < last:
                # All states change in the last section, where what was carried back from the next step is read.
                nodes[e] = None
                self.returned[name] = e = self.graph.node("copy", e)
                self._stage[e] = last
            elif e in self._columns:
                e = self.graph.node("copy", e)
                while e in self.returned.values():
                    e = self.graph.node("copy", e)
                self.returned[name] = e
                self._stage[e] = last
            nodes[e] = None
        self.order = ordered(self.returned.values())
        order = [e for e in self.order if e in nodes]
        self._target_nodes = sorted(order, key=lambda e: self._stage[e])

    def section(self, e: Expression) -> int:
        """How many products a node needs."""
        return self._stage[e]

    @cached_property
    def targets(self) -> tuple[Target, ...]:
        """All, each after those that it needs."""
        found = []
        cuts = set(self._target_nodes)
        for e in self._target_nodes:
            ends = frozenset((*self._columns, *(cuts - {e})))
            order = ordered((e,), ends - {e})
            pulled = pull(order, {e: self.graph.constant(1)}, ends, self.slopes)
            terms = {n: d for n, d in pulled.items() if n is not e and d.number != 0 and self._is_input(n, cuts)}
            found.append(Target(e, self.size(e), self._stage[e], terms))
        return tuple(found)

    def _is_input(self, n: Expression, cuts: set[Expression]) -> bool:
        kinds = ("state", "parameter", "raw")
        return n in self._columns or n in cuts or (n.op == "leaf" and n.name is not None and n.name[0] in kinds)

    def column(self, e: Expression) -> Column | None:
        """The column that a node is, if it is one."""
        return self._columns.get(e)

    # -- values that derivatives need ------------------------------------------------------------------------------

    def _keep_what_is_needed(self) -> None:
        self._values: dict[Expression, Expression] = {}
        self._slopes: dict[Expression, tuple[Expression, ...]] = {}
        _ = self.targets
        self.vectors = tuple(self.value(p.vector) for p in self.products)
        cuts = set(self._target_nodes)
        for e in ordered(cuts):  # all slopes, so that no later question adds to what is kept
            if e.args and e.op != "linear" and e not in self._columns:
                self.slopes(e)

    def slopes(self, e: Expression) -> tuple[Expression, ...]:
        """Derivatives of a node in its arguments, by values that are at hand."""
        if e not in self._slopes:
            self._slopes[e] = partials(e, self.value)
        return self._slopes[e]

    def value(self, e: Expression) -> Expression:
        """The value of a node of the step, by what is there in a derivative pass: kept, states, parameters, masks."""
        if e not in self._values:
            self._values[e] = self._valued(e)
        return self._values[e]

    def _valued(self, e: Expression) -> Expression:
        if e.op == "constant" or self._outside(e):
            return e
        for name, node in self.returned.items():
            if node is e:
                return self.graph.leaf("result", name)
        for name, node in self.returned.items():
            if node.op == "copy" and node.args[0] is e:
                return self.graph.leaf("result", name)
        cost = self._cost(e, {}) if e.op in CHEAP else None
        if cost is not None and cost <= _CHEAP_ENOUGH:
            if e.op in ("+", "-", "*", "/"):
                return {
                    "+": self.graph.add, "-": self.graph.subtract, "*": self.graph.multiply, "/": self.graph.divide
                }[e.op](*map(self.value, e.args))  # fmt: skip
            return self.graph.node(e.op, *map(self.value, e.args))
        self.kept.append(e)
        return self.graph.leaf("kept", len(self.kept) - 1)

    @staticmethod
    def _outside(e: Expression) -> bool:
        return e.op == "leaf" and e.name is not None and e.name[0] in ("state", "parameter", "mask", "raw")

    def _cost(self, e: Expression, found: dict[Expression, int | None]) -> int | None:
        """Operations that the value takes from what is or would be kept; None if it depends on a column."""
        if e not in found:
            found[e] = self._costs(e, found)
        return found[e]

    def _costs(self, e: Expression, found: dict[Expression, int | None]) -> int | None:
        if e.op == "constant" or self._outside(e) or e in self.returned.values() or e in self.kept:
            return 0
        if e in self._columns or e.op in ("leaf", "linear"):
            return None
        if e.op not in CHEAP:
            return 0  # it will be kept
        costs = [self._cost(a, found) for a in e.args]
        return None if None in costs else 1 + sum(c for c in costs if c is not None)

    # -- structural damping and readouts ---------------------------------------------------------------------------

    @cached_property
    def marked(self) -> Definition:
        """The cell that structural damping sees: with its pre-activations as another output where D'' is theirs."""
        if self.distance is None or self.untraceable is not None:
            return self

        def step(x: Any, *given: Any) -> tuple[Any, ...]:
            last: list[Any] = []
            at = len(self.states)

            def of_product(name: str, vector: Any) -> Any:
                m = getattr(given[at], name)(vector)
                last[:] = [getattr(x, name) + m]
                return m

            returned = self.step(x, *given[:at], Weights(of_product), *given[at + 1 :])
            return (*(returned if isinstance(returned, tuple) else (returned,)), last[0])

        def text(sizes: dict[str, str]) -> str:
            return " ".join(f"{name}:{size}" for name, size in sizes.items())

        found = Definition(
            step,
            states=text(self.states),
            gates=text(self.gates),
            outputs=text(self.extra) + " preactivations",
            parameters=text(self.parameters),
            masks=text(self.masks),
            name=f"{self.name}+a",
            distance=self.distance,
        )
        found.damped = len(found.returned) - 1
        return found

    @property
    def output(self) -> int:
        """The place among states and outputs of what a layer gives: the first output, or the first state."""
        first = len(self.states)
        return first if self.extra and self.damped != first else 0

    # -- reference -------------------------------------------------------------------------------------------------

    def reference(
        self, x: dict[str, Tensor], raw: Tensor, states: Sequence[Tensor], W: dict[str, Tensor], p: dict[str, Tensor]
    ) -> tuple[Tensor, ...]:
        """One step on tensors: projections x by name, states, weights by the names of their columns, p by name."""
        inputs = Inputs(lambda name: raw if name == "raw" else x[name])
        weights = Weights(lambda name, vector: vector @ W[name])
        return self._call(inputs, states, weights, SimpleNamespace(**p))

    def __deepcopy__(self, memo: dict[int, Any]) -> Definition:
        return self  # as a function, which never changes

    def __reduce__(self) -> Any:
        return self.made_by if self.made_by is not None else self.step.__qualname__

    def __repr__(self) -> str:
        return f"<cell {self.name}: states {', '.join(self.states)}; {len(self.products)} product(s) in a step>"


def cell(
    *,
    states: str,
    gates: str,
    outputs: str = "",
    parameters: str = "",
    masks: str = "",
    name: str | None = None,
    distance: Callable[[Tensor], Tensor] | None = None,
) -> Callable[[Callable[..., Any]], Definition]:
    """Trace a step into a recurrent cell: see `Definition` for the arguments, and `hfopt.recurrences.cell_layer`."""
    return partial(
        Definition,
        states=states,
        gates=gates,
        outputs=outputs,
        parameters=parameters,
        masks=masks,
        name=name,
        distance=distance,
    )


__all__ = ["Column", "Definition", "Product", "Target", "Untraceable", "cell"]
