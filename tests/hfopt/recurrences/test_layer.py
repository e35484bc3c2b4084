"""The recurrence with its input projection inside: against the plain loop on projected inputs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacfwd, jacrev, jvp, vmap
from torch.testing import assert_close

from hfopt import structural
from hfopt.recurrences import simple_rnn, simple_rnn_layer
from tests.hfopt.recurrences.plain import NAMES, Calls, like, plain_rnn, plain_states, problem

EXACT = {"rtol": 1e-11, "atol": 1e-12}
Function = Callable[..., Tensor]


def arguments(steps: int = 5, batch: int = 3, hidden: int = 4, inputs: int = 2) -> tuple[Tensor, ...]:
    """(inputs, weight_vh, weight_hh, h0, bias)."""
    _, W, h0 = problem(steps, batch, hidden)
    shapes = ((steps, batch, inputs), (inputs, hidden), (hidden,))
    X, Wx, b = like(tuple(torch.empty(shape, dtype=W.dtype) for shape in shapes), 9)
    return X, Wx, W, h0, b


def plain_layer(X: Tensor, Wx: Tensor, W: Tensor, h0: Tensor, b: Tensor | None, f: str = "tanh") -> Tensor:
    projected = X @ Wx
    return plain_rnn(projected if b is None else projected + b, W, h0, f)


def scalar(layer: Function, nonlinearity: str = "tanh") -> Function:
    def of(*x: Tensor) -> Tensor:
        H = layer(*x, nonlinearity)
        return (torch.linspace(0.5, 1.5, H.numel(), dtype=H.dtype).view(H.shape) * (H.sin() + H.pow(3))).sum()

    return of


@pytest.mark.parametrize("nonlinearity", NAMES)
def test_values_with_and_without_bias(nonlinearity: str) -> None:
    *rest, b = arguments()
    assert_close(simple_rnn_layer(*rest, b, nonlinearity), plain_layer(*rest, b, nonlinearity), **EXACT)
    assert_close(simple_rnn_layer(*rest, None, nonlinearity), plain_layer(*rest, None, nonlinearity), **EXACT)


@pytest.mark.quick(where=lambda nonlinearity: nonlinearity in ("tanh", "relu"))
@pytest.mark.parametrize("nonlinearity", NAMES)
def test_first_and_second_derivatives_in_everything(nonlinearity: str) -> None:
    at = tuple(x.requires_grad_() for x in arguments(4, 2, 3))
    function = scalar(simple_rnn_layer, nonlinearity)
    assert torch.autograd.gradcheck(function, at, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, at, check_fwd_over_rev=True)
    mine = torch.autograd.functional.hessian(function, at)
    assert_close(mine, torch.autograd.functional.hessian(scalar(plain_layer, nonlinearity), at), **EXACT)


@pytest.mark.parametrize("modes", [*itertools.product((jacfwd, jacrev), repeat=2)])
def test_second_derivatives_in_every_order_of_modes(modes: tuple[Callable[..., Function], ...]) -> None:
    at = arguments(3, 2, 2)
    outer, inner = modes
    for i, j in itertools.product(range(5), repeat=2):
        mine = outer(inner(scalar(simple_rnn_layer), i), j)(*at)
        assert_close(mine, jacrev(jacrev(scalar(plain_layer), i), j)(*at), **EXACT)


def test_third_derivatives() -> None:
    at = arguments(3, 2, 2)
    for i, j, k in ((0, 1, 2), (1, 1, 1), (4, 2, 0)):
        mine = jacrev(jacrev(jacrev(scalar(simple_rnn_layer), i), j), k)(*at)
        assert_close(mine, jacrev(jacrev(jacrev(scalar(plain_layer), i), j), k)(*at), **EXACT)


def test_forward_over_a_backward_pass_without_graph() -> None:
    X, Wx, W, h0, b = arguments()
    (v,) = like((W,), 1)

    def product(layer: Function) -> tuple[Tensor | None, ...]:
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(W.clone().requires_grad_(), v)
            weights = Wx.clone().requires_grad_(), dual
            gradient = torch.autograd.grad(scalar(layer)(X, *weights, h0, b), weights)
            return tuple(torch.autograd.forward_ad.unpack_dual(g).tangent for g in gradient)

    assert_close(product(simple_rnn_layer), product(plain_layer), **EXACT)


def test_a_product_is_one_tangent_and_one_adjoint() -> None:
    X, *weights = arguments()
    weights = [x.requires_grad_() for x in weights]
    H = simple_rnn_layer(X, *weights)
    u = torch.zeros_like(H, requires_grad=True)
    g = torch.autograd.grad(H, weights, u, create_graph=True)
    v = like(tuple(weights), 1)
    with Calls() as calls:
        (Jv,) = torch.autograd.grad(g, u, v, retain_graph=True)
        product = torch.autograd.grad(H, weights, Jv, retain_graph=True)
    assert calls.recurrent == {"hfopt::sequence_tangent": 1, "hfopt::sequence_adjoint": 1}
    assert calls.count["aten::mm"] == calls.count["aten::bmm"] == 0
    J = jacrev(lambda *w: plain_layer(X, *w), (0, 1, 2, 3))(*(w.detach() for w in weights))
    J = torch.cat([j.reshape(H.numel(), -1) for j in J], 1)
    flat = torch.cat([x.reshape(-1) for x in v])
    assert_close(Jv.reshape(-1), J @ flat, **EXACT)
    assert_close(torch.cat([x.reshape(-1) for x in product]), J.t() @ (J @ flat), rtol=1e-10, atol=1e-11)


def test_structural_damping_sees_the_whole_input() -> None:
    X, Wx, W, h0, b = arguments()
    with structural.collecting() as states:
        H = simple_rnn_layer(X, Wx, W, h0, b)
    A = plain_states(X @ Wx + b, W, h0)[1]
    assert_close(states[0].preactivations, A, **EXACT)
    assert_close(H, A.tanh(), **EXACT)


@pytest.mark.parametrize("dims", [(1, None, None, None, None), (None, 0, None, None, 0), (0, None, 0, 0, None)])
def test_many_at_once(dims: tuple[int | None, ...]) -> None:
    at = arguments()
    batched = tuple(x if d is None else torch.stack([x, -x], d) for x, d in zip(at, dims, strict=True))

    def gradient(layer: Function) -> Callable[..., Any]:
        return vmap(grad(scalar(layer), (0, 1, 2, 3, 4)), in_dims=dims)

    assert_close(gradient(simple_rnn_layer)(*batched), gradient(plain_layer)(*batched), **EXACT)


def test_many_tangents() -> None:
    at = arguments()
    many = tuple(torch.stack(vs) for vs in zip(*(like(at, seed) for seed in range(3)), strict=True))
    mine = vmap(lambda *v: jvp(simple_rnn_layer, at, v)[1])(*many)
    assert_close(mine, vmap(lambda *v: jvp(plain_layer, at, v)[1])(*many), **EXACT)


@pytest.mark.slow
def test_compiled() -> None:
    at = tuple(x.requires_grad_() for x in arguments())
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: simple_rnn_layer(*x).sin().sum(), fullgraph=True, backend="aot_eager")
    mine = torch.autograd.grad(compiled(*at), at)
    assert_close(mine, torch.autograd.grad(plain_layer(*at).sin().sum(), at), **EXACT)


def test_is_the_recurrence_of_projected_inputs() -> None:
    X, Wx, W, h0, b = (x.float() for x in arguments(50, 20, 30, 3))
    mine, projected = simple_rnn_layer(X, Wx, W, h0, b), simple_rnn(X @ Wx + b, W, h0)
    assert_close(mine, projected, rtol=1e-5, atol=1e-5)


X, WX, W, H0, B = arguments()


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ((X[0], WX, W, H0), ValueError, r"inputs has shape \(3, 2\); it is \(T, B, V\)"),
        ((X[:0], WX, W, H0), ValueError, "inputs has shape .*none of them 0"),
        ((X, WX.t(), W, H0), ValueError, r"weight_vh has shape \(4, 2\); with the 2 inputs"),
        ((X, WX[:, :3], W, H0), ValueError, r"weight_hh has shape \(4, 4\); with 3 hidden"),
        ((X, WX, W, H0[:1]), ValueError, "h0 has shape"),
        ((X, WX, W, H0, B[:2]), ValueError, r"bias has shape \(2,\)"),
        ((X, WX, W, H0, B.float()), TypeError, "bias is torch.float32 .*inputs is torch.float64"),
        ((X.long(), WX, W, H0), TypeError, "inputs has dtype torch.int64"),
        ((X, None, W, H0), TypeError, "weight_vh is a NoneType"),
        ((X, WX, W, H0, None, "elu"), ValueError, "nonlinearity is 'elu'"),
        ((X, WX, W, H0, None, "tanh", torch.ones(2, 2)), ValueError, "mask is"),
    ],
)
def test_errors_name_the_argument(given: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        simple_rnn_layer(*given)
