"""Derivatives of every cell through autograd and torch.func, to second order, and under torch's transforms."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.testing import assert_close

from hfopt.recurrences.operators import sequence_forward
from hfopt.recurrences.sequence import run
from tests.hfopt.recurrences import registry
from tests.hfopt.recurrences.plain import Calls, like
from tests.hfopt.recurrences.registry import whole

EXACT = {"rtol": 1e-11, "atol": 1e-12}
SMALL: dict[str, int] = {"steps": 3, "batch": 2, "inputs": 2, "units": 2, "factors": 2}
TINY: dict[str, int] = {"steps": 3, "batch": 1, "inputs": 1, "units": 2, "factors": 1}
# One of each kind, with and without marks, projected inputs and readouts.
NAMES = ("tanh", "relu+a", "lstm", "gru.read", "gru2014", "mrnn+a", "rhn")
SOME = ("lstm", "gru.read", "mrnn+a")
Function = Callable[..., Any]


def arguments(name: str, sizes: dict[str, int] | None = None, seed: int = 0) -> tuple[Tensor, ...]:
    return registry.arguments(name, seed=seed, **(sizes or {}))


def cell(name: str) -> Function:
    """The registered cell as a function of its arguments, but a K_x without rows."""
    return lambda *x: run(whole(name).name, *x)


def plain(name: str) -> Function:
    return lambda *x: whole(name).plain(x)


def scalar(function: Function) -> Function:
    """A function of the arguments with curvature of its own on top of the outputs'."""

    def of(*x: Tensor) -> Tensor:
        total = x[0].new_zeros(())
        for k, y in enumerate(function(*x)):
            weights = torch.linspace(0.5, 1.5 + k, y.numel(), dtype=y.dtype).view(y.shape)
            total = total + (weights * (y.sin() + 0.3 * y.pow(3))).sum()
        return total

    return of


