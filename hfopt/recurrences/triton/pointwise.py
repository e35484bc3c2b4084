"""What is pointwise in a defined cell's passes, as functions of Triton's language."""

from __future__ import annotations

import linecache
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hfopt.recurrences.definition import Definition
from hfopt.recurrences.expression import Expression, ordered, pull, push
from hfopt.recurrences.structure import UNITS

_FUNCTIONS = {
    "sigmoid": "sigmoid({0})",
    "tanh": "tanh({0}, INTERPRETED)",
    "relu": "tl.where({0} < 0, 0.0, {0})",
    "exp": "tl.exp({0})",
    "abs": "tl.abs({0})",
    "sign": "tl.where({0} > 0, 1.0, tl.where({0} < 0, -1.0, {0}))",
    "step": "tl.where({0} > 0, 1.0, 0.0)",
}
_HEAD = (
    "import triton\nimport triton.language as tl\nfrom hfopt.recurrences.triton.products import sigmoid, tanh\n\n\n"
    "@triton.jit\n"
)


@dataclass(frozen=True)
class Pointwise:
    """A function of the kernels, and the leaves whose values it is given as v, in this order."""

    function: Any
    values: tuple[Expression, ...]


def served(definition: Definition) -> bool:
    """Whether the kernels can run the cell: one product in a step, of a state, and one size for all."""
    d = definition
    if d.untraceable is not None or len(d.products) != 1 or d.products[0].vector not in d.before.values():
        return False
    sizes = {*d.states.values(), *d.gates.values(), *d.parameters.values(), *d.masks.values()}
    return sizes == {UNITS}


def outside(d: Definition) -> list[Expression]:
    """What a step takes from outside besides the product's columns: columns of inputs alone, parameters, raw inputs."""
    found = [c.node for c in d.inputs] + [d.graph.leaf("parameter", b) for b in d.parameters]
    return found if d.raw is None else [*found, d.raw]


def forward(d: Definition) -> Pointwise:
    """(states, outputs, what is kept) of the inputs' columns q, the products g, values v and states d."""
    at = {c.name: i for i, c in enumerate(d.input_columns)}
    texts = {c.node: f"q[{at[c.name]}]" for c in d.inputs}
    for k, c in enumerate(d.products[0].columns):
        texts[c.node] = f"q[{at[c.name]}] + g[{k}]" if c.kind == "a" else f"g[{k}]"
    texts |= {e: f"d[{i}]" for i, e in enumerate(d.before.values())}
    return _made(f"{d.name}_forward", "q, g, v, d", [*d.returned.values(), *d.kept], texts)


def tangent(d: Definition, has_q: bool) -> Pointwise:
    """Changes of states and outputs, of those from outside q, the products g, values v and changes d of states."""
    away = outside(d)
    texts: dict[Expression, str] = {}
    seeds: dict[Expression, Expression] = {}

    def seed(e: Expression, text: str) -> None:
        seeds[e] = d.graph.leaf("text", text)
        texts[seeds[e]] = text

    for i, e in enumerate(away if has_q else ()):
        seed(e, f"q[{i}]")
    for k, c in enumerate(d.products[0].columns):
        seed(c.node, f"q[{len(away) + k}] + g[{k}]" if has_q else f"g[{k}]")
    for i, e in enumerate(d.before.values()):
        seed(e, f"d[{i}]")
    moved = push(ordered(d.returned.values(), seeds), seeds, d.slopes)
    zero = d.graph.constant(0)
    name = f"{d.name}_tangent" + "_q" * has_q
    return _made(name, "q, g, v, d", [moved.get(e, zero) for e in d.returned.values()], texts)


def adjoint(d: Definition) -> Pointwise:
    """Cotangents of the product's columns, of states before, and from outside, of those u of states and outputs."""
    texts: dict[Expression, str] = {}
    seeds: dict[Expression, Expression] = {}
    for i, e in enumerate(d.returned.values()):
        seeds[e] = d.graph.leaf("text", f"u[{i}]")
        texts[seeds[e]] = f"u[{i}]"
    columns = [c.node for c in d.products[0].columns]
    ends = frozenset((*columns, *(c.node for c in d.inputs)))
    pulled = pull(ordered(d.returned.values(), ends), seeds, ends, d.slopes)
    goals = [*columns, *d.before.values(), *outside(d)]
    zero = d.graph.constant(0)
    return _made(f"{d.name}_adjoint", "u, v", [pulled.get(e, zero) for e in goals], texts)


def of_nodes(name: str, goals: Sequence[Expression], stop: Sequence[Expression]) -> Pointwise:
    """The goals as a function of x, the values of leaves and of the nodes in `stop`, in the order of `values`."""
    order = ordered(goals, stop)
    inputs = [e for e in order if e in stop or e.op == "leaf"]
    made = _made(name, "x", goals, {e: f"x[{i}]" for i, e in enumerate(inputs)})
    return Pointwise(made.function, tuple(inputs))


def _made(name: str, arguments: str, goals: Sequence[Expression], texts: dict[Expression, str]) -> Pointwise:
    """The function that returns the goals, compiled from its text."""
    name = re.sub(r"\W", "_", name)
    order = ordered(goals, texts)
    leaves = [e for e in order if e.op == "leaf" and e not in texts]
    known = {**texts, **{e: f"v[{i}]" for i, e in enumerate(leaves)}}
    some = {"u": "u[0]", "x": "x[0]"}.get(arguments[0], "g[0]")
    lines = []
    for e in order:
        inner = [known[a] for a in e.args] if e not in known else []
        if e in known:
            value = known[e]
        elif e.op == "constant":
            value = repr(e.value)
        elif e.op in ("+", "-", "*", "/"):
            value = f"{inner[0]} {e.op} {inner[1]}"
        else:
            value = inner[0] if e.op == "copy" else _FUNCTIONS[e.op].format(*inner)
        if e.op == "constant":
            known[e] = value
        else:
            lines.append(f"    t{e.index} = {value}")
            known[e] = f"t{e.index}"
    returned = [f"{known[e]} + 0.0 * {some}" if e.op == "constant" else known[e] for e in goals]
    body = "\n".join([*lines, f"    return ({', '.join(returned)},)"])
    text = f"{_HEAD}def {name}({arguments}, INTERPRETED: tl.constexpr):\n{body}\n"
    return Pointwise(_compiled(name, text), tuple(leaves))


def _compiled(name: str, text: str) -> Any:
    """The function in a text, whose source Triton can look up."""
    place = f"<hfopt cell {name} {hash(text):x}>"
    linecache.cache[place] = (len(text), None, text.splitlines(keepends=True), place)
    namespace: dict[str, Any] = {"__name__": f"hfopt.recurrences.triton.made_{name}"}
    exec(compile(text, place, "exec"), namespace)
    return namespace[name]


__all__ = ["Pointwise", "adjoint", "forward", "of_nodes", "outside", "served", "tangent"]
