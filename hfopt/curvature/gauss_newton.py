"""The Gauss-Newton matrix as an operator: ``op @ v`` about a fixed point, built once and multiplied many times."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from hfopt.closure.frozen import Frozen
from hfopt.closure.run import closure_run
from hfopt.closure.trace import Closure, refuse_independence
from hfopt.curvature.columns import cannot_batch, columns_at_once, rows
from hfopt.curvature.consistency import inconsistency
from hfopt.curvature.gradient_hooks import hooked
from hfopt.curvature.linearisation import (
    POLICIES,
    Cost,
    DoubleBackward,
    Linearisation,
    eager,
    explained,
)
from hfopt.curvature.output_space import Joint, Matching
from hfopt.curvature.parts import Maybe, Part, again
from hfopt.curvature.policy import ClosureRunner, PreviousChoice, build
from hfopt.errors import ClosureError, NotDifferentiable, logger
from hfopt.linalg import graph
from hfopt.linalg.operators import ClosureOperator
from hfopt.linalg.processes import Processes
from hfopt.linalg.vector import dot


class GaussNewton(ClosureOperator):
    """``G = J' H_L J + d2R/dtheta2`` of the loss that a closure computes, about the parameters' present values.

    The point is fixed: changing a parameter in place afterwards makes a product raise, since the graph is kept.

    Args:
        closure: computes the loss, as in :meth:`hfopt.HessianFree.step`; it is run once here.
        params: the parameters theta; those that do not require a gradient are left out.
        structural: collect hidden states, so that ``op.damped(lambda, mu)`` can damp them.
        linearisation: ``"auto"``, ``"double-backward"``, ``"linearize"``, ``"checkpoint"``, ``"recompute"`` or
            ``"differences"`` (see :mod:`hfopt.curvature.linearisation`).
        memory_budget: bytes that the kept graphs may take under ``"auto"``, and the vectors of a batched product at
            once; default: 80% of what is free.
        loss: a function of what the closure returns, in place of a criterion of torch.nn.functional.
        outputs: the module whose results are the network's outputs.
        known: the policy that ``"auto"`` took for an operator before, and for how many outputs: taken again without
            another look at memory while the number of outputs gives no reason to (see
            :func:`hfopt.curvature.policy.still_holds`) and the model allows it.
        processes: others that build the same operator on data of their own; gradient, loss and products are the means.
        verify: check tangents against adjoints, at the price of about one product, where the model has a backward pass
            of its own or is run again for every product (see :mod:`hfopt.curvature.consistency`).

    Attributes:
        gradient: of the loss, flat (P,), as the parameters' hooks leave it.
        loss: its value.
        projection: onto the space that gradient hooks leave; None without hooks.
        linearisation: the policy that was taken (``.linearisation.name``), and what it costs
            (``.linearisation.cost``; None where it was asked for or known before).

    Raises:
        ClosureError: the loss could not be taken apart into outputs and criteria.
        NotDifferentiable: no policy works for the model, or tangents and adjoints do not belong together.
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
        known: PreviousChoice | None = None,
        frozen: Frozen | None = None,
        processes: Processes | None = None,
        verify: bool = True,
    ) -> None:
        super().__init__(params, processes)
        if linearisation not in POLICIES:
            raise ValueError(f"linearisation is {linearisation!r}, but must be one of {', '.join(POLICIES)}")
        self._frozen = Frozen(self.device, (closure,)) if frozen is None else frozen
        self.closure, self.memory_budget = closure, memory_budget
        model = ClosureRunner(closure, self.params, self._frozen, loss, outputs, structural, memory_budget)
        built = build(model, linearisation, known)
        self.scaler, self.unit = model.scaling.scaler, model.scaling.unit
        seen, self.parts, self.linearisation = built.seen, built.parts, built.linearisation
        self._check_curvature()
        self.loss = self._loss_of_all(seen.total)
        self.result, self.differentiates = seen.result, seen.differentiates
        self.has_structural = any(part.hidden for part in self.parts)
        if structural and not self.has_structural:
            raise ClosureError(
                "structural damping is asked for, but no hidden state was marked in the closure: use hfopt's "
                "recurrences or call hfopt.structural.mark in the model, or set structural to 0"
            )
        self._versions = [p._version for p in self.params]
        self.one_by_one = False
        whole = len(self.parts) == 1 and bool(self.parts[0].sites)
        self._again = model.again(self.parts[0]) if whole else None
        shares = [*built.gradients, *(part.space.direct for part in self.parts)]
        refuse_independence(self.params, [g for share in shares for g in share])
        self.gradient, self.projection = hooked(self.vector, self._of_all(self._flat(shares)))
        heads = (z for part in self.parts for z in part.space.outputs)
        if verify and (self.linearisation.name == "recompute" or graph.has_custom_backward(heads)):
            found = inconsistency(self)
            if found is not None:
                raise NotDifferentiable(found)

    def unrecordable(self) -> str | None:
        """Return a reason that lies in the linearisation, in other processes, or in where the graph was built."""
        policy = self.linearisation.name
        if policy not in ("double-backward", "checkpoint"):
            return f"the linearisation {policy!r} runs parts of the model again, random draws and buffers included"
        return super().unrecordable()

    def __repr__(self) -> str:
        lin = self.linearisation
        cost = "" if lin.cost is None else f", {lin.cost}"
        return f"{type(self).__name__}(P={self.vector.size}, linearisation={lin.name!r}{cost})"

    @property
    def space(self) -> Matching | Joint:
        """Outputs and loss, of a closure with one part."""
        return self.parts[0].space

    @property
    def cotangents(self) -> list[Tensor]:
        """``dL/dz`` for every output."""
        found = [t for part in self.parts for t in part.space.cotangents]
        return found if self.unit == 1.0 else [t * self.unit for t in found]

    @property
    def outputs(self) -> int:
        """The number of output values."""
        return sum(z.numel() for part in self.parts for z in part.space.outputs)

    def _check_curvature(self) -> None:
        """Refuse a loss that has no Hessian in its outputs."""
        for part in self.parts:
            part.space.check_curvature()

    def _check_point(self) -> None:
        if [p._version for p in self.params] != self._versions:
            raise RuntimeError("a parameter has changed since the operator was built; build another at the new point")

    def _flat(self, shares: Iterable[Maybe], out: Tensor | None = None) -> Tensor:
        """Return the sum of the contributions of the parts, flat (P,)."""
        out = torch.empty(self.vector.size, dtype=self.dtype, device=self.device) if out is None else out
        first = True
        for share in shares:
            if first:
                self.vector.flatten_into(out, share)
            else:
                self._add_into(out, share)
            first = False
        return out.zero_() if first else out

    def _add_into(self, flat: Tensor, parts: Maybe) -> None:
        for piece, part in zip(torch.split(flat, self.vector.sizes), parts, strict=True):
            if part is not None:
                dense = part.detach() if part.layout == torch.strided else part.detach().to_dense()
                piece.add_(dense.reshape(-1))

    # -- products --------------------------------------------------------------------------------------------------

    @eager
    @explained
    def multiply(self, v: Tensor, out: Tensor | None = None, *, structural: float = 0.0) -> Tensor:
        """Return ``G v + structural * S v`` in one tangent and one adjoint pass."""
        self._check_point()
        self.products += 1
        vs = self.vector.cast_views(self.project(v))
        mu = structural / self.unit  # S belongs to no loss
        out = self._of_all(self._flat(self._shares(lambda i, lin: self._product(i, lin, vs, mu)), out))
        return out if self.projection is None else self.projection.apply_(out)

    @eager
    @explained
    def multiply_many(self, v: Tensor, *, structural: float = 0.0) -> Tensor:
        """Return ``G V`` for ``V (P, k)`` in batched passes of as many columns as fit into memory.

        Where an operation of the model has no batching rule, the columns are multiplied one by one, and the log says
        so.
        """
        self._check_point()
        if self.one_by_one:
            return super().multiply_many(v, structural=structural)
        width = columns_at_once(self.linearisation.column_bytes(), self.vector.size, self.memory_budget, self.device)
        try:
            done = [self._multiply_batch(part, structural) for part in torch.split(self.project(v), width, 1)]
        except RuntimeError as error:
            if not cannot_batch(error):
                raise
            self.one_by_one = True
            logger.warning("vectors are multiplied one by one, since the model cannot be batched: %s", error)
            return super().multiply_many(v, structural=structural)
        return self.project(done[0] if len(done) == 1 else torch.cat(done, 1))

    def _multiply_batch(self, v: Tensor, structural: float) -> Tensor:
        vs = rows(self.vector, v)
        total = torch.zeros(v.shape[1], v.shape[0], dtype=self.dtype, device=self.device)
        mu = structural / self.unit
        for share in self._shares(lambda i, lin: self._product(i, lin, vs, mu, batched=True)):
            for piece, part in zip(torch.split(total, self.vector.sizes, 1), share, strict=True):
                if part is not None:
                    piece.add_(part.detach().reshape(len(piece), -1))
        self.products += v.shape[1]
        return self._of_all(total).t()

    def _shares(self, product: Callable[[int, Linearisation], list[Maybe]]) -> Iterable[Maybe]:
        """Yield the contribution of every part: first those that are kept, then the others from another run."""
        missing = False
        for i, part in enumerate(self.parts):
            missing |= part.linearisation is None and bool(part.space.outputs)
            if part.linearisation is not None:
                yield from product(i, part.linearisation)
            elif not part.space.outputs:
                yield from product(i, NoOutputs(len(self.params)))
        if not missing:
            return
        sums: Maybe = [None] * len(self.params)

        def use(part: Part, heads: list[Tensor]) -> None:
            fresh = DoubleBackward(heads, self.params, [torch.zeros_like(z) for z in heads])
            for share in product(self.parts.index(part), fresh):
                for j, g in enumerate(share):
                    if g is not None:
                        old = sums[j]
                        sums[j] = g if old is None else old + g

        with closure_run(self._frozen, again=True):
            again(self.closure, self.parts, use)
        yield sums

    def _product(
        self, i: int, lin: Linearisation, v: Sequence[Tensor], structural: float, batched: bool = False
    ) -> list[Maybe]:
        """Return the contribution of part i to ``(G + structural S) v``."""
        u = lin.jvp(v, batched)
        count = self.parts[i].count
        w, direct = self.output_product(i, u[:count], v, batched)
        hidden = self._hidden_part(i, u[count:], structural)
        return [lin.vjp([*w, *hidden], batched, structural), direct]

    def output_product(self, number: int, u: Maybe, v: Sequence[Tensor], batched: bool = False) -> tuple[Maybe, Maybe]:
        """Return ``H_L u`` for the outputs of a part, and the term in parameter space."""
        return self.parts[number].space.product(u, v, batched)

    def _hidden_part(self, i: int, u: Maybe, structural: float) -> Maybe:
        """``structural D'' J_a v`` for every marked hidden state of part i."""
        if not structural:
            return [None] * len(u)
        return [None if t is None else t * w * structural for t, w in zip(u, self.parts[i].hidden, strict=True)]

    def structural_product(self, v: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the product of the hidden states' part alone, ``S v = J_a' D'' J_a v``."""
        self.products += 1
        vs = self.vector.cast_views(self.project(v))

        def product(i: int, lin: Linearisation) -> list[Maybe]:
            count = self.parts[i].count
            hidden = self._hidden_part(i, lin.jvp(vs)[count:], 1.0)
            return [lin.vjp([*([None] * count), *hidden], structural=1.0)]

        out = self._flat(self._shares(product), out)
        return self.project(out if self.processes is None else self.processes.mean_(out))

    def structural_quadratic(self, v: Tensor) -> float:
        """Return ``v' S v = sum D'' (J_a v)^2``."""
        if any(part.linearisation is None or part.linearisation.name == "checkpoint" for part in self.parts):
            return dot(v, self.structural_product(v))
        vs, total = self.vector.cast_views(self.project(v)), 0.0
        for part in self.parts:
            if part.linearisation is not None:
                tangents = part.linearisation.jvp(vs)[part.count :]
                pairs = zip(tangents, part.hidden, strict=True)
                total += sum(float((w * t * t).sum(dtype=torch.float64)) for t, w in pairs if t is not None)
        return total if self.processes is None else self.processes.mean(total)

    def pull(self, cotangents: Sequence[Tensor]) -> Tensor:
        """Return ``J' w`` for one tensor per output of this process, flat (P,)."""
        left = list(cotangents)
        given = [[left.pop(0) for _ in range(part.count)] for part in self.parts]

        def product(i: int, lin: Linearisation) -> list[Maybe]:
            return [lin.vjp([*given[i], *([None] * len(self.parts[i].hidden))])]

        return self._flat(self._shares(product))

    def pull_many(self, cotangents: Sequence[Tensor | None]) -> Tensor:
        """Return ``J' W (P, k)`` for k cotangents along a new first dimension of each output's tensor (None: zero)."""
        left = list(cotangents)
        given = [[left.pop(0) for _ in range(part.count)] for part in self.parts]
        k = next(len(t) for t in cotangents if t is not None)
        total = torch.zeros(k, self.vector.size, dtype=self.dtype, device=self.device)

        def product(i: int, lin: Linearisation) -> list[Maybe]:
            w: Maybe = [*given[i], *([None] * len(self.parts[i].hidden))]
            return [lin.vjp(w, True) if any(t is not None for t in w) else [None] * len(self.params)]

        for share in self._shares(product):
            for piece, part in zip(torch.split(total, self.vector.sizes, 1), share, strict=True):
                if part is not None:
                    piece.add_(part.detach().reshape(k, -1))
        return total.t()

    def outputs_by_part(self, use: Callable[[int, list[Tensor]], None]) -> None:
        """Run the closure again; ``use(i, heads)`` for every part, with its outputs in the graph of this run."""
        if self._again is not None:
            use(0, self._again()[: self.parts[0].count])
            return
        with closure_run(self._frozen, again=True):
            each = lambda part, heads: use(self.parts.index(part), heads[: part.count])  # noqa: E731
            again(self.closure, self.parts, each, everything=True)

    def outputs_again(self) -> list[Tensor] | None:
        """Return the outputs of another run in a new graph, or None if a sum is split into parts."""
        return None if self._again is None else self._again()[: self.parts[0].count]


class NoOutputs:
    """The linearisation of a part without outputs: a regulariser that has a ``backward()`` of its own."""

    name = "nothing"
    cost: Cost | None = None

    def __init__(self, params: int) -> None:
        self._params = params

    def jvp(self, v: Sequence[Tensor], batched: bool = False) -> Maybe:
        """Return no outputs."""
        return []

    def vjp(self, w: Sequence[Tensor | None], batched: bool = False, structural: float = 0.0) -> Maybe:
        """Return zero."""
        return [None] * self._params

    def column_bytes(self) -> int:
        """Return zero."""
        return 0

    def kept_bytes(self) -> int:
        """Return zero."""
        return 0
