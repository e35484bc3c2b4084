"""Diagonal preconditioners: the empirical Fisher matrix's diagonal, and the curvature's by Hutchinson's estimate."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from hfopt.curvature.gauss_newton import GaussNewton
from hfopt.errors import logger
from hfopt.linalg.operators import Operator
from hfopt.preconditioners.base import Preconditioner, generator, ready, with_outputs
from hfopt.preconditioners.squares import along, by_cases, by_layers, cases, random_signs

SQUARES = ("auto", "layers", "cases", "signs")


class Diagonal(Preconditioner):
    """``M = (diag + lambda + c)^exponent``.

    Args:
        exponent: between 0 (no preconditioner) and 1.
    """

    def __init__(self, exponent: float) -> None:
        if not 0 <= exponent <= 1:
            raise ValueError(f"exponent is {exponent}, but must satisfy 0 <= exponent <= 1")
        self.exponent = exponent
        self._diagonal: Tensor | None = None
        self._inverse: Tensor | None = None

    @property
    def diagonal(self) -> Tensor:
        """The diagonal (P,) from the last :meth:`refresh`."""
        return ready(self._diagonal, "refresh()", "diagonal")

    @abstractmethod
    def refresh(self, op: Operator, step: int) -> None:
        """Set the non-negative diagonal (P,)."""

    def damp(self, damping: float, decay: float | Tensor) -> None:
        """Set ``M = (diag + lambda + c)^exponent``."""
        diagonal = ready(self._diagonal, "refresh()", "damp()")
        # A bound far below any curvature keeps M invertible where an undamped parameter has no gradient.
        m = (diagonal + damping + decay).clamp_min_(torch.finfo(diagonal.dtype).tiny)
        self._inverse = m.pow_(-self.exponent)

    def apply(self, r: Tensor) -> Tensor:
        """Return ``M^-1 r``."""
        return self.apply_into(r, torch.empty_like(r))

    def apply_into(self, r: Tensor, out: Tensor) -> Tensor:
        """Return ``M^-1 r``, in ``out``."""
        return torch.mul(r, ready(self._inverse, "damp()", "applying"), out=out)


class EmpiricalFisherDiagonal(Diagonal):
    """``M = (diag(F) + lambda + c)^0.75``, F the empirical Fisher matrix.

    ``diag(F)_i`` is the mean over cases of squared per-case gradients, for a loss that is a mean over cases (for a sum
    over N cases it is N times their sum). Three ways to it:

    - ``"layers"``: exact, at the cost of about four gradients and in blocks of cases that bound its memory. Another
      run of the closure shows the rows that every weight of a linear layer, a convolution or a recurrence of hfopt (a
      replaced one of torch too) multiplies, and the gradients of the products. Weights may be computed from parameters
      (transposed, joined, normalised). Whether this tells the whole of a parameter's per-case gradients (which it
      does not under batch normalisation, for instance) is checked by one adjoint pass.
    - ``"cases"``: exact, at the cost of one adjoint pass per case, many of them in one batched pass. It works for
      every model; of use for few cases.
    - ``"signs"``: unbiased, at one adjoint pass per probe. With random signs s, the square of
      ``sum_n s_n dL_n/dtheta`` has the right mean, since the cross terms of cases cancel.

    ``"auto"`` takes the first, for the parameters that it does not tell about the second if there are at most
    ``most_cases``, else the third, and then says so in the log. Where there are several outputs, each of them counts as
    cases of its own.

    Args:
        exponent: 0.75 in the source.
        probes: number of sign vectors a step; the relative error of an entry is about ``sqrt(2 / probes)``.
        batch_dim: the outputs' dimension along which cases stand.
        squares: ``"auto"``, ``"layers"`` (an error where that is not possible), ``"cases"`` or ``"signs"``.
        most_cases: the largest number of cases for which ``"auto"`` takes them one by one.

    Attributes:
        ways: how the squares of each parameter were found in the last refresh.

    Source: Martens, ICML 2010, section 4.7. Not of help on recurrent nets, it says.
    """

    def __init__(
        self,
        exponent: float = 0.75,
        probes: int = 8,
        batch_dim: int = 0,
        squares: str = "auto",
        most_cases: int = 128,
    ) -> None:
        super().__init__(exponent)
        if probes < 1:
            raise ValueError(f"probes is {probes}, but must be at least 1")
        if squares not in SQUARES:
            raise ValueError(f"squares is {squares!r}, but must be one of {', '.join(map(repr, SQUARES))}")
        if most_cases < 0:
            raise ValueError(f"most_cases is {most_cases}, but must not be negative")
        self.probes, self.batch_dim, self.squares, self.most_cases = probes, batch_dim, squares, most_cases
        self.ways: list[str] = []
        self._told = False

    def refresh(self, op: Operator, step: int) -> None:
        """Compute the diagonal at the operator's point.

        Raises:
            TypeError: for an operator without outputs (the Hessian of a loss).
            ValueError: ``squares="layers"`` on a model that has other parameters, or outputs without ``batch_dim``.
        """
        op = with_outputs(op, "empirical-Fisher", self.batch_dim)
        draws = generator(op, step)
        exact: dict[int, Tensor] = {}
        if self.squares in ("auto", "layers"):
            exact = by_layers(op, self.batch_dim, draws)
        missing = [i for i in range(len(op.params)) if i not in exact]
        if missing and self.squares == "layers":
            raise ValueError(
                f"squares is 'layers', but parameters {missing} are not those of linear layers, convolutions or "
                "recurrences alone, each case for itself; use squares 'auto', 'cases' or 'signs'"
            )
        other = "layers"
        total = torch.zeros(op.vector.size, dtype=op.dtype, device=op.device)
        if missing:
            few = self.squares == "auto" and sum(cases(op, self.batch_dim)) <= self.most_cases
            other = "cases" if few or self.squares == "cases" else "signs"
            total = by_cases(op, self.batch_dim) if other == "cases" else self._by_signs(op, draws)
            if other == "signs" and self.squares == "auto" and not self._told:
                self._told = True
                logger.info(
                    "the squared gradients of %d parameter tensors are estimated with random signs: they are not those "
                    "of linear layers, convolutions or recurrences alone, and there are more than most_cases=%d cases",
                    len(missing),
                    self.most_cases,
                )
        pieces = op.vector.views(total)
        for i, square in exact.items():
            pieces[i].copy_(square.view_as(pieces[i]))
        self.ways = ["layers" if i in exact else other for i in range(len(pieces))]
        self._diagonal = total if op.processes is None else op.processes.mean_(total)

    def _by_signs(self, op: GaussNewton, draws: torch.Generator) -> Tensor:
        total = torch.zeros(op.vector.size, dtype=op.dtype, device=op.device)
        for _ in range(self.probes):
            pulled = op.pull([self._signed(t, draws) for t in op.cotangents])
            total.addcmul_(pulled, pulled, value=1 / self.probes)
        return total

    def _signed(self, cotangent: Tensor, draws: torch.Generator) -> Tensor:
        if cotangent.dim() == 0:
            return cotangent
        n = cotangent.shape[self.batch_dim % cotangent.dim()]
        # dL/dz_n carries 1/N; sqrt(N) makes the square the mean over cases of squared per-case gradients.
        signs = along(random_signs(n, draws, cotangent), cotangent, self.batch_dim)
        signed: Tensor = cotangent * (signs * n**0.5)
        return signed


class HutchinsonDiagonal(Diagonal):
    """``M = (|diag(B)| + lambda + c)^exponent``, the curvature's own diagonal by Hutchinson's estimate.

    ``diag(B) = E[v * B v]`` for random signs v, from ``probes`` products at once. The variance of an entry is the
    sum of the squares of the others in its row, divided by the number of probes. For every operator, the
    Hessian included, whose diagonal is taken by its absolute value.

    Args:
        exponent: 1 is Jacobi's preconditioner; less evens out the estimate's errors.
        probes: products with the curvature a step.

    Source: Bekas, Kokiopoulou and Saad, "An estimator for the diagonal of a matrix", Applied Numerical
    Mathematics 2007.
    """

    def __init__(self, exponent: float = 0.75, probes: int = 16) -> None:
        super().__init__(exponent)
        if probes < 1:
            raise ValueError(f"probes is {probes}, but must be at least 1")
        self.probes = probes

    def refresh(self, op: Operator, step: int) -> None:
        """Multiply random signs by the curvature at the operator's point."""
        size = op.shape[0] * self.probes
        like = torch.empty((), dtype=op.dtype, device=op.device)
        v = random_signs(size, generator(op, step), like).view(op.shape[0], self.probes)
        self._diagonal = (v * (op @ v)).mean(1).abs_()
