"""Tangents from differences of the outputs, for models whose backward pass cannot be differentiated itself.

    J v = [z(theta + h v) - z(theta - h v)] / 2h + O(h^2),      h = eps^(1/3) (1 + |theta|) / |v|

The adjoint ``J'w`` is autograd's own. Both are as exact as the model's backward pass and ``eps^(2/3)`` allow (2e-5 in
float32, 4e-11 in float64), and so is the symmetry of ``J' H J``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hfopt.curvature.linearisation import Cost, Maybe, pull_back
from hfopt.linalg import graph
from hfopt.linalg.vector import ParameterVector, norm


class Differences:
    """Two runs of the model for ``J v``, the kept forward graph for ``J'w``; about 2.5 gradients a product."""

    name = "differences"
    cost: Cost | None = None

    def __init__(
        self, outputs: Sequence[Tensor], params: Sequence[Tensor], run: Callable[[], Sequence[Tensor]]
    ) -> None:
        """``run`` computes the outputs again, at the parameters' present values."""
        self.outputs, self.params, self._run = list(outputs), list(params), run
        self._vector = ParameterVector(self.params)
        # Of the least precise among parameters and outputs: below its rounding no difference can be seen.
        self._eps = max(torch.finfo(t.dtype).eps for t in (*self.outputs, *self.params))

    def jvp(self, v: Sequence[Tensor], batched: bool = False) -> Maybe:
        """Return ``J v`` by a central difference; ``batched``: one vector after the other."""
        if batched:
            each = [self.jvp([x[k] for x in v]) for k in range(len(v[0]))]
            return [torch.stack([t for t in column if t is not None]) for column in zip(*each, strict=True)]
        direction = self._vector.flatten(v)
        length = norm(direction)
        if length == 0.0:
            return [torch.zeros_like(z) for z in self.outputs]
        saved = self._vector.snapshot()
        h = self._eps ** (1 / 3) * (1.0 + norm(self._vector.flatten(saved))) / length
        up, down = self._at(saved, direction, h), self._at(saved, direction, -h)
        return [(a - b) / (2 * h) for a, b in zip(up, down, strict=True)]

    def _at(self, saved: list[Tensor], direction: Tensor, h: float) -> list[Tensor]:
        """The outputs at ``theta + h * direction``; the parameters come back to the bit."""
        try:
            self._vector.move(saved, direction, h)
            return [z.detach() for z in self._run()]
        finally:
            self._vector.restore(saved)

    def vjp(self, w: Sequence[Tensor | None], batched: bool = False, structural: float = 0.0) -> Maybe:
        """Return ``J' w`` on the forward graph."""
        return pull_back(self.outputs, self.params, w, batched)

    def column_bytes(self) -> int:
        """Return the bytes of a tangent and a cotangent of everything that the forward graph keeps."""
        return 2 * graph.saved_bytes(self.outputs, self.params)

    def kept_bytes(self) -> int:
        """Return the bytes of the forward graph."""
        return graph.saved_bytes(self.outputs, self.params)
