"""The simple recurrence h_t = f(h_{t-1} W + p_t) over a whole sequence, as one node of the autograd graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hfopt import structural
from hfopt.recurrences.linear import Maybe, adjoint, apply, before, tangent
from hfopt.recurrences.nonlinearities import NONLINEARITIES
from hfopt.recurrences.operators import rnn_forward


class _Recurrence(torch.autograd.Function):
    """(P, W, h0, f, preactivations) -> (H,), or (H, A) with a_t = p_t + h_{t-1} W if `preactivations`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(P: Tensor, W: Tensor, h0: Tensor, nonlinearity: str, preactivations: bool) -> tuple[Tensor, ...]:
        H = rnn_forward(P, W, h0, nonlinearity)
        return (H, P + before(H, h0) @ W) if preactivations else (H,)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, W, h0, ctx.nonlinearity, ctx.preactivations = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[0], h0, W)
        ctx.save_for_forward(output[0], h0, W)

    @staticmethod
    def backward(ctx: Any, U: Maybe, Ua: Maybe = None) -> tuple[Maybe, ...]:
        if U is None and Ua is None:
            return (None,) * 5
        return (*adjoint((U, Ua), ctx.saved_tensors, ctx.nonlinearity), None, None)

    @staticmethod
    def jvp(ctx: Any, dP: Maybe, dW: Maybe, dh0: Maybe, *_: None) -> tuple[Tensor, ...]:
        return tangent((dP, dW, dh0), ctx.saved_tensors, ctx.nonlinearity, ctx.preactivations)


def _setup_compiled(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, W, h0, ctx.nonlinearity = inputs
    ctx.save_for_backward(output, h0, W)


def _backward_compiled(ctx: Any, U: Tensor) -> tuple[Maybe, ...]:
    return (*adjoint((U, None), ctx.saved_tensors, ctx.nonlinearity), None)


# torch.compile traces no function with a forward mode of its own; it takes the operator with this backward pass.
rnn_forward.register_autograd(_backward_compiled, setup_context=_setup_compiled)


def simple_rnn(
    inputs_projected: Tensor,
    weight_hh: Tensor,
    h0: Tensor,
    nonlinearity: str = "tanh",
    mask: Tensor | None = None,
) -> Tensor:
    """Hidden states of a simple recurrent network: h_t = f(h_{t-1} W + p_t) for t = 0..T-1, with h_{-1} = h0.

    Differentiable any number of times in forward and reverse mode: a Jacobian-vector product is one tangent pass, a
    vector-Jacobian product one adjoint pass over the stored states. While an optimizer looks for hidden states
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
    _check_types(inputs_projected=inputs_projected, weight_hh=weight_hh, h0=h0)
    P, W, h0 = _same_precision(inputs_projected, weight_hh, h0)
    _check(P, W, h0, nonlinearity, mask)
    if h0.dim() == 1:
        h0 = h0.expand(P.shape[1], -1)
    if torch.compiler.is_compiling():
        compiled: Tensor = rnn_forward(P, W, h0, nonlinearity)
        return compiled
    wanted = structural.wanted()
    H, *A = apply(_Recurrence, P, W, h0, nonlinearity, wanted)
    if wanted:
        curvature = NONLINEARITIES[nonlinearity].distance(H.detach())
        structural.mark(A[0], curvature, batch_dim=1, mask=mask)
    states: Tensor = H
    return states


def _check_types(**named: object) -> None:
    for name, given in named.items():
        if not isinstance(given, Tensor):
            raise TypeError(f"{name} is a {type(given).__name__}, not a tensor")
        if not given.is_floating_point():
            raise TypeError(f"{name} has dtype {given.dtype}; give a floating-point tensor")


def _same_precision(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, float32 tensors in the autocast dtype, as for torch's recurrent layers; otherwise as they are."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.dtype == torch.float32 else t for t in tensors)


def _check(P: Tensor, W: Tensor, h0: Tensor, nonlinearity: str, mask: Tensor | None) -> None:
    for name, tensor in {"weight_hh": W, "h0": h0}.items():
        if tensor.dtype != P.dtype or tensor.device != P.device:
            raise TypeError(
                f"{name} is {tensor.dtype} on {tensor.device}, but inputs_projected is {P.dtype} on {P.device}; "
                "bring them together with .to()"
            )
    if nonlinearity not in NONLINEARITIES:
        raise ValueError(f"nonlinearity is {nonlinearity!r}; it is one of {', '.join(map(repr, NONLINEARITIES))}")
    if P.dim() != 3:
        raise ValueError(f"inputs_projected has shape {tuple(P.shape)}; it is (T, B, h): steps, sequences, units")
    steps, batch, hidden = P.shape
    if P.numel() == 0:
        raise ValueError(f"inputs_projected has shape {tuple(P.shape)}: no step, no sequence or no unit is in it")
    if W.shape != (hidden, hidden):
        raise ValueError(
            f"weight_hh has shape {tuple(W.shape)}; with the {hidden} units of inputs_projected it is {hidden, hidden}"
        )
    if h0.shape not in ((batch, hidden), (hidden,)):
        raise ValueError(f"h0 has shape {tuple(h0.shape)}; here it is {batch, hidden} or ({hidden},)")
    if mask is not None and (mask.shape != (steps, batch) or mask.dtype != torch.bool):
        raise ValueError(f"mask is {mask.dtype} of shape {tuple(mask.shape)}; here it is bool of {steps, batch}")
