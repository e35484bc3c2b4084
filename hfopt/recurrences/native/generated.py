"""The compiled passes of a traced cell, with or without a readout."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hfopt.recurrences.generated import Generated
from hfopt.recurrences.native.compile import library
from hfopt.recurrences.native.layout import Layout
from hfopt.recurrences.native.passes import Maybe, Vectors, accumulation_steps, call, contiguous, padded, parts, tile
from hfopt.recurrences.readout import Read
from hfopt.recurrences.registry import Maybes, Tensors

_TYPES = (torch.float32, torch.float64)


class Compiled:
    """Passes in C where they serve the tensors, those in torch's operations elsewhere."""

    def __init__(self, cell: Generated | Read) -> None:
        self.cell, self.base = cell, cell.base if isinstance(cell, Read) else cell
        self.read = isinstance(cell, Read)
        self.layout = Layout(self.base.definition)

    def _library(self, like: Tensor) -> ctypes.CDLL | None:
        if like.device.type != "cpu" or like.dtype not in _TYPES:
            return None
        return library(self.base.definition)

    def _numbers(self, arguments: Tensors, vectors: int) -> tuple[tuple[int, ...], int, float]:
        """Sizes as the passes take them, the columns of the widest product, and operations of a pass."""
        (steps, batch, inputs), own = arguments[0].shape, self._without(arguments)
        p, sizes = self.base.parts(own), self.base.sizes(own)
        widest = max([0, *(K.shape[1] for K in p.K)]) or p.Kx.shape[1]
        flops = 4.0 * steps * batch * vectors * (sum(K.numel() for K in p.K) + p.Kx.numel())
        outputs = arguments[-1].shape[1] if self.read else 0
        lengths = [sizes.get(s, 0) for s in self.layout.sizes]
        return (steps, batch, inputs, vectors, p.Kx.shape[0], outputs, *lengths), widest, flops

    def _without(self, given: Sequence[Any]) -> Sequence[Any]:
        """The cell's own arguments, or one thing for each."""
        return given[:-1] if self.read else given

    def _point(self, arguments: Tensors, results: Tensors) -> list[Maybe]:
        """Arguments, K_o or None, states and outputs, what is kept or None."""
        own = self._own(results)
        kept = own[self.base.outputs :] or [None]
        return [*self._without(arguments), arguments[-1] if self.read else None, *own[: self.base.outputs], *kept]

    def _own(self, results: Sequence[Any]) -> list[Any]:
        """The cell's own results, or one thing for each of them that is shown."""
        return self.cell.of_base(results) if isinstance(self.cell, Read) else list(results)

    def forward(self, arguments: Tensors) -> list[Tensor]:
        """As in `Passes`."""
        X, compiled = arguments[0], self._library(arguments[0])
        if compiled is None or self.read:
            return self.cell.forward(arguments)
        if arguments[1].shape[0] == 0:
            self.base.project(X, arguments[1])
        results = [X.new_empty(shape) for shape in self.base.shapes(arguments)]
        numbers, widest, flops = self._numbers(arguments, 1)
        ranges = parts(X.shape[1], flops / 2)
        settings = (tile(widest * X.itemsize, ranges),)
        call("forward", X, numbers, settings, contiguous(self._point(arguments, results)), ranges, compiled=compiled)
        return results

    def tangent(self, tangents: Maybes, arguments: Tensors, results: Tensors) -> list[Tensor]:
        """As in `Passes`."""
        X, compiled = arguments[0], self._library(arguments[0])
        if compiled is None:
            return self.cell.tangent(tangents, arguments, results)
        moved = self.base.parts(self._without(tangents))
        many = Vectors.of(tangents, [x.dim() for x in arguments])
        numbers, widest, flops = self._numbers(arguments, many.count)
        ranges = parts(X.shape[1], flops)
        found = [X.new_empty(many.sequence(*r.shape)) for r in results[: self.cell.outputs]]
        shown = self._own(found)[: self.base.outputs]
        given: list[Maybe] = [moved.X, moved.Kx, *moved.K, *moved.parameters, *moved.states]
        given += [tangents[-1] if self.read else None, *self._point(arguments, results)]
        tensors = [*contiguous(given), *shown, found[0] if self.read else None]
        call("tangent", X, numbers, (tile(widest * X.itemsize, ranges),), tensors, ranges, compiled=compiled)
        return found

    def adjoint(self, cotangents: Maybes, arguments: Tensors, results: Tensors, needed: Sequence[bool]) -> list[Tensor]:
        """As in `Passes`."""
        X, compiled = arguments[0], self._library(arguments[0])
        if compiled is None:
            return self.cell.adjoint(cotangents, arguments, results, needed)
        p = self.base.parts(self._without(arguments))
        many = Vectors.of(cotangents, (3,) * self.cell.outputs)
        numbers, widest, flops = self._numbers(arguments, many.count)
        ranges = parts(X.shape[1], flops)
        dX = X.new_empty(many.sequence(*X.shape)) if needed[0] else None
        states = [X.new_empty(many.matrix(*s.shape)) for s in p.states]
        sizes = self.base.sizes(self._without(arguments))
        rows, ld = tile(widest * X.itemsize, ranges), padded(sum(sizes[k.size] for k in self.layout.row))
        summed = [p.Kx, *p.K, *p.parameters, *([arguments[-1]] if self.read else [])]
        totals = [X.new_zeros(many.matrix(*w.shape)) for w in summed]
        # A single range of sequences adds to the totals themselves.
        alone = len(ranges) == 1
        sums = [
            t.view(1, many.count, *w.shape) if alone else X.new_zeros(len(ranges), many.count, *w.shape)
            for t, w in zip(totals, summed, strict=True)
        ]
        given = [*self._own(cotangents)[: self.base.outputs], cotangents[0] if self.read else None]
        call(
            "adjoint",
            X,
            numbers,
            (rows, ld, accumulation_steps(rows), padded(arguments[-1].shape[1]) if self.read else 0),
            [*contiguous((*given, *self._point(arguments, results))), dX, *states],
            ranges,
            [(*own, *([] if self.read else [None])) for own in zip(*sums, strict=True)],
            compiled=compiled,
        )
        for t, each in zip(totals, sums, strict=True):
            if not alone:
                torch.sum(each, 0, out=t.view(each.shape[1:]))
        masks = [X.new_zeros(many.matrix(*m.shape)) for m in p.masks]
        read = [totals.pop()] if self.read else []
        found: list[Maybe] = [dX, *totals, *masks, *states, *read]
        return [x if on and x is not None else X.new_empty(0) for x, on in zip(found, needed, strict=True)]


__all__ = ["Compiled"]
