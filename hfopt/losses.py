"""Losses in output space: the matching curvature of every criterion of torch.nn.functional.

The Gauss-Newton product ``G v = J' H_L J v`` needs the Hessian of the loss in the network's outputs ``z``. With the
loss a weighted sum of criteria, ``L = sum_k <c_k, l_k(z_k)>``, each criterion contributes a block that is diagonal or
of softmax form, and is positive semi-definite for the criteria in closed form.

Criteria that take probabilities or log-probabilities (``nll_loss``, ``kl_div``, ``binary_cross_entropy``) are linear or
badly curved in their argument. They get the Fisher information of the distribution that the argument describes, which
equals the Hessian in the logits when a (log-)softmax or sigmoid precedes (Martens, "New insights and perspectives on
the natural gradient method", JMLR 2020, section 9): with ``p = exp(z)`` normalised, ``J_z' diag(p) J_z =
J_a' (diag(p) - pp') J_a`` for the logits ``a``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import _reduction

from hfopt.errors import ClosureError


class OutputCurvature(Protocol):
    """One block of ``H_L``: a symmetric matrix that acts on tensors of the outputs' shape."""

    def product(self, u: Tensor) -> Tensor:
        """Return ``H u`` for ``u`` of the shape of the outputs."""

    def sample(self, generator: torch.Generator | None, cases: int = 0) -> Tensor:
        """A random ``g`` of the shape of the outputs with mean zero and ``E[g g'] = H``.

        Random numbers are used up case by case, along the dimension ``cases``.
        """


def _case_first(shape: torch.Size, cases: int) -> list[int]:
    """The shape with its dimension ``cases`` moved to the front."""
    return [*shape[cases : cases + 1], *shape[:cases], *shape[cases + 1 :]]


@dataclass
class Diagonal:
    """``H = diag(weight)``, ``weight >= 0`` in the shape of the outputs (or one that broadcasts to it)."""

    weight: Tensor
    shape: torch.Size

    def product(self, u: Tensor) -> Tensor:
        """Return ``weight * u``."""
        return u * self.weight

    def sample(self, generator: torch.Generator | None, cases: int = 0) -> Tensor:
        """``sqrt(weight) * (+-1)``."""
        drawn = torch.randint(0, 2, _case_first(self.shape, cases), generator=generator, device=self.weight.device)
        sign = (drawn.movedim(0, cases) if cases else drawn) * 2 - 1
        return self.weight.sqrt() * sign.to(self.weight.dtype)


@dataclass
class Softmax:
    """``H = s (diag(p) - p p')`` along ``dim``: probabilities ``p``, weights ``s`` (size 1 along ``dim``)."""

    p: Tensor
    s: Tensor
    dim: int

    def product(self, u: Tensor) -> Tensor:
        """Return ``s p (u - p'u)``."""
        return (self.s * self.p) * (u - (self.p * u).sum(self.dim, keepdim=True))

    def sample(self, generator: torch.Generator | None, cases: int = 0) -> Tensor:
        """``sqrt(s) (e_y - p)`` with the class ``y`` drawn from ``p`` by Gumbel's trick."""
        shape = _case_first(self.p.shape, cases)
        uniform = torch.rand(shape, generator=generator, device=self.p.device, dtype=self.p.dtype)
        uniform = uniform.movedim(0, cases) if cases else uniform
        gumbel = -(-uniform.clamp_min(1e-20).log()).clamp_min(1e-20).log()
        y = (self.p.clamp_min(1e-30).log() + gumbel).argmax(self.dim, keepdim=True)
        return self.s.sqrt() * (torch.zeros_like(self.p).scatter_(self.dim, y, 1.0) - self.p)


