"""Second derivatives in closed form: of every cell with one product in a step, against autograd through the steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from hfopt.recurrences import Definition
from hfopt.recurrences.cells import EXAMPLES
from hfopt.recurrences.definition import cell as define
from hfopt.recurrences.expression import sigmoid, tanh
from hfopt.recurrences.generated import Generated, generated
from hfopt.recurrences.second import program_of
from hfopt.recurrences.sequence import run
from tests.hfopt.recurrences import registry
from tests.hfopt.recurrences.plain import Calls

Function = Callable[..., tuple[Tensor, ...]]


@define(states="h k", gates="a r b", outputs="o", parameters="s", masks="m")
def gated_vector(x: Any, h: Any, k: Any, W: Any, p: Any) -> Any:
    """One product, of a vector that is a function of inputs, states, a parameter and a mask."""
    v = p.m * (sigmoid(x.r + p.s) * h)
    a = tanh(x.a + W.a(v))
    return a * k, tanh(k + a) + W.b(v), sigmoid(x.b) * h * a


CELLS: dict[str, Definition] = {}
for _made in EXAMPLES.values():
    CELLS |= {d.name: d for d in (_made(), _made().marked) if program_of(d) is not None}
CELLS["gated_vector"] = gated_vector
EVERY = [*CELLS, *(f"{name}.projected" for name, d in CELLS.items() if d.raw is None)]


def problem(name: str, seed: int = 0) -> tuple[Generated, list[Tensor], list[int]]:
    """The cell, arguments (T = 4, B = 2, 3 inputs, 2 units), and the places of those that have derivatives."""
    d = CELLS[name.removesuffix(".projected")]
    c, draws = generated(d), torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draws, dtype=torch.float64)

    X, Kx = randn(4, 2, 3), randn(3, 2 * len(d.input_columns))
    if name.endswith(".projected"):
        X, Kx = X @ Kx, Kx[:0]
    (product,) = d.products
    masks = [2.0 * (randn(2, 2) > 0).double() for _ in d.masks]
    at = [X, Kx, randn(2, 2 * len(product.columns)), *(randn(2) for _ in d.parameters), *masks]
    at += [randn(2, 2).tanh() for _ in d.states]
    use = [i for i in range(len(at)) if i not in registry.of_masks(c) and at[i].numel()]
    return c, [x.requires_grad_(i in use) for i, x in enumerate(at)], use


def scalar(function: Function) -> Callable[..., Tensor]:
    """A function of the arguments with curvature of its own on top of the outputs'."""

    def of(*x: Tensor) -> Tensor:
        total = x[0].new_zeros(())
        for k, y in enumerate(function(*x)):
            weights = torch.linspace(0.5, 1.5 + k, y.numel(), dtype=y.dtype).view(y.shape)
            total = total + (weights * (y.sin() + 0.3 * y.pow(3))).sum()
        return total

    return of


def both(c: Generated) -> tuple[Function, Function]:
    return lambda *x: run(c.name, *x), lambda *x: c.plain(x)


def test_the_cells_with_one_product_are_known() -> None:
    names = {"tanh", "relu", "sigmoid", "identity", "modrelu", "lstm", "gru", "ugrnn", "intersection"}
    assert {name for name in EXAMPLES if program_of(EXAMPLES[name]()) is not None} == names
    assert names < set(CELLS)


def test_piecewise_linear_cells_have_no_second_derivative_of_a_step() -> None:
    assert {name for name, d in CELLS.items() if (found := program_of(d)) is not None and not found.second} == {
        "relu", "relu+a", "identity", "identity+a", "modrelu",
    }  # fmt: skip


@pytest.mark.quick(where=lambda name: name in ("tanh", "relu", "lstm", "gated_vector", "sigmoid.projected"))
@pytest.mark.parametrize("name", EVERY)
def test_gradgradcheck(name: str) -> None:
    c, at, _ = problem(name)
    assert torch.autograd.gradgradcheck(scalar(both(c)[0]), at, check_fwd_over_rev=True)


@pytest.mark.parametrize("name", EVERY)
def test_hessian_products_of_second_and_third_order(name: str) -> None:
    c, at, use = problem(name, seed=1)
    x = [at[i] for i in use]
    v, w = ([registry.like(at, seed)[i] for i in use] for seed in (1, 2))

    def products(function: Function) -> tuple[Any, Any]:
        g = torch.autograd.grad(scalar(function)(*at), x, create_graph=True)
        Hv = torch.autograd.grad(g, x, v, retain_graph=True)
        again = torch.autograd.grad(g, x, v, create_graph=True)
        return Hv, torch.autograd.grad(again, x, w, allow_unused=True, materialize_grads=True)

    mine, plain = both(c)
    assert_close(products(mine), products(plain), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["tanh", "lstm", "gru", "intersection", "gated_vector"])
def test_many_hessian_products_and_some_arguments_alone(name: str) -> None:
    c, at, use = problem(name, seed=2)
    mine, plain = both(c)
    for chosen in (use, *([i] for i in use)):
        x = [at[i] for i in chosen]
        many = [torch.stack([registry.like(at, seed)[i] for seed in range(3)]) for i in chosen]

        def products(function: Function, x: list[Tensor] = x, many: list[Tensor] = many) -> Any:
            g = torch.autograd.grad(scalar(function)(*at), x, create_graph=True)
            return torch.vmap(lambda *v: torch.autograd.grad(g, x, v, retain_graph=True))(*many)

        assert_close(products(mine), products(plain), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["tanh", "relu", "lstm", "gru.projected"])
def test_a_hessian_product_is_one_tangent_and_one_adjoint(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    c, at, use = problem(name)
    x = [at[i] for i in use]
    monkeypatch.setattr(Generated, "plain", None)
    g = torch.autograd.grad(scalar(both(c)[0])(*at), x, create_graph=True)
    with Calls() as calls:
        torch.autograd.grad(g, x, [registry.like(at, 1)[i] for i in use])
    assert calls.recurrent == {"hfopt::sequence_tangent": 1, "hfopt::sequence_adjoint": 1}


def test_one_step() -> None:
    c, at, use = problem("tanh")
    at[0] = at[0][:1].detach().requires_grad_()
    x = [at[i] for i in use]
    v = [registry.like(at, 1)[i] for i in use]

    def product(function: Function) -> Any:
        return torch.autograd.grad(torch.autograd.grad(scalar(function)(*at), x, create_graph=True), x, v)

    assert_close(product(both(c)[0]), product(both(c)[1]), rtol=1e-12, atol=1e-12)
