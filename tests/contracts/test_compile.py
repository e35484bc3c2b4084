"""torch.compile'd modules and closures: the steps are those of the module itself, whatever the backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hfopt
from tests.hfopt.tools import DENSE, dense_gauss_newton, mlp, randn, relative, theta

X, Y = randn(20, 3, seed=1), randn(20, 2, seed=2)
# The compiler's own: about what it imports, and about hooks that would be called twice by a module that it wraps.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Using `torch.compile:UserWarning"),
]


def noisy(seed: int) -> nn.Module:
    return nn.Sequential(mlp(3, 8, seed=seed), nn.Tanh(), nn.Dropout(0.3), mlp(8, 2, seed=seed))


@pytest.mark.parametrize("curvature", ["gauss-newton", "hessian"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("way", ["wrapped", "in place"])
def test_a_compiled_module_takes_the_same_steps(curvature: str, backend: str, way: str) -> None:
    """The last two backends have no second derivatives: inside a step, the module runs as it is."""
    model, twin = noisy(3), noisy(3)
    if way == "wrapped":
        compiled: Any = torch.compile(model, backend=backend)
    else:
        model.compile(backend=backend)
        compiled = model
    ours = hfopt.HessianFree(compiled.parameters(), curvature=curvature)
    plain = hfopt.HessianFree(twin.parameters(), curvature=curvature)
    for step in range(3):
        torch.manual_seed(step)
        ours.step(lambda: F.mse_loss(compiled(X), Y))
        torch.manual_seed(step)
        plain.step(lambda: F.mse_loss(twin(X), Y))
    assert torch.equal(theta(model), theta(twin))
    assert ours.stats[-1].loss < ours.stats[0].loss


def test_a_compiled_closure() -> None:
    model, twin = mlp(3, 4, 2, seed=4), mlp(3, 4, 2, seed=4)
    ours, plain = hfopt.HessianFree(model.parameters()), hfopt.HessianFree(twin.parameters())

    @torch.compile  # type: ignore[untyped-decorator]
    def closure() -> Tensor:
        return F.mse_loss(model(X), Y)

    for _ in range(3):
        ours.step(closure)
        plain.step(lambda: F.mse_loss(twin(X), Y))
    assert torch.equal(theta(model), theta(twin))


def test_a_compiled_module_outside_of_a_step_is_compiled() -> None:
    """What a step does to the compiler ends with it, and products of an operator built by hand work as well."""
    seen: list[int] = []

    def backend(graph: Any, example: Any) -> Any:
        seen.append(1)
        return graph.forward

    model = mlp(3, 4, 2, seed=5)
    compiled = torch.compile(model, backend=backend)
    op = hfopt.GaussNewton(lambda: F.mse_loss(compiled(X), Y), model.parameters())
    v = randn(op.shape[0], seed=6)
    dense = dense_gauss_newton(model, lambda m: m(X), lambda z: F.mse_loss(z, Y))
    assert relative(op @ v, dense @ v) < DENSE
    assert not seen
    compiled(X)
    assert seen


@pytest.mark.parametrize("product", ["double-backward", "linearize", "recompute", "hessian"])
def test_compiled_code_calls_a_product_as_a_whole(product: str) -> None:
    """The product is that of uncompiled code, and costs at most one break of the graph around it."""
    model = mlp(3, 4, 2, seed=7)

    def closure() -> Tensor:
        return F.mse_loss(model(X), Y)

    if product == "hessian":
        op: Any = hfopt.Hessian(closure, model.parameters())
    else:
        op = hfopt.GaussNewton(closure, model.parameters(), linearisation=product)
    v = randn(op.shape[0], seed=8)

    def power(v: Tensor) -> Tensor:
        w = op.multiply(v) + 0.1 * v
        return w / w.norm()

    expected, columns = power(v), op.multiply_many(torch.stack([v, 2 * v], 1))
    assert torch.equal(torch.compile(power, backend="eager")(v), expected)
    assert torch.equal(torch.compile(op.multiply_many, backend="eager")(torch.stack([v, 2 * v], 1)), columns)
    torch.compiler.reset()
    assert torch._dynamo.explain(power)(v).graph_break_count <= 1  # type: ignore[no-untyped-call]
