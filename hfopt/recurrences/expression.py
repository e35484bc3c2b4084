"""Scalar expressions of one step of a recurrent cell, and their derivatives by symbols.

A step that is written as a Python function is called once with expressions in place of tensors; what it returns is a
graph of additions, products, quotients, nonlinearities and products with recurrent matrices ("linear" nodes). Equal
expressions are one node. The same functions (`sigmoid`, `tanh`, ...) work on tensors.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

Name = tuple[str, Any]


class Untraceable(TypeError):
    """A step does what no expression can stand for."""


class Graph:
    """The nodes of one trace, each of them once."""

    def __init__(self) -> None:
        self._nodes: dict[tuple[Any, ...], Expression] = {}

    def node(self, op: str, *args: Expression, value: float = 0.0, name: Name | None = None) -> Expression:
        """The node of this operation on these arguments."""
        key = (op, *map(id, args), value, name)
        if key not in self._nodes:
            self._nodes[key] = Expression(self, op, args, value, name, len(self._nodes))
        return self._nodes[key]

    def constant(self, value: float) -> Expression:
        """A number."""
        return self.node("constant", value=float(value))

    def leaf(self, kind: str, which: Any = None) -> Expression:
        """A value that comes from outside the step."""
        return self.node("leaf", name=(kind, which))

    def linear(self, vector: Expression, column: str) -> Expression:
        """The column of this name of the product of a vector with its recurrent matrix."""
        return self.node("linear", vector, name=("m", column))

    def of(self, x: Expression | float) -> Expression:
        """``x`` as a node of this graph."""
        if isinstance(x, Expression):
            if x.graph is not self:
                raise Untraceable("a step mixes expressions of two traces")
            return x
        if isinstance(x, (int, float)):
            return self.constant(x)
        raise Untraceable(f"a step combines its arguments with a {type(x).__name__}; give it as a parameter or a mask")

    # The arithmetic leaves out what 0 and 1 make superfluous: derivatives are full of them.

    def add(self, a: Expression, b: Expression) -> Expression:
        """``a + b``."""
        if a.number is not None and b.number is not None:
            return self.constant(a.number + b.number)
        if a.number == 0:
            return b
        if a is b:
            return self.multiply(self.constant(2), a)
        if a.negated is not None:
            return self.subtract(b, a.negated)
        if b.negated is not None:
            return self.subtract(a, b.negated)
        return a if b.number == 0 else self.node("+", a, b)

    def subtract(self, a: Expression, b: Expression) -> Expression:
        """``a - b``."""
        if a.number is not None and b.number is not None:
            return self.constant(a.number - b.number)
        if a.number == 0 and b.op == "*" and (factor := b.args[0].number) is not None:
            return self.multiply(self.constant(-factor), b.args[1])
        return a if b.number == 0 else self.node("-", a, b)

    def multiply(self, a: Expression, b: Expression) -> Expression:
        """``a b``."""
        if a.number is not None and b.number is not None:
            return self.constant(a.number * b.number)
        if a.number == 0 or b.number == 0:
            return self.constant(0)
        if a.number == 1:
            return b
        return a if b.number == 1 else self.node("*", a, b)

    def divide(self, a: Expression, b: Expression) -> Expression:
        """``a / b``."""
        if b.number is not None:
            return self.multiply(a, self.constant(1 / b.number))
        return self.constant(0) if a.number == 0 else self.node("/", a, b)


class Expression:
    """A node: an operation on other nodes, a leaf, or a number."""

    __slots__ = ("args", "graph", "index", "name", "op", "value")

    def __init__(
        self, graph: Graph, op: str, args: tuple[Expression, ...], value: float, name: Name | None, index: int
    ) -> None:
        self.graph, self.op, self.args, self.value, self.name, self.index = graph, op, args, value, name, index

    @property
    def number(self) -> float | None:
        """Its value, if it is a constant."""
        return self.value if self.op == "constant" else None

    @property
    def negated(self) -> Expression | None:
        """What it is the negative of, if it is written so."""
        return self.args[1] if self.op == "-" and self.args[0].number == 0 else None

    def __add__(self, other: Any) -> Expression:
        return self.graph.add(self, self.graph.of(other))

    def __radd__(self, other: Any) -> Expression:
        return self.graph.add(self.graph.of(other), self)

    def __sub__(self, other: Any) -> Expression:
        return self.graph.subtract(self, self.graph.of(other))

    def __rsub__(self, other: Any) -> Expression:
        return self.graph.subtract(self.graph.of(other), self)

    def __mul__(self, other: Any) -> Expression:
        return self.graph.multiply(self, self.graph.of(other))

    def __rmul__(self, other: Any) -> Expression:
        return self.graph.multiply(self.graph.of(other), self)

    def __truediv__(self, other: Any) -> Expression:
        return self.graph.divide(self, self.graph.of(other))

    def __rtruediv__(self, other: Any) -> Expression:
        return self.graph.divide(self.graph.of(other), self)

    def __neg__(self) -> Expression:
        return self.graph.constant(0) - self

    def __bool__(self) -> bool:
        raise Untraceable("a step branches on values")

    def __getattr__(self, name: str) -> Any:
        if name in FUNCTIONS:
            return lambda: self.graph.node(name, self)
        if name.startswith("__"):
            raise AttributeError(name)  # Python itself asks for these
        raise Untraceable(f"a step uses .{name} of a value, which is no part of what can be traced")

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", str(func))
        first = next((a for a in args if isinstance(a, Expression)), None)
        if first is None or kwargs:
            raise Untraceable(f"a step calls {name} in a way that cannot be traced")
        if name in FUNCTIONS and len(args) == 1:
            return first.graph.node(name, first)
        arithmetic = {"add": "add", "sub": "subtract", "mul": "multiply", "div": "divide"}
        known = {**arithmetic, "subtract": "subtract", "multiply": "multiply", "divide": "divide"}
        if name in known and len(args) == 2:
            combined: Expression = getattr(first.graph, known[name])(*map(first.graph.of, args))
            return combined
        raise Untraceable(f"a step calls {name}, which is no part of what can be traced")


def _step(x: Tensor) -> Tensor:
    return (x > 0).to(x.dtype)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "exp": torch.exp,
    "abs": torch.abs,
    "sign": torch.sign,
    "step": _step,
}
# Those that take so little that they are worked out again rather than kept.
CHEAP = frozenset({"+", "-", "*", "/", "relu", "abs", "sign", "step", "copy"})


def _function(name: str) -> Callable[[Any], Any]:
    def of(x: Any) -> Any:
        return x.graph.node(name, x) if isinstance(x, Expression) else FUNCTIONS[name](x)

    of.__name__ = name
    of.__doc__ = f"{name} of an expression or a tensor."
    return of


sigmoid, tanh, relu, exp = map(_function, ("sigmoid", "tanh", "relu", "exp"))
absolute, sign, step = map(_function, ("abs", "sign", "step"))


def partials(e: Expression, value: Callable[[Expression], Expression]) -> tuple[Expression, ...]:
    """Derivatives of a node in its arguments, as expressions of values; slopes by the function's own value."""
    number = e.graph.constant
    if e.op == "+":
        return number(1), number(1)
    if e.op == "-":
        return number(1), number(-1)
    if e.op == "*":
        return value(e.args[1]), value(e.args[0])
    if e.op == "/":
        inverse = 1 / value(e.args[1])
        return inverse, -(value(e) * inverse)
    if e.op == "copy":
        return (number(1),)
    if e.op in ("sign", "step"):
        return (number(0),)
    if e.op == "abs":
        return (value(e.graph.node("sign", e.args[0])),)
    y = value(e)
    if e.op == "sigmoid":
        return (y * (1 - y),)
    if e.op == "tanh":
        return (1 - y * y,)
    return (e.graph.node("step", y),) if e.op == "relu" else (y,)  # exp


