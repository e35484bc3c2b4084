"""The recurrence under torch's transforms: one node for each, many vectors and many networks at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import jacrev, jvp, vjp, vmap
from torch.fx import GraphModule
from torch.testing import assert_close

from hfopt.recurrences import simple_rnn
from tests.hfopt.recurrences.plain import Calls, like, plain_rnn, problem

EXACT = {"rtol": 1e-11, "atol": 1e-12}


# torch's own folding of constants warns of the constants that it has just folded.
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")
def test_linearize_is_one_tangent() -> None:
    P, W, h0 = problem()
    H, pushforward = torch.func.linearize(lambda p, w: simple_rnn(p, w, h0), P, W)
    v = like((P, W), 1)
    pushforward(*v)  # The first call works out what is constant.
    with Calls() as calls:
        tangent = pushforward(*v)
    assert calls.recurrent == {"hfopt::sequence_tangent": 1}
    expected = jvp(lambda p, w: plain_rnn(p, w, h0), (P, W), v)
    assert_close((H, tangent), expected, **EXACT)


def test_compile_sees_one_node() -> None:
    graphs: list[GraphModule] = []

    def backend(graph: GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    def function(P: Tensor, W: Tensor, h0: Tensor) -> Tensor:
        return simple_rnn(P, W, h0)

    point = problem()
    torch._dynamo.reset()
    value = torch.compile(function, fullgraph=True, backend=backend)(*point)
    (graph,) = graphs
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert called[0] == "hfopt.sequence_forward.default"
    assert not any("hfopt" in name for name in called[1:])
    assert_close(value, plain_rnn(*point), **EXACT)


def test_gradient_of_a_compiled_function() -> None:
    point = tuple(x.requires_grad_() for x in problem())
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: simple_rnn(*x).sin(), fullgraph=True, backend="aot_eager")
    value = compiled(*point).sum()
    with Calls() as calls:
        mine = torch.autograd.grad(value, point)
    assert calls.recurrent == {"hfopt::sequence_adjoint": 1}
    assert_close(mine, torch.autograd.grad(plain_rnn(*point).sin().sum(), point), **EXACT)


def test_many_tangents_are_one_pass() -> None:
    point = problem()
    many = tuple(torch.stack(vs) for vs in zip(*(like(point, seed) for seed in range(5)), strict=True))
    with Calls() as calls:
        mine = vmap(lambda *v: jvp(simple_rnn, point, v)[1])(*many)
    assert calls.recurrent["hfopt::sequence_tangent"] == 1
    assert_close(mine, vmap(lambda *v: jvp(plain_rnn, point, v)[1])(*many), **EXACT)


@pytest.mark.parametrize("given", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_many_tangents_in_some_arguments(given: tuple[int, ...]) -> None:
    point = problem()
    many = tuple(torch.stack([like(point, seed)[i] for seed in range(4)]) for i in given)

    def product(rnn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def of(*x: Tensor) -> Tensor:
            full = list(point)
            for i, xi in zip(given, x, strict=True):
                full[i] = xi
            return rnn(*full)

        return vmap(lambda *v: jvp(of, tuple(point[i] for i in given), v)[1])

    assert_close(product(simple_rnn)(*many), product(plain_rnn)(*many), **EXACT)


def test_many_cotangents_are_one_pass() -> None:
    point = problem()
    (us,) = like((torch.empty(5, *point[0].shape, dtype=torch.float64),), 1)
    H, pullback = vjp(simple_rnn, *point)
    with Calls() as calls:
        mine = vmap(pullback)(us)
    assert calls.recurrent["hfopt::sequence_adjoint"] == 1
    assert H.shape == point[0].shape
    assert_close(mine, vmap(vjp(plain_rnn, *point)[1])(us), **EXACT)


def test_many_products_by_cached_double_backward() -> None:
    P, W, h0 = problem()
    W.requires_grad_()
    H = simple_rnn(P, W, h0)
    u = torch.zeros_like(H, requires_grad=True)
    (g,) = torch.autograd.grad(H, W, u, create_graph=True)
    every = torch.eye(W.numel(), dtype=W.dtype).view(-1, *W.shape)
    basis = vmap(lambda v: torch.autograd.grad(g, u, v, retain_graph=True)[0])(every)
    expected = jacrev(lambda w: plain_rnn(P, w, h0))(W.detach()).reshape(H.numel(), -1)
    assert_close(basis.reshape(W.numel(), -1).t(), expected, **EXACT)


@pytest.mark.parametrize("dims", [(0, None, None), (None, 0, None), (1, None, 1), (0, 2, 0), (None, None, 0)])
def test_many_sequences_and_many_networks(dims: tuple[int | None, ...]) -> None:
    point = problem()
    batched = tuple(x if d is None else torch.stack([x, -0.5 * x, 2 * x], d) for x, d in zip(point, dims, strict=True))

    def gradient(rnn: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
        return vmap(torch.func.grad(lambda *x: rnn(*x).sin().sum(), (0, 1, 2)), in_dims=dims)

    assert_close(vmap(simple_rnn, in_dims=dims)(*batched), vmap(plain_rnn, in_dims=dims)(*batched), **EXACT)
    assert_close(gradient(simple_rnn)(*batched), gradient(plain_rnn)(*batched), **EXACT)


def test_nested_vmap() -> None:
    P, W, h0 = problem(4, 2, 3)
    (Ps,) = like((torch.empty(2, 3, *P.shape, dtype=P.dtype),), 1)
    (dWs,) = like((torch.empty(2, 3, *W.shape, dtype=W.dtype),), 2)

    def product(rnn: Callable[..., Tensor]) -> Tensor:
        def of(p: Tensor, dw: Tensor) -> Tensor:
            return jvp(lambda w: rnn(p, w, h0), (W,), (dw,))[1]

        return vmap(vmap(of))(Ps, dWs)

    assert_close(product(simple_rnn), product(plain_rnn), **EXACT)


def test_autocast_runs_in_the_low_precision() -> None:
    P, W, h0 = problem(8, 4, 16, dtype=torch.float32)
    W.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        H = simple_rnn(P.bfloat16(), W, h0)
    assert H.dtype == torch.bfloat16
    (gradient,) = torch.autograd.grad(H.float().sum(), W)
    assert gradient.dtype == torch.float32
    (reference,) = torch.autograd.grad(plain_rnn(P, W, h0).sum(), W)
    assert (gradient - reference).norm() <= 0.05 * reference.norm()