@dataclass
class Call:
    """One call of a criterion: its function, its arguments by name, and its factor ``c = dL/dl`` in the whole loss."""

    function: Callable[..., Tensor]
    arguments: dict[str, Any]
    factor: Tensor

    @classmethod
    def bind(cls, function: Callable[..., Tensor], args: Sequence[Any], kwargs: dict[str, Any], factor: Tensor) -> Call:
        """Name the arguments and convert the reduction to its current spelling."""
        bound = inspect.signature(function).bind(*args, **kwargs)
        bound.apply_defaults()
        a = dict(bound.arguments)
        if a.get("size_average") is not None or a.get("reduce") is not None:
            a["reduction"] = _reduction.legacy_get_string(a["size_average"], a["reduce"])
        return cls(function, a, factor)

    def elementwise(self, denominator: Tensor | float) -> Tensor:
        """Return the factor of each unreduced loss value; ``denominator`` is the divisor of reduction="mean"."""
        if self.arguments["reduction"] == "mean":
            return self.factor / denominator
        return self.factor


def _same_shape(call: Call) -> tuple[Tensor, Tensor] | None:
    """Input and target of a criterion that acts element by element; None where they broadcast."""
    z, y = call.arguments["input"], call.arguments["target"]
    return (z, y) if z.shape == y.shape and call.arguments.get("weight") is None else None


def _diagonal(z: Tensor, weight: Tensor) -> Diagonal:
    return Diagonal(weight.to(z.dtype), z.shape)


def _mse(call: Call) -> OutputCurvature | None:
    """``l = (z - y)^2``, ``H = 2``."""
    if _same_shape(call) is None:
        return None
    z = call.arguments["input"]
    return _diagonal(z, 2.0 * call.elementwise(z.numel()))


def _huber(call: Call) -> OutputCurvature | None:
    """``l'' = 1`` where ``|z - y| < delta``, else 0."""
    if (pair := _same_shape(call)) is None:
        return None
    inside = (pair[0] - pair[1]).abs() < call.arguments["delta"]
    return _diagonal(pair[0], inside * call.elementwise(pair[0].numel()))


def _smooth_l1(call: Call) -> OutputCurvature | None:
    """``l'' = 1 / beta`` where ``|z - y| < beta``, else 0."""
    if (pair := _same_shape(call)) is None:
        return None
    beta = call.arguments["beta"]
    if beta == 0:
        return _l1(call)
    inside = (pair[0] - pair[1]).abs() < beta
    return _diagonal(pair[0], inside * (call.elementwise(pair[0].numel()) / beta))


def _l1(call: Call) -> OutputCurvature | None:
    raise ClosureError(
        "found l1_loss (or smooth_l1_loss with beta=0): it has no curvature, so there is nothing for Gauss-Newton to "
        "use. Use smooth_l1_loss or huber_loss, or give a loss with curvature by loss="
    )


def _bce_logits(call: Call) -> OutputCurvature | None:
    """``H = w p (1 - p) (pos_weight y + 1 - y)`` with ``p = sigmoid(z)``."""
    a = call.arguments
    z, y = a["input"], a["target"]
    p = torch.sigmoid(z)
    h = p * (1 - p)
    if a["pos_weight"] is not None:
        h = h * (a["pos_weight"] * y + 1 - y)
    if a["weight"] is not None:
        h = h * a["weight"]
    return _diagonal(z, h * call.elementwise(z.numel()))


def _bce(call: Call) -> OutputCurvature | None:
    """Fisher information of a Bernoulli variable in its mean: ``1 / (p (1 - p))``."""
    a = call.arguments
    p = a["input"]
    # The bound is that of torch's own backward pass; where it acts, a sigmoid's derivative is zero anyway.
    h = 1 / (p * (1 - p)).clamp_min(1e-12)
    if a["weight"] is not None:
        h = h * a["weight"]
    return _diagonal(p, h * call.elementwise(p.numel()))


