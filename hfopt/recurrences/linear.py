"""Tangent and adjoint of the simple recurrence at a point (X, H, h0, K): linear maps, each the other's transpose.

With z_t = [h_{t-1}, x_t], K (h + V, h), W = K[:h] and W_x = K[h:],

    tangent (dP, dX, dK, dh0) -> (R_h, R_a):   R_a,t = dp_t + dx_t W_x + z_t dK + R_h,{t-1} W,   R_h,t = f'(a_t) R_a,t
    adjoint (U, U_a) -> (dP, dK, dh0):         dp_t = f'(a_t) G_t + ua_t,   G_t = u_t + dp_{t+1} W',
                                               dK = sum_t z_t' dp_t,   dh0 = dp_0 W'   (and dx_t = dp_t W_x')

Both can be differentiated again, in their arguments and in the point. Gauss-Newton products by cached double backward
differentiate the adjoint in its arguments once a product; that is one call of the tangent operator and nothing else,
because what the adjoint's dependence on the point needs has a node of its own (`_Point`), which autograd visits only
when the path to the point is asked for, as a Hessian does.

Reference: Pearlmutter, "Fast exact multiplication by the Hessian", 1994 (R is his operator).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hfopt.recurrences.nonlinearities import NONLINEARITIES
from hfopt.recurrences.operators import rnn_adjoint, rnn_tangent

Maybe = Tensor | None
Point = tuple[Tensor, Tensor, Tensor, Tensor]
Tangents = tuple[Maybe, Maybe, Maybe, Maybe]


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """`function.apply(*args)`."""
    return function.apply(*args)  # type: ignore[no-untyped-call]


def lag(X: Tensor, first: Maybe = None) -> Tensor:
    """X_{t-1} for t = 0..T-1, with X_{-1} = first, or zero: (T, B, h)."""
    start = torch.zeros_like(X[:1]) if first is None else first.unsqueeze(0)
    return torch.cat((start, X[:-1]))


def lead(X: Tensor) -> Tensor:
    """X_{t+1} for t = 0..T-1, with X_T = 0: (T, B, h)."""
    return torch.cat((X[1:], torch.zeros_like(X[:1])))


def step_inputs(X: Tensor, H: Tensor, h0: Maybe) -> Tensor:
    """z_t = [h_{t-1}, x_t]: (T, B, h + V)."""
    return torch.cat((lag(H, h0), X), -1)


def correlate(X: Tensor, Y: Tensor) -> Tensor:
    """The sum over t of X_t' Y_t: (m, n) from X (T, B, m), Y (T, B, n)."""
    return X.reshape(-1, X.shape[-1]).t() @ Y.reshape(-1, Y.shape[-1])


def plus(*terms: Maybe) -> Maybe:
    """The sum of those terms that are there; None if none is."""
    given = [term for term in terms if term is not None]
    return sum(given[1:], start=given[0]) if given else None


def tangent(tangents: Tangents, point: Point, nonlinearity: str, preactivations: bool) -> tuple[Tensor, ...]:
    """(R_h,), or (R_h, R_a) if `preactivations`, each (T, B, h), of tangents (dP, dX, dK, dh0); a None is zero."""
    if all(d is None for d in tangents):
        return (torch.zeros_like(point[1]),) * (2 if preactivations else 1)
    result: tuple[Tensor, ...] = apply(_Tangent, *tangents, *point, nonlinearity, preactivations)
    return result


