"""Preconditioners of conjugate gradients: ``z = M^-1 r``, M symmetric positive definite and cheap to invert."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from hfopt.curvature import GaussNewton
from hfopt.operators import Operator


class Preconditioner(ABC):
    """Refreshed once a step, at the new point, then applied at every CG iteration."""

    @abstractmethod
    def refresh(self, op: Operator, step: int) -> None:
        """Take the new point from ``op``; ``step`` seeds whatever is drawn."""

    @abstractmethod
    def damp(self, damping: float, decay: float | Tensor) -> None:
        """Set the lambda and the weight decay of the system that is solved next."""

    @abstractmethod
    def __call__(self, r: Tensor) -> Tensor:
        """``M^-1 r``."""


class EmpiricalFisherDiagonal(Preconditioner):
    """``M = (diag(F) + lambda + c)^0.75``, F the empirical Fisher matrix (Martens 2010, section 4.7).

    ``diag(F)_i`` is the mean over cases of squared per-case gradients. It is estimated without bias from a few random
    sign vectors s: one adjoint pass of ``sum_n s_n dL/dz_n``, squared, has ``N diag(F) / N^2`` as its mean since the
    cases' cross terms cancel. Not of help on recurrent nets, says the source; the case is one index of ``batch_dim``.

    Args:
        exponent: 0.75 in the source.
        probes: number of sign vectors a step; the relative error of an entry is about ``sqrt(2 / probes)``.
        batch_dim: the outputs' dimension along which cases stand.
    """

    def __init__(self, exponent: float = 0.75, probes: int = 8, batch_dim: int = 0) -> None:
        if not 0 <= exponent <= 1 or probes < 1:
            raise ValueError(f"need 0 <= exponent <= 1 and probes >= 1, but they are {exponent} and {probes}")
        self.exponent, self.probes, self.batch_dim = exponent, probes, batch_dim
        self._diagonal: Tensor | None = None
        self._inverse: Tensor | None = None

    def refresh(self, op: Operator, step: int) -> None:
        """Estimate the diagonal at the operator's point.

        Raises:
            TypeError: for an operator without outputs (the Hessian of a loss).
        """
        if not isinstance(op, GaussNewton):
            raise TypeError(
                f"the empirical-Fisher preconditioner needs outputs, which a {type(op).__name__} operator does not "
                "have; use curvature 'gauss-newton' or no preconditioner"
            )
        generator = torch.Generator(device=op.device).manual_seed(step)
        total = torch.zeros(op.vector.size, dtype=op.dtype, device=op.device)
        for _ in range(self.probes):
            signed = [self._signed(t, generator) for t in op.cotangents]
            pulled = op.pull(signed)
            total.addcmul_(pulled, pulled, value=1 / self.probes)
        self._diagonal = total if op.processes is None else op.processes.mean_(total)

    def _signed(self, cotangent: Tensor, generator: torch.Generator) -> Tensor:
        if cotangent.dim() == 0:
            return cotangent
        dim = self.batch_dim % cotangent.dim()
        n = cotangent.shape[dim]
        shape = [n if i == dim else 1 for i in range(cotangent.dim())]
        signs = torch.randint(0, 2, shape, generator=generator, device=cotangent.device) * 2 - 1
        # dL/dz_n carries 1/N; sqrt(N) makes the square the mean over cases of squared per-case gradients.
        signed: Tensor = cotangent * (signs * n**0.5).to(cotangent.dtype)
        return signed

    def damp(self, damping: float, decay: float | Tensor) -> None:
        """``M = (diag(F) + lambda + c)^exponent``."""
        if self._diagonal is None:
            raise RuntimeError("refresh() must come before damp()")
        # A bound far below any curvature keeps M invertible where an undamped parameter has no gradient.
        m = (self._diagonal + damping + decay).clamp_min_(torch.finfo(self._diagonal.dtype).tiny)
        self._inverse = m.pow_(-self.exponent)

    def __call__(self, r: Tensor) -> Tensor:
        """``M^-1 r``."""
        if self._inverse is None:
            raise RuntimeError("damp() must come before applying")
        return r * self._inverse


def as_preconditioner(preconditioner: str | Preconditioner | None, batch_dim: int = 0) -> Preconditioner | None:
    """A preconditioner from what a user gives; ``batch_dim`` is for one given by name."""
    if preconditioner is None or isinstance(preconditioner, Preconditioner):
        return preconditioner
    if preconditioner == "none":
        return None
    if preconditioner == "empirical-fisher":
        return EmpiricalFisherDiagonal(batch_dim=batch_dim)
    raise ValueError(
        f"preconditioner is {preconditioner!r}, but must be None, 'none', 'empirical-fisher' or a Preconditioner"
    )
