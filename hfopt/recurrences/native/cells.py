"""The compiled tangents and adjoints of the registered cells; forward passes are the cells' own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache

from torch import Tensor

from hfopt.recurrences.generated import Generated
from hfopt.recurrences.native import simple
from hfopt.recurrences.native.generated import Compiled
from hfopt.recurrences.native.passes import (
    Vectors,
    accumulation_steps,
    call,
    contiguous,
    padded,
    parts,
    serves,
    tile,
    total,
)
from hfopt.recurrences.registry import CELLS, Cell, Maybe, Maybes, Passes, Tensors

_F = {"tanh": 0, "sigmoid": 1, "relu": 2}


def _sums(ranges: Sequence[object], many: Vectors, like: Tensor, *sizes: tuple[int, int]) -> list[Tensor]:
    """Zeros (ranges, N, rows, columns) for each of `sizes`."""
    return [like.new_zeros(len(ranges), many.count, *size) for size in sizes]


def _asked(needed: Sequence[bool], *pulled: Maybe) -> list[Tensor]:
    """The cotangents, those not needed as empty tensors."""
    given = next(x for x in pulled if x is not None)
    return [x if wanted and x is not None else given.new_empty(0) for x, wanted in zip(pulled, needed, strict=True)]


class _Compiled(ABC):
    """Passes in C where they serve the tensors, those of the cell itself elsewhere."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell

    def forward(self, arguments: Tensors) -> list[Tensor]:
        """As in `Passes`."""
        return self.cell.forward(arguments)

    def tangent(self, tangents: Maybes, arguments: Tensors, results: Tensors) -> list[Tensor]:
        """As in `Passes`."""
        if not serves(arguments[0]):
            return self.cell.tangent(tangents, arguments, results)
        return self._tangent(tangents, arguments, results)

    def adjoint(self, cotangents: Maybes, arguments: Tensors, results: Tensors, needed: Sequence[bool]) -> list[Tensor]:
        """As in `Passes`."""
        if not serves(arguments[0]):
            return self.cell.adjoint(cotangents, arguments, results, needed)
        return self._adjoint(cotangents, arguments, results, needed)

    @abstractmethod
    def _tangent(self, tangents: Maybes, arguments: Tensors, results: Tensors) -> list[Tensor]:
        """The tangent in C."""

    @abstractmethod
    def _adjoint(
        self, cotangents: Maybes, arguments: Tensors, results: Tensors, needed: Sequence[bool]
    ) -> list[Tensor]:
        """The adjoint in C."""


class _LSTM(_Compiled):
    def _tangent(self, tangents: Maybes, arguments: Tensors, results: Tensors) -> list[Tensor]:
        X, _, h0, _ = arguments
        (steps, batch, V), h = X.shape, h0.shape[1]
        many = Vectors.of(tangents, (3, 2, 2, 2))
        moved = [X.new_empty(many.sequence(steps, batch, h)) for _ in range(2)]
        ranges = parts(batch, 16.0 * steps * batch * many.count * h * (h + V))
        call(
            "lstm_tangent",
            X,
            (steps, batch, h, V, many.count),
            (tile(4 * h * X.itemsize, ranges),),
            [*contiguous((*tangents, *arguments, *results)), *moved],
            ranges,
        )
        return moved

    def _adjoint(
        self, cotangents: Maybes, arguments: Tensors, results: Tensors, needed: Sequence[bool]
    ) -> list[Tensor]:
        X, K, h0, _ = arguments
        (steps, batch, V), h = X.shape, h0.shape[1]
        many = Vectors.of(cotangents, (3, 3))
        ranges = parts(batch, 16.0 * steps * batch * many.count * h * (h + V))
        dX = X.new_empty(many.sequence(steps, batch, V)) if needed[0] else None
        dh0, dc0 = (X.new_empty(many.matrix(batch, h)) for _ in range(2))
        rows, ld = tile(4 * h * X.itemsize, ranges), padded(4 * h)
        (sums,) = _sums(ranges, many, X, (K.shape[0], ld))
        call(
            "lstm_adjoint",
            X,
            (steps, batch, h, V, many.count),
            (rows, ld, accumulation_steps(rows)),
            [*contiguous((*cotangents, *arguments, *results)), dX, dh0, dc0],
            ranges,
            [(part,) for part in sums],
        )
        return _asked(needed, dX, total(sums, many, 4 * h), dh0, dc0)


class _GRU(_Compiled):
    def _tangent(self, tangents: Maybes, arguments: Tensors, results: Tensors) -> list[Tensor]:
        X, K_h, K_x, _, h0 = arguments
        (steps, batch, V), h = X.shape, h0.shape[1]
        many = Vectors.of(tangents, (3, 2, 2, 1, 2))
        R = X.new_empty(many.sequence(steps, batch, h))
        ranges = parts(batch, 12.0 * steps * batch * many.count * h * (h + V))
        call(
            "gru_tangent",
            X,
            (steps, batch, h, V, many.count),
            (tile(3 * h * X.itemsize, ranges),),
            [*contiguous((*tangents, X, K_h, K_x, h0, *results)), R],
            ranges,
        )
        return [R]

    def _adjoint(
        self, cotangents: Maybes, arguments: Tensors, results: Tensors, needed: Sequence[bool]
    ) -> list[Tensor]:
        X, K_h, K_x, _, h0 = arguments
        (steps, batch, V), h = X.shape, h0.shape[1]
        many = Vectors.of(cotangents, (3,))
        ranges = parts(batch, 12.0 * steps * batch * many.count * h * (h + V))
        dX = X.new_empty(many.sequence(steps, batch, V)) if needed[0] else None
        dh0 = X.new_empty(many.matrix(batch, h))
        rows, ld = tile(3 * h * X.itemsize, ranges), padded(4 * h)
        on_h, on_x, on_b = _sums(ranges, many, X, (h, ld), (V, ld), (1, h))
        call(
            "gru_adjoint",
            X,
            (steps, batch, h, V, many.count),
            (rows, ld, accumulation_steps(rows)),
            [*contiguous((*cotangents, X, K_h, K_x, h0, *results)), dX, dh0],
            ranges,
            list(zip(on_h, on_x, on_b, strict=True)),
        )
        # The ring's columns are n, r, z, m: those of x K_x are the first three, torch's order has n last.
        dK_x = total(on_x, many, 3 * h).roll(-h, -1)
        db_n = on_b.sum(0).reshape(many.matrix(h))
        return _asked(needed, dX, total(on_h, many, 3 * h), dK_x, db_n, dh0)


