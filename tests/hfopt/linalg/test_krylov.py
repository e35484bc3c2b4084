"""Solutions for every lambda from one solve, against direct and separate solves; lambda chosen by the loss."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hfopt
from hfopt import CG, KrylovDamping
from hfopt.linalg.krylov import _BLOCK, DampingPath, gram
from models import RNN
from tests.hfopt.linalg.test_cg import Matrix, exact, phi
from tests.hfopt.tools import DENSE, dense_gauss_newton, flat, matrix, mlp, randn, relative, rounding, spd, theta

LAMBDAS = (1e-4, 1e-2, 0.3, 1.0, 20.0)


def system(n: int = 40, smallest: float = -3.0) -> tuple[Tensor, Tensor]:
    return spd(torch.logspace(0, smallest, n, dtype=torch.float64), seed=1), randn(n, seed=2)


def damped(a: Tensor, damping: float, metric: Tensor | None = None) -> Tensor:
    return a + damping * (torch.eye(len(a), dtype=a.dtype) if metric is None else torch.diag(metric))


def solved(cg: CG, a: Tensor, b: Tensor, x0: Tensor | None = None, directions: int = 1000) -> Any:
    solution = cg.solve(Matrix(a), b, x0, directions=directions)
    assert solution.pairs is not None
    return solution


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("at", [1e-2, 1.0])
def test_a_whole_space_holds_every_solution(weighed: bool, at: float) -> None:
    b_matrix, b = system()
    metric = torch.linspace(0.5, 3.0, 40, dtype=torch.float64) if weighed else None
    basis = torch.linalg.qr(randn(40, 40, seed=3))[0] * torch.logspace(-4, 4, 40, dtype=torch.float64)
    path = DampingPath(basis.t(), (damped(b_matrix, at, metric) @ basis).t(), b, at, metric)
    assert path.dimension == 40
    for damping in LAMBDAS:
        p = torch.linalg.solve(damped(b_matrix, damping, metric), b)
        assert relative(path.solution(damping), p) < 1e-8
        assert path.model(damping) == pytest.approx((float(b @ p), float(p @ b_matrix @ p)), rel=1e-8)


@pytest.mark.parametrize("iterations", [1, 2, 5, 12])
@pytest.mark.parametrize("at", [1e-2, 1.0])
def test_from_zero_they_are_the_iterates_of_other_solves(iterations: int, at: float) -> None:
    a, b = system()
    cg = CG(max_iterations=iterations, tolerance=0.0)
    path = DampingPath(*solved(cg, damped(a, at), b).pairs, b, at)
    assert path.dimension == iterations
    for damping in LAMBDAS:
        assert relative(path.solution(damping), cg.solve(Matrix(damped(a, damping)), b).x) < 1e-8


def test_a_preconditioner_of_their_own_metric() -> None:
    """With M = W, the space is the same for every lambda as well."""
    a, b = system()
    metric = torch.linspace(0.5, 3.0, 40, dtype=torch.float64)
    cg = CG(max_iterations=6, tolerance=0.0)
    solution = cg.solve(Matrix(damped(a, 0.1, metric)), b, None, lambda r: r / metric, directions=6)
    assert solution.pairs is not None
    path = DampingPath(*solution.pairs, b, 0.1, metric)
    other = cg.solve(Matrix(damped(a, 2.0, metric)), b, None, lambda r: r / metric)
    assert relative(path.solution(2.0), other.x) < 1e-8


@pytest.mark.parametrize("damping", LAMBDAS)
def test_from_a_start_they_are_the_best_of_the_space(damping: float) -> None:
    a, b = system()
    solution = solved(CG(max_iterations=7, tolerance=0.0), damped(a, 0.1), b, randn(40, seed=4))
    s, product = solution.pairs
    assert s.shape == product.shape == (8, 40)
    assert torch.allclose(product, s @ damped(a, 0.1), rtol=1e-10, atol=1e-12)
    p = DampingPath(s, product, b, 0.1).solution(damping)
    assert float((s @ (b - damped(a, damping) @ p)).abs().max()) < 1e-8 * float(b.norm() * s.norm())
    assert float((p - torch.linalg.lstsq(s.t(), p.unsqueeze(1)).solution.squeeze(1) @ s).norm()) < 1e-9


@pytest.mark.parametrize("kept", [1, 5, 19])
@pytest.mark.parametrize("warm", [False, True])
def test_of_a_long_solve_the_first_directions_and_its_end(kept: int, warm: bool) -> None:
    a, b = system()
    system_matrix, start = damped(a, 0.01), 0.1 * randn(40, seed=5) if warm else None
    cg = CG(max_iterations=20, tolerance=0.0)
    solution = solved(cg, system_matrix, b, start, kept)
    assert len(solution.pairs[0]) == kept + 1 + warm
    assert solution.products == 20 + warm
    path = DampingPath(*solution.pairs, b, 0.01)
    whole = solved(cg, system_matrix, b, start)
    assert phi(system_matrix, b, path.solution(0.01)) <= phi(system_matrix, b, solution.x) + 1e-12
    assert torch.equal(solution.pairs[0][: kept + warm], whole.pairs[0][: kept + warm])
    assert relative(solution.pairs[1], solution.pairs[0] @ system_matrix) < DENSE


def test_without_asking_nothing_is_kept() -> None:
    a, b = system()
    assert CG().solve(Matrix(a), b).pairs is None
    nothing = CG().solve(Matrix(a), torch.zeros_like(b), directions=5)
    assert nothing.pairs is not None
    path = DampingPath(*nothing.pairs, b, 1.0)
    assert (path.dimension, path.least) == (0, 0.0)
    assert torch.equal(path.solution(1.0), torch.zeros_like(b))
    assert path.model(1.0) == (0.0, 0.0)


def test_negative_curvature_leads_downhill() -> None:
    a = spd([4.0, 1.0, 1e-2, -0.5, -3.0], seed=6)
    b = randn(5, seed=7)
    basis = torch.eye(5, dtype=torch.float64)
    path = DampingPath(basis, a @ basis, b, 0.0)
    t, vectors = torch.linalg.eigh(a)
    assert torch.allclose(path.values, t)
    assert path.least == pytest.approx(1e-2)
    for damping in LAMBDAS:
        p = path.solution(damping)
        assert relative(p, vectors @ ((vectors.t() @ b) / (t.abs() + damping))) < DENSE
        assert path.model(damping) == pytest.approx((float(b @ p), float(p @ a @ p)), rel=1e-9)
        assert float(b @ p) > 0


def test_rows_that_say_nothing_are_left_out() -> None:
    a, b = system()
    s = randn(4, 40, seed=8)
    s = torch.stack([s[0], s[1], 3 * s[0], torch.zeros(40, dtype=torch.float64), s[2], s[0] - s[1]])
    path = DampingPath(s, s @ damped(a, 0.1), b, 0.1)
    clean = s[[0, 1, 4]]
    assert path.dimension == 3
    assert relative(path.solution(1.0), DampingPath(clean, clean @ damped(a, 0.1), b, 0.1).solution(1.0)) < 1e-8
    s[2, 0] = math.nan
    assert DampingPath(s, s @ damped(a, 0.1), b, 0.1).dimension == 3


@pytest.mark.parametrize(("size", "dtype"), [(30_001, torch.float64), (150_001, torch.float32)])
def test_sums_of_blocks(size: int, dtype: torch.dtype) -> None:
    """Short vectors are summed in float64, the blocks of long ones in their own precision."""
    a, b = randn(3, size, seed=9, dtype=torch.float32), randn(2, size, seed=10, dtype=torch.float32)
    for x, y in ((a, b), (a, a)):
        exact_sums = x.double() @ y.double().t()
        # Errors of rounding are of both signs: about the square root of their number, with room for orders of sums.
        total = float((x.abs().double() @ y.abs().double().t()).max())
        assert float((gram(x, y) - exact_sums).abs().max()) < rounding(min(size, _BLOCK) ** 0.5, dtype=dtype) * total
        double = gram(x.double(), y.double())
        assert float((double - exact_sums).abs().max()) < rounding(size**0.5) * total


def test_single_precision() -> None:
    a, b = system(smallest=-2.0)
    cg = CG(max_iterations=15, tolerance=0.0)
    solution = cg.solve(Matrix(damped(a, 0.1).float()), b.float(), directions=15)
    assert solution.pairs is not None
    path = DampingPath(*solution.pairs, b.float(), 0.1)
    for damping in (0.02, 0.1, 1.0):
        assert relative(path.solution(damping).double(), cg.solve(Matrix(damped(a, damping)), b).x) < 1e-3


# -- whole steps -------------------------------------------------------------------------------------------------------

X, Y = randn(20, 3, seed=11), randn(20, 2, seed=12)


def test_the_loss_chooses_lambda() -> None:
    """Every candidate solved directly: none beside the chosen one is clearly better, and the step is that one's."""
    model = mlp(3, 5, 2, seed=13)
    cg = exact(max_iterations=200, decay=0.0)  # from zero, the space is that of every lambda
    optimizer = hfopt.HessianFree(model.parameters(), cg=cg, line_search=None, preconditioner=None)
    for _ in range(6):
        before = theta(model)
        g = flat(torch.autograd.grad(F.mse_loss(model(X), Y), list(model.parameters())))
        dense = dense_gauss_newton(model, lambda m: m(X), lambda z: F.mse_loss(z, Y))
        optimizer.step(lambda: F.mse_loss(model(X), Y))
        s, after = optimizer.stats[-1], theta(model)
        assert s.accepted

        def loss(damping: float) -> tuple[float, Tensor]:
            p = torch.linalg.solve(damped(dense, damping), -g)  # noqa: B023 - used at once
            nn.utils.vector_to_parameters(before + p, model.parameters())  # noqa: B023
            return float(F.mse_loss(model(X), Y).detach()), p

        chosen, p = loss(s.new_damping)
        assert chosen == pytest.approx(s.new_loss, rel=1e-6)
        assert relative(after - before, p) < 1e-5
        for other in (4 * s.new_damping, s.new_damping / 4):
            assert loss(other)[0] > chosen - 0.011 * (s.loss - chosen)
        nn.utils.vector_to_parameters(after, model.parameters())
        assert s.products == s.cg_iterations + (s.step == 1)


