"""Gradient ``dL/dz`` and products with ``H_L``, from outputs to loss, for all outputs of a closure together.

Two cases. :class:`Matching`: the loss is ``sum_k <c_k, l_k(z_k)> + R(theta)`` with known criteria ``l_k`` and a
regulariser R. :class:`Joint`: any twice differentiable function of declared outputs and, possibly, parameters; its
Hessian is found by differentiating twice and may be indefinite where the function is not convex.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hfopt.closure.criteria import CriterionCall, Site
from hfopt.closure.decompose import WAYS_OUT, Decomposition, decompose
from hfopt.closure.partial import edge_of, partial_gradients, walk
from hfopt.closure.trace import Trace
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

    def __init__(self, found: Decomposition, params: Sequence[Tensor]) -> None:
        """Gather outputs, cotangents and curvatures of the criteria.

        Raises:
            ClosureError: a criterion has no curvature.
        """
        self.params, self.direct = list(params), found.direct
        self.outputs: Tensors = []
        self.sites: list[Site] = []
        self.blocks: list[Block] = []
        cotangents: Maybe = []
        places: dict[int, int] = {}
        for call, c in zip(found.calls, found.factors, strict=True):
            self.blocks.append(self._block(call, c, places, cotangents))
        self.cotangents = [
            torch.zeros_like(z) if t is None else t for z, t in zip(self.outputs, cotangents, strict=True)
        ]

    def _block(self, call: CriterionCall, c: Tensor, places: dict[int, int], cotangents: Maybe) -> Block:
        where = []
        for z, site in zip(call.outputs, call.sites, strict=True):
            if id(z) not in places:
                places[id(z)] = len(self.outputs)
                self.outputs.append(z)
                self.sites.append(site)
                cotangents.append(None)
            where.append(places[id(z)])
        bound = Call.bind(*call.bound(), call.factor(c))
        # The closed forms are Hessians in the criterion's input; a network may also stand at the target's place.
        closed = matching_curvature(bound) if call.is_input(bound.arguments["input"]) else None
        inputs: Tensors = []
        if closed is None:
            inputs, value = call.again()
            gradients = _grad([value], inputs, [c], create=True)
        else:
            gradients = call.cotangents(c)
        for i, g in zip(where, gradients, strict=True):
            _add(cotangents, i, None if g is None else g.detach())
        return Block(where, closed, inputs, gradients if closed is None else [])

    def check_curvature(self) -> None:
        """All criteria have second derivatives."""

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
        if trace.total.requires_grad and self._uncut:
            self.outputs = graph.directly_used([trace.total], trace.outputs)
        else:
            self.outputs = trace.outputs
        self.inputs = self.outputs if trace.inputs is None else trace.inputs
        self.sites = [trace.sites[id(z)] for z in self.outputs]
        self._refuse_side_paths(trace)
        one = [torch.ones_like(trace.total)]
        self._dz, self.direct = self._gradients([trace.total], one, create=True)
        if all(g is None for g in self._dz):
            raise ClosureError(f"the loss does not depend on the declared outputs. {WAYS_OUT}")
        self.cotangents = [
            torch.zeros_like(z) if g is None else g.detach() for z, g in zip(self.inputs, self._dz, strict=True)
        ]
        self._check(trace, one)

    def _gradients(
        self, roots: Sequence[Tensor], weights: Sequence[Tensor], create: bool = False, batched: bool = False
    ) -> tuple[Maybe, Maybe]:
        """Of the outputs, each at fixed others, and of the parameters at fixed outputs."""
        if not self._uncut:
            targets = [*self.inputs, *self.params]
            found = _grad(roots, targets, weights, create=create, batched=batched)
            return found[: len(self.inputs)], found[len(self.inputs) :]
        edges = [edge_of(t) for t in (*self.inputs, *self.params)]
        pairs = [(r, w) for r, w in zip(roots, weights, strict=True) if r.requires_grad]
        live: list[int] = []

        def one(*cotangents: Tensor) -> tuple[Tensor, ...]:
            grads = partial_gradients([r for r, _ in pairs], cotangents, edges)
            live[:] = [i for i, g in enumerate(grads) if g is not None]
            return tuple(g for g in grads if g is not None)

        with torch.set_grad_enabled(create):
            values = (torch.vmap(one) if batched and pairs else one)(*(w for _, w in pairs))
        result: Maybe = [None] * len(edges)
        for i, g in zip(live, values, strict=True):
            result[i] = g
        return result[: len(self.inputs)], result[len(self.inputs) :]

    def _refuse_side_paths(self, trace: Trace) -> None:
        """The loss may use outputs and parameters; outputs may use no other output as it was handed out."""
        if graph.reached_leaves(self.outputs) & {id(z) for z in trace.inputs or ()}:
            raise ClosureError(
                "a declared output was found to be computed from another one (a module that is called again on its own "
                "result?): declare the last one alone, by outputs=<a module around all calls> or by loss=<function>"
            )
        network = {n for n in graph.nodes(self.outputs) if not graph.is_leaf_node(n)}
        _, nodes = walk(trace.total, {edge_of(z) for z in self.outputs})
        beside = next((n for n in nodes if n in network), None)
        if beside is not None:
            raise ClosureError(
                "besides the declared outputs, the loss was found to use a result of the network from which they are "
                f"computed (through {beside.name()}). Make one function of all that the loss is computed from and give "
                "it as loss=, with a closure that returns that function's arguments, or pass curvature='hessian'"
            )

    def check_curvature(self) -> None:
        """Refuse a loss that torch cannot differentiate twice in the outputs.

        Raises:
            ClosureError: its backward pass is an operation without a derivative.
        """
        outputs = {edge_of(z) for z in self.inputs}
        for g in self._dz:
            if g is None or not g.requires_grad:
                continue
            for node in walk(g, outputs)[1]:
                if node.name() == "torch::autograd::NotImplemented":
                    raise ClosureError(
                        f"the loss has no second derivative in its outputs ({_said_by(node)}): use another loss, or "
                        "pass curvature='empirical-fisher', which takes the gradient alone"
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
                "the loss depends on the network in other ways than through the outputs that the closure returns; "
                "return all tensors that the loss is computed from, or pass outputs=<the module whose result is the "
                "network's output>"
            )

    def product(self, u: Sequence[Tensor | None], v: Sequence[Tensor], batched: bool = False) -> tuple[Maybe, Maybe]:
        """Return ``[[L_zz, L_zt], [L_tz, L_tt]]`` times ``(u, v)``; ``batched`` as for :class:`Matching`."""
        heads = [(g, t) for g, t in zip(self._dz, u, strict=True) if g is not None and t is not None]
        heads += [(g, t) for g, t in zip(self.direct, v, strict=True) if g is not None]
        return self._gradients([g for g, _ in heads], [t for _, t in heads], batched=batched)


def _said_by(node: Any) -> str:
    """Return the error for a node without a derivative."""
    try:
        node(*(torch.zeros(tuple(data.shape)) for data in node._input_metadata))
    except RuntimeError as error:
        return str(error)
    return str(node.name())


def output_space(trace: Trace, params: Sequence[Tensor]) -> Matching | Joint:
    """The loss of a traced closure as a function of its outputs.

    Criteria are looked for first: of outputs that the closure returns, nothing is known but where they are.

    Raises:
        ClosureError: the loss could not be taken apart.
    """
    if trace.inputs is not None or (trace.outputs and not trace.calls):
        return Joint(trace, params)
    try:
        found = decompose(trace, params)
    except ClosureError:
        if not trace.outputs:
            raise
        return Joint(trace, params)
    return Matching(found, params)
