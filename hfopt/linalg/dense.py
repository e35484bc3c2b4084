"""Solutions for every damping from the whole matrix: formed by batched products, diagonalised once.

With ``B = W^(1/2) Q diag(t) Q' W^(1/2)``,

    p(lambda) = (|B| + lambda W)^-1 b = V (|t| + lambda)^-1 V'b,     V = W^(-1/2) Q,

which costs nothing once t and Q are there. For P parameters these take about ``10 P^3`` multiplications in double
precision and P products, all in a few batched passes: less than a solve by conjugate gradients where P is a few
hundred, and exact.

Where a curvature t is negative, its absolute value stands for it, as in :mod:`hfopt.linalg.krylov`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class DenseSystem:
    """``p(lambda)`` for all ``lambda >= 0``.

    Args:
        matrix: ``B + damping W`` (P, P), symmetric up to rounding.
        b: right-hand side (P,).
        damping: the lambda in ``matrix``.
        metric: the diagonal W (P,); None: the identity.
        project: applied to every solution, for systems whose b lies in a subspace: without it, rounding would lead out.

    Attributes:
        values: t, ascending, in double precision, of the parameters that the system couples.
        finite: whether all entries of the matrix are finite; where they are not, nothing here means anything.
    """

    def __init__(
        self,
        matrix: Tensor,
        b: Tensor,
        damping: float = 0.0,
        metric: Tensor | None = None,
        project: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> None:
        self._project = project
        a = matrix.double().cpu()
        self.finite = bool(torch.isfinite(a).all())
        if not self.finite:
            a = torch.eye(len(a), dtype=a.dtype)
        # What neither b nor the matrix couples to anything stays at zero, which a basis of a null space would mix up.
        coupled = (a - torch.diag(a.diagonal())).any(1) | (b != 0).cpu()
        self._coupled, self._size = coupled.nonzero().squeeze(1), len(a)
        a = a[self._coupled][:, self._coupled]
        a = (a + a.t()) / 2
        weights = None if metric is None else metric.double().cpu().rsqrt()[self._coupled]
        if weights is not None:
            a = a * weights * weights.unsqueeze(1)
        largest = float(a.abs().max()) if a.numel() else 0.0
        # LAPACK's own scaling does not reach matrices at the ends of the range.
        unit = largest if largest > 0.0 else 1.0
        values, basis = torch.linalg.eigh(a / unit)
        self.values: Tensor = values * unit - damping
        self._basis = basis if weights is None else basis * weights.unsqueeze(1)
        self._like = b
        self._b = self._basis.t() @ b.double().cpu()[self._coupled]
        # Without damping, curvatures that are products' rounding errors would be divided by.
        self._zero = 8 * torch.finfo(b.dtype).eps * float(self.values.abs().max()) if a.numel() else 0.0

    @property
    def least(self) -> float:
        """The smallest ``|t|``."""
        return float(self.values.abs().min()) if len(self.values) else 0.0

    def _coordinates(self, damping: float) -> Tensor:
        curvature = self.values.abs() + damping
        y = self._b / curvature
        return y if damping > 0 else torch.where(curvature > self._zero, y, 0.0)

    def solution(self, damping: float) -> Tensor:
        """``p(lambda)`` (P,); for ``lambda = 0`` the shortest one, as the pseudo-inverse gives it."""
        p = torch.zeros(self._size, dtype=torch.float64)
        p[self._coupled] = self._basis @ self._coordinates(damping)
        return self._project(p.to(self._like))

    def model(self, damping: float) -> tuple[float, float]:
        """``(b'p, p'Bp)`` of ``p(lambda)``, without its damping."""
        y = self._coordinates(damping)
        return float(self._b @ y), float(self.values @ y.square())