def _class_weights(call: Call, z: Tensor, smoothing: float) -> Tensor:
    """``s``: the summed weight of all classes in each case's smoothed target, times the factor; 1 along the classes."""
    a = call.arguments
    dim = 1 if z.dim() > 1 else 0
    y, w, classes = a["target"], a["weight"], z.shape[dim]
    if y.is_floating_point():
        q = y * (1 - smoothing) + smoothing / classes
        if w is not None:
            q = q * w.view([-1] + [1] * (z.dim() - dim - 1))
        s = q.sum(dim)
        denominator: Tensor | float = z.numel() / classes
    else:
        valid = y != a["ignore_index"]
        own = torch.ones_like(y, dtype=z.dtype) if w is None else w[y.clamp(0, classes - 1)]
        every = 1.0 if w is None else w.sum() / classes
        s = ((1 - smoothing) * own + smoothing * every) * valid
        denominator = (own * valid).sum()
    weights: Tensor = (s * call.elementwise(denominator)).unsqueeze(dim).to(z.dtype)
    return weights


def _cross_entropy(call: Call) -> OutputCurvature | None:
    """``H = s (diag(p) - pp')`` with ``p = softmax(z)``."""
    z = call.arguments["input"]
    dim = 1 if z.dim() > 1 else 0
    return Softmax(z.softmax(dim), _class_weights(call, z, call.arguments["label_smoothing"]), dim)


def _normalised(z: Tensor, dims: Sequence[int], name: str) -> int:
    """The one of ``dims`` along which ``exp(z)`` sums to one. A sum that is NaN says nothing: the loss is NaN, too."""
    for dim in dims:
        if not bool((z.logsumexp(dim).abs() >= 1e-3).any()):
            return dim
    raise ClosureError(
        f"found {name} on an input that is not normalised log-probabilities (exp(input) does not sum to one): it is "
        "linear in its input, so its curvature is only known behind log_softmax. Apply log_softmax first, use "
        "cross_entropy on the logits, or give the loss as a function of the right outputs by loss= or outputs="
    )


def _nll(call: Call) -> OutputCurvature | None:
    """Fisher information ``s diag(p)``, ``p = exp(z)``."""
    z = call.arguments["input"]
    dim = _normalised(z, [1 if z.dim() > 1 else 0], "nll_loss")
    return _diagonal(z, z.exp() * _class_weights(call, z, 0.0)) if dim >= 0 else None


def _kl_div(call: Call) -> OutputCurvature | None:
    """Fisher information ``s diag(p)``, ``p = exp(z)``, with ``s`` the summed target of each case."""
    a = call.arguments
    z, y = a["input"], a["target"]
    if z.shape != y.shape:
        return None
    if a["log_target"]:
        y = y.exp()
    dim = _normalised(z, range(z.dim() - 1, -1, -1), "kl_div")
    factor = call.factor / z.shape[0] if a["reduction"] == "batchmean" else call.elementwise(z.numel())
    return _diagonal(z, z.exp() * (factor * y).sum(dim, keepdim=True))


def _by_autograd(call: Call) -> OutputCurvature | None:
    return None


Builder = Callable[[Call], "OutputCurvature | None"]

# None from a builder means: no closed form for these arguments, differentiate the criterion twice instead.
CRITERIA: dict[Callable[..., Any], Builder] = {
    F.mse_loss: _mse,
    F.huber_loss: _huber,
    F.smooth_l1_loss: _smooth_l1,
    F.l1_loss: _l1,
    F.binary_cross_entropy: _bce,
    F.binary_cross_entropy_with_logits: _bce_logits,
    F.cross_entropy: _cross_entropy,
    F.nll_loss: _nll,
    F.kl_div: _kl_div,
    F.poisson_nll_loss: _by_autograd,
    F.gaussian_nll_loss: _by_autograd,
    F.soft_margin_loss: _by_autograd,
    F.multilabel_soft_margin_loss: _by_autograd,
}


def matching_curvature(call: Call) -> OutputCurvature | None:
    """Return ``H_L`` of one criterion call in closed form, or None to leave it to automatic differentiation.

    Raises:
        ClosureError: for a criterion without curvature, or log-probabilities that are not normalised.
    """
    with torch.no_grad():
        return CRITERIA[call.function](call)
