"""A low-rank preconditioner from one block of products with the curvature."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hfopt.linalg.operators import Operator
from hfopt.preconditioners.base import Preconditioner, generator, ready


class Nystrom(Preconditioner):
    """The randomized Nystrom approximation ``B ~ U diag(l) U'`` of rank r, inverted with the damping.

    With a random orthonormal ``Omega (P, r)`` and ``Y = B Omega``, the approximation is ``Y (Omega'Y)^+ Y'``, computed
    stably with a small shift. With ``mu = lambda + c`` and l_r the smallest of its eigenvalues,

        M = U (diag(l) + mu) U' + (l_r + mu) (I - U U'),

    which takes the r largest eigenvalues of the system together; what is left is a condition number of about
    ``(l_r + mu) / mu``. A weight decay that differs between parameters is diagonal in M, too. Of an indefinite
    operator the part that is positive is taken.

    Args:
        rank: r, the number of products a refresh makes, all at once.
        every: steps between refreshes; in between, the last approximation stands.

    Source: Frangella, Tropp and Udell, "Randomized Nystrom preconditioning", SIAM J. Matrix Anal. Appl. 2023
    (arXiv 2021), algorithms 2.1 and section 5.
    """

    def __init__(self, rank: int = 20, every: int = 1) -> None:
        if rank < 1 or every < 1:
            raise ValueError(f"rank and every must be at least 1, but are {rank} and {every}")
        self.rank, self.every = rank, every
        self._u: Tensor | None = None
        self._l: Tensor | None = None
        self._inverse: Tensor | None = None
        self._v: Tensor | None = None

    @property
    def eigenvalues(self) -> Tensor:
        """``l (r,)``, in descending order."""
        return ready(self._l, "refresh()", "eigenvalues")

    @property
    def eigenvectors(self) -> Tensor:
        """``U (P, r)``."""
        return ready(self._u, "refresh()", "eigenvectors")

    def refresh(self, op: Operator, step: int) -> None:
        """Approximate the curvature at the operator's point, if due."""
        size = op.shape[0]
        if self._u is not None and self._l is not None and len(self._u) == size and step % self.every:
            self._u, self._l = (t.to(device=op.device, dtype=op.dtype) for t in (self._u, self._l))
            return
        rank = min(self.rank, size)
        normal = torch.randn(size, rank, generator=generator(op, step), dtype=op.dtype, device=op.device)
        omega: Tensor = torch.linalg.qr(normal)[0]
        y = op @ omega
        # Where the curvature is zero by structure, such as in rows that no case uses, so is the approximation.
        omega = omega * (y != 0).any(1, keepdim=True)
        shift = torch.finfo(op.dtype).eps * float(torch.linalg.matrix_norm(y))
        y = y + shift * omega
        core = (omega.t() @ y).double()
        values, vectors = torch.linalg.eigh((core + core.t()) / 2)
        kept = values > torch.finfo(op.dtype).eps * values.abs().max()
        root = torch.where(kept, values.clamp_min(torch.finfo(torch.float64).tiny).rsqrt(), 0.0)
        b = y @ (vectors * root).to(op.dtype)
        u, s, _ = torch.linalg.svd(b, full_matrices=False)
        self._u, self._l = u.contiguous(), (s.square() - shift).clamp_min(0.0)

    def damp(self, damping: float, decay: float | Tensor) -> None:
        """Invert ``W W' + D`` with ``W = U sqrt(l - l_r)`` and ``D = lambda + c + l_r`` by Woodbury's formula."""
        u, values = ready(self._u, "refresh()", "damp()"), ready(self._l, "refresh()", "damp()")
        floor = torch.finfo(u.dtype).eps * values[0] + torch.finfo(u.dtype).tiny
        d = (values[-1] + damping + decay).clamp_min(floor).expand(len(u))
        self._inverse = 1 / d
        w = u * (values - values[-1]).sqrt()
        scaled = w * self._inverse.unsqueeze(1)
        inner = (w.t() @ scaled).double()
        inner.diagonal().add_(1.0)
        # M^-1 = D^-1 - V V' with V = D^-1 W L^-T and L L' = I + W' D^-1 W.
        lower = torch.linalg.cholesky(inner)
        self._v = torch.linalg.solve_triangular(lower, scaled.double().t(), upper=False).t().to(u.dtype).contiguous()

    def apply(self, r: Tensor) -> Tensor:
        """Return ``M^-1 r``, two products with a matrix (P, r)."""
        return self.apply_into(r, torch.empty_like(r))

    def apply_into(self, r: Tensor, out: Tensor) -> Tensor:
        """Return ``M^-1 r``, in ``out``."""
        v, inverse = ready(self._v, "damp()", "applying"), ready(self._inverse, "damp()", "applying")
        return torch.mul(r, inverse, out=out).addmv_(v, v.t() @ r, alpha=-1)

    def state_dict(self) -> dict[str, Any]:
        """Return the approximation, if the next steps continue with it."""
        if self.every == 1 or self._u is None or self._l is None:
            return {}
        return {"u": self._u.clone(), "l": self._l.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self._u, self._l = (state[name].clone() if name in state else None for name in ("u", "l"))
