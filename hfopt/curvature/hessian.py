"""The Hessian of any twice differentiable loss, by a cached double backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from hfopt.closure.frozen import Frozen
from hfopt.closure.run import closure_run
from hfopt.closure.trace import Closure, refuse_independence, trace
from hfopt.curvature.columns import cannot_batch, columns, columns_at_once, rows
from hfopt.curvature.gradient_hooks import hooked
from hfopt.curvature.linearisation import eager, explained, not_differentiable
from hfopt.errors import logger
from hfopt.linalg import graph
from hfopt.linalg.operators import ClosureOperator
from hfopt.linalg.processes import Processes


class Hessian(ClosureOperator):
    """``H = d2L/dtheta2`` by a cached double backward pass; symmetric, and indefinite away from minima.

    Args:
        closure: computes the loss by any differentiable operations.
        params: the parameters theta.
        loss: a function of what the closure returns, if that is not the loss.
        processes: as for :class:`GaussNewton`.
    """

    def __init__(
        self,
        closure: Closure,
        params: Iterable[Tensor],
        *,
        loss: Callable[..., Tensor] | None = None,
        frozen: Frozen | None = None,
        processes: Processes | None = None,
    ) -> None:
        super().__init__(params, processes)
        frozen = Frozen(self.device, (closure,)) if frozen is None else frozen
        with closure_run(frozen) as run:
            seen = trace(closure, loss=loss, params=self.params, cut=False)
        self.scaler, self.unit = run.scaling.scaler, run.scaling.unit
        self.loss = self._loss_of_all(seen.total)
        self.result, self.differentiates = seen.result, seen.differentiates
        with graph.unhooked(self.params):
            grads: Sequence[Tensor | None] = torch.autograd.grad(
                seen.total, self.params, create_graph=True, allow_unused=True
            )
        refuse_independence(self.params, grads)
        try:
            graph.refuse_once_differentiable(g for g in grads if g is not None)
        except RuntimeError as error:
            raise not_differentiable({"double-backward": error}) from error
        self.one_by_one = False
        self.custom_backward = graph.has_custom_backward([seen.total])
        self._live = [(i, g) for i, g in enumerate(grads) if g is not None and g.requires_grad]
        self.gradient, self.projection = hooked(self.vector, self._of_all(self.vector.flatten(grads)))

    @eager
    @explained
    def multiply(self, v: Tensor, out: Tensor | None = None, *, structural: float = 0.0) -> Tensor:
        """Return ``H v = d<grad L, v>/dtheta``.

        Raises:
            ValueError: for ``structural``, which a Hessian does not have.
        """
        if structural:
            raise ValueError("structural is given, but the Hessian of a loss has no hidden states to damp")
        self.products += 1
        vs = self.vector.cast_views(self.project(v))
        parts: Sequence[Tensor | None] = [None] * len(self.params)
        if self._live:
            heads, tangents = [g for _, g in self._live], [vs[i] for i, _ in self._live]
            parts = graph.gradients(heads, self.params, tangents)
        out = torch.empty(self.vector.size, dtype=self.dtype, device=self.device) if out is None else out
        self._of_all(self.vector.flatten_into(out, parts))
        return out if self.projection is None else self.projection.apply_(out)

    @eager
    @explained
    def multiply_many(self, v: Tensor, *, structural: float = 0.0) -> Tensor:
        """Return ``H V`` for ``V (P, k)`` in batched passes, of as many columns as fit into memory.

        Raises:
            ValueError: for ``structural``, which a Hessian does not have.
        """
        if structural or self.one_by_one or not self._live:
            return super().multiply_many(v, structural=structural)
        heads = [g for _, g in self._live]
        width = columns_at_once(2 * graph.saved_bytes(heads, self.params), self.vector.size, None, self.device)
        done = []
        try:
            for part in torch.split(self.project(v), width, 1):
                vs = rows(self.vector, part)
                found = graph.gradients(heads, self.params, [vs[i] for i, _ in self._live], batched=True)
                done.append(columns(self.vector, vs, found))
        except RuntimeError as error:
            if not cannot_batch(error):
                raise
            self.one_by_one = True
            logger.warning("vectors are multiplied one by one, since the model cannot be batched: %s", error)
            return super().multiply_many(v)
        self.products += v.shape[1]
        return self.project(self._of_all(torch.cat(done, 1).contiguous()))
