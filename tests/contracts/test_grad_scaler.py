"""torch.amp.GradScaler: the closure scales its loss, the step is that of the loss itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.nn import functional as F

import hfopt
from tests.hfopt.tools import grads, mlp, randn, theta

X, Y = randn(20, 3, seed=1, dtype=torch.float32), randn(20, 2, seed=2, dtype=torch.float32)


def scaled(
    model: Any, optimizer: torch.optim.Optimizer, scaler: GradScaler, factor: float = 1.0
) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(model(X), Y)
        scaler.scale(loss).backward()
        return loss

    return closure


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.1},
        {"curvature": "hessian"},
        {"curvature": "fisher"},
        {"curvature": "empirical-fisher"},
        {"preconditioner": "empirical-fisher"},
        {"linearisation": "recompute"},
    ],
    ids=lambda o: "-".join(f"{v}" for v in o.values()) or "default",
)
@pytest.mark.parametrize("roles", [False, True])
def test_a_power_of_two_changes_not_a_bit(options: dict[str, Any], roles: bool) -> None:
    one, two = (mlp(3, 4, 2, seed=3, dtype=torch.float32) for _ in range(2))
    plain, ours = hfopt.HessianFree(one.parameters(), **options), hfopt.HessianFree(two.parameters(), **options)
    scaler = GradScaler("cpu", init_scale=2.0**10, growth_factor=4.0, growth_interval=2)
    scaler.scale(X)  # the scaler's own step() asks for a first use before it runs a closure
    for _ in range(5):
        other: dict[str, Any] = {"curvature": lambda: F.mse_loss(one(X), Y)} if roles else {}
        expected = plain.step(lambda: F.mse_loss(one(X), Y), **other)
        other = {"curvature": lambda: F.mse_loss(two(X), Y)} if roles else {}
        step = scaler.step if roles else hfopt.HessianFree.step
        first = (ours, scaled(two, ours, scaler))
        assert float(step(*first, **other)) == float(expected)  # type: ignore[arg-type]
        scaler.update()
        assert torch.equal(theta(one), theta(two))
        assert torch.equal(grads(one), grads(two))
        a, b = plain.stats[-1], ours.stats[-1]
        assert (a.loss, a.new_loss, a.rho, a.damping) == (b.loss, b.new_loss, b.rho, b.damping)
    assert scaler.get_scale() == 2.0**14
    assert GradScaler.scale.__qualname__ == "GradScaler.scale"  # torch's own again


def test_guarded_closures_return_the_loss_itself() -> None:
    """Evaluations without gradients see an unscaled loss, the others a scaled one."""
    one, two = (mlp(3, 4, 2, seed=3, dtype=torch.float32) for _ in range(2))
    plain, ours = hfopt.HessianFree(one.parameters()), hfopt.HessianFree(two.parameters())
    scaler = GradScaler("cpu")

    def closure() -> Tensor:
        loss = F.mse_loss(two(X), Y)
        if loss.requires_grad:
            scaler.scale(loss).backward()
        return loss

    for _ in range(3):
        plain.step(lambda: F.mse_loss(one(X), Y))
        ours.step(closure)
        scaler.update()
    assert torch.equal(theta(one), theta(two))


def test_a_disabled_scaler_is_none() -> None:
    one, two = (mlp(3, 4, 2, seed=3, dtype=torch.float32) for _ in range(2))
    plain, ours = hfopt.HessianFree(one.parameters()), hfopt.HessianFree(two.parameters())
    scaler = GradScaler("cpu", enabled=False)
    for _ in range(3):
        plain.step(lambda: F.mse_loss(one(X), Y))
        scaler.step(ours, scaled(two, ours, scaler))
        scaler.update()
    assert torch.equal(theta(one), theta(two))


def test_half_precision_overflows_until_the_scale_fits_and_then_trains() -> None:
    """Outputs and their derivatives in float16; the parameters stay until a scale is found."""
    model = mlp(3, 4, 2, seed=3, dtype=torch.float32)
    optimizer = hfopt.HessianFree(model.parameters())
    scaler = GradScaler("cpu", init_scale=2.0**24)

    def closure() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            z = model(X)
        loss = F.mse_loss(z.float(), Y)
        scaler.scale(loss).backward()
        return loss

    before, skipped = theta(model), 0
    for _ in range(25):
        optimizer.step(closure)
        scaler.update()
        if optimizer.stats[-1].cg_reason == "not finite" and skipped == len(optimizer.stats) - 1:
            skipped += 1
            assert torch.equal(theta(model), before)
    values = [s.loss for s in optimizer.stats]
    assert skipped >= 2
    assert scaler.get_scale() <= 2.0 ** (24 - skipped)
    assert values[-1] < 0.8 * values[0]
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="float16 on tensor cores needs a CUDA device")
def test_half_precision_on_cuda() -> None:
    """A scale that fits changes nothing but rounding; one that is too large is found out and lowered."""
    full, half = (mlp(3, 4, 2, seed=3, dtype=torch.float32).cuda() for _ in range(2))
    x, y = X.cuda(), Y.cuda()
    cg = hfopt.CG(max_iterations=5)
    plain = hfopt.HessianFree(full.parameters(), damping=0.1, cg=cg)
    ours = hfopt.HessianFree(half.parameters(), damping=0.1, cg=cg)
    scaler = GradScaler("cuda", init_scale=2.0**8)

    def closure() -> Tensor:
        ours.zero_grad()
        with torch.autocast("cuda", dtype=torch.float16):
            loss = F.mse_loss(half(x), y)
        scaler.scale(loss).backward()
        return loss

    for _ in range(3):
        plain.step(lambda: F.mse_loss(full(x), y))
        ours.step(closure)
        scaler.update()
    assert torch.allclose(theta(full), theta(half), rtol=0.1, atol=0.05)
    assert ours.stats[-1].new_loss < 0.95 * ours.stats[0].loss
    scaler = GradScaler("cuda", init_scale=2.0**30)
    before = theta(half)
    ours.step(closure)
    scaler.update()
    assert ours.stats[-1].cg_reason == "not finite"
    assert scaler.get_scale() < 2.0**30
    assert torch.equal(theta(half), before)
