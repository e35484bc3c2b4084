"""Hidden states for structural damping.

Structural damping (Martens & Sutskever, ICML 2011, section 3) adds to the curvature matrix the Gauss-Newton matrix of a
distance ``D`` between the hidden states before and after a step,

    S = J_a' D'' J_a,      a = pre-activations of the hidden units, J_a = da/dtheta,

so a model has to mark its hidden states. A recurrence calls :func:`mark` during its forward pass; the call has no
effect unless an optimizer with structural damping collects them (:func:`wanted`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class HiddenState:
    """One marked tensor: ``preactivations`` in the autograd graph and ``weight``, the diagonal of D'' (same shape)."""

    preactivations: Tensor
    weight: Tensor


_collected: ContextVar[list[HiddenState] | None] = ContextVar("hfopt_hidden_states", default=None)


def wanted() -> bool:
    """Return whether a running pass collects hidden states, so that a recurrence should yield pre-activations."""
    return _collected.get() is not None


def mark(preactivations: Tensor, curvature: Tensor, *, batch_dim: int = 1, mask: Tensor | None = None) -> None:
    """Register hidden units for structural damping; does nothing unless :func:`wanted`.

    The distance is the mean over sequences of the sum over valid steps and units, so with ``B`` sequences the
    weight of unit ``i`` at step ``t`` of sequence ``b`` is ``mask[t, b] D''_i(t, b) / B``.

    Args:
        preactivations: ``a (T, B, h)``, or any shape with the sequences along ``batch_dim``; in the autograd graph.
        curvature: the diagonal ``D''`` of the distance's Hessian in ``a``, same shape (tanh units: ``1 - h**2``).
        batch_dim: the dimension of the sequences, whose number the distance is averaged over.
        mask: ``(T, B)``, or any shape that broadcasts after a trailing dimension is added; False where a step is
            beyond its sequence's end.

    Raises:
        ValueError: if ``curvature`` has another shape than ``preactivations``.
    """
    collected = _collected.get()
    if collected is None:
        return
    if curvature.shape != preactivations.shape:
        raise ValueError(
            f"curvature has shape {tuple(curvature.shape)}, but preactivations have {tuple(preactivations.shape)}; "
            "give one second derivative of the distance per hidden unit"
        )
    weight = curvature.detach() / preactivations.shape[batch_dim]
    if mask is not None:
        weight = weight * mask.unsqueeze(-1).to(weight.dtype)
    collected.append(HiddenState(preactivations, weight))


@contextmanager
def collecting(enabled: bool = True) -> Iterator[list[HiddenState]]:
    """Collect every state that is marked inside the block; with ``enabled=False`` collect none."""
    states: list[HiddenState] = []
    token = _collected.set(states if enabled else None)
    try:
        yield states
    finally:
        _collected.reset(token)


def tanh_distance(hidden: Tensor) -> Tensor:
    """Return ``D'' = 1 - h**2``: Hessian, in the pre-activation, of the cross-entropy of two ``(1 + h)/2``."""
    return torch.addcmul(torch.ones((), dtype=hidden.dtype, device=hidden.device), hidden, hidden, value=-1.0)