def test_of_all_candidates_the_smallest() -> None:
    model, other = mlp(3, 5, 2, seed=14), mlp(3, 5, 2, seed=14)
    for m, how in ((model, "smallest"), (other, "walk")):
        optimizer = hfopt.HessianFree(m.parameters(), backtracking=how, damping=KrylovDamping(most=3))
        optimizer.step(lambda: F.mse_loss(m(X), Y))  # noqa: B023 - used at once
        if how == "smallest":
            assert optimizer.stats[0].evaluations == 7
            best = optimizer.stats[0].new_loss
        assert best <= optimizer.stats[0].new_loss


def test_without_backtracking_lambda_follows_rho() -> None:
    model = mlp(3, 6, 2, seed=8)
    optimizer = hfopt.HessianFree(model.parameters(), damping=KrylovDamping(30.0), backtracking="none")
    for _ in range(10):
        optimizer.step(lambda: F.mse_loss(model(X), Y))
    for s, following in zip(optimizer.stats[:-1], optimizer.stats[1:], strict=True):
        factor = 4.0 if not s.accepted else 2 / 3 if s.rho > 0.75 else 1.0 if s.rho >= 0.25 else 1.5
        assert s.new_damping == pytest.approx(factor * s.damping)
        assert following.damping == s.new_damping