def adjoint(
    cotangents: tuple[Maybe, Maybe], point: Point, nonlinearity: str, inputs: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dP (T, B, h), dK (h + V, h), dh0 (B, h)) of cotangents (U, U_a), each (T, B, h), not both None (zero).

    Without `inputs` and outside a graph that is being recorded, dP is left out: it is empty then.
    """
    like = cotangents[1] if cotangents[0] is None else cotangents[0]
    assert like is not None
    inputs = inputs or torch.is_grad_enabled()
    carriers = apply(_Point, torch.empty_like(like), *point, nonlinearity)
    result: tuple[Tensor, Tensor, Tensor] = apply(_Adjoint, *cotangents, *carriers, *point, nonlinearity, inputs)
    return result


def _change_of_step_inputs(X_: Maybe, H_: Maybe, h0_: Maybe, point: Point) -> Maybe:
    """The change of z (T, B, h + V) by changes of X, H and h0."""
    if X_ is None and H_ is None and h0_ is None:
        return None
    X, H, _, _ = point
    return step_inputs(torch.zeros_like(X) if X_ is None else X_, torch.zeros_like(H) if H_ is None else H_, h0_)


class _Tangent(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(dP: Maybe, dX: Maybe, *args: Any) -> tuple[Tensor, ...]:
        if dX is not None:
            K = args[5]
            dP = plus(dP, dX @ K[K.shape[1] :])
        R, Ra = rnn_tangent(dP, *args)
        return (R, Ra) if args[-1] else (R,)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.nonlinearity, ctx.preactivations = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, output[0])
        ctx.save_for_forward(*tensors, output[0])

    @staticmethod
    def backward(ctx: Any, U: Maybe, Ua: Maybe = None) -> tuple[Maybe, ...]:
        if U is None and Ua is None:
            return (None,) * 10
        dP, dX, dK, dh0, X, H, h0, K, R = ctx.saved_tensors
        tangents, point = (dP, dX, dK, dh0), (X, H, h0, K)
        A, on_dK, on_dh0 = adjoint((U, Ua), point, ctx.nonlinearity, True)
        by_point: tuple[Maybe, ...] = (None,) * 4
        if any(ctx.needs_input_grad[4:8]):
            by_point = _point_cotangents(tangents, R, U, A, point, ctx.nonlinearity)
        return (
            A if ctx.needs_input_grad[0] else None,
            A @ K[K.shape[1] :].t() if ctx.needs_input_grad[1] else None,
            on_dK if ctx.needs_input_grad[2] else None,
            on_dh0 if ctx.needs_input_grad[3] else None,
            *by_point,
            None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, *changes: Any) -> tuple[Tensor, ...]:
        dP, dX, dK, dh0, X, H, h0, K, R = ctx.saved_tensors
        ddP, ddX, ddK, ddh0, X_, H_, h0_, K_ = changes[:8]
        tangents, point, hidden = (dP, dX, dK, dh0), (X, H, h0, K), K.shape[1]
        inputs, y = ddP, None
        z_ = _change_of_step_inputs(X_, H_, h0_, point)
        if dK is not None and z_ is not None:
            inputs = plus(inputs, z_ @ dK)
        if K_ is not None:
            inputs = plus(inputs, lag(R, dh0) @ K_[:hidden], None if dX is None else dX @ K_[hidden:])
        rate = NONLINEARITIES[ctx.nonlinearity].slope_rate
        if H_ is not None and rate is not None:
            # The change of f'(a_t) adds y_t to R_h,t; the rest is a tangent whose inputs get y_{t-1} W.
            y = rate(H) * H_ * _pretangent(tangents, R, point)
            inputs = plus(inputs, lag(y) @ K[:hidden])
        Q, *Qa = tangent((inputs, ddX, ddK, ddh0), point, ctx.nonlinearity, ctx.preactivations)
        return (Q if y is None else Q + y, *Qa)


class _Adjoint(torch.autograd.Function):
    """(U, U_a, carriers, point) -> (dP, dK, dh0).

    The point gets no gradient here. The carriers' values are not read; their tangents are the point's, and their
    cotangents are what `_Point` needs to work out the point's.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        U, Ua, *_, X, H, h0, K, nonlinearity, inputs = args
        result: tuple[Tensor, Tensor, Tensor] = rnn_adjoint(U, Ua, X, H, h0, K, nonlinearity, inputs)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        U, Ua, *_, X, H, h0, K, ctx.nonlinearity, ctx.inputs = inputs
        ctx.on_preactivations = Ua is not None
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(U, Ua, output[0], X, H, h0, K)
        ctx.save_for_forward(U, Ua, output[0], X, H, h0, K)

    @staticmethod
    def backward(ctx: Any, dP: Maybe, dK: Maybe, dh0: Maybe) -> tuple[Maybe, ...]:
        if dP is None and dK is None and dh0 is None:
            return (None,) * 15
        U, _, A, X, H, h0, K = ctx.saved_tensors
        R, *Ra = tangent((dP, None, dK, dh0), (X, H, h0, K), ctx.nonlinearity, ctx.on_preactivations)
        carried = (None, R, dh0, dK, dP, U, A)
        return (None if U is None else R, *(Ra or (None,)), *carried, *(None,) * 6)

    @staticmethod
    def jvp(ctx: Any, *changes: Any) -> tuple[Maybe, ...]:
        dU, dUa, X_, H_, h0_, K_ = changes[:6]
        U, Ua, A, X, H, h0, K = ctx.saved_tensors
        point, hidden = (X, H, h0, K), K.shape[1]
        if not ctx.inputs:
            A, _, _ = adjoint((U, Ua), point, ctx.nonlinearity, True)
        W, later = K[:hidden], lead(A)
        y = on_K = on_h0 = None
        if K_ is not None:
            dU, on_h0 = plus(dU, later @ K_[:hidden].t()), A[0] @ K_[:hidden].t()
        z_ = _change_of_step_inputs(X_, H_, h0_, point)
        if z_ is not None:
            on_K = correlate(z_, A)
        rate = NONLINEARITIES[ctx.nonlinearity].slope_rate
        if H_ is not None and rate is not None:
            # The change of f'(a_t) adds y_t to dp_t; the rest is an adjoint whose cotangents get y_{t+1} W'.
            G = later @ W.t() if U is None else U + later @ W.t()
            y = rate(H) * H_ * G
            dU = plus(dU, lead(y) @ W.t())
            on_K, on_h0 = plus(on_K, correlate(step_inputs(X, H, h0), y)), plus(on_h0, y[0] @ W.t())
        if dU is None and dUa is None:
            dU = torch.zeros_like(H)
        dP, dK, dh0 = adjoint((dU, dUa), point, ctx.nonlinearity, ctx.inputs)
        return plus(dP, y) if ctx.inputs else dP.new_empty(0), plus(dK, on_K), plus(dh0, on_h0)


