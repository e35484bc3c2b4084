"""A loss of several batches as a sum, with one part for every ``backward()`` that a closure calls.

As long as the graphs of all batches fit into memory, one linearisation serves them together. When they stop to, while
the closure still runs, each ``backward()`` closes a part: the part is linearised and kept if there is room for it;
otherwise its share of the gradient and its curvature in output space are taken down, and its graph is let go. A
product is then the sum over the kept parts and, for all others together, one more run of the closure, in which each of
them is linearised, multiplied and let go before the next batch is computed:

    G v = sum_b J_b' H_b J_b v.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hfopt import structural
from hfopt.closure.criteria import CriterionCall, Site
from hfopt.closure.decompose import decompose
from hfopt.closure.modes import release
from hfopt.closure.partial import Edge, walk
from hfopt.closure.trace import Closure, OutputCollector, Trace, TraceMode
from hfopt.curvature.linearisation import Cost, DoubleBackward, Linearisation
from hfopt.curvature.output_space import Joint, Matching, output_space
from hfopt.errors import ClosureError
from hfopt.linalg import graph

Maybe = list["Tensor | None"]

_CLOSED = "hfopt: the value of a criterion of a closed part"

# What double backward's graph holds, in units of the forward graph (measured: 2.6 on an autoencoder, 2.9 on an RNN).
DOUBLE_BACKWARD_MEMORY = 2.9


def _notes(node: Any) -> dict[Any, Any]:
    notes: dict[Any, Any] = node.metadata
    return notes


@dataclass(eq=False)
class Part:
    """The loss of one batch, split into network and criterion.

    Attributes:
        space: outputs, dL/dz and products with H_L.
        hidden: D'' of the marked hidden states, ``marked`` which of those that were collected.
        heads: outputs and pre-activations in the graph; empty once that was let go.
        sites: where in the closure the outputs stand.
        linearisation: None: built again in every product.
    """

    space: Matching | Joint
    hidden: list[Tensor]
    marked: list[int]
    heads: list[Tensor]
    sites: list[Site]
    linearisation: Linearisation | None = None

    @classmethod
    def of(cls, seen: Trace, params: Sequence[Tensor], space: Matching | Joint | None = None) -> Part:
        """Split the loss of a trace."""
        space = output_space(seen, params) if space is None else space
        marked = [i for i, h in enumerate(seen.hidden) if h.preactivations.requires_grad]
        heads = [*space.outputs, *(seen.hidden[i].preactivations for i in marked)]
        return cls(space, [seen.hidden[i].weight for i in marked], marked, heads, space.sites)

    @property
    def count(self) -> int:
        """The number of outputs."""
        return len(self.space.outputs)

    @property
    def at(self) -> list[Tensor]:
        """dL/dz, and zero for every hidden state."""
        return [*self.space.cotangents, *(torch.zeros_like(w) for w in self.hidden)]

    def release_graph(self) -> None:
        """Release every graph except the one from outputs to loss."""
        self.heads = []
        if isinstance(self.space, Matching):
            self.space.outputs = [z.detach() for z in self.space.outputs]


@dataclass
class SumOfParts:
    """The linearisation of a sum of which not all parts are kept: ``name`` is "partial", or "recompute" for none.

    ``largest``: bytes of the largest part's forward graph.
    """

    parts: list[Part]
    largest: int = 0
    cost: Cost | None = None

    @property
    def kept(self) -> int:
        """The number of parts that are kept."""
        return sum(p.linearisation is not None for p in self.parts)

    @property
    def name(self) -> str:
        """The name of the policy."""
        return "partial" if self.kept else "recompute"

    def column_bytes(self) -> int:
        """Return the bytes of a tangent and a cotangent of all that the largest forward graph of a part keeps."""
        return 2 * self.largest

    def kept_bytes(self) -> int:
        """Return the bytes of the kept parts."""
        return sum(p.linearisation.kept_bytes() for p in self.parts if p.linearisation is not None)


@dataclass
class PartCollector:
    """Watches a closure run, and splits it into parts once memory requires it.

    Args:
        params: the parameters.
        budget: bytes for all that is kept.
        trusted: up to so many outputs memory is not looked at.
    """

    params: list[Tensor]
    budget: int
    trusted: int = 0
    parts: list[Part] = field(default_factory=list)
    gradients: list[Maybe] = field(default_factory=list)
    need: int = 0
    largest: int = 0
    _outputs: int = 0
    _pending: list[tuple[Trace, list[Tensor]]] = field(default_factory=list)
    _claimed: dict[Edge, CriterionCall] = field(default_factory=dict)
    _squares: int = 0
    _hidden: int = 0
    _separate: bool = True

    def __call__(self, mode: TraceMode) -> None:
        """``backward()`` was called, on the last of ``mode.roots``."""
        root = mode.roots[-1]
        if not self._separate or not root.requires_grad:
            return
        met, nodes = walk(root, {c.edge for c in (*mode.calls, *mode.squares)})
        if any(edge in self._claimed for edge in met) or (self.parts and any(_CLOSED in _notes(n) for n in nodes)):
            self._give_up("the value of a criterion enters two backward() calls")
            return
        calls = [c for c in mode.calls if c.edge in met]
        squares, self._squares = mode.squares[self._squares :], len(mode.squares)
        params = {id(p) for p in self.params}
        errors = [s for s in squares if s.edge in met and s.of_data(params)]
        self._claimed |= {c.edge: c for c in (*calls, *errors)}
        hidden = mode.hidden[self._hidden :]
        self._hidden = len(mode.hidden)
        outputs = [z for c in (*calls, *errors) for z in c.outputs]
        heads = outputs + [h.preactivations for h in hidden]
        self._pending.append((Trace(root, None, calls, squares, hidden=hidden), heads))
        if not self.parts:
            self._outputs += sum(z.numel() for z in outputs)
            if self._outputs <= self.trusted:
                return
            self.need += self._needed(heads)
            if len(mode.roots) < 2 or self.need <= self.budget:
                return
            self.need = 0
        while self._pending:
            self._close(*self._pending.pop(0))
        for node, _ in self._claimed:
            _notes(node)[_CLOSED] = True  # to hold the node would be to hold its graph
        mode.let_go(self._claimed.values())
        self._claimed.clear()
        self._hidden = self._squares = 0

    def _needed(self, heads: list[Tensor]) -> int:
        forward = graph.saved_bytes(heads, self.params)
        self.largest = max(self.largest, forward)
        return int(DOUBLE_BACKWARD_MEMORY * forward)

    def _give_up(self, why: str) -> None:
        self._separate = False
        if self.parts:
            raise ClosureError(
                f"the batches of the closure do not fit into memory together, and cannot be taken one by one, since "
                f"{why}: give every batch a backward() of its own, use smaller batches, or raise memory_budget"
            )

    def _close(self, seen: Trace, heads: list[Tensor]) -> None:
        """Linearise a part and keep it, or take down its gradient alone."""
        part = Part.of(seen, self.params, Matching(decompose(seen, self.params, part=True), self.params))
        need = self._needed(heads)
        pulled: Sequence[Tensor | None] = [None] * len(self.params)
        if part.heads and self.need + need <= self.budget:
            self.need += need
            double = DoubleBackward(part.heads, self.params, part.at)
            part.linearisation, pulled = double, double.gradient
        elif part.heads:
            pulled = graph.gradients(part.heads, self.params, part.at)
        part.release_graph()
        self.parts.append(part)
        self.gradients.append(list(pulled))


class Replay(OutputCollector):
    """Passes on the heads of every part when its ``backward()`` is called."""

    def __init__(self, parts: list[Part], use: Callable[[Part, list[Tensor]], None], everything: bool) -> None:
        super().__init__([n for part in parts for n, _ in part.sites])
        self.parts, self.use, self.everything, self.number = parts, use, everything, 0
        self.hidden: list[structural.HiddenState] = []

    def after_backward(self, freed: Sequence[Tensor]) -> None:
        """Use the next part, and let its graph go."""
        if not self.roots.pop().requires_grad:
            return
        part, self.number = self.parts[self.number], self.number + 1
        heads = [self.flat[n][i] for n, i in part.sites]
        heads += [self.hidden[i].preactivations for i in part.marked]
        for n, _ in part.sites:
            self.flat.pop(n, None)
        self.hidden.clear()
        if heads and (self.everything or part.linearisation is None):
            self.use(part, heads)
        release(freed)


def again(
    closure: Closure, parts: list[Part], use: Callable[[Part, list[Tensor]], None], everything: bool = False
) -> None:
    """Run the closure once more; ``use(part, heads)`` before the next part is run, for all or those not kept."""
    mode = Replay(parts, use, everything)
    with structural.collecting(any(p.hidden for p in parts)) as mode.hidden, mode:
        closure()
