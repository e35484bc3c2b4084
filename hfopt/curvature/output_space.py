"""Gradient ``dL/dz`` and products with ``H_L``, from outputs to loss, for all outputs of a closure together.

Two cases. :class:`Matching`: the loss is ``sum_k <c_k, l_k(z_k)> + R(theta)`` with known criteria ``l_k`` and a
regulariser R. :class:`Joint`: any twice differentiable function of declared outputs and, possibly, parameters; its
Hessian is found by differentiating twice and may be indefinite where the function is not convex.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from hfopt.closure.trace import WAYS_OUT, CriterionCall, Trace
from hfopt.errors import ClosureError
from hfopt.linalg import graph
from hfopt.losses import Call, OutputCurvature, matching_curvature

Tensors = list[Tensor]
Maybe = list["Tensor | None"]


def _grad(
    roots: Sequence[Tensor],
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    *,
    create: bool = False,
    batched: bool = False,
) -> Maybe:
    """``autograd.grad`` that keeps the graph and answers None for whatever does not depend on ``inputs``."""
    pairs = [(r, w) for r, w in zip(roots, weights, strict=True) if r.requires_grad]
    heads, cotangents = [r for r, _ in pairs], [w for _, w in pairs]
    if create and heads and inputs:
        with graph.unhooked(inputs):
            return list(torch.autograd.grad(heads, inputs, cotangents, create_graph=True, allow_unused=True))
    return graph.gradients(heads, inputs, cotangents, batched)


def _known(tensors: Sequence[Tensor | None]) -> list[tuple[int, Tensor]]:
    return [(i, t) for i, t in enumerate(tensors) if t is not None]


def _add(parts: Maybe, i: int, t: Tensor | None) -> None:
    if t is not None:
        old = parts[i]
        parts[i] = t if old is None else old + t


@dataclass
class Block:
    """One criterion: the positions of its inputs among the outputs, and its curvature.

    ``closed`` is the closed form if there is one (a single output then); otherwise ``gradients`` are ``c dl/dz`` with
    the graph over the cut ``inputs``, to be differentiated once more.
    """

    where: list[int]
    closed: OutputCurvature | None
    inputs: Tensors
    gradients: Maybe

    def product(self, u: Sequence[Tensor | None], batched: bool = False) -> Maybe:
        """Multiply the tangents of its own outputs (None: zero) by this block, in the order of ``where``."""
        if self.closed is not None:
            product = torch.vmap(self.closed.product) if batched else self.closed.product
            return [None if u[0] is None else product(u[0])]
        live = [(i, g) for i, g in _known(self.gradients) if u[i] is not None]
        tangents = [t for i, _ in live if (t := u[i]) is not None]
        return _grad([g for _, g in live], self.inputs, tangents, batched=batched)


class Matching:
    """A weighted sum of known criteria plus a regulariser of the parameters."""

    def __init__(self, trace: Trace, params: Sequence[Tensor]) -> None:
        """Find the weights ``c_k``, the cotangents and the regulariser; refuse what is not a weighted sum.

        Raises:
            ClosureError: the loss is not linear in the criteria, or depends on the network beside them.
        """
        self.params = list(params)
        leaves = [call.leaf for call in trace.calls]
        with graph.unhooked(self.params):
            found: Sequence[Tensor | None] = torch.autograd.grad(
                trace.total, [*leaves, *self.params], create_graph=True, allow_unused=True
            )
        factors, self.direct = found[: len(leaves)], list(found[len(leaves) :])
        self._refuse_nonlinear(trace, factors)
        self._refuse_side_paths(trace)
        self._refuse_feedback(trace)
        self.outputs: Tensors = []
        self.blocks: list[Block] = []
        cotangents: Maybe = []
        places: dict[int, int] = {}
        for call, c in zip(trace.calls, factors, strict=True):
            if c is None:
                continue
            block = self._block(call, c.detach(), places, cotangents)
            self.blocks.append(block)
        self.cotangents = [
            torch.zeros_like(z) if t is None else t for z, t in zip(self.outputs, cotangents, strict=True)
        ]

    def _block(self, call: CriterionCall, c: Tensor, places: dict[int, int], cotangents: Maybe) -> Block:
        where = []
        for z in call.outputs:
            if id(z) not in places:
                places[id(z)] = len(self.outputs)
                self.outputs.append(z)
                cotangents.append(None)
            where.append(places[id(z)])
        bound = Call.bind(call.function, call.args, call.kwargs, c)
        # The closed forms are Hessians in the criterion's input; a network may also stand at the target's place.
        plain = len(where) == 1 and bound.arguments["input"] is call.inputs[0]
        closed = matching_curvature(bound) if plain else None
        gradients = _grad([call.value], call.inputs, [c], create=closed is None)
        for i, g in zip(where, gradients, strict=True):
            _add(cotangents, i, None if g is None else g.detach())
        return Block(where, closed, [] if closed is not None else call.inputs, gradients)

    def _refuse_nonlinear(self, trace: Trace, factors: Sequence[Tensor | None]) -> None:
        bad = [
            call.function.__name__
            for call, c in zip(trace.calls, factors, strict=True)
            if c is not None and c.requires_grad
        ]
        if bad:
            node = trace.total.grad_fn.name() if trace.total.grad_fn is not None else "?"
            raise ClosureError(
                f"the loss is not a weighted sum of criteria: it was found to depend on {', '.join(bad)} "
                f"nonlinearly (it ends in {node}). Pass outputs=<the module whose result is the network's output>, so "
                "that everything after it is differentiated as the loss, or loss=<function> with a closure that "
                "returns its arguments"
            )

    def _refuse_side_paths(self, trace: Trace) -> None:
        if all(g is None for g in self.direct):
            return
        network = {n for n in graph.nodes(z for call in trace.calls for z in call.outputs) if not graph.is_leaf_node(n)}
        shared = [n for n in graph.nodes([trace.total]) if n in network]
        if shared:
            raise ClosureError(
                "besides the criterion, the loss uses a result of the network (found through "
                f"{shared[0].name()}); only functions of the parameters can be added to criteria. {WAYS_OUT}"
            )

    def _refuse_feedback(self, trace: Trace) -> None:
        if len(trace.calls) < 2:  # a walk over the whole network, at every step, for what takes two
            return
        reached = graph.reached_leaves(z for call in trace.calls for z in call.outputs)
        used = [call.function.__name__ for call in trace.calls if id(call.leaf) in reached]
        if used:
            raise ClosureError(
                f"the value of {', '.join(used)} was found to be used in computing another criterion's outputs; only "
                f"sums of criteria can be taken apart. {WAYS_OUT}"
            )

    def product(self, u: Sequence[Tensor | None], v: Sequence[Tensor], batched: bool = False) -> tuple[Maybe, Maybe]:
        """Multiply block by block in output space, and by the regulariser's exact Hessian in parameter space.

        ``batched``: for k vectors, along the first dimension of every tensor.
        """
        w: Maybe = [None] * len(self.outputs)
        for block in self.blocks:
            for i, part in zip(block.where, block.product([u[i] for i in block.where], batched), strict=True):
                _add(w, i, part)
        live = _known(self.direct)
        return w, _grad([g for _, g in live], self.params, [v[i] for i, _ in live], batched=batched)


class Joint:
    """Any function of declared outputs (and directly of parameters), differentiated twice."""

    def __init__(self, trace: Trace, params: Sequence[Tensor]) -> None:
        """Differentiate the loss once, in the outputs and in the parameters at fixed outputs.

        Raises:
            ClosureError: the loss does not depend on the declared outputs, or depends on the network beside them.
        """
        self.params = list(params)
        self._uncut = trace.inputs is None
        self.outputs = graph.directly_used([trace.total], trace.outputs) if self._uncut else trace.outputs
        # Uncut outputs: gradients are stopped there by hooks whenever parameters beside them are asked for.
        self.inputs = self.outputs if trace.inputs is None else trace.inputs
        self._refuse_side_paths(trace)
        one = [torch.ones_like(trace.total)]
        self._dz = _grad([trace.total], self.inputs, one, create=True)
        if all(g is None for g in self._dz):
            raise ClosureError(f"the loss does not depend on the declared outputs. {WAYS_OUT}")
        self.cotangents = [
            torch.zeros_like(z) if g is None else g.detach() for z, g in zip(self.inputs, self._dz, strict=True)
        ]
        self.direct: Maybe = [None] * len(self.params)
        barrier = [z.grad_fn for z in self.inputs if z.grad_fn is not None]
        reached = graph.reached_leaves([trace.total], barrier)
        self._has_direct = any(id(p) in reached for p in self.params)
        if self._has_direct:
            with self._stopped():
                self.direct = _grad([trace.total], self.params, one, create=True)
        self._check(trace, one)

    def _refuse_side_paths(self, trace: Trace) -> None:
        """The loss may use outputs and parameters; outputs may use no other output as it was handed out."""
        if graph.reached_leaves(self.outputs) & {id(z) for z in trace.inputs or ()}:
            raise ClosureError(
                "a declared output was found to be computed from another one (a module that is called again on its own "
                "result?): declare the last one alone, by outputs=<a module around all calls> or by loss=<function>"
            )
        network = {n for n in graph.nodes(self.outputs) if not graph.is_leaf_node(n)}
        barrier = {z.grad_fn for z in self.outputs if z.grad_fn is not None}
        beside = [n for n in graph.nodes([trace.total], barrier) if n in network]
        nested = [n for n in graph.nodes(self.outputs) if any(f in barrier for f, _ in n.next_functions)]
        if beside or (nested and self._uncut):
            raise ClosureError(
                "besides the declared outputs, the loss was found to use a result of the network from which they are "
                f"computed (through {(beside or nested)[0].name()}). Make one function of all that the loss is "
                "computed from and give it as loss=, with a closure that returns that function's arguments"
            )

    def _check(self, trace: Trace, one: Tensors) -> None:
        """Compare with the plain gradient where the graph was not cut: a path beside the outputs must not be lost."""
        if not self._uncut:
            return
        plain = _grad([trace.total], self.params, one)
        ours = _grad(self.outputs, self.params, self.cotangents)
        found: Tensors = []
        for p, g, a, b in zip(self.params, plain, ours, self.direct, strict=True):
            zero = torch.zeros_like(p)
            g, a, b = (zero if t is None else t.detach() for t in (g, a, b))
            if p.numel():
                found.append(torch.stack([(g - a - b).abs().max(), g.abs().max()]).double())
        # Read at once: on a device the host would wait for every single number.
        if found and any(difference > 1e-3 * scale + 1e-30 for difference, scale in torch.stack(found).tolist()):
            raise ClosureError(
                "the loss depends on the network beside the outputs that the closure returns; return all tensors that "
                "the loss is computed from, or pass outputs=<the module whose result is the network's output>"
            )

    @contextmanager
    def _stopped(self) -> Iterator[None]:
        stopped = self.inputs if self._uncut else []
        hooks = [z.register_hook(graph.stop) for z in stopped]  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def product(self, u: Sequence[Tensor | None], v: Sequence[Tensor], batched: bool = False) -> tuple[Maybe, Maybe]:
        """Return ``[[L_zz, L_zt], [L_tz, L_tt]]`` times ``(u, v)``; ``batched`` as for :class:`Matching`."""
        heads = [(g, t) for g, t in zip(self._dz, u, strict=True) if g is not None and t is not None]
        if self._has_direct:
            heads += [(g, t) for g, t in zip(self.direct, v, strict=True) if g is not None]
        roots, weights = [g for g, _ in heads], [t for _, t in heads]
        w = _grad(roots, self.inputs, weights, batched=batched)
        h: Maybe = [None] * len(self.params)
        if self._has_direct:
            with self._stopped():
                h = _grad(roots, self.params, weights, batched=batched)
        return w, h


def output_space(trace: Trace, params: Sequence[Tensor]) -> Matching | Joint:
    """The loss of a traced closure as a function of its outputs."""
    return Matching(trace, params) if trace.calls else Joint(trace, params)
