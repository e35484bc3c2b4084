"""Hutchinson, Nystrom, K-FAC and L-BFGS against dense formulas; all of them symmetric, positive definite and of use."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import hfopt
from hfopt import CG
from hfopt.linalg.cuda_graphs import obstacle
from hfopt.preconditioners import (
    KFAC,
    LBFGS,
    EmpiricalFisherDiagonal,
    HutchinsonDiagonal,
    Nystrom,
    Preconditioner,
    as_preconditioner,
)
from hfopt.preconditioners.kfac import drawn
from tests.hfopt.preconditioners.preconditioned import N, convolutional, dense, gauss_newton, recurrent
from tests.hfopt.tools import DENSE, SUMS, matrix, mlp, randn, relative, rounding

X, Y = randn(N, 3, seed=1), randn(N, 2, seed=2)
EYE = torch.eye(26, dtype=torch.float64)


def problem(seed: int = 3) -> hfopt.GaussNewton:
    model = mlp(3, 4, 2, seed=seed)
    return gauss_newton(model, lambda net: F.mse_loss(net(X), Y))


def test_hutchinson_is_the_diagonal_on_average() -> None:
    op = problem()
    g = matrix(op)
    m = HutchinsonDiagonal(probes=1000)
    m.refresh(op, 0)
    off = (g.square().sum(1) - g.diagonal().square()).sqrt()
    assert bool(((m.diagonal - g.diagonal()).abs() < 4.5 * off / 1000**0.5 + 1e-12).all())
    m.damp(0.3, 0.1)
    assert torch.allclose(m.apply(Y.new_ones(26)), (m.diagonal + 0.4) ** -0.75, rtol=1e-12)


def test_hutchinson_of_a_hessian_is_positive() -> None:
    model = mlp(3, 4, 2, seed=3)
    m = HutchinsonDiagonal()
    m.refresh(hfopt.Hessian(lambda: F.mse_loss(model(X), Y), model.parameters()), 0)
    assert bool((m.diagonal >= 0).all())


@pytest.mark.parametrize("decay", [0.0, 0.2, randn(26, seed=7).abs()], ids=["none", "number", "vector"])
def test_nystrom_is_its_dense_formula(decay: float | Tensor) -> None:
    op = problem()
    m = Nystrom(rank=5)
    m.refresh(op, 0)
    u, values = m.eigenvectors, m.eigenvalues
    assert relative(u.T @ u, torch.eye(5, dtype=torch.float64)) < SUMS
    # The approximation itself, without shift: G W (W'GW)^+ (GW)' depends on the span of W alone.
    omega = torch.randn(26, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    g = matrix(op)
    approximation = g @ omega @ torch.linalg.pinv(omega.T @ g @ omega, hermitian=True) @ omega.T @ g
    assert relative((u * values) @ u.T, approximation) < 1e-8
    m.damp(0.05, decay)
    d = decay if isinstance(decay, Tensor) else torch.full((26,), decay, dtype=torch.float64)
    least = values[-1]
    full = (u * values) @ u.T + least * (EYE - u @ u.T) + torch.diag(0.05 + d)
    assert relative(dense(m, 26), torch.linalg.inv(full)) < DENSE


def test_nystrom_of_full_rank_is_the_inverse() -> None:
    op = problem()
    m = Nystrom(rank=50)
    m.refresh(op, 0)
    m.damp(0.01, 0.0)
    g = matrix(op)
    assert relative(dense(m, 26) @ (g + 0.01 * EYE), EYE) < 1e-6


def layer_factors(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """A and G by loops over all rows, of inputs (N, T, k) and output gradients (N, T, o)."""
    a = torch.zeros(x.shape[2] + 1, x.shape[2] + 1, dtype=torch.float64)
    b = torch.zeros(g.shape[2], g.shape[2], dtype=torch.float64)
    for n in range(x.shape[0]):
        for t in range(x.shape[1]):
            row = torch.cat([x[n, t], torch.ones(1, dtype=torch.float64)])
            a += torch.outer(row, row) / (x.shape[0] * x.shape[1])
            b += torch.outer(g[n, t], g[n, t])
    return a, b


def test_kfac_is_the_kronecker_product_of_factors_by_loops() -> None:
    model = mlp(3, 4, 2, seed=3)
    op = gauss_newton(model, lambda net: F.cross_entropy(net(X), torch.arange(N) % 2))
    m = KFAC()
    m.refresh(op, 5)
    (w,) = drawn(op, 5, 0)
    hidden = model[1](model[0](X)).detach()
    back = (w @ model[2].weight.detach()) * (1 - hidden.square())
    blocks = [layer_factors(x.unsqueeze(1), g.unsqueeze(1)) for x, g in ((X, back), (hidden, w))]
    for f, (a, g) in zip(m.factors, blocks, strict=True):
        assert relative(f.a, a) < SUMS
        assert relative(f.g, g) < SUMS
    m.damp(0.3, 0.1)
    inverse = dense(m, 26)
    starts = [0, 16]
    for start, (a, g) in zip(starts, blocks, strict=True):
        o, k = len(g), len(a) - 1
        pi = ((a.trace() / len(a)) / (g.trace() / len(g))) ** 0.5
        gamma = 0.4**0.5
        full = torch.kron(g + gamma / pi * torch.eye(o).double(), a + pi * gamma * torch.eye(k + 1).double())
        # Rows of [W b], as they stand in the flat vector: W (o, k), then b (o,).
        order = [i * (k + 1) + j for i in range(o) for j in range(k)] + [i * (k + 1) + k for i in range(o)]
        size = o * (k + 1)
        block = inverse[start : start + size, start : start + size]
        assert relative(block, torch.linalg.inv(full)[order][:, order]) < SUMS
        inverse[start : start + size, start : start + size] = 0
    assert float(inverse.abs().max()) == 0.0


def test_averaged_factors_are_the_running_average_of_the_single_ones() -> None:
    """Refresh k has e old + (1 - e) new with e = min(1 - 1/k, 0.6): 0, 1/2, 0.6, ...; another network begins again."""
    averaged, single = KFAC(average=0.6), KFAC()
    expected: list[Tensor] = []
    for k, share in enumerate((0.0, 0.5, 0.6, 0.6)):
        op = problem(seed=k)
        for m in (averaged, single):
            m.refresh(op, k)
        new = [t for f in single.factors for t in (f.a, f.g)]
        expected = [share * e + (1 - share) * t for e, t in zip(expected or new, new, strict=True)]
        for t, e in zip((t for f in averaged.factors for t in (f.a, f.g)), expected, strict=True):
            assert relative(t, e) < SUMS
    model = mlp(3, 2, seed=1)
    op = gauss_newton(model, lambda net: F.mse_loss(net(X), Y))
    for m in (averaged, single):
        m.refresh(op, 9)
    assert torch.equal(averaged.factors[0].a, single.factors[0].a)


def test_factors_do_not_depend_on_the_size_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = KFAC(), KFAC()
    op = problem()
    whole.refresh(op, 1)
    monkeypatch.setattr("hfopt.preconditioners.layers.BLOCK", 2 * (3 + 4))  # two cases of the first layer
    parts.refresh(op, 1)
    for one, other in zip(whole.factors, parts.factors, strict=True):
        assert relative(other.a, one.a) < rounding(N)
        assert relative(other.g, one.g) < rounding(N)


def test_kfac_of_convolutions() -> None:
    model, x = convolutional(), randn(N, 2, 7, 6, seed=1)
    op = gauss_newton(model, lambda net: F.mse_loss(net(x), Y))
    m = KFAC()
    m.refresh(op, 2)
    (w,) = drawn(op, 2, 0)
    y = model[0](x)
    (gy,) = torch.autograd.grad(model[1:](y), y, w)
    padded = F.pad(x, (1, 1, 1, 1))
    patches = torch.stack(
        [padded[:, :, i : i + 3, j : j + 3].reshape(N, -1) for i in range(0, 7, 2) for j in range(0, 6, 2)], 1
    )
    a, g = layer_factors(patches, gy.flatten(2).transpose(1, 2))
    assert [f.bias for f in m.factors] == [1, -1, 4]
    assert relative(m.factors[0].a, a) < SUMS
    assert relative(m.factors[0].g, g) < SUMS


def test_kfac_of_one_linear_layer_and_one_case_is_nearly_the_inverse() -> None:
    """With one case A (x) G is the layer's block, on average over draws, whatever they are."""
    model = mlp(3, 2, seed=3)
    op = gauss_newton(model, lambda net: F.mse_loss(net(X[:1]), Y[:1]))
    m = KFAC(samples=1000)
    m.refresh(op, 0)
    (f,) = m.factors
    order = [i * 4 + j for i in range(2) for j in range(3)] + [3, 7]
    assert relative(torch.kron(f.g, f.a)[order][:, order], matrix(op)) < 0.1


