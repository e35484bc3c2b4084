"""Self-checks: one closure that is broken for each of them, models that are in order, and no trace of a check."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hfopt
from tests.hfopt.tools import mlp, randn

X, Y = randn(12, 3, seed=1), randn(12, 2, seed=2)
CLASSES = torch.arange(12) % 2
CG = hfopt.CG(max_iterations=4)


def step(model: nn.Module, closure: Callable[[], Any], *, others: dict[str, Any] | None = None, **options: Any) -> None:
    optimizer = hfopt.HessianFree(model.parameters(), **{"cg": CG, "check": True, **options})
    optimizer.step(closure, **(others or {}))


def fails(pattern: str) -> Any:
    return pytest.raises(hfopt.CheckFailed, match=pattern)


# -- the closure is one function ------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["closure", "curvature", "evaluation", "debias"])
def test_draws_in_a_closure_that_nobody_can_repeat(role: str) -> None:
    """From a generator that the closure does not refer to itself, but only what it iterates over."""
    model, draws = mlp(3, 4, 2), np.random.default_rng(0)
    noise = (torch.from_numpy(draws.normal(size=(12, 3))) for _ in itertools.count())

    def noisy() -> Tensor:
        return F.mse_loss(model(X + next(noise)), Y)

    def quiet() -> Tensor:
        return F.mse_loss(model(X), Y)

    name = "the closure" if role == "closure" else f"the {role}= closure"
    with fails(f"two calls of {name} .*draws of torch, random and numpy are repeated"):
        step(model, noisy if role == "closure" else quiet, others={} if role == "closure" else {role: noisy})


def test_a_batch_drawn_in_the_closure() -> None:
    model = mlp(3, 4, 2)
    batches: Iterator[Tensor] = itertools.cycle(torch.arange(12).split(5))

    def closure() -> Tensor:
        batch = next(batches)
        return F.mse_loss(model(X[batch]), Y[batch])

    with fails("two calls of the closure"):
        step(model, closure)


def test_another_loss_where_gradients_are_enabled() -> None:
    model = mlp(3, 4, 2)
    with fails("must not depend on whether gradients are enabled"):
        step(model, lambda: F.mse_loss(model(X), Y) * (2 if torch.is_grad_enabled() else 1))


def test_outputs_that_were_computed_before() -> None:
    model = mlp(3, 4, 2)
    outputs = model(X)
    with fails("did not change by a bit when the parameters were moved.*again"):
        step(model, lambda: F.mse_loss(outputs, Y))


# -- reductions -----------------------------------------------------------------------------------------------------


def test_another_loss_returned_than_minimised() -> None:
    model = mlp(3, 4, 2)

    def closure() -> float:
        total = 0.0
        for x, y in zip(X.split(6), Y.split(6), strict=True):
            loss = F.mse_loss(model(x), y) / 2
            loss.backward()
            total = loss.item()  # of the last batch alone
        return total

    with fails("returned the loss .* but called backward.. on losses that sum to"):
        step(model, closure)


def batches(model: nn.Module, size: int, weigh: Callable[[Tensor, int], Tensor]) -> Callable[[], None]:
    xs, ys = X.split(size), Y.split(size)

    def closure() -> None:
        for x, y in zip(xs, ys, strict=True):
            weigh(F.mse_loss(model(x), y), len(x)).backward()

    return closure


@pytest.mark.parametrize("curvature", ["gauss-newton", "hessian"])
def test_a_mean_of_means_of_unequal_batches(curvature: str) -> None:
    model = mlp(3, 4, 2)
    with fails("mean of 3 batch means, over 5 cases each but 2 in the last one, whose cases count 2.5 times as much"):
        step(model, batches(model, 5, lambda loss, n: loss / 3), curvature=curvature)
    step(model, batches(model, 5, lambda loss, n: loss * n / 12), curvature=curvature)
    step(model, batches(model, 4, lambda loss, n: loss / 3), curvature=curvature)


def test_terms_of_a_loss_may_have_their_own_numbers_of_cases() -> None:
    """As where an equation holds inside and a condition at the border."""
    model = mlp(3, 4, 2)

    def closure() -> None:
        (F.mse_loss(model(X).sin(), Y) / 2).backward()
        (F.mse_loss(model(X[:3]), Y[:3]) / 2).backward()

    step(model, closure)


@pytest.mark.parametrize("role", ["curvature", "evaluation", "debias"])
def test_a_sum_in_one_role_and_a_mean_in_another(role: str) -> None:
    model = mlp(3, 4, 2)
    others = {role: lambda: F.mse_loss(model(X[:6]), Y[:6], reduction="sum")}
    with fails(f"{role}= closure have the weight 12 .* but 1 in the closure of the gradient.*reduction='mean'"):
        step(model, lambda: F.mse_loss(model(X), Y), others=others)
    others = {role: lambda: F.mse_loss(model(X[:6]), Y[:6], reduction="none").sum() / 12}
    step(model, lambda: F.mse_loss(model(X), Y), others=others)


def test_an_empirical_fisher_matrix_of_a_sum() -> None:
    model = mlp(3, 4, 2)
    for reduction in ("sum", "none"):
        with fails("takes the loss for a mean over cases, but mse_loss is summed over 24 terms"):
            step(
                model,
                lambda reduction=reduction: F.mse_loss(model(X), Y, reduction=reduction).sum(),
                curvature="empirical-fisher",
            )
    step(model, lambda: F.mse_loss(model(X), Y, reduction="sum") / 12, curvature="empirical-fisher")


@pytest.mark.parametrize(
    "options",
    [{"curvature": "fisher"}, {"curvature": "empirical-fisher"}, {"preconditioner": "empirical-fisher"}],
)
def test_classes_taken_for_cases(options: dict[str, Any]) -> None:
    model = mlp(3, 4, 2)
    with fails(r"batch_dim is 1, but that is the dimension of the classes of cross_entropy.*\(12, 2\)"):
        step(model, lambda: F.cross_entropy(model(X), CLASSES), batch_dim=1, **options)
    step(model, lambda: F.cross_entropy(model(X), CLASSES), **options)


# -- derivatives ----------------------------------------------------------------------------------------------------


class Tripled(torch.autograd.Function):
    """The identity, with three times its derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 3 * g


