"""Gradient hooks of parameters: a step stays in the space that they leave.

A hook M on a parameter (``register_hook``, or ``register_post_accumulate_grad_hook``) changes the gradient of the loss
to ``M J' dL/dz`` and tells nothing of J, so that ``M J' H_L J`` is not symmetric. Where M is a projection P, such as a
0/1 mask that freezes rows of a weight, the loss is minimised over the range of P alone, in which gradient and curvature
are

    P g   and   P G P,

both symmetric and the only ones that a step may be made of: every vector of the solve begins in that range and is kept
there. Anything else that changes a gradient (clipping, scaling, noise) leaves no function to be minimised by products,
and is refused.

Passes of the operators themselves run without these hooks (:func:`hfopt.linalg.graph.unhooked`): as after
``backward()``, a hook sees the whole gradient, once per operator, and beside it a few vectors that tell what it does.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hfopt.errors import ClosureError
from hfopt.linalg.graph import leaf_hooks
from hfopt.linalg.projection import Map, Projection
from hfopt.linalg.vector import ParameterVector


def hooked(vector: ParameterVector, gradient: Tensor) -> tuple[Tensor, Projection | None]:
    """The gradient (P,) as its parameters' hooks leave it, and the projection that they are; None without hooks.

    Raises:
        ClosureError: a hook is no projection.
    """
    if not any(leaf_hooks(p) or _late(p) for p in vector.params):
        return gradient, None
    mask = torch.ones_like(gradient)
    others: list[tuple[int, Map]] = []
    gradient = gradient.clone()
    with torch.no_grad():
        for i, (p, g, m) in enumerate(zip(vector.params, vector.views(gradient), vector.views(mask), strict=True)):
            if not (leaf_hooks(p) or _late(p)) or not p.numel():
                continue
            seen, changed = _through(p, g.to(p.dtype, copy=True))
            if not changed:  # a hook that looks on
                continue
            found = _kind(p, g.to(p.dtype), seen)
            if found is None:
                raise ClosureError(
                    f"a gradient hook on parameter {i}, of shape {tuple(p.shape)}, does more than set entries to zero "
                    "or project the gradient (clipping, scaling or noise?), so that no products belong to what it "
                    "makes of the gradient. Remove the hook from the parameter: damping and line search bound the "
                    "step, so that nothing needs clipping; scale a parameter's steps by the lr of a group of its own; "
                    "and freeze entries by a mask of zeros and ones"
                )
            if isinstance(found, Tensor):
                m.copy_(found)
            else:
                others.append((i, found))
            g.copy_(seen)
    return gradient, Projection(vector, mask, others)


def _late(p: Tensor) -> list[Callable[[Tensor], None]]:
    """The hooks that torch calls when a gradient has been added to ``p.grad``."""
    return list((getattr(p, "_post_accumulate_grad_hooks", None) or {}).values())


def _gradient_of(p: Tensor) -> Tensor | None:
    return p.grad


def _through(p: Tensor, g: Tensor) -> tuple[Tensor, bool]:
    """Return ``g`` after the hooks of a parameter, and whether they changed it.

    Raises:
        ClosureError: a hook moves the parameter, or takes its gradient away.
    """
    changed = False
    for hook in list(leaf_hooks(p).values()):
        version, result = g._version, hook(g)
        changed |= result is not None or g._version != version
        g = g if result is None else result.to(p.dtype)
    if late := _late(p):
        kept, version, own, before = p.grad, p._version, g, g._version
        p.grad = g
        try:
            for after in late:
                after(p)
            left = _gradient_of(p)
        finally:
            p.grad = kept
        if left is None or p._version != version:
            raise ClosureError(
                f"a register_post_accumulate_grad_hook of a parameter of shape {tuple(p.shape)} moves the parameter, "
                "or takes its gradient away (an optimizer inside backward()?): remove the hook, since HessianFree "
                "steps by itself"
            )
        changed |= left is not own or left._version != before
        g = left.detach()
    return g.to_dense() if g.layout != torch.strided else g, changed


def _kind(p: Tensor, g: Tensor, seen: Tensor) -> Tensor | Map | None:
    """The mask that a parameter's hooks are, or another projection; None if they are neither."""

    def hook(v: Tensor) -> Tensor:
        return _through(p, v.clone())[0]

    ones, probe = torch.ones_like(g), _probe(g)
    # Powers of two far apart: what a clipping or a threshold does shows in one of them, and scaling is exact.
    far = 2.0 ** int(math.log2(torch.finfo(g.dtype).max) / 2)
    scales = (1.0, far, 1 / far)
    mask = hook(ones)
    several = [hook(probe * s) for s in scales]
    if mask.shape != g.shape or any(t.shape != g.shape for t in several):
        return None
    finite = bool(g.isfinite().all())
    if bool(((mask == 0) | (mask == 1)).all()):
        right = all(torch.equal(t, mask * (probe * s)) for t, s in zip(several, scales, strict=True))
        if right and (not finite or torch.equal(seen, mask * g)):
            return mask
    tolerance = 64 * torch.finfo(g.dtype).eps

    def close(a: Tensor, b: Tensor, size: Tensor) -> bool:
        return bool((a - b).double().norm() <= tolerance * size.double().norm())

    linear = all(close(t / s, several[0], probe) for t, s in zip(several, scales, strict=True))
    linear = linear and close(hook(probe + ones), several[0] + mask, probe + ones)
    idempotent = close(hook(several[0]), several[0], probe) and (not finite or close(hook(seen), seen, g))
    skew = abs(float((probe.double() * mask.double()).sum() - (ones.double() * several[0].double()).sum()))
    size = float(probe.double().norm() * ones.double().norm())
    return hook if linear and idempotent and skew <= tolerance * size else None


def _probe(like: Tensor) -> Tensor:
    """Numbers of both signs with sizes between 1 and 2, the same in every process."""
    draws = torch.Generator().manual_seed(0)
    values = torch.rand(like.shape, generator=draws, dtype=torch.float64) + 1
    signs = torch.randint(0, 2, like.shape, generator=draws) * 2 - 1
    return (values * signs).to(like)
