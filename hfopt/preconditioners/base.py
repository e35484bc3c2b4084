"""Interface of preconditioners: ``z = M^-1 r`` with M symmetric, positive definite and cheap to invert."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import Any, Protocol

import torch
from torch import Tensor

from hfopt.curvature.fisher import check_cases
from hfopt.curvature.gauss_newton import GaussNewton
from hfopt.linalg.operators import Operator


class System(Protocol):
    """The damped system that conjugate gradients solve."""

    def multiply(self, v: Tensor, out: Tensor | None = None) -> Tensor:
        """Return ``A v``."""


class Preconditioner(ABC):
    """Refreshed once a step, at the new point; damped before every solve; applied at every CG iteration.

    While a solve runs, M is fixed, and :meth:`apply` reads no number of a device.
    """

    @abstractmethod
    def refresh(self, op: Operator, step: int) -> None:
        """Move to the point of ``op``; ``step`` seeds random draws."""

    @abstractmethod
    def damp(self, damping: float, decay: float | Tensor) -> None:
        """Set lambda and the weight decay c (a number or (P,)) of the next system."""

    @abstractmethod
    def apply(self, r: Tensor) -> Tensor:
        """Return ``M^-1 r`` for ``r (P,)``."""

    def apply_into(self, r: Tensor, out: Tensor) -> Tensor:
        """Return ``M^-1 r``, in ``out (P,)`` if the preconditioner supports it; other tensors may be returned."""
        return self.apply(r)

    @property
    def active(self) -> bool:
        """Whether M exists after :meth:`refresh`; otherwise the step continues without a preconditioner."""
        return True

    runs = 0
    """The number of forward and backward passes of the closure that the last :meth:`refresh` made."""

    _z: Tensor | None = None

    def __call__(self, r: Tensor) -> Tensor:
        """Return ``M^-1 r`` for ``r (P,)``; on a CPU the next call may overwrite it, as fresh memory is expensive."""
        if r.device.type != "cpu":
            return self.apply(r)
        if self._z is None or self._z.shape != r.shape or self._z.dtype != r.dtype:
            self._z = torch.empty_like(r)
        return self.apply_into(r, self._z)

    def __repr__(self) -> str:
        names = [name for name in inspect.signature(type(self)).parameters if hasattr(self, name)]
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"

    def __getstate__(self) -> dict[str, Any]:
        """Return everything except buffers that every call recreates, for copy and pickle."""
        return {name: value for name, value in self.__dict__.items() if name != "_z"}

    def watch(self, system: System) -> System:
        """Return the system to pass to CG, for preconditioners that learn from its products."""
        return system

    def state_dict(self) -> dict[str, Any]:
        """Return the state that the next step needs; empty if every step rebuilds the preconditioner."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 - nothing to restore by default
        """Restore :meth:`state_dict`."""


def with_outputs(op: Operator, name: str, batch_dim: int) -> GaussNewton:
    """Return ``op`` if it has outputs with cases along ``batch_dim``.

    Raises:
        TypeError: for an operator without outputs (the Hessian of a loss).
        ValueError: an output has no such dimension.
    """
    if not isinstance(op, GaussNewton):
        raise TypeError(
            f"the {name} preconditioner needs outputs, which a {type(op).__name__} operator does not have; use "
            "curvature 'gauss-newton' or no preconditioner"
        )
    check_cases(op.cotangents, batch_dim)
    return op


def ready(value: Tensor | None, before: str, now: str) -> Tensor:
    """Return ``value``, which ``before`` sets.

    Raises:
        RuntimeError: it is not there.
    """
    if value is None:
        raise RuntimeError(f"{before} must come before {now}")
    return value


def mean_decay(decay: float | Tensor) -> float:
    """Return the weight decay as one number, for M that can only include a multiple of the identity."""
    return float(decay.mean()) if isinstance(decay, Tensor) else decay


def generator(op: Operator, seed: int) -> torch.Generator:
    """Return a step's generator, the same in every process and after a resumption."""
    return torch.Generator(device=op.device).manual_seed(seed)
