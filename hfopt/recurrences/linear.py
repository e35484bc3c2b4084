"""Tangent and adjoint of the simple recurrence at a point (H, h0, W): linear maps, each the transpose of the other.

    tangent   (dP, dW, dh0) -> (R_h, R_a):   R_a,t = dp_t + h_{t-1} dW + R_h,{t-1} W,   R_h,t = f'(a_t) R_a,t
    adjoint   (U, U_a) -> (dP, dW, dh0):     dp_t = f'(a_t) G_t + ua_t,   G_t = u_t + dp_{t+1} W',
                                             dW = sum_t h_{t-1}' dp_t,   dh0 = dp_0 W'

Both can be differentiated again, in their arguments and in the point. Gauss-Newton products by cached double backward
differentiate `adjoint` in its arguments once per product, which is one call of the tangent operator and nothing else. How
`adjoint` depends on the point matters to Hessians alone; that part is a node of its own (`_PointOfAdjoint`), which autograd
visits only when the path to the point is asked for.

Reference: Pearlmutter, "Fast exact multiplication by the Hessian", 1994 (R is his operator).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hfopt.recurrences.nonlinearities import NONLINEARITIES
from hfopt.recurrences.operators import rnn_adjoint, rnn_tangent

Maybe = Tensor | None


def before(X: Tensor, first: Maybe = None) -> Tensor:
    """X_{t-1}, t = 0..T-1, with X_{-1} = first, or zero: (T, B, h)."""
    start = torch.zeros_like(X[:1]) if first is None else first.unsqueeze(0)
    return torch.cat((start, X[:-1]))


def after(X: Tensor) -> Tensor:
    """X_{t+1}, t = 0..T-1, with X_T = 0: (T, B, h)."""
    return torch.cat((X[1:], torch.zeros_like(X[:1])))


def correlate(X: Tensor, Y: Tensor) -> Tensor:
    """sum_t X_t' Y_t: (m, n) from X (T, B, m), Y (T, B, n)."""
    return X.reshape(-1, X.shape[-1]).t() @ Y.reshape(-1, Y.shape[-1])


def plus(*terms: Maybe) -> Maybe:
    """The sum of those terms that are there; None if none is."""
    given = [term for term in terms if term is not None]
    return sum(given[1:], start=given[0]) if given else None


def tangent(
    dP: Maybe,
    dW: Maybe,
    dh0: Maybe,
    H: Tensor,
    h0: Tensor,
    W: Tensor,
    nonlinearity: str,
    preactivations: bool,
) -> tuple[Tensor, ...]:
    """(R_h,), or (R_h, R_a) if `preactivations`, each (T, B, h); a None among dP (T, B, h), dW (h, h), dh0 (B, h) is zero."""
    if dP is None and dW is None and dh0 is None:
        return (torch.zeros_like(H),) * (2 if preactivations else 1)
    result: tuple[Tensor, ...] = _Tangent.apply(dP, dW, dh0, H, h0, W, nonlinearity, preactivations)
    return result


