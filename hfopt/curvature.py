"""Curvature matrices as operators: ``op @ v`` about a fixed point, built once and multiplied many times.

    Gauss-Newton   G = J' H_L J + d2R/dtheta2        (Schraudolph, Neural Computation 2002)
    Hessian        H = d2L/dtheta2                   (Pearlmutter, Neural Computation 1994)
    Fisher         F = E[J' g g' J]                  with g = dL/dz for targets drawn from the model, or the data's own

All are symmetric (P, P); G and F are positive semi-definite for convex losses and regularisers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hfopt import graph
from hfopt.closure import Closure, Site, outputs_again, trace
from hfopt.errors import ClosureError
from hfopt.frozen import Frozen
from hfopt.linearisation import (
    DOUBLE_BACKWARD_MEMORY,
    POLICIES,
    DoubleBackward,
    Linearisation,
    Linearize,
    Recompute,
    available_bytes,
    not_differentiable,
)
from hfopt.operators import Local
from hfopt.output_space import Joint, Matching, output_space

# Vectors in one batched pass at most, for its memory grows with them.
MANY = 64

Maybe = list["Tensor | None"]


class GaussNewton(Local):
    """``G = J' H_L J + d2R/dtheta2`` of the loss that a closure computes, about the parameters' present values.

    The point is fixed: changing a parameter in place afterwards makes a product raise, since the graph is kept.

    Args:
        closure: computes the loss, as in :meth:`hfopt.HessianFree.step`; it is run once here.
        params: the parameters theta; those that do not require a gradient are left out.
        structural: collect hidden states, so that ``op.damped(lambda, mu)`` can damp them.
        linearisation: ``"auto"``, ``"double-backward"``, ``"linearize"`` or ``"recompute"``
            (see :mod:`hfopt.linearisation`).
        memory_budget: bytes that the kept graph may take under ``"auto"``; default: 80% of what is free.
        loss: a function of what the closure returns, in place of a criterion of torch.nn.functional.
        outputs: the module whose results are the network's outputs.
        known: the policy that ``"auto"`` took for an operator before, and for how many outputs: taken again without
            another look at memory while there are no more of them and the model allows it.

    Attributes:
        gradient: of the loss, flat (P,).
        loss: its value.
        linearisation: the policy that was taken (``.linearisation.name``).

    Raises:
        ClosureError: the loss could not be taken apart into outputs and criteria.
        NotDifferentiable: no policy works for the model.
    """

    def __init__(
        self,
        closure: Closure,
        params: Iterable[Tensor],
        *,
        structural: bool = False,
        linearisation: str = "auto",
        memory_budget: int | None = None,
        loss: Callable[..., Tensor] | None = None,
        outputs: nn.Module | None = None,
        known: tuple[str, int] | None = None,
        frozen: Frozen | None = None,
    ) -> None:
        super().__init__(params)
        if linearisation not in POLICIES:
            raise ValueError(f"linearisation is {linearisation!r}, but must be one of {', '.join(POLICIES)}")
        self._frozen = Frozen(self.device) if frozen is None else frozen
        with self._frozen.run(), differentiable_attention():
            seen = trace(closure, loss=loss, outputs=outputs, hidden=structural)
        self.loss, self.result, self.differentiates = seen.total.detach(), seen.result, seen.differentiates
        self.space: Matching | Joint = output_space(seen, self.params)
        marked = [i for i, h in enumerate(seen.hidden) if h.preactivations.requires_grad]
        self._hidden = [seen.hidden[i].weight for i in marked]
        self.has_structural = bool(self._hidden)
        if structural and not self._hidden:
            raise ClosureError(
                "structural damping is asked for, but no hidden state was marked in the closure: use hfopt's "
                "recurrences or call hfopt.structural.mark in the model, or set structural to 0"
            )
        heads = [*self.space.outputs, *(seen.hidden[i].preactivations for i in marked)]
        kind = "module" if outputs else "loss" if loss else "criteria" if seen.calls else "result"
        sites = [seen.sites[id(z)] for z in self.space.outputs]
        # No method of this operator: a cycle would keep its graph alive until the next garbage collection.
        self._again = partial(_heads_again, closure, self._frozen, kind, sites, outputs, marked)
        self._versions = [p._version for p in self.params]
        self._count = len(self.space.outputs)
        self.linearisation, gradient = self._linearise(linearisation, heads, memory_budget, known)
        _refuse_independence(self.params, [*gradient, *self.space.direct])
        self.gradient = self.vector.flatten(gradient)
        self._add_into(self.gradient, self.space.direct)
        if self.linearisation.name == "recompute":
            self.space.outputs = [z.detach() for z in self.space.outputs]

    def _linearise(
        self, policy: str, heads: list[Tensor], budget: int | None, known: tuple[str, int] | None = None
    ) -> tuple[Linearisation, Maybe]:
        """The linearisation and the gradient ``J' dL/dz``."""
        at = [*self.space.cotangents, *(torch.zeros_like(w) for w in self._hidden)]
        if policy == "auto":
            trusted = known is not None and sum(z.numel() for z in self.space.outputs) <= known[1]
            return self._automatic(heads, budget, known[0] if known is not None and trusted else None)
        if policy == "double-backward":
            double = DoubleBackward(heads, self.params, at)
            return double, double.gradient
        lin: Linearisation
        if policy == "linearize":
            around = partial(self._frozen.again, watch=False)
            lin = Linearize(heads, self.params, self._again, around, self._frozen.drew)
            return lin, lin.vjp(at)
        gradient = torch.autograd.grad(
            heads, self.params, at, allow_unused=True, retain_graph=not isinstance(self.space, Matching)
        )
        return Recompute(self.params, self._again), list(gradient)

    def _automatic(self, heads: list[Tensor], budget: int | None, trusted: str | None) -> tuple[Linearisation, Maybe]:
        """The first policy that works: ``trusted``, which has worked before, then those that memory allows."""
        attempts: dict[str, Exception] = {}
        if trusted is not None and (found := self._attempt(trusted, heads, budget, attempts, probe=False)):
            return found
        if budget is None:
            budget = int(0.8 * available_bytes(self.device))
        need = int((DOUBLE_BACKWARD_MEMORY - 1) * graph.saved_bytes(heads, self.params))
        if need > budget:
            warnings.warn(
                f"the graph for cached products would take {need / 2**20:.0f} MiB more, over the budget of "
                f"{budget / 2**20:.0f} MiB: every product runs the model again (about twice as slow). Use a smaller "
                "curvature batch, or raise memory_budget",
                stacklevel=4,
            )
            return self._linearise("recompute", heads, budget)
        for policy in ("double-backward", "linearize"):
            if policy not in attempts and (found := self._attempt(policy, heads, budget, attempts)):
                if attempts:
                    warnings.warn(f"products use {policy!r}, since double backward failed: {attempts}", stacklevel=4)
                return found
        raise not_differentiable(attempts)

    def _attempt(
        self, policy: str, heads: list[Tensor], budget: int | None, attempts: dict[str, Exception], probe: bool = True
    ) -> tuple[Linearisation, Maybe] | None:
        """The linearisation by ``policy``, or None with the reason in ``attempts`` if the model does not allow it.

        torch has no exception of its own for an operation without a second derivative or a forward mode. Whatever the
        reason, the next policy is tried, the warning or error quotes it, and lack of memory is passed on as it is.
        """
        try:
            lin, gradient = self._linearise(policy, heads, budget)
            if probe and policy == "double-backward":
                # An operation without a second derivative shows only when the graph is used.
                lin.jvp([torch.zeros_like(p) for p in self.params])
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            attempts[policy] = error
            return None
        return lin, gradient

    def _check_point(self) -> None:
        if [p._version for p in self.params] != self._versions:
            raise RuntimeError("a parameter has changed since the operator was built; build another at the new point")

    def multiply(self, v: Tensor, out: Tensor | None = None, *, structural: float = 0.0) -> Tensor:
        """``G v + structural * S v`` in one tangent and one adjoint pass."""
        self._check_point()
        self.products += 1
        vs = self.vector.cast_views(v)
        u = self.linearisation.jvp(vs)
        w, direct = self._output_product(u[: self._count], vs)
        return self._pull(w, direct, u, structural, out)

    def multiply_many(self, v: Tensor, *, structural: float = 0.0) -> Tensor:
        """``G V`` for ``V (P, k)`` in one batched tangent and one batched adjoint pass, k times the memory of one.

        Where an operation of the model has no batching rule, or a part of the loss is differentiated automatically,
        the columns are multiplied one by one.
        """
        self._check_point()
        lin, space = self.linearisation, self.space
        closed = isinstance(space, Matching) and all(b.closed is not None for b in space.blocks)
        if not isinstance(lin, DoubleBackward) or not closed or any(d is not None for d in space.direct):
            return super().multiply_many(v, structural=structural)
        k = v.shape[1]
        if k > MANY:
            return torch.cat([self.multiply_many(part, structural=structural) for part in torch.split(v, MANY, 1)], 1)
        pieces = torch.split(v.t(), self.vector.sizes, dim=1)
        vs = [x.reshape(k, *p.shape).to(p.dtype) for x, p in zip(pieces, self.params, strict=True)]
        try:
            u = lin.jvp(vs, batched=True)
            w = self._output_products(u[: self._count])
            pulled = lin.vjp([*w, *self._hidden_part(u, structural)], batched=True)
        except RuntimeError as error:
            if "vmap" not in str(error) and "batching rule" not in str(error):
                raise
            return super().multiply_many(v, structural=structural)
        self.products += k
        rows = [torch.zeros_like(x) if g is None else g for x, g in zip(vs, pulled, strict=True)]
        return torch.cat([g.detach().reshape(k, -1).to(self.dtype) for g in rows], 1).t()

    def _output_products(self, u: Maybe) -> Maybe:
        """Output products of k tangents along the first dimension."""
        live = [i for i, t in enumerate(u) if t is not None]

        def product(*tangents: Tensor) -> tuple[Tensor, ...]:
            full: Maybe = [None] * len(u)
            for i, tangent in zip(live, tangents, strict=True):
                full[i] = tangent
            done, _ = self._output_product(full, [])
            return tuple(t for i in live if (t := done[i]) is not None)

        w: Maybe = [None] * len(u)
        for i, part in zip(live, torch.vmap(product)(*(t for t in u if t is not None)), strict=True):
            w[i] = part
        return w

    def structural_product(self, v: Tensor, out: Tensor | None = None) -> Tensor:
        """``S v = J_a' D'' J_a v``, hidden states' part alone."""
        self.products += 1
        u = self.linearisation.jvp(self.vector.cast_views(v))
        return self._pull([None] * self._count, [None] * len(self.params), u, 1.0, out)

    def structural_quadratic(self, v: Tensor) -> float:
        """``v' S v = sum D'' (J_a v)^2``, by a tangent pass alone."""
        u = self.linearisation.jvp(self.vector.cast_views(v))[self._count :]
        return sum(
            float((w * t * t).sum(dtype=torch.float64)) for t, w in zip(u, self._hidden, strict=True) if t is not None
        )

    def _output_product(self, u: Maybe, v: Sequence[Tensor]) -> tuple[Maybe, Maybe]:
        return self.space.product(u, v)

    def _pull(self, w: Maybe, direct: Maybe, u: Maybe, structural: float, out: Tensor | None) -> Tensor:
        pulled = self.linearisation.vjp([*w, *self._hidden_part(u, structural)])
        out = torch.empty(self.vector.size, dtype=self.dtype, device=self.device) if out is None else out
        self.vector.flatten_into(out, pulled)
        self._add_into(out, direct)
        return out

    def _hidden_part(self, u: Maybe, structural: float) -> Maybe:
        """``structural D'' J_a v`` for every marked hidden state."""
        if not structural:
            return [None] * len(self._hidden)
        tangents = u[self._count :]
        return [None if t is None else t * w * structural for t, w in zip(tangents, self._hidden, strict=True)]

    def _add_into(self, flat: Tensor, parts: Maybe) -> None:
        for piece, part in zip(torch.split(flat, self.vector.sizes), parts, strict=True):
            if part is not None:
                piece.add_(part.detach().reshape(-1))

    def pull(self, cotangents: Sequence[Tensor]) -> Tensor:
        """``J' w`` for one tensor per output, flat (P,)."""
        return self.vector.flatten(self.linearisation.vjp([*cotangents, *([None] * len(self._hidden))]))


