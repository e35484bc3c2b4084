"""The Fisher information matrix of a model's predictive distribution, or of the data's own targets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from hfopt.closure.trace import Closure
from hfopt.curvature.draws import Forms, draw
from hfopt.curvature.gauss_newton import GaussNewton
from hfopt.curvature.output_space import Joint, Matching
from hfopt.errors import ClosureError

Maybe = list["Tensor | None"]


def check_cases(outputs: Iterable[Tensor], batch_dim: int) -> None:
    """Check that every output has a dimension ``batch_dim``; an output without dimensions is one case.

    Raises:
        ValueError: one has not.
    """
    for z in outputs:
        if z.dim() and not -z.dim() <= batch_dim < z.dim():
            raise ValueError(
                f"batch_dim is {batch_dim}, but an output has shape {tuple(z.shape)}: give the dimension along which "
                "cases stand"
            )


class Fisher(GaussNewton):
    """``F = sum_n s_n s_n'`` over cases and draws, ``s_n = J_n' g_n``: the loss's Fisher matrix by sampled or true
    targets.

    With ``kind="sampled"`` the output gradients ``g`` are drawn from the model's own predictive distribution
    (``E[g g'] = H_L``), so that ``E[F] = G``; drawn once, when the operator is built. With ``kind="empirical"`` they
    are the gradients at the data's targets: for a mean over N cases ``F = (1/N) sum_n grad_n grad_n'``.

    Args:
        kind: ``"sampled"`` or ``"empirical"``.
        samples: draws per case.
        batch_dim: the outputs' dimension along which cases stand; gradients are summed over all others.
        generator: for the draws, which belong to the places of cases along ``batch_dim`` (see
            :mod:`hfopt.curvature.draws`); default: torch's global one.

    The rest as for :class:`GaussNewton`. Source: Martens, JMLR 2020, sections 5 and 11.
    """

    def __init__(
        self,
        closure: Closure,
        params: Iterable[Tensor],
        *,
        kind: str = "sampled",
        samples: int = 1,
        batch_dim: int = 0,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> None:
        if kind not in ("sampled", "empirical"):
            raise ValueError(f"kind is {kind!r}, but must be 'sampled' or 'empirical'")
        if samples < 1:
            raise ValueError(f"samples is {samples}, but must be at least 1")
        super().__init__(closure, params, **options)
        check_cases((z for part in self.parts for z in part.space.outputs), batch_dim)
        self.batch_dim = batch_dim
        # (number of the output, g) for every draw of every part
        self._draws: list[list[tuple[int, Tensor]]] = (
            [self._own(part.space) for part in self.parts] if kind == "empirical" else self._drawn(samples, generator)
        )

    def _check_curvature(self) -> None:
        """Of the loss, the gradient is enough."""

    def _own(self, space: Matching | Joint) -> list[tuple[int, Tensor]]:
        return [
            (i, t * (z.shape[self.batch_dim] * self.unit if z.dim() else self.unit) ** 0.5)
            for i, (z, t) in enumerate(zip(space.outputs, space.cotangents, strict=True))
        ]

    def _forms(self, space: Matching | Joint) -> Forms:
        if not isinstance(space, Matching) or any(b.closed is None for b in space.blocks):
            raise ClosureError(
                "a sampled Fisher matrix needs a criterion with a known distribution; use one of "
                "torch.nn.functional, kind='empirical', or the Gauss-Newton matrix"
            )
        return [(b.where[0], b.closed) for b in space.blocks if b.closed is not None]

    def _drawn(self, samples: int, generator: torch.Generator | None) -> list[list[tuple[int, Tensor]]]:
        forms = [self._forms(part.space) for part in self.parts]
        outputs = [part.space.outputs for part in self.parts]
        place = (0, 1) if self.processes is None else (self.processes.rank, self.processes.size)
        found: list[list[tuple[int, Tensor]]] = [[] for _ in self.parts]
        device = torch.device("cpu") if generator is None else generator.device
        seed = int(torch.randint(1 << 32, (), generator=generator, device=device))
        for k in range(samples):
            for own, drawn in zip(found, draw(forms, outputs, self.batch_dim, seed, k, *place), strict=True):
                own += [(i, samples**-0.5 * g) for i, g in drawn or ()]
        # With a loss that is not finite itself there is nothing to tell of the weights.
        if bool(self.loss.isfinite()) and any(not bool(g.isfinite().all()) for own in found for _, g in own):
            raise ClosureError(
                "a sampled Fisher matrix needs criteria with weights that are finite and not negative, but one of "
                "those found has not; use the Gauss-Newton matrix"
            )
        return found

    def output_product(self, number: int, u: Maybe, v: Sequence[Tensor], batched: bool = False) -> tuple[Maybe, Maybe]:
        _, direct = self.parts[number].space.product([None] * len(u), v, batched)
        w: Maybe = [None] * len(u)
        for i, g in self._draws[number]:
            if (t := u[i]) is not None:
                part, old = (torch.vmap(self._along, (None, 0)) if batched else self._along)(g, t), w[i]
                w[i] = part if old is None else old + part
        return w, direct

    def _along(self, g: Tensor, t: Tensor) -> Tensor:
        """``g g't`` for every case."""
        others = [d for d in range(t.dim()) if d != self.batch_dim % t.dim()]
        return g * ((g * t).sum(others, keepdim=True) if others else g * t)
