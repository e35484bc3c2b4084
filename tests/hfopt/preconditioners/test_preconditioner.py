"""The empirical-Fisher diagonal: unbiased, exact in its damping, and of use."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import hfopt
from hfopt import CG, EmpiricalFisherDiagonal, FixedDamping
from hfopt.preconditioners import as_preconditioner
from tests.hfopt.tools import flat, mlp, randn, theta

N = 6
X, Y = randn(N, 3, seed=1), randn(N, 2, seed=2)


def squares(model: torch.nn.Module) -> Tensor:
    """Mean over cases of squared per-case gradients."""
    rows = [flat(torch.autograd.grad(F.mse_loss(model(X[n]), Y[n]), list(model.parameters()))) for n in range(N)]
    return torch.stack(rows).square().mean(0)


def test_the_diagonal_is_unbiased() -> None:
    model = mlp(3, 4, 2, seed=3)
    op = hfopt.GaussNewton(lambda: F.mse_loss(model(X), Y), model.parameters())
    m = EmpiricalFisherDiagonal(exponent=1.0, probes=1000, squares="signs")
    m.refresh(op, 0)
    m.damp(0.0, 0.0)
    diagonal = 1 / m(torch.ones(26, dtype=torch.float64))
    # An entry's relative error is at most sqrt(2 / probes).
    assert float((diagonal / squares(model) - 1).abs().max()) < 4.5 * (2 / 1000) ** 0.5


def test_the_mean_over_steps_is_unbiased_and_steps_draw_anew() -> None:
    model = mlp(3, 4, 2, seed=4)
    op = hfopt.GaussNewton(lambda: F.mse_loss(model(X), Y), model.parameters())
    m = EmpiricalFisherDiagonal(exponent=1.0, probes=2, squares="signs")
    seen = []
    for step in range(400):
        m.refresh(op, step)
        m.damp(0.0, 0.0)
        seen.append(1 / m(torch.ones(26, dtype=torch.float64)))
    assert float((torch.stack(seen).mean(0) / squares(model) - 1).abs().max()) < 4.5 * (2 / 800) ** 0.5
    assert not torch.equal(seen[0], seen[1])
    m.refresh(op, 0)
    m.damp(0.0, 0.0)
    assert torch.equal(1 / m(torch.ones(26, dtype=torch.float64)), seen[0])


def test_damping_and_exponent() -> None:
    model = mlp(3, 4, 2, seed=5)
    op = hfopt.GaussNewton(lambda: F.mse_loss(model(X), Y), model.parameters())
    bare, full = EmpiricalFisherDiagonal(exponent=1.0), EmpiricalFisherDiagonal()
    for m in (bare, full):
        m.refresh(op, 7)
    bare.damp(0.0, 0.0)
    r, c = randn(26, seed=6), randn(26, seed=7).abs()
    diagonal = 1 / bare(torch.ones(26, dtype=torch.float64))
    for decay in (0.2, c):
        full.damp(0.3, decay)
        assert torch.allclose(full(r), r / (diagonal + 0.3 + decay) ** 0.75, rtol=1e-12)


def badly_scaled() -> tuple[torch.nn.Module, Tensor]:
    model = mlp(60, 1, seed=8)
    return model, randn(200, 60, seed=9) * torch.logspace(-1, 2, 60, dtype=torch.float64)


def test_it_changes_cg_but_not_the_solution() -> None:
    y, ends, iterations = randn(200, 1, seed=10), [], []
    for preconditioner in (None, "empirical-fisher"):
        model, x = badly_scaled()
        optimizer = hfopt.HessianFree(
            model.parameters(),
            preconditioner=preconditioner,
            damping=FixedDamping(1e-3),
            cg=CG(max_iterations=3000, tolerance=0.0, residual=1e-12),
            backtracking="none",
        )
        optimizer.step(lambda: F.mse_loss(model(x), y))  # noqa: B023 - used at once
        ends.append(theta(model))
        iterations.append(optimizer.stats[0].cg_iterations)
    assert torch.allclose(*ends, rtol=1e-6, atol=1e-7)
    assert iterations[1] < 0.5 * iterations[0]


def test_training_with_it() -> None:
    y = randn(200, 1, seed=11)
    model, x = badly_scaled()
    optimizer = hfopt.HessianFree(model.parameters(), preconditioner="empirical-fisher", weight_decay=1e-3)
    for _ in range(8):
        optimizer.step(lambda: F.mse_loss(model(x), y))
    losses = [s.loss for s in optimizer.stats]
    assert losses[-1] < 0.6 * losses[0]


def test_refusals() -> None:
    model = mlp(3, 2)
    m = EmpiricalFisherDiagonal()
    with pytest.raises(RuntimeError, match="refresh"):
        m.damp(0.1, 0.0)
    with pytest.raises(RuntimeError, match="damp"):
        m(torch.zeros(8))
    with pytest.raises(TypeError, match="Hessian"):
        m.refresh(hfopt.Hessian(lambda: F.mse_loss(model(X), Y), model.parameters()), 0)
    with pytest.raises(ValueError, match="exponent"):
        EmpiricalFisherDiagonal(exponent=1.5)
    with pytest.raises(ValueError, match="probes"):
        EmpiricalFisherDiagonal(probes=0)


def test_the_optimizer_tells_where_the_cases_stand() -> None:
    """Outputs (T, B, O) with batch_dim=1 are preconditioned as the same outputs (B, T, O) with batch_dim=0."""
    x, y = randn(5, 4, 3, seed=30), randn(5, 4, 2, seed=31)
    ends = []
    for batch_dim in (0, 1):
        model = mlp(3, 4, 2, seed=32)
        optimizer = hfopt.HessianFree(model.parameters(), preconditioner="empirical-fisher", batch_dim=batch_dim)
        a, b = (t.transpose(0, batch_dim) for t in (x, y))
        optimizer.step(lambda net=model, a=a, b=b: F.mse_loss(net(a), b))
        ends.append(theta(model))
    assert torch.allclose(ends[0], ends[1], rtol=1e-6)


@pytest.mark.parametrize("name", ["empirical-fisher", "hutchinson", "nystrom", "kfac", "lbfgs"])
def test_conjugate_gradients_reuse_what_a_call_returned(name: str) -> None:
    """A call gives the numbers of apply(), in memory that the next call takes again; copies have their own."""
    model = mlp(3, 4, 2, seed=3)
    x, y = randn(6, 3, seed=1), randn(6, 2, seed=2)
    op = hfopt.GaussNewton(lambda: F.mse_loss(model(x), y), model.parameters())
    m = as_preconditioner(name)
    assert m is not None
    m.refresh(op, 0)
    m.damp(0.1, 0.01)
    one, two = randn(op.shape[0], seed=4), randn(op.shape[0], seed=5)
    z = m(one)
    assert torch.equal(z, m.apply(one))
    kept = z.clone()
    assert m(two).data_ptr() == z.data_ptr()
    assert not torch.equal(z, kept)
    assert torch.equal(copy.deepcopy(m)(one), kept)
    assert torch.equal(z, m.apply(two))