@pytest.mark.quick(where=lambda name: name in ("lstm", "mrnn+a"))
@pytest.mark.parametrize("name", NAMES)
def test_gradcheck_of_first_and_second_order(name: str) -> None:
    at = tuple(x.requires_grad_() for x in arguments(name, TINY, seed=4))
    assert torch.autograd.gradcheck(cell(name), at, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(scalar(cell(name)), at, check_fwd_over_rev=True)


@pytest.mark.quick(where=lambda name, modes: name in ("lstm", "gru.read", "mrnn+a"))
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("modes", [*itertools.product((jacfwd, jacrev), repeat=2)])
def test_hessian_in_every_order_of_modes(name: str, modes: tuple[Function, Function]) -> None:
    at = arguments(name, SMALL)
    every = tuple(range(len(at)))
    outer, inner = modes
    mine = outer(inner(scalar(cell(name)), every), every)(*at)
    assert_close(mine, hessian(scalar(plain(name)), every)(*at), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_hessian_products_by_double_backward(name: str) -> None:
    at = tuple(x.requires_grad_() for x in arguments(name))
    v = like(at, 1)

    def product(function: Function) -> tuple[Tensor, ...]:
        g = torch.autograd.grad(scalar(function)(*at), at, create_graph=True)
        return torch.autograd.grad(g, at, v)

    assert_close(product(cell(name)), product(plain(name)), **EXACT)


@pytest.mark.parametrize("name", SOME)
def test_third_derivatives_in_reverse_mode(name: str) -> None:
    at = tuple(x.requires_grad_() for x in arguments(name, SMALL))
    v, w = like(at, 1), like(at, 2)

    def third(function: Function) -> tuple[Tensor, ...]:
        g = torch.autograd.grad(scalar(function)(*at), at, create_graph=True)
        Hv = torch.autograd.grad(g, at, v, create_graph=True)
        return torch.autograd.grad(Hv, at, w)

    assert_close(third(cell(name)), third(plain(name)), **EXACT)


@pytest.mark.parametrize("name", SOME)
def test_derivatives_in_one_argument_alone(name: str) -> None:
    at = arguments(name, SMALL)
    for k in range(len(at)):
        mine = jacrev(jacfwd(scalar(cell(name)), k), k)(*at)
        assert_close(mine, hessian(scalar(plain(name)), k)(*at), **EXACT)


@pytest.mark.parametrize("name", SOME)
def test_a_product_by_cached_double_backward_is_one_tangent_and_one_adjoint(name: str) -> None:
    at = tuple(x.requires_grad_() for x in arguments(name))
    outputs = cell(name)(*at)
    u = tuple(torch.zeros_like(y, requires_grad=True) for y in outputs)
    g = torch.autograd.grad(outputs, at, u, create_graph=True)
    v = like(at, 1)
    with Calls() as calls:
        R = torch.autograd.grad(g, u, v, retain_graph=True)
        product = torch.autograd.grad(outputs, at, R, retain_graph=True)
    assert calls.recurrent == {"hfopt::sequence_tangent": 1, "hfopt::sequence_adjoint": 1}
    expected = vjp(plain(name), *at)[1](jvp(plain(name), at, v)[1])
    assert_close(product, expected, **EXACT)


@pytest.mark.parametrize("name", SOME)
def test_many_products_by_cached_double_backward_are_one_pass(name: str) -> None:
    at = tuple(x.requires_grad_() for x in arguments(name))
    outputs = cell(name)(*at)
    u = tuple(torch.zeros_like(y, requires_grad=True) for y in outputs)
    g = torch.autograd.grad(outputs, at, u, create_graph=True)
    many = tuple(torch.stack(vs) for vs in zip(*(like(at, seed) for seed in range(3)), strict=True))
    with Calls() as calls:
        R = vmap(lambda *v: torch.autograd.grad(g, u, v, retain_graph=True))(*many)
        products = vmap(lambda *r: torch.autograd.grad(outputs, at, r, retain_graph=True))(*R)
    assert calls.recurrent == {"hfopt::sequence_tangent": 1, "hfopt::sequence_adjoint": 1}
    for k in range(3):
        v = tuple(m[k] for m in many)
        expected = vjp(plain(name), *at)[1](jvp(plain(name), at, v)[1])
        assert_close(tuple(p[k] for p in products), expected, **EXACT)


# torch's own folding of constants warns of the constants that it has just folded.
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")
@pytest.mark.parametrize("name", SOME)
def test_linearize_is_one_tangent(name: str) -> None:
    at = arguments(name)
    outputs, pushforward = torch.func.linearize(cell(name), *at)
    v = like(at, 1)
    pushforward(*v)  # The first call works out what is constant.
    with Calls() as calls:
        moved = pushforward(*v)
    assert calls.recurrent == {"hfopt::sequence_tangent": 1}
    assert_close((outputs, moved), jvp(plain(name), at, v), **EXACT)


def stacked(name: str, at: tuple[Tensor, ...], given: tuple[int, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.stack([like(at, seed)[i] for seed in range(3)]) for i in given)


@pytest.mark.parametrize("name", SOME)
def test_many_tangents_in_some_arguments_are_one_pass(name: str) -> None:
    at = arguments(name)
    for given in [(k,) for k in range(len(at))] + [(0, 1), tuple(range(len(at)))]:
        many = stacked(name, at, given)

        def product(function: Function, given: tuple[int, ...] = given) -> Function:
            def of(*x: Tensor) -> Any:
                full = list(at)
                for i, xi in zip(given, x, strict=True):
                    full[i] = xi
                return function(*full)

            return vmap(lambda *v: jvp(of, tuple(at[i] for i in given), v)[1])

        with Calls() as calls:
            mine = product(cell(name))(*many)
        assert calls.recurrent["hfopt::sequence_tangent"] == 1
        assert_close(mine, product(plain(name))(*many), **EXACT)


@pytest.mark.parametrize("name", SOME)
def test_many_tangents_of_which_some_are_shared(name: str) -> None:
    at, shared = arguments(name), like(arguments(name), 7)
    (many,) = stacked(name, at, (1,))

    def product(function: Function) -> Any:
        return vmap(lambda v: jvp(function, at, (shared[0], v, *shared[2:]))[1], in_dims=0)(many)

    with Calls() as calls:
        mine = product(cell(name))
    assert calls.recurrent["hfopt::sequence_tangent"] == 1
    assert_close(mine, product(plain(name)), **EXACT)


@pytest.mark.parametrize("name", SOME)
def test_many_cotangents_are_one_pass(name: str) -> None:
    at = arguments(name)
    outputs, pullback = vjp(cell(name), *at)
    us = tuple(torch.stack([like(outputs, seed)[i] for seed in range(4)], 1) for i in range(len(outputs)))
    with Calls() as calls:
        mine = vmap(pullback, in_dims=((1,) * len(outputs),))(us)
    assert calls.recurrent["hfopt::sequence_adjoint"] == 1
    assert_close(mine, vmap(vjp(plain(name), *at)[1], in_dims=((1,) * len(outputs),))(us), **EXACT)


@pytest.mark.parametrize("name", SOME)
def test_many_sequences_and_many_networks(name: str) -> None:
    at = arguments(name, SMALL)
    every = tuple(range(len(at)))
    for dims in ((0,) + (None,) * (len(at) - 1), (None, 1) + (None,) * (len(at) - 2), (0,) * len(at)):
        batched = tuple(x if d is None else torch.stack([x, -0.5 * x], d) for x, d in zip(at, dims, strict=True))

        def gradient(function: Function, dims: tuple[int | None, ...] = dims) -> Function:
            return vmap(torch.func.grad(scalar(function), every), in_dims=dims)

        def values(function: Function, dims: tuple[int | None, ...] = dims) -> Function:
            return vmap(function, in_dims=dims)

        assert_close(values(cell(name))(*batched), values(plain(name))(*batched), **EXACT)
        assert_close(gradient(cell(name))(*batched), gradient(plain(name))(*batched), **EXACT)


@pytest.mark.parametrize("name", SOME)
def test_nested_vmap(name: str) -> None:
    at = arguments(name, SMALL)
    (dK,) = like((torch.empty(2, 3, *at[1].shape, dtype=at[1].dtype),), 2)
    (dX,) = like((torch.empty(2, 3, *at[0].shape, dtype=at[0].dtype),), 3)

    def product(function: Function) -> Any:
        def of(x: Tensor, k: Tensor) -> Any:
            return jvp(lambda *y: function(*y, *at[2:]), at[:2], (x, k))[1]

        return vmap(vmap(of))(dX, dK)

    assert_close(product(cell(name)), product(plain(name)), **EXACT)


@pytest.mark.parametrize("name", SOME)
def test_the_bare_operator_can_be_differentiated_twice(name: str) -> None:
    at = tuple(x.requires_grad_() for x in arguments(name, TINY, seed=4))
    outputs = whole(name).outputs
    assert torch.autograd.gradgradcheck(lambda *x: tuple(sequence_forward(whole(name).name, x)[:outputs]), at)


@pytest.mark.parametrize("name", SOME)
def test_arguments_and_cotangents_of_any_layout(name: str) -> None:
    def turned(x: Tensor) -> Tensor:
        return x.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() > 1 else torch.stack((x, x), -1)[:, 0]

    def results(function: Function) -> tuple[Tensor, ...]:
        at = tuple(turned(x).detach().requires_grad_() for x in arguments(name))
        outputs = function(*at)
        u = tuple(turned(y).requires_grad_() for y in like(outputs, 1))
        g = torch.autograd.grad(outputs, at, u, create_graph=True)
        v = tuple(turned(x) for x in like(at, 2))
        return *outputs, *g, *torch.autograd.grad(g, u, v)

    assert_close(results(cell(name)), results(plain(name)), **EXACT)


@pytest.mark.parametrize("name", SOME)
def test_arguments_are_left_as_they_are(name: str) -> None:
    at = tuple(x.requires_grad_() for x in arguments(name))
    copies = [x.detach().clone() for x in at]
    outputs = cell(name)(*at)
    u = tuple(torch.ones_like(y, requires_grad=True) for y in outputs)
    g = torch.autograd.grad(outputs, at, u, create_graph=True)
    v = tuple(torch.ones_like(x) for x in at)
    first, second = (torch.autograd.grad(g, u, v, retain_graph=True) for _ in range(2))
    assert_close(first, second, rtol=0, atol=0)
    ones = [torch.ones_like(x) for x in (*u, *v)]
    for now, before in zip((*at, *u, *v), (*copies, *ones), strict=True):
        assert torch.equal(now, before)


@pytest.mark.parametrize("name", SOME)
def test_transforms_inside_no_grad(name: str) -> None:
    """What torch.func differentiates is watched, whatever the grad mode around it."""
    at = arguments(name, SMALL)
    every = tuple(range(len(at)))
    expected = hessian(scalar(plain(name)), every)(*at)
    with torch.no_grad():
        for outer, inner in itertools.product((jacfwd, jacrev), repeat=2):
            mine = outer(inner(scalar(cell(name)), every), every)(*at)
            assert_close(mine, expected, rtol=1e-10, atol=1e-11)


def test_torchs_older_way_to_batch_is_refused_and_not_wrong() -> None:
    at = tuple(x.requires_grad_() for x in arguments("lstm"))
    outputs = cell("lstm")(*at)
    us = tuple(torch.stack([like(outputs, seed)[i] for seed in range(3)]) for i in range(2))
    told = r"Batching rule not implemented for hfopt::sequence_adjoint.*is_grads_batched=True.*torch\.vmap\(lambda w"
    with pytest.raises(RuntimeError, match=told):
        torch.autograd.grad(outputs, at, us, is_grads_batched=True)
    one_by_one = [torch.autograd.grad(outputs, at, [u[k] for u in us], retain_graph=True) for k in range(3)]
    found = torch.vmap(lambda *w: torch.autograd.grad(outputs, at, w, retain_graph=True))(*us)  # as it says
    assert_close(found, tuple(map(torch.stack, zip(*one_by_one, strict=True))), rtol=1e-10, atol=1e-11)
