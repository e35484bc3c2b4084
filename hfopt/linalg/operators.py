"""Symmetric linear maps on parameter space: the interface of every curvature matrix, and added damping."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from hfopt.linalg.cuda_graphs import origin
from hfopt.linalg.processes import Processes
from hfopt.linalg.projection import Projection
from hfopt.linalg.vector import ParameterVector
from hfopt.linalg.watching import product_made


class Operator(ABC):
    """A symmetric linear map on parameter space.

    ``op @ v`` takes a flat vector (P,), many of them as columns (P, k), or a list of tensors shaped like the
    parameters (with a further dimension, the last, for k vectors), and returns the same kind.
    ``products`` counts the vectors multiplied so far.
    """

    has_structural = False

    def __init__(self, vector: ParameterVector) -> None:
        self.vector = vector
        self.products = 0

    @property
    def shape(self) -> tuple[int, int]:
        """(P, P)."""
        return self.vector.size, self.vector.size

    @property
    def device(self) -> torch.device:
        """The parameters' device."""
        return self.vector.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of flat vectors."""
        return self.vector.dtype

    @abstractmethod
    def multiply(self, v: Tensor, out: Tensor | None = None, *, structural: float = 0.0) -> Tensor:
        """Return the product with one flat vector (P,), written to ``out`` if given.

        ``structural`` adds that multiple of the structural-damping matrix S, for operators that have one
        (``has_structural``).
        """

    def multiply_many(self, v: Tensor, *, structural: float = 0.0) -> Tensor:
        """Return the products with the columns of ``v (P, k)``, one by one unless the operator can batch them."""
        return torch.stack([self.multiply(column, structural=structural) for column in v.unbind(1)], 1)

    def unrecordable(self) -> str | None:
        """Return why products cannot be recorded as a CUDA graph on the current stream, as far as known beforehand."""
        return None

    @overload
    def __matmul__(self, v: Tensor) -> Tensor: ...
    @overload
    def __matmul__(self, v: Sequence[Tensor]) -> list[Tensor]: ...
    def __matmul__(self, v: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
        """Return ``op v``.

        Raises:
            ValueError: another shape, dtype or device than the parameters'.
        """
        if isinstance(v, Tensor):
            self._check(v)
            if v.dim() == 1:
                return self.multiply(v)
            return self.multiply_many(v) if v.shape[1] else v.clone()
        tensors = list(v)
        shapes, given = [tuple(p.shape) for p in self.vector.params], [tuple(t.shape) for t in tensors]
        if given == shapes:
            return self.vector.cast_views(self.multiply(self.vector.flatten(tensors)))
        k = given[0][-1] if given and given[0] else 0
        if given != [(*shape, k) for shape in shapes]:
            raise ValueError(
                f"v has tensors of shapes {given}, but the parameters {shapes}; many vectors have one more dimension, "
                "the last, in all tensors"
            )
        flat = [t.reshape(p.numel(), k).to(self.dtype) for t, p in zip(tensors, self.vector.params, strict=True)]
        found = torch.split(self @ torch.cat(flat), self.vector.sizes)
        pairs = zip(found, self.vector.params, strict=True)
        return [piece.reshape(*p.shape, k).to(p.dtype) for piece, p in pairs]

    def _check(self, v: Tensor) -> None:
        if v.dim() not in (1, 2) or v.shape[0] != self.vector.size:
            raise ValueError(f"v has shape {tuple(v.shape)}, but must be (P,) or (P, k) with P = {self.vector.size}")
        if v.dtype != self.dtype or v.device != self.device:
            raise ValueError(f"v is {v.dtype} on {v.device}, but the parameters are {self.dtype} on {self.device}")

    def to_dense(self) -> Tensor:
        """Return the matrix (P, P), by P products; for tests and tiny models."""
        return self @ torch.eye(self.vector.size, dtype=self.dtype, device=self.device)

    def damped(self, damping: float, structural: float = 0.0, decay: float | Tensor = 0.0) -> Damped:
        """Return ``op + damping (I + structural S) + decay``; see :class:`Damped`."""
        return Damped(self, damping, structural, decay)


class Damped(Operator):
    """``A = B + lambda I + lambda mu S + diag(c)``, S the structural-damping matrix of B; one pass for all.

    Args:
        base: the operator B.
        damping: lambda >= 0.
        structural: mu >= 0; needs a base that was built with ``structural=True``.
        decay: c >= 0, the curvature of an L2 penalty ``c/2 |theta|^2``: a number, or a flat vector (P,).
    """

    def __init__(self, base: Operator, damping: float, structural: float = 0.0, decay: float | Tensor = 0.0) -> None:
        super().__init__(base.vector)
        if structural and not base.has_structural:
            raise ValueError(
                f"structural damping needs a Gauss-Newton or Fisher operator built with structural=True, not this "
                f"{type(base).__name__}"
            )
        if not damping >= 0 or not structural >= 0:
            raise ValueError(f"damping and structural must not be negative, but are {damping} and {structural}")
        self.base, self.damping, self.structural, self.decay = base, damping, structural, decay

    def __repr__(self) -> str:
        decay = "(P,)" if isinstance(self.decay, Tensor) else self.decay
        return f"Damped({self.base!r}, damping={self.damping}, structural={self.structural}, decay={decay})"

    def multiply(self, v: Tensor, out: Tensor | None = None, *, structural: float = 0.0) -> Tensor:
        """Return ``B v + lambda v + lambda mu S v + c v``."""
        self.products += 1
        product_made()
        out = self.base.multiply(v, out, structural=structural + self.damping * self.structural)
        return self._add_diagonal(v, out)

    def multiply_many(self, v: Tensor, *, structural: float = 0.0) -> Tensor:
        """Return the same for the columns of ``v (P, k)``, in one pass where the base operator has one."""
        self.products += v.shape[1]
        out = self.base.multiply_many(v, structural=structural + self.damping * self.structural)
        return self._add_diagonal(v, out)

    def unrecordable(self) -> str | None:
        """Return what the base says."""
        return self.base.unrecordable()

    def _add_diagonal(self, v: Tensor, out: Tensor) -> Tensor:
        if isinstance(self.decay, Tensor):
            decay = self.decay if v.dim() == 1 else self.decay.unsqueeze(1)
            return out.add_(v, alpha=self.damping).addcmul_(v, decay)
        return out.add_(v, alpha=self.damping + self.decay)


class ClosureOperator(Operator):
    """Common part of operators built from a closure: parameters, the loss and its gradient at the point."""

    loss: Tensor  # 0-dim, detached
    gradient: Tensor  # flat (P,)
    result: Any  # what an optimizer's step returns for this run of the closure
    projection: Projection | None = None  # what the parameters' gradient hooks are

    def __init__(self, params: Iterable[Tensor], processes: Processes | None = None) -> None:
        if isinstance(params, Tensor):
            raise TypeError("params must be an iterable of tensors, not one tensor; write [tensor]")
        super().__init__(ParameterVector(p for p in params if p.requires_grad))
        self.origin = origin(self.vector.params)
        self.processes = processes
        self.unit = 1.0  # 1/s where the closure's loss is s times what it means

    @property
    def params(self) -> list[Tensor]:
        """The parameters theta that require a gradient."""
        return self.vector.params

    def unrecordable(self) -> str | None:
        """Return a reason that lies in other processes, or in where the graph was built."""
        if self.processes is not None:
            return "products are means over several processes"
        return None if self.origin is None else self.origin.obstacle()

    def project(self, v: Tensor) -> Tensor:
        """``P v`` for ``v (P,)`` or (P, k), P the projection that the parameters' gradient hooks are; else v itself."""
        return v if self.projection is None else self.projection(v)

    def _loss_of_all(self, total: Tensor) -> Tensor:
        """The loss, of all processes and without its scaling."""
        if self.unit == 1.0 and self.processes is None:
            return total.detach()
        value = float(total.detach()) * self.unit
        value = value if self.processes is None else self.processes.mean(value)
        return torch.tensor(value, dtype=torch.float64, device=self.device)

    def _of_all(self, share: Tensor) -> Tensor:
        """Reduce a contribution of this process to the loss of all processes, in place."""
        if self.unit != 1.0:
            share.mul_(self.unit)
        return share if self.processes is None else self.processes.mean_(share)
