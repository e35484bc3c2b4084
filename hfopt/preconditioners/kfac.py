"""Kronecker-factored curvature: a block for each linear or convolution layer, inverted through its two factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hfopt.curvature import GaussNewton
from hfopt.notice import logger
from hfopt.operators import Operator
from hfopt.output_space import Matching
from hfopt.preconditioners.base import Preconditioner, generator, ready, with_outputs
from hfopt.preconditioners.layers import Layer, Watched, watched


@dataclass
class Factors:
    """One block ``A (x) G`` of a weight (o, k) and, as a last column, its bias.

    Attributes:
        weight, bias: which parameters; ``bias`` is -1 where there is none.
        a: (k, k), or (k + 1, k + 1) with a bias.
        g: (o, o).
    """

    weight: int
    bias: int
    a: Tensor
    g: Tensor


class KFAC(Preconditioner):
    """One Kronecker product ``A (x) G`` per linear or convolution layer; a diagonal for all other parameters.

    With the rows x of a layer's inputs over N cases and T positions (1 for each column of a bias), and g the gradients
    of its outputs for targets drawn from the model (``E[g g']`` is the curvature then),

        A = (1/N) sum x x',     G = (1/T) sum g g',

    whose product is the layer's block of the Gauss-Newton matrix if x and g are independent, and different positions
    uncorrelated. Damping is factored: ``(A + pi gamma I) (x) (G + gamma / pi I)`` with ``gamma^2 = lambda + c`` and
    ``pi^2 = (tr A / dim A) / (tr G / dim G)``. The other parameters have ``diag + lambda + c``, the diagonal from
    squared gradients of drawn targets. Where the loss is no criterion with a known distribution, the data's own targets
    stand in for drawn ones.

    Args:
        samples: draws of targets.
        probes: adjoint passes for the diagonal of the other parameters, if there are any.
        every: steps between refreshes; in between, the last factors stand.
        batch_dim: the outputs' dimension along which cases stand.

    Sources: Martens and Grosse, ICML 2015, sections 3, 5 and 6.3; Grosse and Martens, ICML 2016, section 3
    (convolutions).
    """

    def __init__(self, samples: int = 1, probes: int = 8, every: int = 1, batch_dim: int = 0) -> None:
        if min(samples, probes, every) < 1:
            raise ValueError(f"samples, probes and every must be at least 1, but are {samples}, {probes} and {every}")
        self.samples, self.probes, self.every, self.batch_dim = samples, probes, every, batch_dim
        self.factors: list[Factors] = []
        self._diagonal: Tensor | None = None
        self._sizes: list[int] = []
        self._shapes: list[torch.Size] = []
        self._inverse: Tensor | None = None
        self._inverses: list[tuple[Tensor, Tensor]] = []
        self._told = False

    def refresh(self, op: Operator, step: int) -> None:
        """Find the factors at the operator's point, where that is due.

        Raises:
            TypeError: for an operator without outputs (the Hessian of a loss).
            ValueError: an output has no dimension ``batch_dim``.
        """
        op = with_outputs(op, "K-FAC", self.batch_dim)
        self._sizes, self._shapes = op.vector.sizes, [p.shape for p in op.params]
        old = self._diagonal
        if old is not None and len(old) == op.vector.size and step % self.every:
            self._diagonal = old.to(device=op.device, dtype=op.dtype)
            for f in self.factors:
                f.a, f.g = f.a.to(device=op.device, dtype=op.dtype), f.g.to(device=op.device, dtype=op.dtype)
            return
        draws = generator(op, step)
        self.factors = self._find(op, draws)
        layered = {i for f in self.factors for i in (f.weight, f.bias)}
        self._diagonal = torch.zeros(op.vector.size, dtype=op.dtype, device=op.device)
        if len(layered - {-1}) < len(self._sizes):
            for _ in range(self.probes):
                pulled = op.pull(drawn(op, draws, self.batch_dim))
                self._diagonal.addcmul_(pulled, pulled, value=1 / self.probes)
        if op.processes is not None:
            for t in (self._diagonal, *(t for f in self.factors for t in (f.a, f.g))):
                op.processes.mean_(t)

    def _find(self, op: GaussNewton, draws: torch.Generator) -> list[Factors]:
        seen = watched(op, self.batch_dim)
        groups: dict[tuple[int, int], list[Layer]] = {}
        for layer in seen.layers if seen is not None else ():
            if layer.weight is not None:
                groups.setdefault((layer.weight, -1 if layer.bias is None else layer.bias), []).append(layer)
        uses = [i for pair in groups for i in pair if i >= 0]
        groups = {pair: used for pair, used in groups.items() if all(uses.count(i) == 1 for i in pair if i >= 0)}
        if seen is None or not groups:
            if not self._told:
                self._told = True
                logger.warning(
                    "K-FAC found no linear or convolution layer whose cases stand along dimension %d of the one "
                    "output, and is a diagonal preconditioner",
                    self.batch_dim,
                )
            return []
        found = [_empty(op, pair) for pair in groups]
        for draw in range(self.samples):
            layers = [layer for layers in groups.values() for layer in layers]
            used, _ = Watched(seen.heads, layers, []).backward(drawn(op, draws, self.batch_dim))
            reached = {id(layer) for layer in used}
            for f, calls in zip(found, groups.values(), strict=True):
                for layer in calls:
                    if id(layer) in reached:
                        _add(f, layer, op.dtype, draw == 0, self.samples)
        return found

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
            self._inverses.append(_damped_inverses(f, damping + c))

    def apply(self, r: Tensor) -> Tensor:
        """``G^-1 R A^-1`` for every layer's part R of r."""
        return self.apply_into(r, torch.empty_like(r))

    def apply_into(self, r: Tensor, out: Tensor) -> Tensor:
        """``M^-1 r``, in ``out``."""
        torch.mul(r, ready(self._inverse, "damp()", "applying"), out=out)
        given, found = torch.split(r, self._sizes), torch.split(out, self._sizes)
        for f, (a, g) in zip(self.factors, self._inverses, strict=True):
            block = given[f.weight].view(len(g), -1)
            if f.bias < 0:
                torch.mm(g @ block, a, out=found[f.weight].view(len(g), -1))
                continue
            solved = g @ torch.cat([block, given[f.bias].unsqueeze(1)], 1) @ a
            found[f.weight].view(len(g), -1).copy_(solved[:, :-1])
            found[f.bias].copy_(solved[:, -1])
        return out

    def state_dict(self) -> dict[str, Any]:
        """The factors, where the next steps go on with them."""
        if self.every == 1 or self._diagonal is None:
            return {}
        factors = [{"weight": f.weight, "bias": f.bias, "a": f.a.clone(), "g": f.g.clone()} for f in self.factors]
        return {"diagonal": self._diagonal.clone(), "factors": factors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self._diagonal = state["diagonal"].clone() if "diagonal" in state else None
        self.factors = [
            Factors(int(f["weight"]), int(f["bias"]), f["a"].clone(), f["g"].clone()) for f in state.get("factors", [])
        ]


def _empty(op: GaussNewton, pair: tuple[int, int]) -> Factors:
    weight = op.params[pair[0]]
    o, k = len(weight), weight[0].numel() + (pair[1] >= 0)
    like = torch.empty((), dtype=op.dtype, device=op.device)
    return Factors(*pair, like.new_zeros(k, k), like.new_zeros(o, o))


def drawn(op: GaussNewton, draws: torch.Generator, batch_dim: int) -> list[Tensor]:
    """Random w for every output with ``E[w w'] = H_L``; the data's own gradients, where no distribution is known."""
    found = [torch.zeros_like(t) for t in op.cotangents]
    start = 0
    for part in op.parts:
        space = part.space
        if not isinstance(space, Matching) or any(b.closed is None for b in space.blocks):
            for i in range(start, start + part.count):
                t = op.cotangents[i]
                found[i] = t * t.shape[batch_dim % t.dim()] ** 0.5 if t.dim() else t
        else:
            for block in space.blocks:
                assert block.closed is not None
                # The criteria's curvature is that of the loss as the closure has it, scaled by 1 / unit.
                found[start + block.where[0]] += block.closed.sample(draws) * op.unit**0.5
        start += part.count
    return found


def _add(f: Factors, layer: Layer, dtype: torch.dtype, first: bool, samples: int) -> None:
    """Add one call's part of A (with the first draw) and of G."""
    for _, x, g in layer.rows(layer.block(), dtype):
        x, g = x.flatten(0, 1), g.flatten(0, 1)
        f.g.addmm_(g.t(), g, alpha=1 / (layer.positions * samples))
        if first:
            x = torch.cat([x, x.new_ones(len(x), 1)], 1) if f.bias >= 0 else x
            f.a.addmm_(x.t(), x, alpha=1 / layer.cases)


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
    """Of a positive definite matrix; the identity for one that has overflown, which tells of no direction."""
    factor, failed = torch.linalg.cholesky_ex(m)
    if int(failed) or not bool(factor.isfinite().all()):
        return torch.eye(len(m), dtype=m.dtype, device=m.device)
    return torch.cholesky_inverse(factor)
