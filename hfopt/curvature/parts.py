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
from hfopt.closure.trace import Closure, CriterionCall, OutputCollector, Site, Trace, TraceMode
from hfopt.curvature.linearisation import Cost, DoubleBackward, Linearisation
from hfopt.curvature.output_space import Joint, Matching, output_space
from hfopt.errors import ClosureError
from hfopt.linalg import graph

Maybe = list["Tensor | None"]

# What double backward's graph holds, in units of the forward graph (measured: 2.6 on an autoencoder, 2.9 on an RNN).
DOUBLE_BACKWARD_MEMORY = 2.9


@dataclass(eq=False)
class Part:
    """The loss of one batch, split into network and criterion.

    Attributes:
        space: outputs, dL/dz and products with H_L.
        hidden: D'' of the marked hidden states, ``marked`` which of those that were collected.
        heads: outputs and pre-activations in the graph; empty once that was let go.
        sites: where in the closure the outputs stand.
        linearisation: None: made anew in every product.
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
        sites = [seen.sites[id(z)] for z in space.outputs]
        return cls(space, [seen.hidden[i].weight for i in marked], marked, heads, sites)

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
    _roots: list[Tensor] = field(default_factory=list)
    _pending: list[Trace] = field(default_factory=list)
    _claimed: list[CriterionCall] = field(default_factory=list)
    _leaves: list[Tensor] = field(default_factory=list)
    _hidden: int = 0
    _separate: bool = True

    def __call__(self, mode: TraceMode) -> None:
        """``backward()`` was called, on the last of ``mode.roots``."""
        if not self._separate:
            return
        root = mode.roots[-1]
        reached = graph.reached_leaves([root]) | {id(root)}
        if any(id(leaf) in reached for leaf in self._leaves):
            self._give_up("the value of a criterion enters two backward() calls")
            return
        claimed = {id(c) for c in self._claimed}
        calls = [c for c in mode.calls if id(c.leaf) in reached and id(c) not in claimed]
        self._claimed += calls
        self._leaves += [c.leaf for c in calls]
        hidden = mode.hidden[self._hidden :]
        self._hidden = len(mode.hidden)
        self._pending.append(Trace(root, None, calls, hidden=hidden, sites=mode.sites))
        if not self.parts:
            self._outputs += sum(z.numel() for c in calls for z in c.outputs)
            if self._outputs <= self.trusted:
                return
            self.need += self._needed(self._pending[-1])
            if len(mode.roots) < 2 or self.need <= self.budget:
                return
            self.need = 0
        while self._pending:
            self._close(self._pending.pop(0))
        self._let_go(mode)

    def _needed(self, seen: Trace) -> int:
        heads = [z for c in seen.calls for z in c.outputs] + [h.preactivations for h in seen.hidden]
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

    def _close(self, seen: Trace) -> None:
        """Linearise a part and keep it, or take down its gradient alone."""
        part = Part.of(seen, self.params, Matching(seen, self.params))
        need = self._needed(seen)
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

    def _let_go(self, mode: TraceMode) -> None:
        """Nothing of the parts that are closed may stay with the mode."""
        claimed = {id(c) for c in self._claimed}
        mode.calls[:] = [c for c in mode.calls if id(c) not in claimed]
        left = {id(z) for c in mode.calls for z in c.outputs}
        for key in [k for k in mode.sites if k not in left]:
            del mode.sites[key]
        mode.roots[:] = [r.detach() for r in mode.roots]
        mode.hidden.clear()
        self._claimed.clear()
        self._hidden = 0
        mode.split = True


class Replay(OutputCollector):
    """Passes on the heads of every part when its ``backward()`` is called."""

    def __init__(self, parts: list[Part], use: Callable[[Part, list[Tensor]], None], everything: bool) -> None:
        super().__init__()
        self.parts, self.use, self.everything, self.number = parts, use, everything, 0
        self.hidden: list[structural.HiddenState] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.Tensor.backward:
            return super().__torch_function__(func, types, args, kwargs)
        part, self.number = self.parts[self.number], self.number + 1
        heads = [self.flat[n][i] for n, i in part.sites]
        heads += [self.hidden[i].preactivations for i in part.marked]
        for n, _ in part.sites:
            self.flat[n] = []
        self.hidden.clear()
        if heads and (self.everything or part.linearisation is None):
            self.use(part, heads)
        return None


def again(
    closure: Closure, parts: list[Part], use: Callable[[Part, list[Tensor]], None], everything: bool = False
) -> None:
    """Run the closure once more; ``use(part, heads)`` before the next part is run, for all or those not kept."""
    mode = Replay(parts, use, everything)
    with structural.collecting(any(p.hidden for p in parts)) as mode.hidden, mode:
        closure()
