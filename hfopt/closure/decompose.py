"""A loss taken apart: ``L = sum_k <c_k, l_k> + R(theta)``, from the graph between it and the network.

The values ``l_k`` of criteria, and squares written by hand, belong to the loss where it is linear in them. What it is
besides must be a function of the parameters alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.graph import Node

from hfopt.closure.criteria import CriterionCall
from hfopt.closure.partial import between, edge_of, partial_gradients, walk
from hfopt.closure.squares import Square, uses_data
from hfopt.errors import ClosureError
from hfopt.linalg import graph

if TYPE_CHECKING:
    from hfopt.closure.trace import Trace

Maybe = list["Tensor | None"]

WAYS_OUT = (
    "Ways out: use a criterion of torch.nn.functional, or means or sums of squares; let the closure return (outputs, "
    "loss); pass outputs=<the module whose result is the network's output>; pass loss=<function> with a closure that "
    "returns that function's arguments; or pass curvature='hessian', which takes any loss"
)


@dataclass
class Decomposition:
    """``L = sum_k <factors_k, calls_k> + R``; ``direct`` is dR/dtheta with its graph, None where R is constant."""

    calls: list[CriterionCall]
    factors: list[Tensor]
    direct: Maybe


def decompose(trace: Trace, params: Sequence[Tensor], part: bool = False) -> Decomposition:
    """Take the loss of a traced closure apart.

    ``part``: it is part of a loss, and may be a function of the parameters alone.

    Raises:
        ClosureError: the loss is not linear in the criteria, or depends on the network beside them.
    """
    return _Decomposing(trace, params, part).run()


class _Decomposing:
    def __init__(self, trace: Trace, params: Sequence[Tensor], part: bool) -> None:
        self.part = part
        self.total, self.params = trace.total, list(params)
        self.ids = {id(p) for p in params}
        self.criteria = {call.edge: call for call in trace.calls}
        self.squares = {s.edge: s for s in trace.squares}
        self.called = bool(trace.calls)
        self.every = frozenset(self.squares)

    def run(self) -> Decomposition:
        """Leave out squares until the loss is linear in all that are left."""
        while True:
            found, beside = walk(self.total, {**self.criteria, **self.squares})
            calls = [self.criteria[e] for e in found if e in self.criteria]
            squares = [self.squares[e] for e in found if e in self.squares]
            # In the order in which they were called, which is that of the outputs.
            calls.sort(key=lambda call: call.sites)
            squares.sort(key=lambda s: s.sites)
            if self._leave_out(self._unfit(squares, self.part or bool(calls), beside)):
                continue
            side = self._depends(beside)
            if side and self._leave_out(_entangled(squares, beside)):
                continue
            if not (calls or squares or self.part):
                raise self._unknown()
            if side:
                self._refuse_side_paths(calls, squares, beside)
            every: list[CriterionCall] = [*calls, *squares]
            # A parameter may be the argument of a criterion, or not be there at all: the others are looked for.
            found_gradients = self._gradients(every, side)
            if self._leave_out([s for s, c in zip(every, found_gradients, strict=False) if _bends(s, c)]):
                continue
            return self._checked(every, found_gradients)

    def _leave_out(self, squares: Sequence[CriterionCall]) -> bool:
        for s in squares:
            del self.squares[s.edge]
        return bool(squares)

    def _unfit(self, squares: list[Square], called: bool, beside: list[Node]) -> list[Square]:
        """Squares that are no squared error: fourth powers, and penalties on parameters beside errors."""
        nested = [s for s in squares if s.nested(self.every)]
        if nested:
            return nested
        data = [s for s in squares if s.of_data(self.ids)]
        if called or data:
            return [s for s in squares if s not in data]
        # A function of nothing but parameters, as in least squares.
        return squares if self._depends(beside) else []

    def _depends(self, nodes: list[Node]) -> bool:
        return any(graph.is_leaf_node(n) and id(n.variable) in self.ids for n in nodes)  # type: ignore[attr-defined]

    def _gradients(self, calls: list[CriterionCall], side: bool) -> Maybe:
        edges = [call.edge for call in calls]
        if side:
            edges += [edge_of(p) for p in self.params if p.requires_grad]
        with torch.enable_grad():
            found = partial_gradients([self.total], [torch.ones_like(self.total)], edges)
        left = found[len(calls) :]
        direct: Maybe = [left.pop(0) if side and p.requires_grad else None for p in self.params]
        return [*found[: len(calls)], *direct]

    def _checked(self, calls: list[CriterionCall], found: Maybe) -> Decomposition:
        bad = [call.name for call, c in zip(calls, found, strict=False) if c is not None and c.requires_grad]
        if bad:
            raise ClosureError(
                f"the loss is not a weighted sum of criteria: it was found to depend on {', '.join(bad)} "
                f"nonlinearly (it ends in {_end(self.total)}). {WAYS_OUT}"
            )
        pairs = [(call, c.detach()) for call, c in zip(calls, found, strict=False) if c is not None]
        return Decomposition([call for call, _ in pairs], [c for _, c in pairs], found[len(calls) :])

    def _refuse_side_paths(self, calls: list[CriterionCall], squares: list[Square], beside: list[Node]) -> None:
        network = _network(calls)
        shared = next((n for n in beside if n in network), None)
        if shared is not None:
            raise ClosureError(
                f"besides the criterion, the loss uses a result of the network (found through {shared.name()}); only "
                f"functions of the parameters can be added to criteria. {WAYS_OUT}"
            )
        # What is added to squares must be a penalty for certain: with a criterion, its network is known.
        trained = [p for p in self.params if p.requires_grad]
        if not calls and not self.part and uses_data(between(self.total, trained, set(self.squares)), self.ids):
            raise self._unknown()

    def _unknown(self) -> ClosureError:
        what = (
            "the loss does not use the value of any criterion called in the closure"
            if self.called
            else "no known criterion was called in the closure"
        )
        return ClosureError(f"{what}; the loss was found to end in {_end(self.total)}. {WAYS_OUT}")


def _bends(call: CriterionCall, c: Tensor | None) -> bool:
    return isinstance(call, Square) and c is not None and c.requires_grad


def _network(calls: Sequence[CriterionCall]) -> set[Node]:
    return {n for n in graph.nodes(z for call in calls for z in call.outputs) if not graph.is_leaf_node(n)}


def _entangled(squares: list[Square], beside: list[Node]) -> list[Square]:
    """Squares of a network whose results the loss uses otherwise, too."""
    nodes = set(beside)
    return [s for s in squares if not _network([s]).isdisjoint(nodes)]


def _end(total: Tensor) -> str:
    return total.grad_fn.name() if total.grad_fn is not None else "a leaf tensor"
