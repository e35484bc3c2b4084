"""Tangent and adjoint of the simple recurrence at a point (H, h0, W): linear maps, each the other's transpose.

    tangent (dP, dW, dh0) -> (R_h, R_a):   R_a,t = dp_t + h_{t-1} dW + R_h,{t-1} W,   R_h,t = f'(a_t) R_a,t
    adjoint (U, U_a) -> (dP, dW, dh0):     dp_t = f'(a_t) G_t + ua_t,   G_t = u_t + dp_{t+1} W',
                                           dW = sum_t h_{t-1}' dp_t,   dh0 = dp_0 W'

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


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """`function.apply(*args)`."""
    return function.apply(*args)  # type: ignore[no-untyped-call]


def before(X: Tensor, first: Maybe = None) -> Tensor:
    """X_{t-1} for t = 0..T-1, with X_{-1} = first, or zero: (T, B, h)."""
    start = torch.zeros_like(X[:1]) if first is None else first.unsqueeze(0)
    return torch.cat((start, X[:-1]))


def after(X: Tensor) -> Tensor:
    """X_{t+1} for t = 0..T-1, with X_T = 0: (T, B, h)."""
    return torch.cat((X[1:], torch.zeros_like(X[:1])))


def correlate(X: Tensor, Y: Tensor) -> Tensor:
    """The sum over t of X_t' Y_t: (m, n) from X (T, B, m), Y (T, B, n)."""
    return X.reshape(-1, X.shape[-1]).t() @ Y.reshape(-1, Y.shape[-1])


def plus(*terms: Maybe) -> Maybe:
    """The sum of those terms that are there; None if none is."""
    given = [term for term in terms if term is not None]
    return sum(given[1:], start=given[0]) if given else None


def tangent(
    tangents: tuple[Maybe, Maybe, Maybe],
    point: tuple[Tensor, Tensor, Tensor],
    nonlinearity: str,
    preactivations: bool,
) -> tuple[Tensor, ...]:
    """(R_h,), or (R_h, R_a) if `preactivations`, each (T, B, h), of tangents (dP, dW, dh0); a None is zero."""
    if all(d is None for d in tangents):
        return (torch.zeros_like(point[0]),) * (2 if preactivations else 1)
    result: tuple[Tensor, ...] = apply(_Tangent, *tangents, *point, nonlinearity, preactivations)
    return result


