"""The simple recurrence h_t = f(h_{t-1} W + p_t) over a whole sequence, as one node of the autograd graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hfopt import structural
from hfopt.recurrences import segments
from hfopt.recurrences.arguments import check_inputs, checked
from hfopt.recurrences.linear import Maybe, adjoint, apply, step_inputs, tangent
from hfopt.recurrences.nonlinearities import NONLINEARITIES
from hfopt.recurrences.operators import rnn_forward
from hfopt.recurrences.recorded import record


class Recurrence(torch.autograd.Function):
    """(P, X, K, h0, f, preactivations) -> (H,), or (H, A) with a_t = p_t + [h_{t-1}, x_t] K if `preactivations`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        P: Maybe, X: Tensor, K: Tensor, h0: Tensor, nonlinearity: str, preactivations: bool
    ) -> tuple[Tensor, ...]:
        H = rnn_forward(P, X, K, h0, nonlinearity)
        if not preactivations:
            return (H,)
        moved = step_inputs(X, H, h0) @ K
        return H, moved if P is None else P + moved

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, X, K, h0, ctx.nonlinearity, ctx.preactivations = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(X, output[0], h0, K)
        ctx.save_for_forward(X, output[0], h0, K)

    @staticmethod
    def backward(ctx: Any, U: Maybe, Ua: Maybe = None) -> tuple[Maybe, ...]:
        if U is None and Ua is None:
            return (None,) * 6
        return (*_pulled_back(ctx, U, Ua), None, None)

    @staticmethod
    def jvp(ctx: Any, dP: Maybe, dX: Maybe, dK: Maybe, dh0: Maybe, *_: None) -> tuple[Tensor, ...]:
        return tangent((dP, dX, dK, dh0), ctx.saved_tensors, ctx.nonlinearity, ctx.preactivations)


def _pulled_back(ctx: Any, U: Maybe, Ua: Maybe) -> tuple[Maybe, Maybe, Tensor, Tensor]:
    """Cotangents of (P, X, K, h0)."""
    on_P, on_X = ctx.needs_input_grad[:2]
    K = ctx.saved_tensors[3]
    dP, dK, dh0 = adjoint((U, Ua), ctx.saved_tensors, ctx.nonlinearity, on_P or on_X)
    return dP if on_P else None, dP @ K[K.shape[1] :].t() if on_X else None, dK, dh0


