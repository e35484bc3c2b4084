"""Solves with one more direction, the last solution: the minimum over the larger space, on the host and the device."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import hfopt
from hfopt.damping import FixedDamping
from hfopt.linalg.cg import CG
from hfopt.linalg.cg_host import HostCG
from hfopt.linalg.vector import norm
from tests.hfopt.linalg.test_cg import Matrix, diagonal, exact, phi
from tests.hfopt.linalg.test_cg_device import DTYPES, assert_same, device
from tests.hfopt.tools import mlp, randn, relative, rounding, spd

X, Y = randn(7, 3, seed=5), randn(7, 2, seed=6)


def least(a: Tensor, b: Tensor, basis: list[Tensor]) -> Tensor:
    """The minimum of phi over the span of ``basis``."""
    q = torch.linalg.qr(torch.stack(basis, 1)).Q
    return q @ torch.linalg.solve(q.T @ a @ q, q.T @ b)


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("iterations", [1, 2, 5, 9])
def test_iterates_are_minima_over_the_augmented_space(preconditioned: bool, iterations: int) -> None:
    """The space is that of u and of the Krylov space that the projection leaves, by powers of dense matrices."""
    a, b, u = spd(torch.logspace(1, -2, 30, dtype=torch.float64), seed=1), randn(30, seed=2), randn(30, seed=3)
    m = diagonal(a) if preconditioned else (lambda r: r)
    au = a @ u / (u @ a @ u)
    basis = [u]
    r = b - a @ u * (u @ b) / (u @ a @ u)
    for _ in range(iterations):
        z = m(r)
        basis.append((z - u * (au @ z)) / norm(z))
        r = a @ basis[-1]
    found = CG(max_iterations=iterations, tolerance=0.0).solve(
        Matrix(a), b, None, m if preconditioned else None, augment=u
    )
    assert relative(found.x, least(a, b, basis)) < 1e-8
    assert found.products == iterations + 1
    assert found.iterates[-1].phi == pytest.approx(phi(a, b, found.x), rel=1e-10)


def test_the_solution_itself_ends_the_solve() -> None:
    a, b = spd(torch.logspace(0, -3, 20, dtype=torch.float64), seed=4), randn(20, seed=5)
    found = exact(residual=1e-9).solve(Matrix(a), b, augment=-3.0 * torch.linalg.solve(a, b))
    assert (found.reason, found.iterations, found.products) == ("residual", 0, 1)
    assert relative(found.x, torch.linalg.solve(a, b)) < 1e-9


@pytest.mark.parametrize("kind", ["negative", "null", "zero", "infinite"])
def test_without_curvature_the_direction_is_left_out(kind: str) -> None:
    """Of such directions the model says nothing, whatever rounding makes of ``u'Au``."""
    values = torch.tensor([-1.0 if kind == "negative" else 0.0, 1.0, 2.0, 5.0], dtype=torch.float64)
    a = torch.diag(values)
    b = torch.tensor([0.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    u = torch.tensor([{"zero": 0.0, "infinite": math.inf}.get(kind, 1.0), 1e-16, 0.0, 0.0], dtype=torch.float64)
    if kind == "zero":
        u.zero_()
    plain, found = exact().solve(Matrix(a), b), exact().solve(Matrix(a), b, augment=u)
    assert torch.equal(found.x, plain.x)
    assert (found.iterations, found.products) == (plain.iterations, plain.products + 1)


@pytest.mark.parametrize("condition", [3e3, 1e4])
def test_single_precision(condition: float) -> None:
    """The residual stays at right angles to u, and iterates go on falling, where u has the least curvature of all."""
    a = spd(torch.logspace(0, -math.log10(condition), 200, dtype=torch.float64), seed=7)
    vectors = torch.linalg.eigh(a).eigenvectors
    b, u = randn(200, seed=8), vectors[:, 0] + 1e-3 * vectors[:, 100]
    found = exact(max_iterations=150, residual=0.0).solve(Matrix(a.float()), b.float(), augment=u.float())
    reference = exact(max_iterations=150, residual=0.0).solve(Matrix(a), b, augment=u)
    plain = exact(max_iterations=150, residual=0.0).solve(Matrix(a.float()), b.float())
    assert phi(a, b, found.x.double()) <= phi(a, b, plain.x.double())
    residual = b.float() - a.float() @ found.x
    assert abs(float(u.float() @ residual)) < 1e-5 * float(u.norm() * b.norm())
    rel = rounding(condition=condition, dtype=torch.float32)
    assert phi(a, b, found.x.double()) == pytest.approx(phi(a, b, reference.x), rel=rel)
    falls = [check.model for check in found.checks]
    assert all(after <= before + 1e-5 * abs(before) for before, after in pairwise(falls))


def test_directions_are_kept_apart_from_u() -> None:
    """Pairs are directions with their products, of which all but u are at right angles to u."""
    a, b, u = spd(torch.logspace(0, -5, 40, dtype=torch.float64), seed=9), randn(40, seed=10), randn(40, seed=11)
    found = CG(max_iterations=8, tolerance=0.0).solve(Matrix(a), b, directions=5, augment=u)
    assert found.pairs is not None
    s, products = found.pairs
    assert len(s) == 7  # u, five directions, the solution
    assert relative(products, s @ a) < 1e-10
    assert relative(s[0] / s[0].norm(), u / u.norm()) < 1e-12
    assert float((s[1:] @ u).abs().max()) < 1e-10 * float(u.norm() * s[1:].norm(dim=1).max())
    whole = torch.linalg.lstsq(s.T, found.x.unsqueeze(1)).solution
    assert relative(s.T @ whole, found.x.unsqueeze(1)) < 1e-9


@DTYPES
@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize(("tolerance", "check_every", "repair_every"), [(None, 4, 0), (0.0, 10, 7), (5e-4, 1, 0)])
def test_a_device_takes_the_same_iterates(
    dtype: torch.dtype, preconditioned: bool, tolerance: float | None, check_every: int, repair_every: int
) -> None:
    a = spd(torch.logspace(1, -2, 60, dtype=torch.float64), seed=12).to(dtype)
    b, u = randn(60, seed=13).to(dtype), randn(60, seed=14).to(dtype)
    m = diagonal(a) if preconditioned else None
    cg = CG(tolerance=tolerance, check_every=check_every, repair_every=repair_every, max_iterations=33)
    expected = HostCG(cg, Matrix(a), b, None, m, augment=u).iterate(norm(b), None)
    assert_same(device(cg, Matrix(a), b, None, m, augment=u), expected)


def test_what_is_refused() -> None:
    a, b = spd([1.0, 2.0], seed=15), randn(2, seed=16)
    with pytest.raises(ValueError, match=r"augment \[3\]"):
        CG().solve(Matrix(a), b, augment=randn(3, seed=17))
    with pytest.raises(ValueError, match="both are given"):
        CG().solve(Matrix(a), b, b, augment=b)


def test_the_last_solution_is_one_more_direction_of_the_next_solve() -> None:
    model = mlp(3, 4, 2, seed=20)
    optimizer = hfopt.HessianFree(model.parameters(), damping=FixedDamping(0.3), solver="cg")
    optimizer.step(lambda: F.mse_loss(model(X), Y))
    last = torch.cat([optimizer.state[p]["cg_start"].reshape(-1) for p in model.parameters()])
    op = hfopt.GaussNewton(lambda: F.mse_loss(model(X), Y), model.parameters())
    expected = CG().solve(op.damped(0.3), -op.gradient, augment=last)
    optimizer.step(lambda: F.mse_loss(model(X), Y))
    assert optimizer.stats[1].cg_iterations == expected.iterations
    assert optimizer.stats[1].solution_norm == pytest.approx(norm(expected.x), rel=1e-9)