def adjoint(
    cotangents: tuple[Maybe, Maybe], point: tuple[Tensor, Tensor, Tensor], nonlinearity: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(dP (T, B, h), dW (h, h), dh0 (B, h)) of cotangents (U, U_a), each (T, B, h), not both None (zero)."""
    like = cotangents[1] if cotangents[0] is None else cotangents[0]
    assert like is not None
    carriers = apply(_Point, torch.empty_like(like), *point, nonlinearity)
    result: tuple[Tensor, Tensor, Tensor] = apply(_Adjoint, *cotangents, *carriers, *point, nonlinearity)
    return result


class _Tangent(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        R, Ra = rnn_tangent(*args)
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
            return (None,) * 8
        dP, dW, dh0, H, h0, W, R = ctx.saved_tensors
        point = H, h0, W
        A, on_W, on_h0 = adjoint((U, Ua), point, ctx.nonlinearity)
        by_point: tuple[Maybe, ...] = (None, None, None)
        if any(ctx.needs_input_grad[3:6]):
            by_point = _point_cotangents((dP, dW, dh0), R, U, A, point, ctx.nonlinearity)
        pairs = ((dP, A), (dW, on_W), (dh0, on_h0))
        return (*(None if given is None else on for given, on in pairs), *by_point, None, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, ...]:
        dP, dW, dh0, H, h0, W, R = ctx.saved_tensors
        ddP, ddW, ddh0, H_, h0_, W_ = tangents[:6]
        inputs, y = ddP, None
        if dW is not None and (H_ is not None or h0_ is not None):
            inputs = plus(inputs, before(torch.zeros_like(H) if H_ is None else H_, h0_) @ dW)
        if W_ is not None:
            inputs = plus(inputs, before(R, dh0) @ W_)
        rate = NONLINEARITIES[ctx.nonlinearity].slope_rate
        if H_ is not None and rate is not None:
            # The change of f'(a_t) adds y_t to R_h,t; the rest is a tangent whose inputs get y_{t-1} W.
            y = rate(H) * H_ * _pretangent((dP, dW, dh0), R, (H, h0, W))
            inputs = plus(inputs, before(y) @ W)
        Q, *Qa = tangent((inputs, ddW, ddh0), (H, h0, W), ctx.nonlinearity, ctx.preactivations)
        return (Q if y is None else Q + y, *Qa)


class _Adjoint(torch.autograd.Function):
    """(U, U_a, carriers, point) -> (dP, dW, dh0).

    The point gets no gradient here. The carriers' values are not read; their tangents are the point's, and their
    cotangents are what `_Point` needs to work out the point's.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        U, Ua, *_, H, h0, W, nonlinearity = args
        result: tuple[Tensor, Tensor, Tensor] = rnn_adjoint(U, Ua, H, h0, W, nonlinearity)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        U, Ua, *_, H, h0, W, ctx.nonlinearity = inputs
        ctx.on_preactivations = Ua is not None
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(U, output[0], H, h0, W)
        ctx.save_for_forward(U, output[0], H, h0, W)

    @staticmethod
    def backward(ctx: Any, dP: Maybe, dW: Maybe, dh0: Maybe) -> tuple[Maybe, ...]:
        if dP is None and dW is None and dh0 is None:
            return (None,) * 12
        U, A, H, h0, W = ctx.saved_tensors
        R, *Ra = tangent((dP, dW, dh0), (H, h0, W), ctx.nonlinearity, ctx.on_preactivations)
        carried = (R, dh0, dW, dP, U, A)
        return (None if U is None else R, *(Ra or (None,)), *carried, None, None, None, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Maybe, ...]:
        dU, dUa, H_, h0_, W_ = tangents[:5]
        U, A, H, h0, W = ctx.saved_tensors
        later = after(A)
        y = on_W = on_h0 = None
        rate = NONLINEARITIES[ctx.nonlinearity].slope_rate
        if W_ is not None:
            dU, on_h0 = plus(dU, later @ W_.t()), A[0] @ W_.t()
        if H_ is not None or h0_ is not None:
            on_W = correlate(before(torch.zeros_like(H) if H_ is None else H_, h0_), A)
        if H_ is not None and rate is not None:
            # The change of f'(a_t) adds y_t to dp_t; the rest is an adjoint whose cotangents get y_{t+1} W'.
            G = later @ W.t() if U is None else U + later @ W.t()
            y = rate(H) * H_ * G
            dU = plus(dU, after(y) @ W.t())
            on_W, on_h0 = plus(on_W, correlate(before(H, h0), y)), plus(on_h0, y[0] @ W.t())
        if dU is None and dUa is None:
            dU = torch.zeros_like(H)
        changes = adjoint((dU, dUa), (H, h0, W), ctx.nonlinearity)
        return tuple(plus(*pair) for pair in zip(changes, (y, on_W, on_h0), strict=True))


class _Point(torch.autograd.Function):
    """Carriers of the derivatives of `adjoint` in its point (H, h0, W).

    There is no edge from here to the adjoint's arguments (`like` only has their shape), so a derivative in
    those alone never comes by. What they contribute arrives as the carriers' cotangents.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(like: Tensor, H: Tensor, h0: Tensor, W: Tensor, nonlinearity: str) -> tuple[Tensor, ...]:
        # Mapped over by vmap as soon as one argument is: cotangents of tensors that are not would be summed.
        mark = sum(x.new_empty(()) for x in (H, h0, W)) + like.new_empty(())
        return tuple(mark.new_empty(x.shape) for x in (like, h0, W, like, like, like))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, *point, ctx.nonlinearity = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*point)
        ctx.save_for_forward(*point)

    @staticmethod
    def backward(ctx: Any, R: Maybe, dh0: Maybe, dW: Maybe, dP: Maybe, U: Maybe, A: Maybe) -> tuple[Maybe, ...]:
        if R is None or A is None:
            return (None,) * 5
        by_point = _point_cotangents((dP, dW, dh0), R, U, A, ctx.saved_tensors, ctx.nonlinearity)
        return (None, *by_point, None)

    @staticmethod
    def jvp(ctx: Any, _: Maybe, *tangents: Maybe) -> tuple[Tensor, ...]:
        H_, h0_, W_ = (
            torch.zeros_like(x) if d is None else d for d, x in zip(tangents[:3], ctx.saved_tensors, strict=True)
        )
        return H_, h0_, W_, *(torch.zeros_like(H_) for _ in range(3))


def _pretangent(tangents: tuple[Maybe, Maybe, Maybe], R: Tensor, point: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """R_a of the tangent with R_h = R, by products over all steps at once."""
    dP, dW, dh0 = tangents
    H, h0, W = point
    moved = before(R, dh0) @ W
    if dW is not None:
        moved = moved + before(H, h0) @ dW
    return moved if dP is None else moved + dP


def _point_cotangents(
    tangents: tuple[Maybe, Maybe, Maybe],
    R: Tensor,
    U: Maybe,
    A: Tensor,
    point: tuple[Tensor, Tensor, Tensor],
    nonlinearity: str,
) -> tuple[Maybe, Maybe, Tensor]:
    """Gradient in (H, h0, W) of <(U, U_a), tangent(dP, dW, dh0)> = <adjoint(U, U_a), (dP, dW, dh0)>.

    R (T, B, h) is R_h of the tangents, A (T, B, h) is dP of the adjoint.
    """
    _, dW, dh0 = tangents
    H, _, W = point
    later = after(A)
    by_H = by_h0 = None
    rate = NONLINEARITIES[nonlinearity].slope_rate
    if rate is not None:
        G = later @ W.t() if U is None else U + later @ W.t()
        by_H = rate(H) * _pretangent(tangents, R, point) * G
    if dW is not None:
        by_H, by_h0 = plus(by_H, later @ dW.t()), A[0] @ dW.t()
    return by_H, by_h0, correlate(before(R, dh0), A)
