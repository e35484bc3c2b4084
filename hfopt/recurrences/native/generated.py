"""The compiled passes of a traced cell."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from hfopt.recurrences.generated import Generated
from hfopt.recurrences.native.compile import library
from hfopt.recurrences.native.layout import Layout
from hfopt.recurrences.native.passes import Maybe, Vectors, accumulation_steps, call, contiguous, padded, parts, tile
from hfopt.recurrences.registry import Maybes, Tensors

_TYPES = (torch.float32, torch.float64)


class Compiled:
    """Passes in C where they serve the tensors, those in torch's operations elsewhere."""

    def __init__(self, cell: Generated) -> None:
        self.cell = cell
        self.layout = Layout(cell.definition)

    def _library(self, like: Tensor) -> ctypes.CDLL | None:
        if like.device.type != "cpu" or like.dtype not in _TYPES:
            return None
        return library(self.cell.definition)

    def _numbers(self, arguments: Tensors, vectors: int) -> tuple[tuple[int, ...], int, float]:
        """Sizes as the passes take them, the length of a row of columns, and operations of a pass."""
        c, (steps, batch, inputs) = self.cell, arguments[0].shape
        sizes = c.sizes(arguments)
        row = sum(sizes[k.size] for k in self.layout.row)
        flops = 4.0 * steps * batch * vectors * sum(K.numel() for K in c.parts(arguments).K)
        flops += 4.0 * steps * batch * vectors * arguments[1].numel()
        return (steps, batch, inputs, vectors, *(sizes.get(s, 0) for s in self.layout.sizes)), row, flops

    def forward(self, arguments: Tensors) -> list[Tensor]:
        """As in `Passes`."""
        X, compiled = arguments[0], self._library(arguments[0])
        if compiled is None:
            return self.cell.forward(arguments)
        results = [X.new_empty(shape) for shape in self.cell.shapes(arguments)]
        numbers, row, flops = self._numbers(arguments, 1)
        ranges = parts(X.shape[1], flops / 2)
        kept = [] if self.cell.definition.kept else [None]
        tensors = [*contiguous(arguments), *results, *kept]
        call("forward", X, numbers, (tile(row * X.itemsize, ranges),), tensors, ranges, compiled=compiled)
        return results

    def tangent(self, tangents: Maybes, arguments: Tensors, results: Tensors) -> list[Tensor]:
        """As in `Passes`."""
        X, compiled = arguments[0], self._library(arguments[0])
        if compiled is None:
            return self.cell.tangent(tangents, arguments, results)
        c, moved = self.cell, self.cell.parts(tangents)
        many = Vectors.of(tangents, [x.dim() for x in arguments])
        numbers, row, flops = self._numbers(arguments, many.count)
        ranges = parts(X.shape[1], flops)
        found = [X.new_empty(many.sequence(*r.shape)) for r in results[: c.outputs]]
        given: list[Maybe] = [moved.X, moved.Kx, *moved.K, *moved.parameters, *moved.states]
        call(
            "tangent",
            X,
            numbers,
            (tile(row * X.itemsize, ranges),),
            [*contiguous((*given, *arguments, *self._point(results))), *found],
            ranges,
            compiled=compiled,
        )
        return found

    def _point(self, results: Tensors) -> list[Maybe]:
        """Results, with a None for what is kept where nothing is."""
        return [*results, *([] if self.cell.definition.kept else [None])]

    def adjoint(self, cotangents: Maybes, arguments: Tensors, results: Tensors, needed: Sequence[bool]) -> list[Tensor]:
        """As in `Passes`."""
        X, compiled = arguments[0], self._library(arguments[0])
        if compiled is None:
            return self.cell.adjoint(cotangents, arguments, results, needed)
        c, p, want = self.cell, self.cell.parts(arguments), self.cell.parts(needed)
        many = Vectors.of(cotangents, (3,) * c.outputs)
        numbers, row, flops = self._numbers(arguments, many.count)
        ranges = parts(X.shape[1], flops)
        dX = X.new_empty(many.sequence(*X.shape)) if want.X else None
        states = [X.new_empty(many.matrix(*s.shape)) for s in p.states]
        rows, ld = tile(row * X.itemsize, ranges), padded(row)
        summed = [p.Kx, *p.K, *p.parameters]
        sums = [X.new_zeros(len(ranges), many.count, *w.shape) for w in summed]
        call(
            "adjoint",
            X,
            numbers,
            (rows, ld, accumulation_steps(rows)),
            [*contiguous((*cotangents, *arguments, *self._point(results))), dX, *states],
            ranges,
            list(zip(*sums, strict=True)),
            compiled=compiled,
        )
        totals = [s.sum(0).reshape(many.matrix(*w.shape)) for s, w in zip(sums, summed, strict=True)]
        masks = [X.new_zeros(many.matrix(*m.shape)) for m in p.masks]
        found: list[Maybe] = [dX, *totals, *masks, *states]
        return [x if on and x is not None else X.new_empty(0) for x, on in zip(found, needed, strict=True)]


__all__ = ["Compiled"]
