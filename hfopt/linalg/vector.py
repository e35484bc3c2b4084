"""Parameters as one flat vector: theta (P,), its pieces, and inner products in float64."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

# Up to this length every product of an inner product is formed in float64; beyond it, that would cost as much as
# everything else in a CG iteration, and products within blocks are summed in the vectors' own precision. The blocks
# are summed in float64, so that the error relative to sum |a_i b_i| is at most that of one short block: in float32 some
# 1e-7 for a norm and 1e-9 to 1e-8 where signs are mixed.
_EXACT = 1 << 16
_BLOCK = 1 << 14
# Below this sum, single products may have been lost to float32's least numbers (as beyond its largest, to infinity).
_FAITHFUL = 1e-25


def dot(a: Tensor, b: Tensor) -> float:
    """Return ``a'b`` of two flat vectors (P,), summed in float64."""
    if a.dtype == torch.float64:
        return float(torch.dot(a, b))
    if a.device.type == "cpu" and a.numel() > _EXACT:
        blocks = zip(torch.split(a, _BLOCK), torch.split(b, _BLOCK), strict=True)
        total = sum((float(torch.dot(x, y)) for x, y in blocks), 0.0)
        if _FAITHFUL < abs(total) < math.inf:
            return total
    return float(torch.dot(a.double(), b.double()))


def norm(a: Tensor) -> float:
    """Return the Euclidean length of a flat vector (P,), summed in float64."""
    return float(dot(a, a) ** 0.5)


class ParameterVector:
    """The parameters of a model seen as one vector theta (P,); they keep their own storage.

    The flat dtype is the widest of the parameters' and never narrower than float32, so that conjugate gradients run
    in at least single precision whatever the model's precision.

    Raises:
        ValueError: no parameter, parameters on several devices, or a sparse one.
        TypeError: a complex or integer parameter, or one that is sharded over processes.
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        self.params: list[Tensor] = list(params)
        if not self.params:
            raise ValueError("params is empty: no parameter requires a gradient")
        dtype = torch.float32
        for i, p in enumerate(self.params):
            # DTensors have placements, and the flat parameters of FSDP this mark.
            if hasattr(p, "placements") or hasattr(p, "_is_flat_param"):
                raise TypeError(
                    f"params[{i}] is sharded over processes (FSDP, DTensor), but every process must hold the whole "
                    "model: leave it plain or wrap it in DistributedDataParallel"
                )
            if not p.dtype.is_floating_point:
                raise TypeError(
                    f"params[{i}] has dtype {p.dtype}; only real floating-point parameters can be optimized (store "
                    "a complex parameter as torch.view_as_real and rebuild it in the forward pass)"
                )
            if p.layout != torch.strided:
                raise ValueError(f"params[{i}] has layout {p.layout}; only dense (strided) parameters are supported")
            if p.device != self.params[0].device:
                raise ValueError(
                    f"params[0] is on {self.params[0].device} and params[{i}] on {p.device}; all must be on one device"
                )
            dtype = torch.promote_types(dtype, p.dtype)
        self.dtype = dtype
        self.device = self.params[0].device
        self.sizes = [p.numel() for p in self.params]
        self.size = sum(self.sizes)

    def flatten(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Concatenate one tensor per parameter (None counts as zeros) into a new flat vector (P,)."""
        out = torch.empty(self.size, dtype=self.dtype, device=self.device)
        return self.flatten_into(out, tensors)

    def flatten_into(self, out: Tensor, tensors: Sequence[Tensor | None]) -> Tensor:
        """Write one tensor per parameter (None counts as zeros) into ``out`` (P,)."""
        with torch.no_grad():
            # The gradient of nn.Embedding(sparse=True) is sparse.
            dense = [t if t is None or t.layout == torch.strided else t.to_dense() for t in tensors]
            flat = [t.reshape(-1) for t in dense if t is not None]
            if len(flat) == len(self.sizes):
                # One call for all: on small models, what a call costs is what counts.
                return torch.cat(flat, out=out)
            for piece, t in zip(torch.split(out, self.sizes), dense, strict=True):
                if t is None:
                    piece.zero_()
                else:
                    piece.copy_(t.reshape(-1))
        return out

    def views(self, flat: Tensor) -> list[Tensor]:
        """Return the pieces of ``flat`` (P,) in the shapes of the parameters, without copying."""
        return [piece.view(p.shape) for piece, p in zip(torch.split(flat, self.sizes), self.params, strict=True)]

    def cast_views(self, flat: Tensor) -> list[Tensor]:
        """Return the pieces like :meth:`views`, each in its parameter's dtype."""
        return [v if v.dtype == p.dtype else v.to(p.dtype) for v, p in zip(self.views(flat), self.params, strict=True)]

    def snapshot(self) -> list[Tensor]:
        """Return copies of the parameters for :meth:`restore`."""
        return [p.detach().clone() for p in self.params]

    def restore(self, saved: Sequence[Tensor]) -> None:
        """Set the parameters to the very bits of ``saved``, unseen by autograd's version counters."""
        for p, s in zip(self.params, saved, strict=True):
            p.data.copy_(s)

    def move(self, saved: Sequence[Tensor], direction: Tensor, length: float) -> None:
        """Set theta = saved + length * direction, unseen by autograd's version counters.

        A graph recorded at ``saved`` is not to be used until :meth:`restore`; afterwards it is valid again.
        """
        for p, s, d in zip(self.params, saved, self.cast_views(direction), strict=True):
            torch.add(s, d, alpha=length, out=p.data)
