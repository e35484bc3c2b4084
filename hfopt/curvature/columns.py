"""Several vectors at once: their forms, and how many go through a batched pass together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hfopt.curvature.linearisation import available_bytes
from hfopt.curvature.parts import Maybe
from hfopt.linalg.vector import ParameterVector

# Vectors in one batched pass at most.
MANY = 64


def rows(vector: ParameterVector, v: Tensor) -> list[Tensor]:
    """Return the columns of ``v (P, k)`` in shapes and dtypes of the parameters, along a new first dimension."""
    pieces = torch.split(v.t(), vector.sizes, dim=1)
    return [x.reshape(len(x), *p.shape).to(p.dtype) for x, p in zip(pieces, vector.params, strict=True)]


def columns(vector: ParameterVector, like: Sequence[Tensor], parts: Maybe) -> Tensor:
    """Invert :func:`rows`: (P, k); None is zero."""
    full = [torch.zeros_like(x) if g is None else g.detach() for x, g in zip(like, parts, strict=True)]
    return torch.cat([g.reshape(len(g), -1).to(vector.dtype) for g in full], 1).t()


def columns_at_once(column: int, size: int, budget: int | None, device: torch.device) -> int:
    """Return the number of vectors (P,) per batched pass, at ``column`` bytes each in addition to the vectors."""
    given = int(0.8 * available_bytes(device)) if budget is None else budget
    return max(1, min(MANY, given // (column + 4 * 8 * size)))


def cannot_batch(error: Exception) -> bool:
    """Return whether torch reports that it cannot batch an operation over several vectors."""
    # A traced graph has the views of single vectors in it; a backward pass in numpy asks for a tensor's memory.
    words = ("vmap", "atching rule", "functorch", "view size is not compatible", "doesn't have storage")
    return any(word in str(error) for word in words)