class _Point(torch.autograd.Function):
    """Carriers of the derivatives of `adjoint` in its point (X, H, h0, K).

    There is no edge from here to the adjoint's arguments (`like` only has their shape), so a derivative in
    those alone never comes by. What they contribute arrives as the carriers' cotangents.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(like: Tensor, X: Tensor, H: Tensor, h0: Tensor, K: Tensor, nonlinearity: str) -> tuple[Tensor, ...]:
        # Mapped over by vmap as soon as one argument is: cotangents of tensors that are not would be summed.
        mark = sum(x.new_empty(()) for x in (X, H, h0, K)) + like.new_empty(())
        return tuple(mark.new_empty(x.shape) for x in (X, like, h0, K, like, like, like))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, *point, ctx.nonlinearity = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*point)
        ctx.save_for_forward(*point)

    @staticmethod
    def backward(ctx: Any, _: None, *carried: Maybe) -> tuple[Maybe, ...]:
        R, dh0, dK, dP, U, A = carried
        if R is None or A is None:
            return (None,) * 6
        by_point = _point_cotangents((dP, None, dK, dh0), R, U, A, ctx.saved_tensors, ctx.nonlinearity)
        return (None, *by_point, None)

    @staticmethod
    def jvp(ctx: Any, _: Maybe, *changes: Maybe) -> tuple[Tensor, ...]:
        X_, H_, h0_, K_ = (
            torch.zeros_like(x) if d is None else d for d, x in zip(changes[:4], ctx.saved_tensors, strict=True)
        )
        return X_, H_, h0_, K_, *(torch.zeros_like(H_) for _ in range(3))


def _pretangent(tangents: Tangents, R: Tensor, point: Point) -> Tensor:
    """R_a of the tangent with R_h = R, by products over all steps at once."""
    dP, dX, dK, dh0 = tangents
    X, H, h0, K = point
    hidden = K.shape[1]
    moved = lag(R, dh0) @ K[:hidden]
    if dX is not None:
        moved = moved + dX @ K[hidden:]
    if dK is not None:
        moved = moved + step_inputs(X, H, h0) @ dK
    return moved if dP is None else moved + dP


def _point_cotangents(
    tangents: Tangents, R: Tensor, U: Maybe, A: Tensor, point: Point, nonlinearity: str
) -> tuple[Maybe, Maybe, Maybe, Tensor]:
    """Gradient in (X, H, h0, K) of <(U, U_a), tangent(dP, dX, dK, dh0)>, which is that of the adjoint's products.

    R (T, B, h) is R_h of the tangents, A (T, B, h) is dP of the adjoint.
    """
    _, dX, dK, dh0 = tangents
    X, H, _, K = point
    hidden = K.shape[1]
    by_X = by_H = by_h0 = None
    rate = NONLINEARITIES[nonlinearity].slope_rate
    if rate is not None:
        G = lead(A) @ K[:hidden].t()
        by_H = rate(H) * _pretangent(tangents, R, point) * (G if U is None else U + G)
    if dK is not None:
        by_z = A @ dK.t()
        by_lag, by_X = by_z.narrow(-1, 0, hidden), by_z.narrow(-1, hidden, X.shape[2])
        by_H, by_h0 = plus(by_H, lead(by_lag)), by_lag[0]
    by_W = correlate(lag(R, dh0), A)
    by_Wx = by_W.new_zeros(X.shape[2], hidden) if dX is None else correlate(dX, A)
    return by_X, by_H, by_h0, torch.cat((by_W, by_Wx))
