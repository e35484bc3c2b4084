"""A quasi-Newton preconditioner from products of the previous solve."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hfopt.linalg.operators import Operator
from hfopt.preconditioners.base import Preconditioner, System, ready

Pair = tuple[Tensor, Tensor]


class Watched:
    """A system that keeps an even sample of the pairs ``(v, A v)``, at most ``most`` of them.

    Whenever there is no room, every second pair goes, and from then on twice as many products are passed over between
    two that are kept.
    """

    def __init__(self, system: System, most: int) -> None:
        self.system, self.most = system, most
        self.pairs: list[Pair] = []
        self._made, self._stride = 0, 1

    def unrecordable(self) -> str | None:
        """Return that products which are replayed would pass by unseen."""
        return "the preconditioner learns from the products, one by one"

    def multiply(self, v: Tensor, out: Tensor | None = None) -> Tensor:
        """Return ``A v`` and record it."""
        out = self.system.multiply(v, out)
        if self._made % self._stride == 0:
            if len(self.pairs) == self.most:
                self.pairs = self.pairs[::2]
                self._stride *= 2
            if self._made % self._stride == 0:
                self.pairs.append((v.clone(), out.clone()))
        self._made += 1
        return out


class LBFGS(Preconditioner):
    """The inverse BFGS matrix of pairs ``(s, y = A s)``, s a direction of the last run of conjugate gradients.

    At most ``pairs`` of them, evenly spaced over the run, are kept; no product is made for it. The lambda and the
    weight decay that stood in A are taken out and those of the new system put in. M is the identity until there are
    pairs. In the compact form with ``S = [s_1 ... s_m]``, ``Y``, R the upper triangle of ``S'Y``, D its diagonal:

        M^-1 = gamma I + [S, gamma Y] [[R^-T (D + gamma Y'Y) R^-1, -R^-T], [-R^-1, 0]] [S, gamma Y]',

    ``gamma = s_m'y_m / y_m'y_m``. On a CUDA device, iterations are not recorded into a graph with this preconditioner.

    Args:
        pairs: m.

    Source: Morales and Nocedal, "Automatic preconditioning by limited memory quasi-Newton updating", SIAM J. Optim.
    2000; Byrd, Nocedal and Schnabel, Math. Programming 1994, theorem 2.2.
    """

    def __init__(self, pairs: int = 16) -> None:
        if pairs < 2:
            raise ValueError(f"pairs is {pairs}, but must be at least 2")
        self.pairs = pairs
        self._s: Tensor | None = None  # (P, m)
        self._y: Tensor | None = None  # (P, m), without damping
        self._seen: Watched | None = None
        self._system: tuple[float, float | Tensor] = (0.0, 0.0)
        self._next: tuple[float, float | Tensor] = (0.0, 0.0)
        self._gamma: Tensor | None = None
        self._sides: Tensor | None = None
        self._middle: Tensor | None = None

    def refresh(self, op: Operator, step: int) -> None:
        """Use the products of the last run, if the number of parameters is the same."""
        self._take()
        if self._s is not None and self._y is not None:
            fits = len(self._s) == op.shape[0]
            self._s, self._y = (t.to(device=op.device, dtype=op.dtype) if fits else None for t in (self._s, self._y))

    def _take(self) -> None:
        """Extract the pairs of the last run, without its damping."""
        seen, self._seen = self._seen, None
        if seen is None or not seen.pairs:
            return
        damping, decay = self._system
        s = torch.stack([v for v, _ in seen.pairs], 1)
        y = torch.stack([av for _, av in seen.pairs], 1)
        y = y - s * (damping + (decay.unsqueeze(1) if isinstance(decay, Tensor) else decay))
        size = torch.linalg.vector_norm(s, dim=0)
        size = torch.where(size > 0, size, 1.0)
        self._s, self._y = s / size, y / size

    def damp(self, damping: float, decay: float | Tensor) -> None:
        """Build M for the system's lambda and weight decay."""
        self._take()
        self._next = damping, decay.clone() if isinstance(decay, Tensor) else decay
        self._gamma = self._sides = self._middle = None
        if self._s is None or self._y is None:
            return
        s = self._s
        y = self._y + s * (damping + (decay.unsqueeze(1) if isinstance(decay, Tensor) else decay))
        s, y = _convex(s, y)
        if s.shape[1] == 0:
            return
        sy, yy = (s.t() @ y).double(), (y.t() @ y).double()
        gamma = sy[-1, -1] / yy[-1, -1]
        inverse = torch.linalg.inv(sy.triu())
        corner = inverse.t() @ (sy.diagonal().diag() + gamma * yy) @ inverse
        middle = torch.cat([torch.cat([corner, -inverse.t()], 1), torch.cat([-inverse, torch.zeros_like(sy)], 1)])
        self._gamma, self._middle = gamma.to(s.dtype), middle.to(s.dtype)
        self._sides = torch.cat([s, self._gamma * y], 1)

    def apply(self, r: Tensor) -> Tensor:
        """Return ``M^-1 r``, two products with a matrix (P, 2m)."""
        return self.apply_into(r, torch.empty_like(r))

    def apply_into(self, r: Tensor, out: Tensor) -> Tensor:
        """Return ``M^-1 r``, in ``out``."""
        if self._sides is None or self._middle is None:
            return out.copy_(r)
        gamma = ready(self._gamma, "damp()", "applying")
        return torch.mul(r, gamma, out=out).addmv_(self._sides, self._middle @ (self._sides.t() @ r))

    def watch(self, system: System) -> System:
        """Return ``system`` with its products recorded."""
        self._seen, self._system = Watched(system, self.pairs), self._next
        return self._seen

    def state_dict(self) -> dict[str, Any]:
        """Return the pairs of the last run."""
        self._take()
        return {} if self._s is None or self._y is None else {"s": self._s.clone(), "y": self._y.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self._seen = None
        self._s, self._y = (state[name].clone() if name in state else None for name in ("s", "y"))

    def __getstate__(self) -> dict[str, Any]:
        """Return the pairs without the system that produced them, for copy and pickle."""
        self._take()
        return super().__getstate__()


def _convex(s: Tensor, y: Tensor) -> Pair:
    """Return the finite pairs along which the curvature is positive and exceeds rounding errors."""
    along = (s * y).sum(0)
    size = torch.linalg.vector_norm(s, dim=0) * torch.linalg.vector_norm(y, dim=0)
    kept = (along > 1e-6 * size) & torch.isfinite(size)
    return s[:, kept], y[:, kept]
