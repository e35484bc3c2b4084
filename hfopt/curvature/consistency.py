"""Whether tangents and adjoints of a model belong together: ``<w, J v> = <J'w, v>``, and ``J'`` is linear.

Autograd computes ``J v`` by differentiating ``u -> J'u`` once more. Where a backward pass hides its arithmetic
(``no_grad``, numpy, ``.data``, a hook that solves a system or clips), the gradient is right and that derivative is not:
``J v`` lacks a part, and with it every product with a curvature matrix, without an error anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from hfopt.curvature.linearisation import Linearisation, Maybe, not_differentiable
from hfopt.curvature.parts import Part
from hfopt.linalg import graph

WAYS_OUT = (
    "Look for a torch.autograd.Function or a hook whose backward computes with no_grad, numpy, .data or detach(), or "
    "clips. Ways out: write its backward in differentiable torch operations; pass linearisation='differences', which "
    "takes tangents from differences of the outputs; or leave the function out of what is optimized"
)
# A power of two, so that a linear map gives the same bits for scaled cotangents, beyond the size of those of a product.
_LARGE = 2.0**12


class Linearised(Protocol):
    """The required part of a curvature operator."""

    parts: list[Part]

    @property
    def params(self) -> list[Tensor]:
        """The parameters."""


def inconsistency(op: Linearised) -> str | None:
    """Return what is wrong with tangents and adjoints about a point, as far as one product of each shows it.

    For random cotangents w, and v the part of ``J'w`` that belongs to each parameter, scaled to length 1, both
    ``<w, J v>`` and ``<J'w, v>`` are ``sum_p |J_p'w|``, a sum of positive terms in which nothing cancels.
    """
    for part in op.parts:
        if part.linearisation is not None and part.space.outputs:
            try:
                found = _of_part(part, part.linearisation, op.params)
            except NotImplementedError as error:  # what torch raises where an operation has no derivative formula
                raise not_differentiable({"the product": error}) from error
            if found is not None:
                return found
    return None


def _of_part(part: Part, lin: Linearisation, params: Sequence[Tensor]) -> str | None:
    outputs = part.space.outputs
    w = [_random(z, at) for z, at in zip(outputs, part.space.cotangents, strict=True)]
    rest: list[Tensor | None] = [None] * len(part.hidden)
    pulled = lin.vjp([*w, *rest])
    # Inside an autocast block the model computes in less precision than its outputs and parameters have.
    eps = max(graph.coarsest_eps(outputs), *(torch.finfo(t.dtype).eps for t in (*outputs, *params)))
    grads = [None if g is None else _dense(g).double() for g in pulled]
    lengths = [0.0 if g is None else float(g.norm()) for g in grads]
    expected = sum(lengths)
    if not 0.0 < expected < float("inf"):
        return None
    tolerance = 4 * eps**0.5
    off = _nonlinearity(lin, w, rest, grads)
    if off > tolerance * expected:
        return (
            f"the backward pass of the model is not linear: for {_LARGE:g} times the same cotangents it gives another "
            f"direction (relative difference {off / expected:.2g}). {WAYS_OUT}"
        )
    v = [
        torch.zeros_like(p) if g is None or n == 0.0 else (g / n).to(p.dtype)
        for p, g, n in zip(params, grads, lengths, strict=True)
    ]
    tangents = lin.jvp(v)[: len(outputs)]
    terms = [(t.double(), u.double()) for t, u in zip(w, tangents, strict=True) if u is not None]
    found = sum(float((t * u).sum()) for t, u in terms)
    rounding = 64 * eps * sum(float((t * u).abs().sum()) for t, u in terms)
    if abs(found - expected) <= tolerance * expected + rounding:
        return None
    return (
        f"products with the curvature matrix would be wrong: <w, J v> is {found:.4g}, but <J'w, v> is {expected:.4g} "
        f"for the Jacobian J of the outputs. {WAYS_OUT}"
    )


def _nonlinearity(lin: Linearisation, w: list[Tensor], rest: list[Tensor | None], grads: Maybe) -> float:
    """Return ``|J'(s w) / s - J'w|`` for a large s; 0 where ``s w`` is too much for the precision of the model."""
    large = lin.vjp([*(t * _LARGE for t in w), *rest])
    pairs = [
        (a, _dense(b).double() / _LARGE) for a, b in zip(grads, large, strict=True) if a is not None and b is not None
    ]
    off = sum(float((a - b).norm()) for a, b in pairs)
    return off if math.isfinite(off) else 0.0


def _random(output: Tensor, at: Tensor) -> Tensor:
    """Return a cotangent of the size of those of the loss; drawn apart from everybody's generators."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    draws = torch.randn(output.shape, generator=generator, dtype=torch.float32)
    size = float(at.double().square().mean().sqrt()) if at.numel() else 1.0
    return (draws * (size or 1.0)).to(device=output.device, dtype=output.dtype)


def _dense(g: Tensor) -> Tensor:
    return g.detach() if g.layout == torch.strided else g.detach().to_dense()