class Lopsided(torch.autograd.Function):
    """The identity with its derivative, but with another one of that."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        scale = torch.ones_like(g)
        scale[:, 0] = 5.0
        return g * scale + (g * (1 - scale)).detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_wrong_backward(dtype: torch.dtype) -> None:
    model, x, y = mlp(3, 4, 2, dtype=dtype), X.to(dtype), Y.to(dtype)

    def closure() -> Tensor:
        h = model[1](model[0](x))
        return F.mse_loss(model[2](Tripled.apply(h)), y)

    with fails("the gradient of the closure's loss is wrong: along a random direction .*autograd.Function"):
        step(model, closure)


def test_a_detached_part() -> None:
    model = mlp(3, 4, 2)

    def closure() -> Tensor:
        penalty = sum(((p**2).sum() for p in model.parameters()), start=torch.zeros(()))
        return F.mse_loss(model(X), Y) + penalty.detach()

    with fails("the gradient of the closure's loss is wrong.*detach"):
        step(model, closure)


def test_parameters_cut_off_from_the_gradient() -> None:
    model = mlp(3, 4, 2)
    with fails(r"the gradient is zero in parameters of shapes \[\(4, 3\), \(4,\)\], but the loss changes"):
        step(model, lambda: F.mse_loss(model[2](model[1](model[0](X)).detach()), Y))
    model.register_parameter("scale", nn.Parameter(torch.ones(1, dtype=X.dtype)))
    step(model, lambda: F.mse_loss(model(X), Y))  # not used at all
    with fails(r"the gradient is zero in parameters of shapes \[\(1,\)\], but the loss changes"):
        step(model, lambda: F.mse_loss(model(X), Y) + 1e-6 * float(model.scale.detach()))


def test_a_product_that_is_not_symmetric() -> None:
    model = mlp(3, 4, 2)
    with fails("not symmetric: w'Gv is .* and v'Gw is"):
        step(model, lambda: F.mse_loss(model[2](Lopsided.apply(model[1](model[0](X)))), Y))


@pytest.mark.parametrize("curvature", ["gauss-newton", "fisher"])
def test_a_criterion_with_a_minus_sign(curvature: str) -> None:
    model = mlp(3, 4, 2)
    weights = torch.tensor([1.0, -3.0], dtype=X.dtype)

    def closure() -> Tensor:
        return F.cross_entropy(model(X), CLASSES) - 2 * F.mse_loss(model(X), Y)

    if curvature == "fisher":  # refused before
        with pytest.raises(hfopt.ClosureError, match="weights"):
            step(model, lambda: F.cross_entropy(model(X), CLASSES, weight=weights), curvature=curvature)
        return
    with fails("the curvature of the criteria is negative: v'Gv is -.*minus sign"):
        step(model, closure)
    step(model, closure, curvature="hessian")


@pytest.mark.parametrize("policy", ["double-backward", "linearize", "recompute"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wrong_products(policy: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Symmetric ones, beside a gradient that is right."""
    plain = hfopt.GaussNewton.multiply
    monkeypatch.setattr(hfopt.GaussNewton, "multiply", lambda self, v, *a, **k: plain(self, v, *a, **k) * 1.01)
    model, x, y = mlp(3, 4, 2, dtype=dtype), X.to(dtype), Y.to(dtype)
    with fails("products with the curvature matrix are wrong: v'Gv is .* but differences of the outputs give"):
        step(model, lambda: F.mse_loss(model(x), y), linearisation=policy)


class Flat(torch.autograd.Function):
    """``x^3``, whose derivative is right, but a constant for the next one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.slope = 3 * x.detach() ** 2
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.slope


@pytest.mark.parametrize("roles", [False, True])
def test_a_wrong_hessian(roles: bool) -> None:
    model = mlp(3, 4, 2)

    def closure() -> Tensor:
        return F.mse_loss(model[2](Flat.apply(model[0](X))), Y)

    others = {"curvature": closure} if roles else {}
    with fails("differences of the gradient give"):
        step(model, closure, curvature="hessian", others=others)
    step(model, closure, others=others)  # Gauss-Newton needs no second derivative of the model