def test_kfac_elsewhere_is_a_diagonal() -> None:
    model, x, y = recurrent("rnn"), randn(5, N, 2, seed=1), randn(N, 1, seed=2)
    op = gauss_newton(model, lambda net: F.mse_loss(net(x), y))
    m = KFAC(probes=800)
    with pytest.warns(UserWarning, match=r"found no linear or convolution layer.*preconditioner='nystrom' or None"):
        m.refresh(op, 0)
    m.refresh(op, 0)  # says so once
    m.damp(0.0, 0.0)
    layered = {i for f in m.factors for i in (f.weight, f.bias)}
    inverse, g = dense(m, op.shape[0]), matrix(op)
    for i, piece in enumerate(torch.split(torch.arange(op.shape[0]), op.vector.sizes)):
        if i not in layered:
            assert torch.allclose(1 / inverse.diagonal()[piece], g.diagonal()[piece], rtol=4.5 * (2 / 800) ** 0.5)


def test_lbfgs_is_the_bfgs_recursion() -> None:
    op = problem()
    m = LBFGS(pairs=6)
    m.refresh(op, 0)
    m.damp(0.1, 0.05)
    assert torch.equal(m.apply(X[:, 0]), X[:, 0])
    watched = m.watch(op.damped(0.1, 0.0, 0.05))
    CG(tolerance=0.0, max_iterations=5).solve(watched, -op.gradient, None, m)
    pairs = [(v, av - 0.15 * v) for v, av in watched.pairs]  # type: ignore[attr-defined]
    assert len(pairs) == 5
    m.refresh(op, 1)
    m.damp(0.3, 0.05)
    pairs = [(v, y + 0.35 * v) for v, y in pairs]
    s, y = pairs[-1]
    h = (s @ y) / (y @ y) * EYE
    for s, y in pairs:
        rho = 1 / (s @ y)
        v = EYE - rho * torch.outer(y, s)
        h = v.T @ h @ v + rho * torch.outer(s, s)
    assert relative(dense(m, 26), h) < 1e-8


