"""The compiled passes of the simple recurrence, tangent and adjoint with or without a readout, on plain tensors.

h_t = f(a_t), a_t = p_t + [h_{t-1}, x_t] K, o_t = [h_t, 1] K_o. Shapes: X (T, B, V), H (T, B, h), h0 (B, h),
K (h + V, h), K_o (h + 1, O); tangents and cotangents may carry N vectors, N before their last two dimensions.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from hfopt.recurrences.native.passes import (
    Maybe,
    Vectors,
    accumulation_steps,
    call,
    contiguous,
    padded,
    parts,
    tile,
    total,
)

_F = {"tanh": 0, "sigmoid": 1, "relu": 2, "identity": 3}


class Point(NamedTuple):
    """Where the passes are linear."""

    X: Tensor
    H: Tensor
    h0: Tensor
    K: Tensor
    nonlinearity: str
    K_o: Maybe = None

    @property
    def outputs(self) -> int:
        return 0 if self.K_o is None else self.K_o.shape[1]


def forward(P: Maybe, X: Tensor, K: Tensor, h0: Tensor, nonlinearity: str) -> Tensor:
    """H (T, B, h): see `loops.forward`; its tanh and logistic function are not torch's, but as exact."""
    steps, batch, V = X.shape
    h = K.shape[1]
    H = K.new_empty(steps, batch, h)
    ranges = parts(batch, 2.0 * steps * batch * h * h)
    sizes, settings = (steps, batch, h, V), (_F[nonlinearity], tile(h * H.itemsize, ranges))
    call("simple_forward", H, sizes, settings, [*contiguous((P, X, h0, K)), H], ranges)
    return H


class Moved(NamedTuple):
    """A tangent's results; what was not asked for is None."""

    R: Maybe
    R_a: Maybe
    R_o: Maybe


def tangent(
    point: Point,
    *,
    dP: Maybe = None,
    dX: Maybe = None,
    dK: Maybe = None,
    dh0: Maybe = None,
    dK_o: Maybe = None,
    hidden: bool = True,
    preactivations: bool = False,
    outputs: bool = False,
) -> Moved:
    """R_a,t = dp_t + dx_t W_x + z_t dK + R_h,{t-1} W, R_h,t = f'(a_t) R_a,t, R_o,t = R_h,t K_o + [h_t, 1] dK_o.

    A None is zero; `hidden`, `preactivations` and `outputs` ask for R_h, R_a and R_o.
    """
    X, H, h0, K, nonlinearity, K_o = point
    steps, batch, h = H.shape
    many = Vectors.of((dP, dX, dK, dh0, dK_o), (3, 3, 2, 2, 2))
    R = H.new_empty(many.sequence(steps, batch, h)) if hidden else None
    R_a = H.new_empty(many.sequence(steps, batch, h)) if preactivations else None
    R_o = H.new_empty(many.sequence(steps, batch, point.outputs)) if outputs else None
    flops = (2.0 if dK is None else 4.0) * steps * batch * many.count * h * h
    ranges = parts(batch, flops)
    call(
        "simple_tangent",
        H,
        (steps, batch, h, X.shape[2], many.count, point.outputs),
        (_F[nonlinearity], tile(h * H.itemsize, ranges)),
        [*contiguous((dP, dX, dK, dh0, dK_o, X, H, h0, K, K_o)), R, R_a, R_o],
        ranges,
    )
    return Moved(R, R_a, R_o)


class Pulled(NamedTuple):
    """An adjoint's results; what was not asked for is None."""

    dP: Maybe
    dX: Maybe
    dK: Tensor
    dh0: Tensor
    dK_o: Maybe


def adjoint(
    point: Point, *, U: Maybe = None, U_a: Maybe = None, U_o: Maybe = None, on_P: bool = False, on_X: bool = False
) -> Pulled:
    """da_t = f'(a_t) (u_t + uo_t K_o' + da_{t+1} W') + ua_t, and what follows from it for every argument.

    A None is zero, one of U, U_a and U_o is there; `on_P` and `on_X` ask for dP = da and dX = da W_x'.
    """
    X, H, h0, K, nonlinearity, K_o = point
    steps, batch, h = H.shape
    many = Vectors.of((U, U_a, U_o), (3, 3, 3))
    ranges = parts(batch, 4.0 * steps * batch * many.count * h * h)
    rows, ld, ld_o = tile(h * H.itemsize, ranges), padded(h), padded(point.outputs)
    dP = H.new_empty(many.sequence(steps, batch, h)) if on_P else None
    dX = H.new_empty(many.sequence(steps, batch, X.shape[2])) if on_X else None
    dh0 = H.new_empty(many.matrix(batch, h))
    sums = H.new_zeros(len(ranges), many.count, K.shape[0], ld)
    read = H.new_zeros(len(ranges), many.count, h + 1, ld_o) if U_o is not None else None
    call(
        "simple_adjoint",
        H,
        (steps, batch, h, X.shape[2], many.count, point.outputs),
        (_F[nonlinearity], rows, ld, ld_o, accumulation_steps(rows)),
        [*contiguous((U, U_a, U_o, X, H, h0, K, K_o)), dP, dX, dh0],
        ranges,
        [(sums[k], None if read is None else read[k]) for k in range(len(ranges))],
    )
    dK = total(sums, many, h)
    return Pulled(dP, dX, dK, dh0, None if read is None else total(read, many, point.outputs))