def test_lambda_crosses_many_orders_in_one_step() -> None:
    """On a quadratic, where only a vanishing lambda is right."""
    model = nn.Linear(6, 1).double()
    x, y = randn(50, 6, seed=15), randn(50, 1, seed=16)
    optimizer = hfopt.HessianFree(model.parameters(), damping=KrylovDamping(1e3), cg=exact(max_iterations=50))
    optimizer.step(lambda: F.mse_loss(model(x), y))
    s = optimizer.stats[0]
    assert s.damping == 1e3
    assert s.new_damping <= 1e3 / 4**4
    full = torch.cat([x, torch.ones(50, 1, dtype=torch.float64)], 1)
    best = F.mse_loss(full @ torch.linalg.lstsq(full, y).solution, y)
    optimizer.step(lambda: F.mse_loss(model(x), y))
    assert optimizer.stats[1].new_loss == pytest.approx(best.item(), rel=0.05)


def test_lambda_stays_where_it_makes_no_difference() -> None:
    """Below all curvatures, lambda does not drift on downwards."""
    model = nn.Linear(4, 1).double()
    x, y = randn(50, 4, seed=17), randn(50, 1, seed=18)
    optimizer = hfopt.HessianFree(model.parameters())
    for _ in range(10):
        optimizer.step(lambda: F.mse_loss(model(x), y))
    assert optimizer.damping.value is not None
    assert optimizer.damping.value > 1e-5 * optimizer.stats[0].gradient_norm