def test_lbfgs_samples_a_run_evenly() -> None:
    from hfopt.preconditioners.lbfgs import Watched

    class Doubling:
        def multiply(self, v: Tensor, out: Tensor | None = None) -> Tensor:
            return 2 * v

    seen = Watched(Doubling(), 4)
    for i in range(21):
        seen.multiply(torch.tensor([float(i)]))
    assert [float(v) for v, _ in seen.pairs] == [0.0, 8.0, 16.0]


def test_products_that_are_watched_are_not_recorded() -> None:
    system = problem().damped(0.1)
    assert obstacle(system) is None
    assert "one by one" in str(obstacle(LBFGS().watch(system)))
    assert obstacle(KFAC().watch(system)) is None


MADE: dict[str, Callable[[], Preconditioner]] = {
    "empirical-fisher": EmpiricalFisherDiagonal,
    "hutchinson": HutchinsonDiagonal,
    "nystrom": lambda: Nystrom(rank=4),
    "kfac": KFAC,
    "lbfgs": lambda: LBFGS(pairs=4),
}


@pytest.mark.parametrize("name", MADE)
@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    damping=st.sampled_from([1e-8, 1e-3, 1.0, 1e4]),
    decay=st.sampled_from([0.0, 1e-2]),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    width=st.integers(1, 4),
)
def test_symmetric_positive_definite(
    name: str, seed: int, damping: float, decay: float, scale: float, width: int
) -> None:
    model, x = mlp(3, width, 2, seed=seed), scale * X
    op = gauss_newton(model, lambda net: F.mse_loss(net(x), Y))
    m = MADE[name]()
    for step in range(2):
        m.refresh(op, step)
        m.damp(damping, decay)
        system = op.damped(damping, 0.0, decay)
        CG(tolerance=0.0, max_iterations=6).solve(m.watch(system), -op.gradient, None, m)
    m.refresh(op, 2)
    m.damp(damping, decay)
    inverse = dense(m, op.shape[0])
    assert bool(torch.isfinite(inverse).all())
    assert relative(inverse, inverse.T) < 1e-6
    d = inverse.diagonal().rsqrt()
    assert float(torch.linalg.eigvalsh(d[:, None] * (inverse + inverse.T) / 2 * d).min()) > 0


