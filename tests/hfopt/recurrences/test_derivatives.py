"""The recurrence's derivatives against a plain loop, finite differences and the definition of an adjoint."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import jacfwd, jacrev, jvp, vjp
from torch.testing import assert_close

from hfopt.recurrences import simple_rnn
from tests.hfopt.recurrences.plain import NAMES, Calls, dot, like, plain_rnn, problem

EXACT = {"rtol": 1e-11, "atol": 1e-12}
Function = Callable[..., Tensor]


def scalar(rnn: Function, nonlinearity: str) -> Function:
    """A function of (P, W, h0) with curvature of its own on top of the states'."""

    def of(P: Tensor, W: Tensor, h0: Tensor) -> Tensor:
        H = rnn(P, W, h0, nonlinearity)
        weights = torch.linspace(0.5, 1.5, H.numel(), dtype=H.dtype).view(H.shape)
        return (weights * (H.sin() + 0.3 * H.pow(3))).sum()

    return of


@pytest.mark.parametrize("nonlinearity", NAMES)
@pytest.mark.parametrize("sizes", [(6, 3, 4), (1, 2, 3), (5, 1, 1), (40, 2, 3)])
def test_values(nonlinearity: str, sizes: tuple[int, int, int]) -> None:
    point = problem(*sizes)
    assert_close(simple_rnn(*point, nonlinearity), plain_rnn(*point, nonlinearity), **EXACT)


@pytest.mark.parametrize("nonlinearity", NAMES)
def test_tangents_and_adjoints(nonlinearity: str) -> None:
    point = problem()
    v = like(point, 1)
    H, tangent = jvp(lambda *x: simple_rnn(*x, nonlinearity), point, v)
    expected, expected_tangent = jvp(lambda *x: plain_rnn(*x, nonlinearity), point, v)
    assert_close(H, expected, **EXACT)
    assert_close(tangent, expected_tangent, **EXACT)
    (u,) = like((H,), 2)
    adjoint = vjp(lambda *x: simple_rnn(*x, nonlinearity), *point)[1](u)
    assert_close(adjoint, vjp(lambda *x: plain_rnn(*x, nonlinearity), *point)[1](u), **EXACT)
    assert_close(dot((u,), (tangent,)), dot(adjoint, v), **EXACT)


@pytest.mark.parametrize("argument", [0, 1, 2])
def test_tangents_and_adjoints_in_one_argument_alone(argument: int) -> None:
    point = problem()
    assert_close(jacfwd(simple_rnn, argument)(*point), jacfwd(plain_rnn, argument)(*point), **EXACT)
    assert_close(jacrev(simple_rnn, argument)(*point), jacrev(plain_rnn, argument)(*point), **EXACT)


