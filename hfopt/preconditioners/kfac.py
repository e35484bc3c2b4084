"""Kronecker-factored curvature: a block for each linear or convolution layer, inverted through its two factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hfopt.curvature.draws import case_dim, draw
from hfopt.curvature.gauss_newton import GaussNewton
from hfopt.curvature.output_space import Joint, Matching
from hfopt.errors import warn
from hfopt.linalg.operators import Operator
from hfopt.losses import Diagonal, OutputCurvature
from hfopt.preconditioners.base import Preconditioner, ready, with_outputs
from hfopt.preconditioners.layers import Layer, Watched, number_of_cases, visit

INSIDE = (
    "layers inside a transform of torch.func (vmap, grad, jacrev, jvp) are out of its sight; differentiate the network "
    "in its inputs by torch.autograd.grad(..., create_graph=True), and give it all points as one batch"
)


@dataclass
class Factors:
    """One block ``A (x) G`` of a weight (o, k) and, as a last column, its bias.

    Attributes:
        weight, bias: which parameters; ``bias`` is -1 where there is none.
        a: (k, k), or (k + 1, k + 1) with a bias.
        g: (o, o).
        turned: whether the parameter is (k, o).
    """

    weight: int
    bias: int
    a: Tensor
    g: Tensor
    turned: bool = False

    def matrix(self, flat: Tensor) -> Tensor:
        """Return the weight's part of a flat vector as (o, k)."""
        return flat.view(-1, len(self.g)).t() if self.turned else flat.view(len(self.g), -1)


