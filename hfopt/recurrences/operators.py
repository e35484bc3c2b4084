"""The simple recurrence's forward, tangent and adjoint as torch operators: one node each for transforms and compilers.

`hfopt::rnn_forward`, `hfopt::rnn_tangent` and `hfopt::rnn_adjoint` work on plain tensors and know no derivative; how
each is the derivative of another stands in `hfopt.recurrences.simple` and `hfopt.recurrences.linear`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hfopt.recurrences import backends


@torch.library.custom_op("hfopt::rnn_forward", mutates_args=())
def rnn_forward(P: Tensor | None, X: Tensor, K: Tensor, h0: Tensor, nonlinearity: str) -> Tensor:
    """H (T, B, h) of h_t = f(p_t + [h_{t-1}, x_t] K); P (T, B, h) or None, X (T, B, V), K (h + V, h), h0 (B, h)."""
    return backends.forward(P, X, K, h0, nonlinearity)


@torch.library.custom_op("hfopt::rnn_tangent", mutates_args=())
def rnn_tangent(
    dP: Tensor | None,
    dK: Tensor | None,
    dh0: Tensor | None,
    X: Tensor,
    H: Tensor,
    h0: Tensor,
    K: Tensor,
    nonlinearity: str,
    preactivations: bool,
) -> tuple[Tensor, Tensor]:
    """(R_h, R_a), both (T, B, h), or (T, N, B, h) for N tangents; R_a is empty unless `preactivations`.

    R_a,t = dp_t + [h_{t-1}, x_t] dK + R_h,{t-1} W, R_h,t = f'(a_t) R_a,t, R_h,{-1} = dh0; a None is zero.
    """
    R, Ra = backends.tangent(dP, dK, dh0, X, H, h0, K, nonlinearity, preactivations)
    return R, H.new_empty(0) if Ra is None else Ra


@torch.library.custom_op("hfopt::rnn_adjoint", mutates_args=())
def rnn_adjoint(
    U: Tensor | None,
    Ua: Tensor | None,
    X: Tensor,
    H: Tensor,
    h0: Tensor,
    K: Tensor,
    nonlinearity: str,
    inputs: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dP, dK, dh0) of cotangents U of H and Ua of the pre-activations, (T, B, h) or (T, N, B, h).

    dp_t = f'(a_t) (u_t + dp_{t+1} W') + ua_t, dK = sum_t [h_{t-1}, x_t]' dp_t, dh0 = dp_0 W'; one of U, Ua may be None
    (zero); dP is empty unless `inputs`.
    """
    dP, dK, dh0 = backends.adjoint(U, Ua, X, H, h0, K, nonlinearity, inputs)
    return H.new_empty(0) if dP is None else dP, dK, dh0


@rnn_forward.register_fake
def _(P: Tensor | None, X: Tensor, K: Tensor, h0: Tensor, nonlinearity: str) -> Tensor:
    return K.new_empty(*X.shape[:2], K.shape[1])


@rnn_tangent.register_fake
def _(
    dP: Tensor | None,
    dK: Tensor | None,
    dh0: Tensor | None,
    X: Tensor,
    H: Tensor,
    h0: Tensor,
    K: Tensor,
    nonlinearity: str,
    preactivations: bool,
) -> tuple[Tensor, Tensor]:
    shape = H.shape if dP is None else dP.shape
    return H.new_empty(shape), H.new_empty(shape if preactivations else (0,))


@rnn_adjoint.register_fake
def _(
    U: Tensor | None,
    Ua: Tensor | None,
    X: Tensor,
    H: Tensor,
    h0: Tensor,
    K: Tensor,
    nonlinearity: str,
    inputs: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    given = Ua if U is None else U
    assert given is not None
    dP = H.new_empty(given.shape if inputs else (0,))
    return dP, K.new_empty(*given.shape[1:-2], *K.shape), H.new_empty(given.shape[1:])


# Many vectors at once: where only the vectors are batched, they ride along in one pass over time, (T, N, B, h); where
# the point itself is (an ensemble of networks), there is a pass for each.


def _one_by_one(operator: Callable[..., Any], info: Any, in_dims: tuple[int | None, ...], args: tuple[Any, ...]) -> Any:
    """Call `operator` for each element of the batched arguments and stack the results along dimension 0."""
    columns = [[a] * info.batch_size if d is None else a.unbind(d) for a, d in zip(args, in_dims, strict=True)]
    results = [operator(*row) for row in zip(*columns, strict=True)]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)


def _batched(tensor: Tensor, dim: int | None, size: int, at: int) -> Tensor:
    """`tensor` with its batch dimension, added if it has none, at position `at`."""
    if dim is None:
        return tensor.unsqueeze(at).expand(*tensor.shape[:at], size, *tensor.shape[at:])
    return tensor.movedim(dim, at)


@rnn_forward.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
    P, X, K, h0, nonlinearity = args
    if in_dims[2] is not None:
        return _one_by_one(rnn_forward, info, in_dims, args)
    size = info.batch_size
    P = None if P is None else _batched(P, in_dims[0], size, 1).flatten(1, 2)
    X, h0 = _batched(X, in_dims[1], size, 1).flatten(1, 2), _batched(h0, in_dims[3], size, 0).flatten(0, 1)
    return rnn_forward(P, X, K, h0, nonlinearity).unflatten(1, (size, -1)), 1


@rnn_tangent.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
    dP, dK, dh0, X, H, h0, K, nonlinearity, preactivations = args
    if _at_many_points(in_dims[3:]) or _carries_vectors(dP, in_dims[0]):
        return _one_by_one(rnn_tangent, info, in_dims, args)
    size = info.batch_size
    inputs = None if dP is None else _batched(dP, in_dims[0], size, 1)
    if dK is not None:
        z = torch.cat((torch.cat((h0.unsqueeze(0), H[:-1])), X), -1)
        moved = z.unsqueeze(1) @ _batched(dK, in_dims[1], size, 0)
        inputs = moved if inputs is None else moved + inputs
    if inputs is None:
        inputs = H.new_zeros(()).expand(H.shape[0], size, *H.shape[1:])
    start = None if dh0 is None else _batched(dh0, in_dims[2], size, 0)
    R, Ra = rnn_tangent(inputs, None, start, X, H, h0, K, nonlinearity, preactivations)
    return (R, Ra if preactivations else H.new_empty(size, 0)), (1, 1 if preactivations else 0)


@rnn_adjoint.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
    U, Ua, X, H, h0, K, nonlinearity, inputs = args
    given, dim = (Ua, in_dims[1]) if U is None else (U, in_dims[0])
    if _at_many_points(in_dims[2:]) or _carries_vectors(given, dim):
        return _one_by_one(rnn_adjoint, info, in_dims, args)
    size = info.batch_size
    U, Ua = (None if c is None else _batched(c, d, size, 1) for c, d in ((U, in_dims[0]), (Ua, in_dims[1])))
    dP, dK, dh0 = rnn_adjoint(U, Ua, X, H, h0, K, nonlinearity, inputs)
    return (dP if inputs else H.new_empty(size, 0), dK, dh0), (1 if inputs else 0, 0, 0)


def _at_many_points(dims: tuple[int | None, ...]) -> bool:
    """Whether any of (X, H, h0, K, ...) is batched."""
    return any(d is not None for d in dims)


def _carries_vectors(given: Tensor | None, dim: int | None) -> bool:
    """Whether a tangent or cotangent is (T, N, B, h) already, besides the dimension mapped over."""
    return given is not None and given.dim() - (dim is not None) != 3