def _setup_compiled(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, X, K, h0, ctx.nonlinearity = inputs
    ctx.save_for_backward(X, output, h0, K)


def _backward_compiled(ctx: Any, U: Tensor) -> tuple[Maybe, ...]:
    return (*_pulled_back(ctx, U, None), None)


# torch.compile traces no function with a forward mode of its own; it takes the operator with this backward pass.
rnn_forward.register_autograd(_backward_compiled, setup_context=_setup_compiled)


def _run(P: Maybe, X: Tensor, K: Tensor, h0: Tensor, nonlinearity: str, mask: Maybe) -> Tensor:
    """H (T, B, h); marks the pre-activations if an optimizer looks for them."""
    if h0.dim() == 1:
        h0 = h0.expand(X.shape[1], -1)
    if torch.compiler.is_compiling():
        compiled: Tensor = rnn_forward(P, X, K, h0, nonlinearity)
        return compiled
    if segments.wanted():

        def part(xs: segments.Given, states: segments.Given, Ks: segments.Given) -> segments.Found:
            H = _run(xs[0], xs[1], Ks[0], states[0], nonlinearity, xs[2])
            return (H,), (H[-1],)

        return segments.over_time(part, (P, X, mask), (h0,), (K,))[0][0]
    wanted = structural.wanted()
    found = apply(Recurrence, P, X, K, h0, nonlinearity, wanted)
    H, *A = record(f"simple_{nonlinearity}", (P, X, K, h0), found, len(found))
    if wanted:
        curvature = NONLINEARITIES[nonlinearity].distance(H.detach())
        structural.mark(A[0], curvature, batch_dim=1, mask=mask)
    states: Tensor = H
    return states


def simple_rnn(
    inputs_projected: Tensor,
    weight_hh: Tensor,
    h0: Tensor,
    nonlinearity: str = "tanh",
    mask: Tensor | None = None,
) -> Tensor:
    """Hidden states of a simple recurrent network: h_t = f(h_{t-1} W + p_t) for t = 0..T-1, with h_{-1} = h0.

    A Jacobian-vector product is one tangent pass, a vector-Jacobian product one adjoint pass over the stored states.
    Both can be differentiated again, any number of times in reverse mode and also in forward mode (third derivatives
    by two nested forward modes excepted, which torch does not carry). While an optimizer looks for hidden states
    (structural damping), the pre-activations a_t = h_{t-1} W + p_t are marked with D'', the curvature of their
    distance: 1 - h^2 for tanh, h (1 - h) for sigmoid, 1 for identity, f'(a)^2 (squared distance of h) for relu.

    Args:
        inputs_projected: p (T, B, h), each unit's input at each step, bias included.
        weight_hh: W (h, h); W[i, j] leads from unit i to unit j.
        h0: (B, h), or (h,) for the same start of every sequence.
        nonlinearity: f, one of "tanh", "relu", "sigmoid", "identity".
        mask: (T, B) bool, False beyond a sequence's end. It changes no state: it keeps those steps out of structural
            damping.

    Returns:
        H (T, B, h).

    Raises:
        ValueError: a wrong shape, an empty sequence or an unknown nonlinearity; the message names the argument.
        TypeError: an argument that is no floating-point tensor, or has another dtype or device than the first.

    Reference: Martens & Sutskever, "Learning recurrent neural networks with Hessian-free optimization", ICML 2011.
    """
    P, W, h0 = checked(inputs_projected=inputs_projected, weight_hh=weight_hh, h0=h0).values()
    _check_nonlinearity(nonlinearity)
    if P.dim() != 3 or P.numel() == 0:
        raise ValueError(
            f"inputs_projected has shape {tuple(P.shape)}; it is (T, B, h), steps, sequences and units, none of them 0"
        )
    steps, batch, hidden = P.shape
    _check_shapes(steps, batch, hidden, W, h0, mask)
    return _run(P, P.new_empty(*P.shape[:2], 0), W, h0, nonlinearity, mask)


def simple_rnn_layer(
    inputs: Tensor,
    weight_vh: Tensor,
    weight_hh: Tensor,
    h0: Tensor,
    bias: Tensor | None = None,
    nonlinearity: str = "tanh",
    mask: Tensor | None = None,
) -> Tensor:
    """Hidden states of a simple recurrent network from its inputs: h_t = f(h_{t-1} W_hh + v_t W_vh + b), h_{-1} = h0.

    `simple_rnn(inputs @ weight_vh + bias, weight_hh, h0, ...)` with the projection inside the operator, where it never
    goes through memory; the same in all else.

    Args:
        inputs: v (T, B, V).
        weight_vh: W_vh (V, h).
        weight_hh: W_hh (h, h); W_hh[i, j] leads from unit i to unit j.
        h0: (B, h), or (h,) for the same start of every sequence.
        bias: b (h,), or None.
        nonlinearity: f, one of "tanh", "relu", "sigmoid", "identity".
        mask: (T, B) bool, False beyond a sequence's end; as in `simple_rnn`.

    Returns:
        H (T, B, h).

    Raises:
        ValueError, TypeError: as `simple_rnn`.
    """
    X, K, h0 = layer_point(inputs, weight_vh, weight_hh, h0, bias, nonlinearity, mask)
    return _run(None, X, K, h0, nonlinearity, mask)


def layer_point(
    inputs: Tensor, weight_vh: Tensor, weight_hh: Tensor, h0: Tensor, bias: Maybe, nonlinearity: str, mask: Maybe
) -> tuple[Tensor, Tensor, Tensor]:
    """(X, K, h0) of `simple_rnn_layer`'s arguments, which are checked: X with a column of ones if there is a bias."""
    given = checked("bias", inputs=inputs, weight_vh=weight_vh, weight_hh=weight_hh, h0=h0, bias=bias)
    X, Wx, W, h0, *biases = given.values()
    _check_nonlinearity(nonlinearity)
    check_inputs(X)
    if Wx.dim() != 2 or Wx.shape[0] != X.shape[2]:
        raise ValueError(f"weight_vh has shape {tuple(Wx.shape)}; with the {X.shape[2]} inputs it is ({X.shape[2]}, h)")
    steps, batch, hidden = X.shape[0], X.shape[1], Wx.shape[1]
    _check_shapes(steps, batch, hidden, W, h0, mask)
    for b in biases:
        if b.shape != (hidden,):
            raise ValueError(f"bias has shape {tuple(b.shape)}; with the {hidden} units of weight_vh it is ({hidden},)")
    if biases:
        X = torch.cat((X, X.new_ones(*X.shape[:2], 1)), -1)
    K = torch.cat((W, Wx, *(b.unsqueeze(0) for b in biases)))
    return X, K, h0


def _check_nonlinearity(nonlinearity: str) -> None:
    if nonlinearity not in NONLINEARITIES:
        raise ValueError(f"nonlinearity is {nonlinearity!r}; it is one of {', '.join(map(repr, NONLINEARITIES))}")


def _check_shapes(steps: int, batch: int, hidden: int, W: Tensor, h0: Tensor, mask: Maybe) -> None:
    if W.shape != (hidden, hidden):
        raise ValueError(f"weight_hh has shape {tuple(W.shape)}; with {hidden} hidden units it is {hidden, hidden}")
    if h0.shape not in ((batch, hidden), (hidden,)):
        raise ValueError(f"h0 has shape {tuple(h0.shape)}; here it is {batch, hidden} or ({hidden},)")
    if mask is not None and (mask.shape != (steps, batch) or mask.dtype != torch.bool):
        raise ValueError(f"mask is {mask.dtype} of shape {tuple(mask.shape)}; here it is bool of {steps, batch}")