def test_structural_damping_keeps_its_weight() -> None:
    """rho's model has neither lambda nor mu, whichever lambda is chosen."""
    torch.manual_seed(0)
    model = RNN(2, 6, 1, output="last").double()
    x, y = randn(7, 9, 2, seed=19), randn(9, 1, seed=20)
    cg = exact(max_iterations=300, decay=0.0)
    optimizer = hfopt.HessianFree(
        model.parameters(), structural=0.5, damping=KrylovDamping(0.05), cg=cg, line_search=None
    )
    changed = 0
    for _ in range(4):
        before, at = theta(model), optimizer.damping.value
        op = hfopt.GaussNewton(lambda: F.mse_loss(model(x), y), model.parameters(), structural=True)
        g, plain, whole = op.gradient, matrix(op), matrix(op.damped(1.0, 0.5))
        assert at is not None
        optimizer.step(lambda: F.mse_loss(model(x), y))
        s, p = optimizer.stats[-1], theta(model) - before
        eye = torch.eye(len(g), dtype=torch.float64)
        structural = whole - plain - eye  # mu S
        assert relative(p, torch.linalg.solve(plain + at * structural + s.new_damping * eye, -g)) < 1e-5
        assert s.quadratic == pytest.approx(float(g @ p + 0.5 * p @ plain @ p), rel=1e-6)
        changed += s.new_damping != at
    assert changed


def test_the_ladder_stays_within_the_bounds() -> None:
    rule = KrylovDamping(1.0, ratio=10.0, most=4, minimum=1e-2, maximum=1e3)
    assert rule.ladder(1.0, True) == pytest.approx([10.0, 100.0, 1000.0])
    assert rule.ladder(1.0, False) == pytest.approx([0.1, 0.01])
    free = KrylovDamping(ratio=10.0, most=2)
    assert free.ladder(1.0, False) == pytest.approx([0.1, 0.01])
    free.start(3.0)
    free.choose(1e-20)
    assert free.value == pytest.approx(3e-10)


def test_large_models_keep_fewer_directions() -> None:
    sizes = (4, 1 << 23, 1 << 24, 1 << 26, 1 << 30)
    assert [KrylovDamping().kept(size) for size in sizes] == [64, 64, 32, 8, 8]
    assert {KrylovDamping(directions=100).kept(size) for size in sizes} == {100}


@pytest.mark.parametrize(
    "options", [{"ratio": 1.0}, {"ratio": math.inf}, {"most": 0}, {"directions": 0}, {"initial": 0.0}, {"low": 2.0}]
)
def test_bad_settings_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        KrylovDamping(**options)
