"""Problems whose answer is known: quadratics in one step, Rosenbrock, XOR."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hfopt
from hfopt import CG, FixedDamping
from tests.hfopt.tools import Point, generator, mlp, randn, spd, theta

EXACT = CG(max_iterations=500, tolerance=0.0, residual=1e-14)
ONE_OUTPUT_SPACE = ["gauss-newton", "hessian"]


@pytest.mark.parametrize("n", [1, 2, 3, 5, 10, 20, 50])
@pytest.mark.parametrize("curvature", ONE_OUTPUT_SPACE)
def test_one_step_solves_least_squares(n: int, curvature: str) -> None:
    a = spd(torch.linspace(1, 10, n, dtype=torch.float64), seed=n)
    b = randn(n, seed=100 + n)
    model = Point(randn(n, seed=200 + n))
    optimizer = hfopt.HessianFree(model.parameters(), curvature=curvature, damping=0.0, cg=EXACT)
    optimizer.step(lambda: F.mse_loss(a @ model(), b, reduction="sum"))
    assert torch.allclose(theta(model), torch.linalg.solve(a, b), rtol=1e-9, atol=1e-10)
    s = optimizer.stats[0]
    assert s.accepted
    assert s.rho == pytest.approx(1.0, rel=1e-9)
    assert s.new_loss < 1e-18 * max(1.0, s.loss)
    assert s.cg_iterations <= 1.25 * n + 2


@pytest.mark.parametrize("n", [1, 2, 10, 50])
def test_one_step_solves_a_quadratic_form(n: int) -> None:
    """A loss that is no criterion, by its Hessian and by the parameters as declared outputs."""
    a, b = spd(torch.linspace(0.5, 3, n, dtype=torch.float64), seed=n), randn(n, seed=n + 1)
    x = torch.linalg.solve(a, b)
    for curvature in ONE_OUTPUT_SPACE:
        model = Point(randn(n, seed=n + 2))
        options = {"loss": lambda z: 0.5 * z @ a @ z - b @ z}
        optimizer = hfopt.HessianFree(model.parameters(), curvature=curvature, damping=0.0, cg=EXACT, **options)
        optimizer.step(lambda: 1.0 * model())  # noqa: B023 - used at once
        assert torch.allclose(theta(model), x, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("n", [10, 30, 50])
@pytest.mark.parametrize("condition", [1e1, 1e4])
@pytest.mark.parametrize("solver", ["auto", "cg"])
def test_one_step_without_damping_at_the_default_tolerance(n: int, condition: float, solver: str) -> None:
    root = spd(torch.logspace(0, 0.5 * math.log10(condition), n, dtype=torch.float64), seed=n)
    model = Point(randn(n, seed=1))
    optimizer = hfopt.HessianFree(model.parameters(), damping=0.0, solver=solver)
    optimizer.step(lambda: F.mse_loss(root @ model(), torch.zeros(n, dtype=torch.float64), reduction="sum"))
    # The residual of CG's rule, squared in the loss, and multiplied by the condition.
    assert optimizer.stats[0].new_loss <= 1e-18 * condition * optimizer.stats[0].loss


@pytest.mark.parametrize("n", [1, 5, 20])
def test_one_step_with_the_empirical_fisher_matrix(n: int) -> None:
    """On any quadratic a step solves F p = -g, whatever F: its residual is zero."""
    a, b = randn(4 * n, n, seed=n), randn(4 * n, seed=n + 1)
    model = Point(randn(n, seed=n + 2))
    before = theta(model)
    optimizer = hfopt.HessianFree(
        model.parameters(), curvature="empirical-fisher", damping=FixedDamping(0.1), cg=EXACT, backtracking="none"
    )
    optimizer.step(lambda: F.mse_loss(a @ model(), b))
    s = optimizer.stats[0]
    r = a @ before - b
    per_case = 2 * r[:, None] * a
    p = torch.linalg.solve(per_case.T @ per_case / (4 * n) + 0.1 * torch.eye(n, dtype=torch.float64), -per_case.mean(0))
    assert torch.allclose(theta(model), before + s.step_length * p, rtol=1e-8, atol=1e-10)


def test_linear_regression_by_the_default_settings() -> None:
    a, b = randn(40, 10, seed=1), randn(40, seed=2)
    model = Point(torch.zeros(10))
    optimizer = hfopt.HessianFree(model.parameters())
    for _ in range(25):
        optimizer.step(lambda: F.mse_loss(a @ model(), b))
    best = float((a @ torch.linalg.lstsq(a, b).solution - b).square().mean())
    assert optimizer.stats[-1].new_loss == pytest.approx(best, rel=1e-10)


# From ten dimensions on there is a local minimum besides, to which Newton's method goes.
@pytest.mark.parametrize(("n", "curvature"), [(2, "gauss-newton"), (2, "hessian"), (10, "gauss-newton")])
def test_rosenbrock(n: int, curvature: str) -> None:
    """As residuals (10 (x_i+1 - x_i^2), 1 - x_i): to float64 accuracy, lambda within its bounds and never useless."""
    model = Point([-1.2, 1.0] * (n // 2))
    zero = torch.zeros(2 * (n - 1), dtype=torch.float64)

    def residuals() -> Tensor:
        x = model()
        return torch.cat([10 * (x[1:] - x[:-1].square()), 1 - x[:-1]])

    optimizer = hfopt.HessianFree(model.parameters(), curvature=curvature, cg=CG(residual=1e-12, tolerance=0.0))
    for _ in range(300):
        optimizer.step(lambda: F.mse_loss(residuals(), zero, reduction="sum"))
        if optimizer.stats[-1].new_loss < 1e-24:
            break
    stats = optimizer.stats
    assert stats[-1].new_loss < 1e-24
    # Residuals below 1e-12 say so much: |1 - x_i| < 1e-12, and the last 10 |x_n - x_n-1^2| < 1e-12 besides.
    assert float((theta(model) - 1).abs().max()) < 2.2e-12
    assert len(stats) < (60 if n == 2 else 150)
    assert max(s.damping for s in stats) < 1e3 * stats[0].damping + 1e3
    # Going on at the solution must not raise lambda to its bound either.
    for _ in range(20):
        optimizer.step(lambda: F.mse_loss(residuals(), zero, reduction="sum"))
    assert optimizer.stats[-1].new_damping < 1e4 * stats[0].damping
    assert all(math.isfinite(s.new_loss) for s in optimizer.stats)
    assert optimizer.stats[-1].new_loss < 1e-24


@pytest.mark.parametrize("curvature", ["gauss-newton", "hessian", "fisher"])
@pytest.mark.parametrize("loss", ["mse", "bce"])
def test_xor_network(curvature: str, loss: str) -> None:
    x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    y = torch.tensor([[0.0], [1.0], [1.0], [0.0]], dtype=torch.float64)
    model = mlp(2, 4, 1, seed=0)
    optimizer = hfopt.HessianFree(model.parameters(), curvature=curvature)
    criterion = F.mse_loss if loss == "mse" else F.binary_cross_entropy_with_logits
    for _ in range(20):
        optimizer.step(lambda: criterion(model(x), y))
    assert bool(((model(x) > (0.5 if loss == "mse" else 0.0)) == y.bool()).all())
    losses = [s.loss for s in optimizer.stats]
    assert all(b <= a for a, b in pairwise(losses))
    assert losses[-1] < 0.01


def test_logistic_regression_on_badly_scaled_data() -> None:
    """Features of scales 1e-3 to 1e3: the gradient norm falls by eight orders at defaults."""
    draws = generator(3)
    x = torch.randn(200, 5, generator=draws, dtype=torch.float64) * torch.logspace(-3, 3, 5, dtype=torch.float64)
    w = torch.logspace(3, -3, 5, dtype=torch.float64)
    y = (torch.sigmoid(x @ w) > torch.rand(200, generator=draws, dtype=torch.float64)).double()
    model = nn.Linear(5, 1, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    optimizer = hfopt.HessianFree(model.parameters())
    for _ in range(60):
        optimizer.step(lambda: F.binary_cross_entropy_with_logits(model(x).squeeze(1), y))
    assert optimizer.stats[-1].gradient_norm < 1e-8 * optimizer.stats[0].gradient_norm