def _heads_again(
    closure: Closure, frozen: Frozen, kind: str, sites: list[Site], module: nn.Module | None, marked: list[int]
) -> list[Tensor]:
    """The outputs at ``sites`` and the ``marked`` ones of the hidden states, from another run of the closure."""
    with frozen.again(), torch.enable_grad(), differentiable_attention():
        heads = outputs_again(closure, kind, sites, module=module, hidden=bool(marked))
    return [*heads[: len(sites)], *(heads[len(sites) + i] for i in marked)]


def _refuse_independence(params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    """A gradient that is nowhere defined means another model's parameters, most often a copy's."""
    if params and all(g is None for g in grads):
        raise ClosureError(
            "the closure's loss does not depend on any of the parameters given: check that they are those of the model "
            "that the closure calls (not of a copy, and not replaced since)"
        )


class Hessian(Local):
    """``H = d2L/dtheta2`` by a cached double backward pass; symmetric, and indefinite away from minima.

    Args:
        closure: computes the loss by any differentiable operations.
        params: the parameters theta.
        loss: a function of what the closure returns, if that is not the loss.
    """

    def __init__(
        self,
        closure: Closure,
        params: Iterable[Tensor],
        *,
        loss: Callable[..., Tensor] | None = None,
        frozen: Frozen | None = None,
    ) -> None:
        super().__init__(params)
        with (frozen or Frozen(self.device)).run(), differentiable_attention():
            seen = trace(closure, loss=loss, cut=False)
        self.loss, self.result, self.differentiates = seen.total.detach(), seen.result, seen.differentiates
        grads: Sequence[Tensor | None] = torch.autograd.grad(
            seen.total, self.params, create_graph=True, allow_unused=True
        )
        _refuse_independence(self.params, grads)
        try:
            graph.refuse_once_differentiable(g for g in grads if g is not None)
        except RuntimeError as error:
            raise not_differentiable({"double-backward": error}) from error
        self._live = [(i, g) for i, g in enumerate(grads) if g is not None and g.requires_grad]
        self.gradient = self.vector.flatten(grads)

    def multiply(self, v: Tensor, out: Tensor | None = None, *, structural: float = 0.0) -> Tensor:
        """``H v = d<grad L, v>/dtheta``.

        Raises:
            ValueError: for ``structural``, which a Hessian does not have.
        """
        if structural:
            raise ValueError("structural is given, but the Hessian of a loss has no hidden states to damp")
        self.products += 1
        vs = self.vector.cast_views(v)
        parts: Sequence[Tensor | None] = [None] * len(self.params)
        if self._live:
            heads, tangents = [g for _, g in self._live], [vs[i] for i, _ in self._live]
            parts = torch.autograd.grad(heads, self.params, tangents, retain_graph=True, allow_unused=True)
        out = torch.empty(self.vector.size, dtype=self.dtype, device=self.device) if out is None else out
        return self.vector.flatten_into(out, parts)


def differentiable_attention() -> Any:
    """Only the plain form of scaled dot-product attention can be differentiated twice."""
    return nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH)