def adjoint(
    U: Maybe, Ua: Maybe, H: Tensor, h0: Tensor, W: Tensor, nonlinearity: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(dP (T, B, h), dW (h, h), dh0 (B, h)) of cotangents U (of H) and Ua (of the pre-activations), not both None."""
    zeros = _PointOfAdjoint.apply(U, Ua, H, h0, W, nonlinearity)
    result: tuple[Tensor, Tensor, Tensor] = _Adjoint.apply(U, Ua, *zeros, H, h0, W, nonlinearity)
    return result


def _inputs_of(dP: Maybe, dW: Maybe, dh0: Maybe, R: Tensor, H: Tensor, h0: Tensor, W: Tensor) -> Tensor:
    """R_a of a tangent R_h = R, by products over all steps at once."""
    moved = before(R, dh0) @ W
    if dW is not None:
        moved = moved + before(H, h0) @ dW
    return moved if dP is None else moved + dP


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
        alpha, by_dW, by_dh0 = adjoint(U, Ua, H, h0, W, ctx.nonlinearity)
        by_H = by_h0 = by_W = None
        if any(ctx.needs_input_grad[3:6]):
            # alpha_t is the whole cotangent of R_a,t; that of R_h,t is beta_t = u_t + alpha_{t+1} W', so f'(a_t) has R_a,t beta_t.
            later = after(alpha)
            rate = NONLINEARITIES[ctx.nonlinearity].slope_rate
            if rate is not None:
                beta = later @ W.t() if U is None else U + later @ W.t()
                by_H = rate(H) * _inputs_of(dP, dW, dh0, R, H, h0, W) * beta
            if dW is not None:
                by_H, by_h0 = plus(by_H, later @ dW.t()), alpha[0] @ dW.t()
            by_W = correlate(before(R, dh0), alpha)
        linear = (
            given if argument is not None else None
            for argument, given in zip((dP, dW, dh0), (alpha, by_dW, by_dh0))
        )
        return (*linear, by_H, by_h0, by_W, None, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, ...]:
        dP, dW, dh0, H, h0, W, R = ctx.saved_tensors
        ddP, ddW, ddh0, H_, h0_, W_ = tangents[:6]
        rate = NONLINEARITIES[ctx.nonlinearity].slope_rate
        inputs, y = ddP, None
        if dW is not None and (H_ is not None or h0_ is not None):
            inputs = plus(inputs, before(torch.zeros_like(H) if H_ is None else H_, h0_) @ dW)
        if W_ is not None:
            inputs = plus(inputs, before(R, dh0) @ W_)
        if H_ is not None and rate is not None:
            # R_h changes by y_t = (change of f'(a_t)) R_a,t on top of a tangent whose inputs get y_{t-1} W.
            y = rate(H) * H_ * _inputs_of(dP, dW, dh0, R, H, h0, W)
            inputs = plus(inputs, before(y) @ W)
        Q, *Qa = tangent(inputs, ddW, ddh0, H, h0, W, ctx.nonlinearity, ctx.preactivations)
        return (Q if y is None else Q + y, *Qa)


class _Adjoint(torch.autograd.Function):
    """(U, Ua) -> (dP, dW, dh0), with the four outputs of `_PointOfAdjoint` added to U, dP, dW, dh0.

    They count as zeros, so their values are not read; their cotangents and tangents pass as through any sum. The point
    (H, h0, W) gets no gradient here.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        U, Ua, *_zeros, H, h0, W, nonlinearity = args
        result: tuple[Tensor, Tensor, Tensor] = rnn_adjoint(U, Ua, H, h0, W, nonlinearity)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        U, Ua, *_zeros, H, h0, W, ctx.nonlinearity = inputs
        ctx.given = U is not None, Ua is not None
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(H, h0, W)
        ctx.save_for_forward(H, h0, W)

    @staticmethod
    def backward(ctx: Any, dP: Maybe, dW: Maybe, dh0: Maybe) -> tuple[Maybe, ...]:
        if dP is None and dW is None and dh0 is None:
            return (None,) * 10
        states, inputs = ctx.given
        R, *Ra = tangent(dP, dW, dh0, *ctx.saved_tensors, ctx.nonlinearity, inputs)
        return (R if states else None, Ra[0] if inputs else None, R, dP, dW, dh0, None, None, None, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Maybe, ...]:
        U, Ua, zero_U, zero_P, zero_W, zero_h0 = tangents[:6]
        H, h0, W = ctx.saved_tensors
        U = plus(U, zero_U)
        if U is None and Ua is None:
            U = torch.zeros_like(H)
        changes = adjoint(U, Ua, H, h0, W, ctx.nonlinearity)
        return tuple(plus(*pair) for pair in zip(changes, (zero_P, zero_W, zero_h0), strict=True))


class _PointOfAdjoint(torch.autograd.Function):
    """Carriers (T, B, h), (T, B, h), (h, h), (B, h), by value zero (and never filled), of `adjoint`'s derivatives in H, h0, W.

    With G_t = u_t + dp_{t+1} W', a change of the point changes the adjoint as if
        u_t   had changed by   dp_{t+1} W_' + y_{t+1} W',      y_t = (change of f'(a_t)) G_t,
    and   dp_t by y_t,   dW by sum_t (h_{t-1}' y_t + (change of h_{t-1})' dp_t),   dh0 by y_0 W' + dp_0 W_'   on top.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        U, Ua, _, h0, W, _ = args
        sequence = Ua if U is None else U
        return tuple(torch.empty_like(shape) for shape in (sequence, sequence, W, h0))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.nonlinearity = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, R: Maybe, dP: Maybe, dW: Maybe, dh0: Maybe) -> tuple[Maybe, ...]:
        U, Ua, H, h0, W = ctx.saved_tensors
        if R is None:
            return (None,) * 6
        A, _, _ = adjoint(U, Ua, H, h0, W, ctx.nonlinearity)
        later = after(A)
        by_H = by_h0 = None
        rate = NONLINEARITIES[ctx.nonlinearity].slope_rate
        if rate is not None:
            G = later @ W.t() if U is None else U + later @ W.t()
            by_H = rate(H) * _inputs_of(dP, dW, dh0, R, H, h0, W) * G
        if dW is not None:
            by_H, by_h0 = plus(by_H, later @ dW.t()), A[0] @ dW.t()
        return None, None, by_H, by_h0, correlate(before(R, dh0), A), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, ...]:
        U, Ua, H, h0, W = ctx.saved_tensors
        H_, h0_, W_ = tangents[2:5]
        A, _, _ = adjoint(U, Ua, H, h0, W, ctx.nonlinearity)
        later = after(A)
        on_U, on_P = torch.zeros_like(A), torch.zeros_like(A)
        on_W, on_h0 = torch.zeros_like(W), torch.zeros_like(h0)
        rate = NONLINEARITIES[ctx.nonlinearity].slope_rate
        if H_ is not None and rate is not None:
            y = rate(H) * H_ * (later @ W.t() if U is None else U + later @ W.t())
            on_U, on_P = on_U + after(y) @ W.t(), y
            on_W, on_h0 = correlate(before(H, h0), y), y[0] @ W.t()
        if H_ is not None or h0_ is not None:
            on_W = on_W + correlate(before(torch.zeros_like(H) if H_ is None else H_, h0_), A)
        if W_ is not None:
            on_U, on_h0 = on_U + later @ W_.t(), on_h0 + A[0] @ W_.t()
        return on_U, on_P, on_W, on_h0
