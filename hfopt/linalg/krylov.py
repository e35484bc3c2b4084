"""Solutions for every damping from the directions of one solve.

Conjugate gradients on ``(B + lambda W) x = b`` produce a space spanned by columns S, and the products with it. In this
space, the system for any other lambda has only some tens of unknowns,

    (S'BS + lambda S'WS) y = S'b,      p(lambda) = S y,

and with ``V = S C`` such that ``V'WV = I`` and ``V'BV = diag(t)``, its solution is explicit:

    p(lambda) = V (t + lambda)^-1 V'b.

From a zero start and without a preconditioner (``W = I``), the space is the Krylov space of B and b for every lambda,
and ``p(lambda)`` equals the iterate after the same number of iterations with that lambda.

Sources: Lanczos, J. Res. Nat. Bur. Standards 1952, section 2, for the projection; Jegerlehner, arXiv:hep-lat/9612014,
for shifted systems in one space. If a curvature t is negative, ``p`` uses its absolute value, as in
Dauphin et al., arXiv:1406.2572, so that every p is a descent direction.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Directions whose part that the others do not span is less than this, squared, are rounding errors.
_INDEPENDENT = {torch.float32: 1e-6, torch.float64: 1e-12}
_EXACT, _BLOCK = 1 << 16, 1 << 13


def gram(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a b'`` (m, n) of rows a (m, P) and b (n, P).

    Summed in float64 a block of columns at a time; within the blocks of long vectors, in the vectors' own precision, as
    :func:`hfopt.linalg.vector.dot` does.
    """
    total = torch.zeros(len(a), len(b), dtype=torch.float64, device=a.device)
    short = a.shape[1] <= _EXACT
    for x, y in zip(torch.split(a, _BLOCK, 1), torch.split(b, _BLOCK, 1), strict=True):
        total += x.double() @ y.double().t() if short else (x @ y.t()).double()
    return total.cpu()


class DampingPath:
    """``p(lambda)`` for all ``lambda > 0``, by Rayleigh and Ritz.

    Args:
        s: rows S' (m, P).
        a: rows of the products ``(B + lambda W) s`` (m, P).
        b: right-hand side (P,).
        damping: the lambda in ``a``.
        metric: the diagonal W (P,); None: the identity.

    Attributes:
        values: t, ascending (k,), k <= m.
        columns: C (m, k), so that ``V = S C``.
    """

    def __init__(self, s: Tensor, a: Tensor, b: Tensor, damping: float, metric: Tensor | None = None) -> None:
        size = torch.linalg.vector_norm(s, dim=1)
        kept = (size > 0) & torch.isfinite(size)
        if not bool(kept.all()):
            s, a, size = s[kept], a[kept], size[kept]
        self.s = s
        scale = 1 / size.double().cpu()
        weighed = s if metric is None else s * metric
        w = gram(weighed, s) * scale * scale.unsqueeze(1)
        c = gram(a, s) * scale * scale.unsqueeze(1)
        w, c = (w + w.t()) / 2, (c + c.t()) / 2
        spread, basis = torch.linalg.eigh(w)
        clear = spread > _INDEPENDENT[s.dtype] * spread.max() if len(spread) else spread > 0
        basis = basis[:, clear] * spread[clear].rsqrt()
        values, turn = torch.linalg.eigh(basis.t() @ c @ basis)
        self.values: Tensor = values - damping
        self.columns: Tensor = scale.unsqueeze(1) * (basis @ turn)
        self._b: Tensor = self.columns.t() @ gram(s, b.unsqueeze(0)).squeeze(1)

    @property
    def dimension(self) -> int:
        """k, the dimension of the space."""
        return len(self.values)

    @property
    def least(self) -> float:
        """The smallest ``|t|``; 0 in an empty space."""
        return float(self.values.abs().min()) if len(self.values) else 0.0

    def _coordinates(self, damping: float) -> Tensor:
        return self._b / (self.values.abs() + damping)

    def solution(self, damping: float) -> Tensor:
        """Return ``p(lambda)`` (P,)."""
        y = self.columns @ self._coordinates(damping)
        return torch.mv(self.s.t(), y.to(self.s))

    def model(self, damping: float) -> tuple[float, float]:
        """Return ``(b'p, p'Bp)`` of ``p(lambda)``, without its damping."""
        y = self._coordinates(damping)
        return float(self._b @ y), float(self.values @ y.square())
