"""Losses of every criterion that is known, by every reduction, on outputs (N, K) of a network.

The reference Gauss-Newton matrix is taken at ``outputs(z)``: the logits where a criterion takes probabilities (its
curvature is the Fisher matrix, which is the Hessian there), otherwise what goes into the criterion.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.hfopt.tools import generator

REDUCTIONS = ("mean", "sum", "none-mean", "none-weighted")


def same(z: Tensor) -> Tensor:
    """The outputs themselves."""
    return z


@dataclass(frozen=True)
class Loss:
    """``value(z)`` is the loss, ``rest(outputs(z))`` the same from the outputs of the reference."""

    value: Callable[[Tensor], Tensor]
    outputs: Callable[[Tensor], Tensor]
    rest: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Data:
    """What targets are made of, and the drawn options."""

    cases: int
    outputs: int
    dtype: torch.dtype
    seed: int
    option: int

    def normal(self, number: int = 0) -> Tensor:
        """(N, K)."""
        draws = generator(1000 * number + self.seed)
        return torch.randn(self.cases, self.outputs, generator=draws, dtype=torch.float64).to(self.dtype)

    def classes(self) -> Tensor:
        """(N,), one of them ignored if there are several and the options say so."""
        found = torch.randint(0, self.outputs, (self.cases,), generator=generator(self.seed + 7))
        if self.cases > 1 and self.option & 1:
            found[0] = -100
        return found

    def class_weights(self) -> Tensor | None:
        """(K,)."""
        return self.normal(2)[0].abs() + 0.2 if self.option & 2 else None


Criterion = Callable[[Tensor, str], Tensor]


def _mse(d: _Data) -> Criterion:
    y = d.normal()
    return lambda z, r: F.mse_loss(z, y, reduction=r)


def _mse_weighted(d: _Data) -> Criterion:
    y, w = d.normal(), d.normal(1).abs()
    return lambda z, r: F.mse_loss(z, y, weight=w, reduction=r)


def _huber(d: _Data) -> Criterion:
    y = d.normal()
    return lambda z, r: F.huber_loss(z, y, reduction=r, delta=0.6)


def _smooth_l1(d: _Data) -> Criterion:
    y = d.normal()
    return lambda z, r: F.smooth_l1_loss(z, y, reduction=r, beta=0.8)


def _cross_entropy(d: _Data) -> Criterion:
    y, w = d.classes(), d.class_weights()
    smoothing = 0.2 if d.option & 4 else 0.0
    return lambda z, r: F.cross_entropy(z, y, weight=w, reduction=r, label_smoothing=smoothing)


def _cross_entropy_soft(d: _Data) -> Criterion:
    y, w = d.normal().float().softmax(1).to(d.dtype), d.class_weights()
    smoothing = 0.2 if d.option & 4 else 0.0
    return lambda z, r: F.cross_entropy(z, y, weight=w, reduction=r, label_smoothing=smoothing)


def _nll(d: _Data) -> Criterion:
    y, w = d.classes(), d.class_weights()
    return lambda z, r: F.nll_loss(z.log_softmax(1), y, weight=w, reduction=r)


def _bits(d: _Data) -> Tensor:
    y = d.normal()
    return y.sigmoid() if d.option & 1 else (y > 0).to(d.dtype)


def _bce(d: _Data) -> Criterion:
    y, w = _bits(d), d.normal(1).abs() if d.option & 2 else None
    return lambda z, r: F.binary_cross_entropy(z.sigmoid(), y, weight=w, reduction=r)


def _bce_logits(d: _Data) -> Criterion:
    y, w = _bits(d), d.normal(1).abs() if d.option & 2 else None
    positive = d.normal(2)[0].abs() if d.option & 4 else None
    return lambda z, r: F.binary_cross_entropy_with_logits(z, y, weight=w, pos_weight=positive, reduction=r)


def _kl(d: _Data) -> Criterion:
    log_target = bool(d.option & 1)
    y = d.normal().log_softmax(1)
    y = y if log_target else y.exp()
    return lambda z, r: F.kl_div(
        z.log_softmax(1), y, reduction="batchmean" if r == "mean" and d.option & 2 else r, log_target=log_target
    )


def _poisson(d: _Data) -> Criterion:
    y, full = d.normal().abs().round(), bool(d.option & 1)
    return lambda z, r: F.poisson_nll_loss(z, y, full=full, reduction=r)


def _soft_margin(d: _Data) -> Criterion:
    y = d.normal().sign()
    return lambda z, r: F.soft_margin_loss(z, y, reduction=r)


def _multilabel(d: _Data) -> Criterion:
    y, w = (d.normal() > 0).to(d.dtype), d.class_weights()
    return lambda z, r: F.multilabel_soft_margin_loss(z, y, weight=w, reduction=r)


def _gaussian(d: _Data) -> Criterion:
    """Of the mean and the variance, side by side in ``z``."""
    y, full = d.normal(), bool(d.option & 1)

    def criterion(z: Tensor, r: str) -> Tensor:
        mean, variance = z.unbind(-1)
        return F.gaussian_nll_loss(mean, y, variance, full=full, reduction=r)

    return criterion


_BUILDERS: dict[str, Callable[[_Data], Criterion]] = {
    "mse": _mse,
    "mse-weighted": _mse_weighted,
    "huber": _huber,
    "smooth_l1": _smooth_l1,
    "cross_entropy": _cross_entropy,
    "cross_entropy-soft": _cross_entropy_soft,
    "nll": _nll,
    "bce": _bce,
    "bce_logits": _bce_logits,
    "kl": _kl,
    "poisson": _poisson,
    "soft_margin": _soft_margin,
    "multilabel": _multilabel,
    "gaussian": _gaussian,
}
NAMES = tuple(_BUILDERS)
# Those whose curvature in the outputs is known in closed form, so that targets can be drawn.
CLOSED = NAMES[:10]
_VARIANCE = "gaussian"


def loss_of(name: str, reduction: str, option: int, cases: int, outputs: int, dtype: torch.dtype, seed: int) -> Loss:
    """The loss of outputs (N, K) by a criterion with drawn targets."""
    data = _Data(cases, outputs, dtype, seed, option)
    criterion = _BUILDERS[name](data)
    weights = data.normal(3).abs()

    def rest(z: Tensor) -> Tensor:
        if not reduction.startswith("none"):
            return criterion(z, reduction)
        each = criterion(z, "none")
        if reduction == "none-mean":
            return each.mean()
        case = weights[:, 0]
        return (each * (case.unsqueeze(1) if each.dim() == 2 else case)).sum()

    if name != _VARIANCE:
        return Loss(rest, same, rest)

    def split(z: Tensor) -> Tensor:
        return torch.stack([z.tanh(), F.softplus(z) + 0.3], -1)

    return Loss(lambda z: rest(split(z)), split, rest)
