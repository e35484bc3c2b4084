"""The space that a step may move in, where it is not all of parameter space."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hfopt.linalg.vector import ParameterVector

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Projection:
    """A symmetric projection P of parameter space, parameter by parameter.

    Attributes:
        mask: (P,), the entries 0 and 1 of its diagonal; 1 throughout for the parameters of ``others``.
        others: (number of a parameter, its projection) where that is no mask.
    """

    vector: ParameterVector
    mask: Tensor
    others: Sequence[tuple[int, Map]] = ()

    def __call__(self, v: Tensor) -> Tensor:
        """``P v`` for ``v (P,)`` or (P, k), a new tensor."""
        return self.apply_(v.clone())

    def apply_(self, v: Tensor) -> Tensor:
        """``P v``, in place of ``v (P,)`` or (P, k)."""
        # Zeros are exact: an entry that is masked does not move by a bit.
        v.mul_(self.mask if v.dim() == 1 else self.mask.unsqueeze(1))
        pieces = torch.split(v, self.vector.sizes)
        for i, hook in self.others:
            p = self.vector.params[i]
            for column in (pieces[i],) if v.dim() == 1 else pieces[i].unbind(1):
                column.copy_(hook(column.reshape(p.shape).to(p.dtype)).reshape(-1))
        return v

    def after(self, inverse: Map) -> Map:
        """``P M^-1`` for a map ``M^-1``: the inverse of a preconditioner, for residuals in the range of P."""

        def projected(r: Tensor) -> Tensor:
            z = inverse(r)
            return self(z) if z is r else self.apply_(z)

        return projected
