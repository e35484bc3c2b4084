"""Diagonal preconditioners: the empirical Fisher matrix's diagonal, and the curvature's by Hutchinson's estimate."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hfopt.curvature import GaussNewton, cannot_batch, columns_at_once
from hfopt.notice import logger
from hfopt.operators import Operator
from hfopt.preconditioners.base import Preconditioner, generator, ready, with_outputs
from hfopt.preconditioners.layers import Layer, backward, watched

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
        """What the last :meth:`refresh` found, (P,)."""
        return ready(self._diagonal, "refresh()", "diagonal")

    @abstractmethod
    def refresh(self, op: Operator, step: int) -> None:
        """Set the diagonal (P,), not negative."""

    def damp(self, damping: float, decay: float | Tensor) -> None:
        """``M = (diag + lambda + c)^exponent``."""
        diagonal = ready(self._diagonal, "refresh()", "damp()")
        # A bound far below any curvature keeps M invertible where an undamped parameter has no gradient.
        m = (diagonal + damping + decay).clamp_min_(torch.finfo(diagonal.dtype).tiny)
        self._inverse = m.pow_(-self.exponent)

    def apply(self, r: Tensor) -> Tensor:
        """``M^-1 r``."""
        return r * ready(self._inverse, "damp()", "applying")


class EmpiricalFisherDiagonal(Diagonal):
    """``M = (diag(F) + lambda + c)^0.75``, F the empirical Fisher matrix.

    ``diag(F)_i`` is the mean over cases of squared per-case gradients, for a loss that is a mean over cases (for a sum
    over N cases it is N times their sum). Three ways to it:

    - ``"layers"``: exact, at the cost of about three gradients. Inputs of linear and convolution layers and gradients
      of their outputs are taken from another run of the closure. Whether they tell the whole of a parameter's
      per-case gradients (which they do not under batch normalisation, for instance) is checked by one adjoint pass.
    - ``"cases"``: exact, at the cost of one adjoint pass per case, many of them in one batched pass. It works for
      every model, recurrent ones included; of use for few cases.
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
        """Find the diagonal at the operator's point.

        Raises:
            TypeError: for an operator without outputs (the Hessian of a loss).
            ValueError: ``squares="layers"`` on a model that has other parameters.
        """
        op = with_outputs(op, "empirical-Fisher")
        draws = generator(op, step)
        exact: dict[int, Tensor] = {}
        if self.squares in ("auto", "layers"):
            exact = by_layers(op, self.batch_dim, draws)
        missing = [i for i in range(len(op.params)) if i not in exact]
        if missing and self.squares == "layers":
            raise ValueError(
                f"squares is 'layers', but parameters {missing} are not those of linear or convolution layers alone, "
                "each case for itself; use squares 'auto', 'cases' or 'signs'"
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
                    "of linear or convolution layers alone, and there are more than most_cases=%d cases",
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
        signs = _along(random_signs(n, draws, cotangent), cotangent, self.batch_dim)
        signed: Tensor = cotangent * (signs * n**0.5)
        return signed


def random_signs(n: int, draws: torch.Generator, like: Tensor) -> Tensor:
    """Random signs (n,), each + or - with probability 1/2."""
    return (torch.randint(0, 2, (n,), generator=draws, device=like.device) * 2 - 1).to(like.dtype)


def _along(signs: Tensor, z: Tensor, dim: int) -> Tensor:
    """``signs (n,)`` in a shape that multiplies ``z`` along ``dim``."""
    shape = [1] * z.dim()
    shape[dim % z.dim()] = len(signs)
    return signs.view(shape)


def cases(op: GaussNewton, batch_dim: int) -> list[int]:
    """The number of cases of each output."""
    return [t.shape[batch_dim % t.dim()] if t.dim() else 1 for t in op.cotangents]


def by_cases(op: GaussNewton, batch_dim: int) -> Tensor:
    """Sums of squared gradients of single cases, times their number, (P,): an adjoint pass for each case."""
    total = torch.zeros(op.vector.size, dtype=op.dtype, device=op.device)
    for i, (t, n) in enumerate(zip(op.cotangents, cases(op, batch_dim), strict=True)):
        own = op.linearisation.column_bytes() + 2 * t.numel() * t.element_size()
        width = columns_at_once(own, op.vector.size, op.memory_budget, op.device)
        for start in range(0, n, width):
            for pulled in _pulled(op, i, _single(t, batch_dim, start, min(start + width, n))):
                total.add_(pulled.square().sum(1), alpha=n)
    return total


def _single(t: Tensor, batch_dim: int, start: int, stop: int) -> Tensor:
    """``t`` with all cases but one set to zero, for the cases from start to stop, (k, *shape)."""
    if t.dim() == 0:
        return t.unsqueeze(0)
    n, dim = t.shape[batch_dim % t.dim()], batch_dim % t.dim()
    chosen = torch.eye(n, dtype=t.dtype, device=t.device)[start:stop]
    shape = [stop - start, *(n if d == dim else 1 for d in range(t.dim()))]
    return t.unsqueeze(0) * chosen.view(shape)


def _pulled(op: GaussNewton, output: int, w: Tensor) -> Iterator[Tensor]:
    """``J' w`` for the k cotangents ``w`` of one output, (P, k); one by one where the model cannot be batched."""
    count = len(op.cotangents)
    try:
        yield op.pull_many([w if j == output else None for j in range(count)])
        return
    except RuntimeError as error:
        if not cannot_batch(error):
            raise
    zeros = [torch.zeros_like(t) for t in op.cotangents]
    for one in w:
        yield op.pull([one if j == output else zeros[j] for j in range(count)]).unsqueeze(1)


def by_layers(op: GaussNewton, batch_dim: int, draws: torch.Generator) -> dict[int, Tensor]:
    """Sums of squared gradients of single cases, times their number, by parameter, as far as layers tell them.

    With signs s, ``sum_n s_n dL_n/dtheta`` is found from the layers and by one adjoint pass. They agree for all
    signs if and only if the layers' per-case gradients are the true ones.
    """
    seen = watched(op, batch_dim)
    if seen is None:
        return {}
    heads, layers = seen
    (cotangent,) = op.cotangents
    layers = backward(heads, layers, [cotangent]) if layers else []
    n = cotangent.shape[batch_dim % cotangent.dim()]
    signs = random_signs(n, draws, cotangent)
    truth = op.vector.views(op.pull([cotangent * _along(signs, cotangent, batch_dim)]))
    exact: dict[int, Tensor] = {}
    for i, p in enumerate(op.params):
        used = [(layer, layer.weight == i) for layer in layers if i in (layer.weight, layer.bias)]
        if not used:
            continue
        signed, square = _of_parameter(used, signs, p.numel())
        wrong = signed.to(op.dtype) - truth[i].reshape(-1)
        precision = torch.finfo(p.dtype).eps ** 0.5
        # The sum of squares is the scale: the signed sum itself may vanish.
        if bool(wrong.square().sum() <= precision * square.sum()):
            exact[i] = (n * square).to(op.dtype)
    return exact


def _of_parameter(used: Sequence[tuple[Layer, bool]], signs: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The sum of a parameter's per-case gradients with signs, and that of their squares, flat; over all its uses.

    ``used``: the layers, each with whether the parameter is its weight.
    """
    signed = torch.zeros(size, dtype=signs.dtype, device=signs.device)
    square = torch.zeros_like(signed)
    block = min(layer.block() for layer, _ in used)
    alone = len(used) == 1 and used[0][0].positions == 1
    for parts in zip(*(layer.rows(block, signs.dtype) for layer, _ in used), strict=True):
        s = signs[parts[0][0]]
        if alone:
            # (g x')^2 = g^2 (x^2)': no case's gradient is ever formed.
            _, x, g = parts[0]
            x, g = x[:, 0] if used[0][1] else x.new_ones(len(x), 1), g[:, 0]
            signed += ((s.unsqueeze(1) * g).t() @ x).reshape(-1)
            square += (g.square().t() @ x.square()).reshape(-1)
            continue
        total = torch.zeros(len(s), size, dtype=signs.dtype, device=signs.device)
        for (_, x, g), (_, weight) in zip(parts, used, strict=True):
            total += (g.transpose(1, 2) @ x).reshape(len(s), -1) if weight else g.sum(1)
        signed += s @ total
        square += total.square().sum(0)
    return signed, square


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
