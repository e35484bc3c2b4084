"""Autocast to bfloat16: products in bfloat16, conjugate gradients and parameters in float32."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hfopt
from hfopt import CG
from tests.hfopt.tools import mlp, randn, relative, theta

X, Y = randn(40, 5, seed=1, dtype=torch.float32), randn(40, 3, seed=2, dtype=torch.float32)


def cast(model: nn.Module) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return F.mse_loss(model(X), Y)


def net(seed: int = 3) -> Any:
    return mlp(5, 12, 3, seed=seed, dtype=torch.float32)


@pytest.mark.parametrize("linearisation", ["double-backward", "recompute"])
def test_products_are_those_of_bfloat16_in_float32_vectors(linearisation: str) -> None:
    model, full = net(), net()
    op = hfopt.GaussNewton(lambda: cast(model), model.parameters(), linearisation=linearisation)
    exact = hfopt.GaussNewton(lambda: F.mse_loss(full(X), Y), full.parameters())
    v = randn(op.shape[0], seed=4, dtype=torch.float32)
    assert op.dtype == (op @ v).dtype == op.gradient.dtype == torch.float32
    assert 1e-5 < relative(op @ v, exact @ v) < 0.03  # bfloat16 has 8 bits
    assert relative(op.gradient, exact.gradient) < 0.03


@pytest.mark.parametrize("curvature", ["gauss-newton", "hessian", "fisher"])
def test_steps_are_near_those_of_float32_and_descend(curvature: str) -> None:
    model, full = net(5), net(5)
    options: dict[str, Any] = {"curvature": curvature, "damping": 0.3, "cg": CG(max_iterations=20)}
    a, b = hfopt.HessianFree(model.parameters(), **options), hfopt.HessianFree(full.parameters(), **options)
    start = theta(model)
    a.step(lambda: cast(model))
    b.step(lambda: F.mse_loss(full(X), Y))
    assert relative(theta(model) - start, theta(full) - start) < 0.15
    for _ in range(10):
        a.step(lambda: cast(model))
    losses = [s.loss for s in a.stats]
    assert losses[-1] < 0.9 * losses[0]
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert all(a.state[p]["cg_start"].dtype == torch.float32 for p in model.parameters() if "cg_start" in a.state[p])


def test_parameters_in_bfloat16_have_vectors_in_float32() -> None:
    model = net(6).bfloat16()
    optimizer = hfopt.HessianFree(model.parameters())
    for _ in range(5):
        optimizer.step(lambda: F.mse_loss(model(X.bfloat16()).float(), Y))
    assert optimizer.stats[-1].new_loss < optimizer.stats[0].loss
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert any(s.get("cg_start", X).dtype == torch.float32 for s in optimizer.state.values())


@pytest.mark.parametrize("roles", [False, True])
def test_autocast_around_a_step_keeps_no_cast_of_parameters(roles: bool) -> None:
    """The same losses as with autocast inside the closure."""

    def run(outside: bool) -> list[float]:
        model = mlp(5, 4, 3, seed=3, dtype=torch.float32)
        optimizer = hfopt.HessianFree(model.parameters())

        def closure() -> Tensor:
            with nullcontext() if outside else torch.autocast("cpu", dtype=torch.bfloat16):
                z = model(X)
            return F.mse_loss(z.float(), Y)

        options = {"curvature": closure, "evaluation": closure} if roles else {}
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=outside):
            losses = [float(optimizer.step(closure, **options)) for _ in range(3)]
        assert all(s.accepted for s in optimizer.stats)
        return losses

    inside = run(False)
    assert inside[2] < inside[0]
    assert run(True) == inside