def ordered(roots: Iterable[Expression], stop: Container[Expression] = ()) -> list[Expression]:
    """All nodes from the roots down, arguments first; those in ``stop`` are the last of their branch."""
    found: dict[Expression, None] = {}
    waiting = [(e, False) for e in reversed(list(roots))]
    while waiting:
        e, ready = waiting.pop()
        if e in found:
            continue
        if ready or e in stop:
            found[e] = None
        else:
            waiting.append((e, True))
            waiting.extend((a, False) for a in reversed(e.args))
    return list(found)


def push(
    order: Sequence[Expression], seeds: dict[Expression, Expression], slopes: Slopes
) -> dict[Expression, Expression]:
    """Tangents of the nodes in ``order`` at those of the seeds; what is not there is zero."""
    moved = dict(seeds)
    for e in order:
        if e in moved or not e.args or e.op == "linear":
            continue
        total = e.graph.constant(0)
        for p, a in zip(slopes(e), e.args, strict=True):
            if a in moved:
                total = total - moved[a] if p.number == -1 else total + p * moved[a]
        if total.number != 0:
            moved[e] = total
    return moved


def pull(
    order: Sequence[Expression], seeds: dict[Expression, Expression], ends: frozenset[Expression], slopes: Slopes
) -> dict[Expression, Expression]:
    """Cotangents of the nodes in ``order`` at those of the seeds; nothing passes through the nodes at the ``ends``."""
    pulled = dict(seeds)
    for e in reversed(order):
        if e not in pulled or not e.args or e.op == "linear" or (e in ends and e not in seeds):
            continue
        for p, a in zip(slopes(e), e.args, strict=True):
            if p.number == 0 or a.op == "constant":
                continue
            term = pulled[e] if p.number == -1 else p * pulled[e]
            if a not in pulled:
                pulled[a] = -term if p.number == -1 else term
            else:
                pulled[a] = pulled[a] - term if p.number == -1 else pulled[a] + term
    return pulled


Slopes = Callable[[Expression], tuple[Expression, ...]]

_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}
OPERATIONS: dict[str, Callable[..., Any]] = {**_ARITHMETIC, **FUNCTIONS}


def evaluate(e: Expression, known: dict[Expression, Any]) -> Any:
    """The value of a node, a tensor or a number, by those that are known; everything on the way becomes known."""
    for node in ordered((e,), known):
        if node in known:
            continue
        if node.op == "constant":
            known[node] = node.value
        elif node.op in _ARITHMETIC:
            known[node] = _ARITHMETIC[node.op](*(known[a] for a in node.args))
        elif node.op == "copy":
            known[node] = known[node.args[0]]
        elif node.op in FUNCTIONS:
            known[node] = FUNCTIONS[node.op](known[node.args[0]])
        else:
            raise KeyError(f"the value of {node.name} is not known")
    return known[e]