@pytest.mark.parametrize("nonlinearity", NAMES)
def test_finite_differences(nonlinearity: str) -> None:
    point = problem()
    v = like(point, 3)
    _, tangent = jvp(lambda *x: simple_rnn(*x, nonlinearity), point, v)
    eps = 1e-6

    def shifted(sign: float) -> Tensor:
        return simple_rnn(*(x + sign * eps * d for x, d in zip(point, v, strict=True)), nonlinearity)

    assert_close(tangent, (shifted(1) - shifted(-1)) / (2 * eps), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("nonlinearity", NAMES)
def test_gauss_newton_matrix(nonlinearity: str) -> None:
    P, W, h0 = problem(5, 3, 4)
    _, jacobian = jvp_and_rows(lambda w: plain_rnn(P, w, h0, nonlinearity), W)
    weights = W.clone().requires_grad_()
    H = simple_rnn(P, weights, h0, nonlinearity)
    u = torch.zeros_like(H, requires_grad=True)
    (g,) = torch.autograd.grad(H, weights, u, create_graph=True)
    products = []
    for basis in torch.eye(W.numel(), dtype=W.dtype):
        (Jv,) = torch.autograd.grad(g, u, basis.view_as(W), retain_graph=True)
        (JtJv,) = torch.autograd.grad(H, weights, Jv, retain_graph=True)
        products.append(JtJv.reshape(-1))
    assert_close(torch.stack(products), jacobian.t() @ jacobian, rtol=1e-10, atol=1e-11)


def jvp_and_rows(function: Callable[[Tensor], Tensor], W: Tensor) -> tuple[Tensor, Tensor]:
    """The value and the Jacobian (values, entries of W), from reverse mode through the plain loop."""
    value = function(W)
    return value, jacrev(function)(W).reshape(value.numel(), W.numel())


@pytest.mark.parametrize("nonlinearity", NAMES)
def test_gradcheck_of_first_and_second_order(nonlinearity: str) -> None:
    point = tuple(x.requires_grad_() for x in problem(3, 2, 2, seed=5))
    function = scalar(simple_rnn, nonlinearity)
    assert torch.autograd.gradcheck(function, point, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, point, check_fwd_over_rev=True)


@pytest.mark.parametrize("nonlinearity", NAMES)
def test_hessian_by_double_backward(nonlinearity: str) -> None:
    point = problem(5, 2, 3)
    mine = torch.autograd.functional.hessian(scalar(simple_rnn, nonlinearity), point)
    theirs = torch.autograd.functional.hessian(scalar(plain_rnn, nonlinearity), point)
    assert_close(mine, theirs, **EXACT)


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("modes", [*itertools.product((jacfwd, jacrev), repeat=2)])
def test_hessian_in_every_order_of_modes(nonlinearity: str, modes: tuple[Callable[..., Function], ...]) -> None:
    point = problem(4, 2, 2)
    outer, inner = modes
    for i, j in itertools.product(range(3), repeat=2):
        mine = outer(inner(scalar(simple_rnn, nonlinearity), i), j)(*point)
        assert_close(mine, jacrev(jacrev(scalar(plain_rnn, nonlinearity), i), j)(*point), **EXACT)


@pytest.mark.parametrize("outer", [jacfwd, jacrev])
def test_third_derivatives(outer: Callable[..., Function]) -> None:
    point = problem(3, 2, 2)
    mine = outer(jacrev(jacrev(scalar(simple_rnn, "tanh"), 1), 1), 1)(*point)
    assert_close(mine, jacrev(jacrev(jacrev(scalar(plain_rnn, "tanh"), 1), 1), 1)(*point), **EXACT)


def test_third_derivatives_by_backward() -> None:
    def third(rnn: Function) -> tuple[Tensor, ...]:
        P, W, h0 = (x.requires_grad_() for x in problem(4, 2, 3))
        (first,) = torch.autograd.grad(scalar(rnn, "sigmoid")(P, W, h0), P, create_graph=True)
        (second,) = torch.autograd.grad(first.sin().sum(), W, create_graph=True)
        return torch.autograd.grad(second.sin().sum(), (P, W, h0))

    assert_close(third(simple_rnn), third(plain_rnn), **EXACT)


def test_forward_over_a_backward_pass_without_graph() -> None:
    """Dual numbers through an ordinary backward pass, in which autograd records nothing."""
    P, W, h0 = problem()
    (v,) = like((W,), 1)

    def product(rnn: Function) -> Tensor:
        with torch.autograd.forward_ad.dual_level():
            weights = torch.autograd.forward_ad.make_dual(W.clone().requires_grad_(), v)
            (g,) = torch.autograd.grad(scalar(rnn, "tanh")(P, weights, h0), weights)
            tangent = torch.autograd.forward_ad.unpack_dual(g).tangent
        assert tangent is not None
        return tangent

    assert_close(product(simple_rnn), product(plain_rnn), **EXACT)


def test_cached_double_backward_is_one_operator_a_product() -> None:
    P, W, h0 = (x.requires_grad_() for x in problem())
    with Calls() as calls:
        H = simple_rnn(P, W, h0)
    assert calls.recurrent == {"hfopt::sequence_forward": 1}
    u = torch.zeros_like(H, requires_grad=True)
    with Calls() as calls:
        g = torch.autograd.grad(H, (P, W, h0), u, create_graph=True)
    assert calls.recurrent == {"hfopt::sequence_adjoint": 1}
    v = like((P, W, h0), 1)
    with Calls() as calls:
        (Jv,) = torch.autograd.grad(g, u, v, retain_graph=True)
    assert calls.recurrent == {"hfopt::sequence_tangent": 1}
    # Nothing of the second order is worked out on the way: no product of matrices outside the operator.
    assert calls.count["aten::mm"] == calls.count["aten::bmm"] == calls.count["aten::cat"] == 0
    with Calls() as calls:
        torch.autograd.grad(H, (P, W, h0), Jv, retain_graph=True)
    assert calls.recurrent == {"hfopt::sequence_adjoint": 1}


@pytest.mark.parametrize("nonlinearity", NAMES)
def test_float32(nonlinearity: str) -> None:
    exact, rounded = problem(30, 5, 8), problem(30, 5, 8, dtype=torch.float32)

    def both(point: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        v = like(problem(30, 5, 8), 1)
        H, tangent = jvp(lambda *x: simple_rnn(*x, nonlinearity), point, tuple(d.to(point[0].dtype) for d in v))
        return H, tangent, *vjp(lambda *x: simple_rnn(*x, nonlinearity), *point)[1](torch.ones_like(H))

    for mine, reference in zip(both(rounded), both(exact), strict=True):
        assert mine.dtype == torch.float32
        assert (mine - reference).norm() <= 2e-5 * reference.norm()
