"""Structural damping through the recurrence: which states are marked, with which weight, and the products."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import hessian, jacrev
from torch.nn.functional import binary_cross_entropy
from torch.testing import assert_close

from hfopt import structural
from hfopt.recurrences import simple_rnn
from tests.hfopt.recurrences.plain import FUNCTIONS, NAMES, Calls, like, plain_states, problem

EXACT = {"rtol": 1e-11, "atol": 1e-12}

DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "tanh": lambda h, at: binary_cross_entropy((1 + h) / 2, (1 + at) / 2, reduction="sum"),
    "sigmoid": lambda h, at: binary_cross_entropy(h, at, reduction="sum"),
    "relu": lambda h, at: (h - at).square().sum() / 2,
    "identity": lambda h, at: (h - at).square().sum() / 2,
}


@pytest.mark.parametrize("nonlinearity", NAMES)
def test_marks_preactivations_with_the_curvature_of_the_distance(nonlinearity: str) -> None:
    point = problem()
    with structural.collecting() as states:
        H = simple_rnn(*point, nonlinearity)
    (state,) = states
    expected, A = plain_states(*point, nonlinearity)
    assert_close(H, expected, **EXACT)
    assert_close(state.preactivations, A, **EXACT)
    f, distance = FUNCTIONS[nonlinearity], DISTANCES[nonlinearity]
    for t, b in ((0, 0), (3, 2)):
        a = A[t, b]
        second = hessian(lambda x, a=a: distance(f(x), f(a)))(a)
        assert_close(torch.diag(state.weight[t, b]) * A.shape[1], second, rtol=1e-9, atol=1e-10)


def test_nothing_is_marked_or_worked_out_when_nobody_looks() -> None:
    with structural.collecting(enabled=False) as states, Calls() as calls:
        simple_rnn(*problem())
    assert states == []
    assert calls.count["aten::mm"] == 0


@pytest.mark.parametrize("nonlinearity", NAMES)
def test_damped_product(nonlinearity: str) -> None:
    """J'J + mu J_a' D'' J_a, by one tangent and one adjoint, against explicit matrices of the plain loop."""
    P, W, h0 = problem()
    mu = 0.3
    H, A = plain_states(P, W, h0, nonlinearity)
    J, Ja = (jacrev(lambda w, i=i: plain_states(P, w, h0, nonlinearity)[i])(W).reshape(H.numel(), -1) for i in (0, 1))
    with structural.collecting() as states:
        weights = W.clone().requires_grad_()
        outputs = simple_rnn(P, weights, h0, nonlinearity)
    (state,) = states
    explicit = J.t() @ J + mu * Ja.t() @ (state.weight.reshape(-1, 1) * Ja)
    u = tuple(torch.zeros_like(x, requires_grad=True) for x in (outputs, state.preactivations))
    (g,) = torch.autograd.grad((outputs, state.preactivations), weights, u, create_graph=True)
    (v,) = like((W,), 1)
    with Calls() as calls:
        R, Ra = torch.autograd.grad(g, u, v, retain_graph=True)
        heads = (outputs, state.preactivations)
        (product,) = torch.autograd.grad(heads, weights, (R, mu * state.weight * Ra), retain_graph=True)
    assert calls.recurrent == {"hfopt::sequence_tangent": 1, "hfopt::sequence_adjoint": 1}
    assert_close(product.reshape(-1), explicit @ v.reshape(-1), rtol=1e-6, atol=1e-9)
    assert_close(Ra, (Ja @ v.reshape(-1)).view_as(A), **EXACT)


@pytest.mark.parametrize("nonlinearity", NAMES)
def test_derivatives_with_preactivations(nonlinearity: str) -> None:
    """Functions of the states and of the pre-activations together, to second order, forward mode included."""

    def function(P: Tensor, W: Tensor, h0: Tensor) -> Tensor:
        with structural.collecting() as states:
            H = simple_rnn(P, W, h0, nonlinearity)
        return (H.pow(3) + H * states[0].preactivations.sin()).sum()

    point = tuple(x.requires_grad_() for x in problem(4, 2, 3, seed=5))
    assert torch.autograd.gradcheck(function, point, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, point, check_fwd_over_rev=True)


def test_preactivations_alone() -> None:
    def function(P: Tensor, W: Tensor, h0: Tensor) -> Tensor:
        with structural.collecting() as states:
            simple_rnn(P, W, h0)
        return states[0].preactivations.cos().sum()

    point = tuple(x.requires_grad_() for x in problem(4, 2, 3))
    assert torch.autograd.gradcheck(function, point, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, point, check_fwd_over_rev=True)


def test_mask_keeps_padding_out_of_the_marks() -> None:
    P, W, h0 = problem(5, 3, 4)
    mask = torch.arange(5).unsqueeze(1) < torch.tensor([5, 2, 3])
    with structural.collecting() as states:
        masked = simple_rnn(P, W, h0, mask=mask)
        plain = simple_rnn(P, W, h0)
    assert_close(masked, plain, rtol=0, atol=0)
    assert_close(states[0].weight, states[1].weight * mask.unsqueeze(-1), rtol=0, atol=0)
    assert (states[1].weight > 0).all()