@pytest.mark.parametrize("name", MADE)
def test_the_solution_is_the_same_and_the_seed_the_step(name: str) -> None:
    op = problem()
    truth = torch.linalg.solve(matrix(op) + 0.01 * EYE, -op.gradient)
    applied = []
    for _ in range(2):
        m = MADE[name]()
        for step in range(3):
            m.refresh(op, step)
            m.damp(0.01, 0.0)
            solver = CG(tolerance=0.0, max_iterations=200, residual=1e-12)
            found = solver.solve(m.watch(op.damped(0.01)), -op.gradient, None, m)
            assert relative(found.x, truth) < 1e-8
        applied.append(m.apply(truth))
    assert torch.equal(*applied)


def uneven() -> hfopt.GaussNewton:
    """Inputs whose scales are two decades apart."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 10), nn.Tanh(), nn.Linear(10, 3)).double()
    x = randn(100, 20, seed=9) * torch.logspace(-1, 1, 20, dtype=torch.float64)
    return gauss_newton(model, lambda net: F.mse_loss(net(x), randn(100, 3, seed=10)))


SOLVER = CG(tolerance=0.0, max_iterations=2000, residual=1e-6)


@functools.cache
def iterations_without() -> int:
    op = uneven()
    return SOLVER.solve(op.damped(1e-4), -op.gradient).iterations


@pytest.mark.parametrize("name", ["kfac", "nystrom", "empirical-fisher", "lbfgs"])
def test_it_saves_iterations(name: str) -> None:
    op = uneven()
    m = {"nystrom": Nystrom(rank=50), "lbfgs": LBFGS(pairs=60)}.get(name) or MADE[name]()
    counts = []
    for step in range(2):
        m.refresh(op, step)
        m.damp(1e-4, 0.0)
        counts.append(SOLVER.solve(m.watch(op.damped(1e-4)), -op.gradient, None, m).iterations)
    assert counts[-1] < 0.7 * iterations_without()


@pytest.mark.parametrize("m", [Nystrom(rank=4, every=3), KFAC(every=3), LBFGS(pairs=4)], ids=lambda m: type(m).__name__)
def test_states_go_round(m: Any) -> None:
    other = copy.deepcopy(m)
    op = problem()
    for step in (3, 4):
        m.refresh(op, step)
        m.damp(0.1, 0.0)
        CG(max_iterations=6).solve(m.watch(op.damped(0.1)), -op.gradient, None, m)
    state = copy.deepcopy(m.state_dict())
    assert state
    other.load_state_dict(state)
    for each in (m, other):
        each.refresh(problem(seed=4), 5)
        each.damp(0.2, 0.0)
    assert torch.equal(m.apply(op.gradient), other.apply(op.gradient))
    again = copy.deepcopy(other)
    assert torch.equal(again.apply(op.gradient), other.apply(op.gradient))


def test_a_rest_of_the_parameters_is_another_vector() -> None:
    """A group at rest makes the vector shorter: what was kept is not used then."""
    for m in (Nystrom(rank=4, every=3), KFAC(every=3), LBFGS(pairs=4)):
        op = problem()
        m.refresh(op, 3)
        m.damp(0.1, 0.0)
        CG(max_iterations=6).solve(m.watch(op.damped(0.1)), -op.gradient, None, m)
        model = mlp(3, 2, seed=1)
        shorter = gauss_newton(model, lambda net: F.mse_loss(net(X), Y))
        m.refresh(shorter, 4)
        m.damp(0.1, 0.0)
        assert m.apply(shorter.gradient).shape == (8,)


def test_names_and_bad_arguments() -> None:
    assert as_preconditioner("none") is None
    for name, made in MADE.items():
        assert type(as_preconditioner(name, 1)) is type(made())
    for build, word in (
        (lambda: Nystrom(rank=0), "rank"),
        (lambda: KFAC(every=0), "every"),
        (lambda: KFAC(average=1.0), "average"),
        (lambda: LBFGS(pairs=1), "pairs"),
        (lambda: HutchinsonDiagonal(probes=0), "probes"),
    ):
        with pytest.raises(ValueError, match=word):
            build()
    model = mlp(3, 2)
    hessian = hfopt.Hessian(lambda: F.mse_loss(model(X), Y), model.parameters())
    with pytest.raises(TypeError, match="outputs"):
        KFAC().refresh(hessian, 0)
    for m in (KFAC(), Nystrom()):
        with pytest.raises(RuntimeError, match="refresh"):
            m.damp(0.1, 0.0)
        with pytest.raises(RuntimeError, match="damp"):
            m.apply(X[0])
