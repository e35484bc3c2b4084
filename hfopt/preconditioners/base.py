"""What every preconditioner offers: ``z = M^-1 r`` with M symmetric, positive definite and cheap to invert."""

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
        """``A v``."""


class Preconditioner(ABC):
    """Refreshed once a step, at the new point; damped before every solve; applied at every CG iteration.

    While a solve runs, M is fixed, and :meth:`apply` reads no number of a device.
    """

    @abstractmethod
    def refresh(self, op: Operator, step: int) -> None:
        """Take the new point from ``op``; ``step`` seeds whatever is drawn."""

    @abstractmethod
    def damp(self, damping: float, decay: float | Tensor) -> None:
        """Set the lambda and the weight decay c (a number or (P,)) of the system that is solved next."""

    @abstractmethod
    def apply(self, r: Tensor) -> Tensor:
        """``M^-1 r`` for ``r (P,)``."""

    def apply_into(self, r: Tensor, out: Tensor) -> Tensor:
        """``M^-1 r``, in ``out (P,)`` where the preconditioner can do that; other tensors may be returned."""
        return self.apply(r)

    @property
    def active(self) -> bool:
        """Whether M is there after :meth:`refresh`; where it is not, the step goes on without a preconditioner."""
        return True

    runs = 0
    """How often :meth:`refresh` ran the closure with a backward pass, the last time, as a part of every step."""

    _z: Tensor | None = None

    def __call__(self, r: Tensor) -> Tensor:
        """``M^-1 r`` for ``r (P,)``, which on a CPU the next call may overwrite: fresh memory is dear there."""
        if r.device.type != "cpu":
            return self.apply(r)
        if self._z is None or self._z.shape != r.shape or self._z.dtype != r.dtype:
            self._z = torch.empty_like(r)
        return self.apply_into(r, self._z)

    def __repr__(self) -> str:
        names = [name for name in inspect.signature(type(self)).parameters if hasattr(self, name)]
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle: everything but what every call makes anew."""
        return {name: value for name, value in self.__dict__.items() if name != "_z"}

    def watch(self, system: System) -> System:
        """The system as conjugate gradients are to see it, for preconditioners that learn from its products."""
        return system

    def state_dict(self) -> dict[str, Any]:
        """What the next step needs of those before; empty for a preconditioner that every step makes anew."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 - nothing to restore by default
        """Restore :meth:`state_dict`."""


def with_outputs(op: Operator, name: str, batch_dim: int) -> GaussNewton:
    """``op``, if it has outputs with cases along ``batch_dim``.

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
    """``value``, which ``before`` sets.

    Raises:
        RuntimeError: it is not there.
    """
    if value is None:
        raise RuntimeError(f"{before} must come before {now}")
    return value


def mean_decay(decay: float | Tensor) -> float:
    """One number for the weight decay, where M has room for a multiple of the identity alone."""
    return float(decay.mean()) if isinstance(decay, Tensor) else decay


def generator(op: Operator, seed: int) -> torch.Generator:
    """Draws of a step, the same in every process and after a resumption; the user's generator is left alone."""
    return torch.Generator(device=op.device).manual_seed(seed)