class KFAC(Preconditioner):
    """One Kronecker product ``A (x) G`` per linear or convolution layer; a diagonal for all other parameters.

    With the R rows x of a layer's inputs over all cases and positions (1 for each column of a bias), and g the
    gradients of its outputs for targets drawn from the model (``E[g g']`` is the curvature then),

        A = (1/R) sum x x',     G = sum g g',

    whose product is the layer's block of the Gauss-Newton matrix if x and g are independent, and different rows
    uncorrelated. Rows need not be those of the outputs, which may be reshaped, joined, sliced or masked before the
    criterion sees them. Where a closure differentiates a network in its inputs (``torch.autograd.grad`` with
    ``create_graph=True``, as for differential equations), g is the whole derivative of the criteria in a layer's
    outputs, that through the derivatives included, while x are the rows of the forward pass alone: what the weight does
    in the derivatives' own passes is left out of the factors (not of the products).

    Damping is factored: ``(A + pi gamma I) (x) (G + gamma / pi I)`` with ``gamma^2 = lambda + c`` and
    ``pi^2 = (tr A / dim A) / (tr G / dim G)``. The other parameters have ``diag + lambda + c``, the diagonal from
    squared gradients of drawn targets. Where the loss is no criterion with a known distribution, the data's own targets
    stand in for drawn ones.

    Args:
        samples: draws of targets.
        average: share of the factors so far in a running average, which batches of few cases need: refresh k has
            ``e old + (1 - e) new`` with ``e = min(1 - 1/k, average)``. 0: those of this step alone.
        probes: adjoint passes for the diagonal of the other parameters, if there are any.
        every: steps between refreshes; in between, the last factors stand.
        batch_dim: the outputs' dimension along which cases stand.

    Sources: Martens and Grosse, ICML 2015, sections 3, 5 (also for the average) and 6.3; Grosse and Martens, ICML 2016,
    section 3 (convolutions).
    """

    def __init__(
        self, samples: int = 1, probes: int = 8, every: int = 1, batch_dim: int = 0, average: float = 0.0
    ) -> None:
        if min(samples, probes, every) < 1:
            raise ValueError(f"samples, probes and every must be at least 1, but are {samples}, {probes} and {every}")
        if not 0 <= average < 1:
            raise ValueError(f"average is {average}, but must be at least 0 and below 1")
        self.samples, self.probes, self.every, self.batch_dim = samples, probes, every, batch_dim
        self.average = average
        self.factors: list[Factors] = []
        self._refreshes = 0
        self._diagonal: Tensor | None = None
        self._sizes: list[int] = []
        self._shapes: list[torch.Size] = []
        self._inverse: Tensor | None = None
        self._inverses: list[tuple[Tensor, Tensor]] = []
        self._told = False

    def refresh(self, op: Operator, step: int) -> None:
        """Compute the factors at the operator's point, if due.

        Raises:
            TypeError: for an operator without outputs (the Hessian of a loss).
            ValueError: an output has no dimension ``batch_dim``.
        """
        op = with_outputs(op, "K-FAC", self.batch_dim)
        self._sizes, self._shapes = op.vector.sizes, [p.shape for p in op.params]
        before, earlier = self._diagonal, self.factors
        if before is not None and len(before) == op.vector.size:
            before = before.to(device=op.device, dtype=op.dtype)
            for f in earlier:
                f.a, f.g = f.a.to(device=op.device, dtype=op.dtype), f.g.to(device=op.device, dtype=op.dtype)
            if step % self.every:
                self._diagonal, self.runs = before, 0
                return
        else:
            before = None
        self.runs = 1
        self.factors = self._find(op, step)
        layered = {i for f in self.factors for i in (f.weight, f.bias)}
        self._diagonal = torch.zeros(op.vector.size, dtype=op.dtype, device=op.device)
        if len(layered - {-1}) < len(self._sizes):
            for i in range(self.probes):
                pulled = op.pull(drawn(op, step, self.batch_dim, self.samples + i))
                self._diagonal.addcmul_(pulled, pulled, value=1 / self.probes)
        if op.processes is not None:
            for t in (self._diagonal, *(t for f in self.factors for t in (f.a, f.g))):
                op.processes.mean_(t)
        if self.average:
            self._mix(before, earlier)

    def _mix(self, diagonal: Tensor | None, factors: list[Factors]) -> None:
        """Add earlier factors to the running average, unless they belong to another network."""
        if diagonal is None or [(f.weight, f.bias) for f in factors] != [(f.weight, f.bias) for f in self.factors]:
            self._refreshes = 1
            return
        self._refreshes += 1
        share = min(1 - 1 / self._refreshes, self.average)
        ready(self._diagonal, "refresh()", "averaging").lerp_(diagonal, share)
        for new, old in zip(self.factors, factors, strict=True):
            new.a.lerp_(old.a, share)
            new.g.lerp_(old.g, share)

    def _find(self, op: GaussNewton, step: int) -> list[Factors]:
        samples = [drawn(op, step, self.batch_dim, i) for i in range(self.samples)]
        found: dict[tuple[int, int], Factors] = {}
        rows: dict[tuple[int, int], int] = {}

        def use(indices: Sequence[int], heads: list[Tensor], layers: list[Layer]) -> None:
            pairs = {id(y): (y.weight, -1 if y.bias is None else y.bias) for y in layers if y.weight is not None}
            layers = [y for y in layers if y.weight is not None]
            for y in layers:
                found.setdefault(pairs[id(y)], _empty(op, pairs[id(y)], y.turned))
            for n, sample in enumerate(samples):
                used, _ = Watched(heads, layers, []).backward([sample[i] for i in indices])
                for layer in used:
                    pair = pairs[id(layer)]
                    if layer.rows_in_all:
                        _add(found[pair], layer, op.dtype, n == 0, self.samples)
                    rows[pair] = rows.get(pair, 0) + (layer.rows_in_all if n == 0 else 0)

        inside = visit(op, self.batch_dim, use)
        found = {pair: f for pair, f in found.items() if enough(rows.get(pair, 0), op, self.batch_dim)}
        # A parameter in two blocks is left to the diagonal.
        uses = [i for pair in found for i in pair if i >= 0]
        found = {pair: f for pair, f in found.items() if all(uses.count(i) == 1 for i in pair if i >= 0)}
        if not found and not self._told:
            self._told = True
            where = (
                INSIDE
                if inside
                else "there are factors for nn.Linear, nn.Conv1d and nn.Conv2d, each with weights of its own"
            )
            warn(
                "K-FAC found no linear or convolution layer that the outputs depend on, and is a diagonal "
                f"preconditioner: {where}; for other networks take preconditioner='nystrom' or None"
            )
        for pair, f in found.items():
            f.a /= max(1, rows.get(pair, 0))
        return list(found.values())

    def damp(self, damping: float, decay: float | Tensor) -> None:
        """Invert the damped factors."""
        diagonal = ready(self._diagonal, "refresh()", "damp()")
        tiny = torch.finfo(diagonal.dtype).tiny
        self._inverse = 1 / (diagonal + damping + decay).clamp_min(tiny)
        pieces = torch.split(decay, self._sizes) if isinstance(decay, Tensor) else None
        self._inverses = []
        for f in self.factors:
            c = decay if pieces is None else float(pieces[f.weight].mean())
            assert isinstance(c, float | int)
            with exactly(f.a):
                self._inverses.append(_damped_inverses(f, damping + c))

    def apply(self, r: Tensor) -> Tensor:
        """Return ``G^-1 R A^-1`` for every layer's part R of r."""
        return self.apply_into(r, torch.empty_like(r))

    def apply_into(self, r: Tensor, out: Tensor) -> Tensor:
        """Return ``M^-1 r``, in ``out``."""
        torch.mul(r, ready(self._inverse, "damp()", "applying"), out=out)
        given, found = torch.split(r, self._sizes), torch.split(out, self._sizes)
        with exactly(r):
            for f, (a, g) in zip(self.factors, self._inverses, strict=True):
                block = f.matrix(given[f.weight])
                if f.bias < 0:
                    f.matrix(found[f.weight]).copy_(g @ block @ a)
                    continue
                solved = g @ torch.cat([block, given[f.bias].unsqueeze(1)], 1) @ a
                f.matrix(found[f.weight]).copy_(solved[:, :-1])
                found[f.bias].copy_(solved[:, -1])
        return out

    def state_dict(self) -> dict[str, Any]:
        """Return the factors, if the next steps continue with them."""
        if (self.every == 1 and not self.average) or self._diagonal is None:
            return {}
        factors = [
            {"weight": f.weight, "bias": f.bias, "a": f.a.clone(), "g": f.g.clone(), "turned": f.turned}
            for f in self.factors
        ]
        return {"diagonal": self._diagonal.clone(), "factors": factors, "refreshes": self._refreshes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self._diagonal = state["diagonal"].clone() if "diagonal" in state else None
        self._refreshes = int(state.get("refreshes", 1 if "diagonal" in state else 0))
        self.factors = [
            Factors(int(f["weight"]), int(f["bias"]), f["a"].clone(), f["g"].clone(), bool(f.get("turned", False)))
            for f in state.get("factors", [])
        ]


def _empty(op: GaussNewton, pair: tuple[int, int], turned: bool) -> Factors:
    weight = op.params[pair[0]]
    o, k = (weight.shape[1], len(weight)) if turned else (len(weight), weight[0].numel())
    k += pair[1] >= 0
    like = torch.empty((), dtype=op.dtype, device=op.device)
    return Factors(*pair, like.new_zeros(k, k), like.new_zeros(o, o), turned)


def drawn(op: GaussNewton, step: int, batch_dim: int, number: int = 0) -> list[Tensor]:
    """Random w for every output with ``E[w w'] = H_L``; the data's own gradients, where no distribution is known.

    ``number``: of a step's draws.
    """
    found = [torch.zeros_like(t) for t in op.cotangents]
    forms = [distributions(part.space) for part in op.parts]
    outputs = [part.space.outputs for part in op.parts]
    place = (0, 1) if op.processes is None else (op.processes.rank, op.processes.size)
    start = 0
    for part, sampled in zip(op.parts, draw(forms, outputs, batch_dim, step, number, *place), strict=True):
        if sampled is None:
            for i in range(start, start + part.count):
                t = op.cotangents[i]
                found[i] = t * t.shape[case_dim(t, batch_dim)] ** 0.5 if t.dim() else t
        else:
            for i, g in sampled:
                # The criteria's curvature is that of the loss as the closure has it, scaled by 1 / unit.
                found[start + i] += g * op.unit**0.5
        start += part.count
    return found


def enough(rows: int, op: GaussNewton, batch_dim: int) -> bool:
    """Whether a layer has rows to tell the covariance of its gradients from one draw: a weight that is computed from a
    single row (in a network that makes the weights of another one) has not, however many cases there are.
    """
    return rows >= min(2, max((n for _, n in number_of_cases(op, batch_dim)), default=1))


def distributions(space: Matching | Joint) -> list[tuple[int, OutputCurvature]] | None:
    """Return (output, curvature that can be sampled) for every criterion; None if one cannot.

    A criterion without a closed form may be drawn from if its Hessian is diagonal, as that of a sum over elements is.
    """
    if isinstance(space, Matching) and all(b.closed is not None for b in space.blocks):
        return [(b.where[0], b.closed) for b in space.blocks if b.closed is not None]
    none: list[Tensor] = [torch.zeros_like(p) for p in space.params]
    ones = [torch.ones_like(z) for z in space.outputs]
    draws = torch.Generator(device=ones[0].device).manual_seed(0)
    signs = [torch.randint(0, 2, z.shape, generator=draws, device=z.device).to(z) * 2 - 1 for z in ones]
    forms: list[tuple[int, OutputCurvature]] = []
    products = [space.product(u, none)[0] for u in (ones, signs)]
    for i, (diagonal, product, sign) in enumerate(zip(*products, signs, strict=True)):
        if diagonal is None or product is None:
            continue
        size = diagonal.abs().max()
        eps = 16 * torch.finfo(diagonal.dtype).eps
        if bool((diagonal < -eps * size).any()) or bool(((product - sign * diagonal).abs() > eps * size).any()):
            return None
        forms.append((i, Diagonal(diagonal.detach().clamp_min(0), diagonal.shape)))
    return forms


def _add(f: Factors, layer: Layer, dtype: torch.dtype, first: bool, samples: int) -> None:
    """Add one call's part of G, and (with the first draw) of A times the number of cases."""
    with exactly(f.a):
        _add_rows(f, layer, dtype, first, samples)


def exactly(like: Tensor) -> torch.autocast:
    """Keep the precision of products inside the block, whatever surrounds the step."""
    return torch.autocast(like.device.type, enabled=False)


def _add_rows(f: Factors, layer: Layer, dtype: torch.dtype, first: bool, samples: int) -> None:
    for _, x, g in layer.rows(layer.block(), dtype):
        x, g = x.flatten(0, 1), g.flatten(0, 1)
        f.g.addmm_(g.t(), g, alpha=1 / samples)
        if first:
            x = torch.cat([x, x.new_ones(len(x), 1)], 1) if f.bias >= 0 else x
            f.a.addmm_(x.t(), x)


def _damped_inverses(f: Factors, damping: float) -> tuple[Tensor, Tensor]:
    """``(A + pi gamma I)^-1`` and ``(G + gamma / pi I)^-1``, in double precision inside."""
    a, g = f.a.double(), f.g.double()
    mean_a, mean_g = float(a.diagonal().mean()), float(g.diagonal().mean())
    # Where lambda is lost in rounding errors of the factors, these decide how small an eigenvalue may be.
    eps = torch.finfo(f.a.dtype).eps
    gamma = max(damping, eps**2 * mean_a * mean_g, torch.finfo(f.a.dtype).tiny) ** 0.5
    pi = (mean_a / mean_g) ** 0.5 if mean_a > 0 and mean_g > 0 else 1.0
    a.diagonal().add_(max(pi * gamma, eps * mean_a))
    g.diagonal().add_(max(gamma / pi, eps * mean_g))
    ia, ig = (((m + m.t()) / 2).to(f.a.dtype) for m in map(_inverse, (a, g)))
    return ia, ig


def _inverse(m: Tensor) -> Tensor:
    """Invert a positive definite matrix; return the identity for one that has overflowed."""
    factor, failed = torch.linalg.cholesky_ex(m)
    if int(failed) or not bool(factor.isfinite().all()):
        return torch.eye(len(m), dtype=m.dtype, device=m.device)
    return torch.cholesky_inverse(factor)