class _MRNN(_Compiled):
    @property
    def _f(self) -> int:
        return _F[self.cell.name.removeprefix("mrnn_").removesuffix("+a")]

    def _tangent(self, tangents: Maybes, arguments: Tensors, results: Tensors) -> list[Tensor]:
        X, W_xf, _, _, h0 = arguments
        (steps, batch, V), h, F = X.shape, h0.shape[1], W_xf.shape[1]
        many = Vectors.of(tangents, (3, 2, 2, 2, 2))
        moved = [X.new_empty(many.sequence(steps, batch, h)) for _ in range(self.cell.outputs)]
        ranges = parts(batch, 8.0 * steps * batch * many.count * h * F)
        call(
            "mrnn_tangent",
            X,
            (steps, batch, h, V, F, many.count),
            (self._f, tile(max(h, F) * X.itemsize, ranges)),
            [
                *contiguous((*tangents, *arguments, results[0], *results[-2:])),
                moved[0],
                moved[1] if len(moved) > 1 else None,
            ],
            ranges,
        )
        return moved

    def _adjoint(
        self, cotangents: Maybes, arguments: Tensors, results: Tensors, needed: Sequence[bool]
    ) -> list[Tensor]:
        X, W_xf, _, K, h0 = arguments
        (steps, batch, V), h, F = X.shape, h0.shape[1], W_xf.shape[1]
        many = Vectors.of(cotangents, (3,) * self.cell.outputs)
        ranges = parts(batch, 8.0 * steps * batch * many.count * h * F)
        dX = X.new_empty(many.sequence(steps, batch, V)) if needed[0] else None
        dh0 = X.new_empty(many.matrix(batch, h))
        rows, ld_h, ld_f = tile(max(h, F) * X.itemsize, ranges), padded(h), padded(F)
        absent = (None,) * (2 - self.cell.outputs)
        on_e, on_g, on_K = _sums(ranges, many, X, (V, ld_f), (h, ld_f), (K.shape[0], ld_h))
        call(
            "mrnn_adjoint",
            X,
            (steps, batch, h, V, F, many.count),
            (self._f, rows, ld_h, ld_f, accumulation_steps(rows)),
            [
                *contiguous((*cotangents, *absent, *arguments, results[0], *results[-2:])),
                dX,
                dh0,
            ],
            ranges,
            list(zip(on_e, on_g, on_K, strict=True)),
        )
        return _asked(needed, dX, total(on_e, many, F), total(on_g, many, F), total(on_K, many, h), dh0)


class _Readout(_Compiled):
    def _point(self, arguments: Tensors, results: Tensors) -> simple.Point:
        X, K, h0, K_o = arguments
        return simple.Point(X, results[-1], h0, K, self.cell.name.removeprefix("readout_").removesuffix("+a"), K_o)

    def _tangent(self, tangents: Maybes, arguments: Tensors, results: Tensors) -> list[Tensor]:
        dX, dK, dh0, dK_o = tangents
        marked = self.cell.outputs > 1
        _, R_a, R_o = simple.tangent(
            self._point(arguments, results),
            dX=dX,
            dK=dK,
            dh0=dh0,
            dK_o=dK_o,
            hidden=False,
            preactivations=marked,
            outputs=True,
        )
        return [x for x in (R_o, R_a) if x is not None]

    def _adjoint(
        self, cotangents: Maybes, arguments: Tensors, results: Tensors, needed: Sequence[bool]
    ) -> list[Tensor]:
        U_o, U_a = (*cotangents, None)[:2]
        pulled = simple.adjoint(self._point(arguments, results), U_a=U_a, U_o=U_o, on_X=needed[0])
        on_K_o = pulled.dK_o
        if on_K_o is None and needed[3]:
            on_K_o = pulled.dK.new_zeros(*pulled.dK.shape[:-2], *arguments[3].shape)
        return _asked(needed, pulled.dX, pulled.dK, pulled.dh0, on_K_o)


_COMPILED: dict[str, type[_Compiled]] = {
    "lstm": _LSTM,
    "gru": _GRU,
    **{f"mrnn_{f}{marked}": _MRNN for f in _F for marked in ("", "+a")},
    **{f"readout_{f}{marked}": _Readout for f in (*_F, "identity") for marked in ("", "+a")},
}


@cache
def cell(name: str) -> Passes | None:
    """The passes of the registered cell of this name, compiled; None if there are none."""
    if name in _COMPILED:
        return _COMPILED[name](CELLS[name])
    traced = CELLS[name]
    return Compiled(traced) if isinstance(traced, Generated) else None
