"""Conjugate gradients against direct solves, and every reason to stop."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hfopt.linalg.cg import CG
from hfopt.linalg.cg_host import HostCG
from hfopt.linalg.solution import Solution
from hfopt.linalg.vector import norm
from tests.hfopt.tools import randn, rounding, spd


class Matrix:
    """A dense matrix as an operator."""

    def __init__(self, a: Tensor) -> None:
        self.a, self.products = a, 0

    def multiply(self, v: Tensor, out: Tensor | None = None) -> Tensor:
        self.products += 1
        return torch.mv(self.a, v, out=out)


def exact(residual: float = 1e-14, **options: float) -> CG:
    """Settings that stop on the residual alone."""
    return CG(**{"max_iterations": 2000, "tolerance": 0.0, "residual": residual, **options})  # type: ignore[arg-type]


def phi(a: Tensor, b: Tensor, x: Tensor) -> float:
    return float(0.5 * x @ a @ x - b @ x)


@pytest.mark.parametrize("condition", [1e0, 1e1, 1e2, 1e4, 1e6, 1e8, 1e10])
def test_solution_equals_a_direct_solve(condition: float) -> None:
    n = 30
    a = spd(torch.logspace(0, -math.log10(condition), n, dtype=torch.float64), seed=1)
    b = randn(n, seed=2)
    # The residual floor of CG in finite precision is about eps * condition * |b|.
    solution = exact(residual=1e-15 * max(condition, 10.0)).solve(Matrix(a), b)
    x = torch.linalg.solve(a, b)
    assert solution.reason == "residual"
    # Backward error at rounding, forward error within condition * eps, the energy error smaller still.
    assert float((b - a @ solution.x).norm() / b.norm()) < rounding(n, max(condition, 10.0))
    assert float((solution.x - x).norm() / x.norm()) < rounding(n, max(condition, 10.0))
    assert phi(a, b, solution.x) == pytest.approx(phi(a, b, x), rel=1e-6)


@pytest.mark.parametrize(
    ("eigenvalues", "distinct"),
    [
        ([1.0] * 20, 1),
        ([1.0] * 10 + [1e3] * 10, 2),
        ([1e-3] * 5 + [1.0] * 10 + [50.0] * 5, 3),
        ([1e-2] + [1.0] * 18 + [1e2], 3),
    ],
)
def test_as_many_iterations_as_distinct_eigenvalues(eigenvalues: list[float], distinct: int) -> None:
    a, b = spd(eigenvalues, seed=3), randn(20, seed=4)
    solution = exact(residual=1e-8).solve(Matrix(a), b)
    assert solution.reason == "residual"
    assert solution.iterations <= distinct
    assert float((b - a @ solution.x).norm()) < 1e-7 * float(b.norm())


def test_clusters_cost_little_more_than_their_centres() -> None:
    spread = 1 + 1e-3 * torch.linspace(-1, 1, 15, dtype=torch.float64)
    a, b = spd(torch.cat([spread, 1e4 * spread]), seed=5), randn(30, seed=6)
    assert exact(residual=1e-8).solve(Matrix(a), b).iterations <= 10


@pytest.mark.parametrize("condition", [1e1, 1e3, 1e5])
def test_single_precision(condition: float) -> None:
    n = 40
    a = spd(torch.logspace(0, -math.log10(condition), n, dtype=torch.float64), seed=7)
    b = randn(n, seed=8)
    solution = exact(residual=1e-6).solve(Matrix(a.float()), b.float())
    x = torch.linalg.solve(a, b)
    assert solution.x.dtype == torch.float32
    energy = math.sqrt(float((solution.x.double() - x) @ a @ (solution.x.double() - x)) / float(x @ a @ x))
    assert energy < 3e-6 * math.sqrt(condition)


@pytest.mark.parametrize("repair_every", [0, 7])
def test_repairing_the_residual(repair_every: int) -> None:
    """With recomputed residuals the recurrence's residual is the true one, at one more product each time."""
    a = spd(torch.logspace(0, -3, 20, dtype=torch.float64), seed=9).float()
    b = randn(20, seed=10).float()
    op = Matrix(a)
    solution = exact(residual=0.0, max_iterations=70, repair_every=repair_every).solve(op, b)
    assert op.products == solution.products == 70 + (10 if repair_every else 0)
    claimed, true = solution.checks[-1].residual, float((b - a @ solution.x).norm())
    if repair_every:
        assert claimed == pytest.approx(true, rel=1e-6)
    else:
        assert claimed < 0.1 * true  # drift: what repair is for


def diagonal(a: Tensor) -> Callable[[Tensor], Tensor]:
    inverse = 1 / a.diagonal()
    return lambda r: r * inverse


def test_preconditioning_keeps_the_solution_and_saves_iterations() -> None:
    n = 50
    scales = torch.logspace(-2, 2, n, dtype=torch.float64)
    a = scales[:, None] * spd(torch.linspace(1, 2, n, dtype=torch.float64), seed=11) * scales
    b = randn(n, seed=12)
    plain = exact(residual=1e-9, max_iterations=5000).solve(Matrix(a), b)
    better = exact(residual=1e-9, max_iterations=5000).solve(Matrix(a), b, None, diagonal(a))
    x = torch.linalg.solve(a, b)
    assert torch.allclose(better.x, x, rtol=1e-5)
    assert float((plain.x - x) @ a @ (plain.x - x)) < 1e-8 * float(x @ a @ x)
    assert better.iterations < plain.iterations / 3


def test_preconditioned_iterates_are_those_of_the_transformed_system() -> None:
    """With M = C C' the iterates are C'^-1 times those of plain CG on C^-1 A C'^-1."""
    a = spd(torch.logspace(0, -3, 12, dtype=torch.float64), seed=13)
    m = spd(torch.linspace(0.5, 4, 12, dtype=torch.float64), seed=14)
    b = randn(12, seed=15)
    c = torch.linalg.cholesky(m)
    inverse = torch.linalg.inv(c)
    cg = CG(max_iterations=5, tolerance=0.0)
    ours = cg.solve(Matrix(a), b, None, lambda r: torch.linalg.solve(m, r))
    theirs = cg.solve(Matrix(inverse @ a @ inverse.T), inverse @ b)
    assert torch.allclose(ours.x, inverse.T @ theirs.x, rtol=1e-9, atol=1e-12)


def history(a: Tensor, b: Tensor, n: int, x0: Tensor | None = None) -> list[float]:
    """phi after every iteration of textbook CG."""
    x = torch.zeros_like(b) if x0 is None else x0.clone()
    r = b - a @ x
    d, values = r.clone(), [phi(a, b, x)]
    for _ in range(n):
        alpha = (r @ r) / (d @ a @ d)
        x = x + alpha * d
        new = r - alpha * (a @ d)
        d, r = new + (new @ new) / (r @ r) * d, new
        values.append(phi(a, b, x))
    return values


def martens(values: list[float], epsilon: float, least: int = 1) -> int:
    """The iteration at which the rule of Martens (2010), section 4.4, stops."""
    for i in range(1, len(values)):
        k = max(10, math.ceil(0.1 * i))
        if i > k and i >= least and values[i] < 0 and (values[i] - values[i - k]) / values[i] < k * epsilon:
            return i
    raise AssertionError("never")


@pytest.mark.parametrize("epsilon", [5e-3, 5e-4, 5e-5])
@pytest.mark.parametrize("least", [1, 100])
def test_progress_rule(epsilon: float, least: int) -> None:
    a = spd(torch.logspace(0, -4, 200, dtype=torch.float64), seed=16)
    b = a @ randn(200, seed=17) + 0.1 * randn(200, seed=18)
    solution = CG(tolerance=epsilon, min_iterations=least, check_every=1).solve(Matrix(a), b)
    # Rounding moves late iterates of two runs apart, so the rule is replayed on this run's own values of phi.
    values = [0.0, *(c.model for c in solution.checks)]
    assert values[:20] == pytest.approx(history(a, b, 19), rel=1e-8)
    expected = martens(values, epsilon, least)
    assert solution.reason == "progress"
    assert solution.iterations == expected


def test_progress_rule_by_hand() -> None:
    """phi_i = -(1 + i) up to 10, then flat but for 1e-3 a step: k = 10 and the share of the last ten steps counts."""
    cg = CG(tolerance=5e-4)
    values = [-float(i) for i in range(11)]
    assert not cg.progress_is_little(values)  # i = k = 10: too early
    for i in range(11, 40):
        values.append(-10 - 1e-3 * (i - 10))
        now, then = values[i], values[i - 10]
        assert cg.progress_is_little(values) == ((now - then) / now < 10 * 5e-4), i
        if i < 20:
            assert not cg.progress_is_little(values)
    assert cg.progress_is_little(values)
    assert not cg.progress_is_little([-v for v in values])  # phi must be negative
    assert not CG(tolerance=0.0).progress_is_little(values)
    # At 200 iterations the window is 20 steps wide: 20 steps of 6e-4 each are too little for k eps = 1e-2 only.
    long = [-1 - 4e-4 * i for i in range(201)]
    assert (long[200] - long[180]) / long[200] < 20 * 5e-4
    assert cg.progress_is_little(long)
    assert not cg.progress_is_little([-1 - 1e-3 * i for i in range(21)])


def best_rate(values: list[float], overhead: float, least: int = 1) -> int:
    """The first iteration at which the decrease per product is less than it was k iterations before."""
    rate = [-value / (overhead + i) for i, value in enumerate(values) if overhead + i > 0]
    rate = [0.0] * (len(values) - len(rate)) + rate
    for i in range(1, len(values)):
        k = max(5, math.ceil(0.1 * i))
        if i > k and i >= least and values[i] < 0 and rate[i] < rate[i - k]:
            return i
    raise AssertionError("never")


@pytest.mark.parametrize("overhead", [0.0, 5.0, 40.0, 300.0])
@pytest.mark.parametrize("least", [1, 60])
@pytest.mark.parametrize("warm", [False, True])
def test_solves_end_where_the_decrease_per_product_is_largest(overhead: float, least: int, warm: bool) -> None:
    a = spd(torch.logspace(0, -4, 200, dtype=torch.float64), seed=16)
    b = a @ randn(200, seed=17) + 0.1 * randn(200, seed=18)
    x0 = 0.3 * torch.linalg.solve(a + 0.01 * torch.eye(200, dtype=torch.float64), b) if warm else None
    solution = CG(overhead=overhead, min_iterations=least, check_every=1).solve(Matrix(a), b, x0)
    start = 0.0 if x0 is None else phi(a, b, x0)
    values = [start, *(c.model for c in solution.checks)]
    assert solution.reason == "progress"
    assert solution.iterations == best_rate(values, overhead, least)


@pytest.mark.parametrize("decades", [1.0, 2.0, 2.5])
def test_an_exact_system_is_solved_on_while_its_residual_halves(decades: float) -> None:
    a, b = spd(torch.logspace(0, -decades, 200, dtype=torch.float64), seed=16), randn(200, seed=17)
    every = CG(tolerance=0.0, check_every=1, max_iterations=120).solve(Matrix(a), b)
    residuals = [norm(b), *(c.residual for c in every.checks)]
    first = CG().solve(Matrix(a), b).iterations  # where the decrease per product has begun to fall, once and for all
    slow = (i for i in range(first, len(residuals)) if residuals[i - 1] > 0.5 * residuals[i - 1 - max(5, -(-i // 10))])
    small = next((i for i, r in enumerate(residuals) if r <= 1e-10 * residuals[0]), len(residuals))
    exactly = CG().solve(Matrix(a), b, damping=0)
    assert exactly.iterations == min(next(slow, small), small)
    assert (exactly.iterations > first) is (decades <= 2)


def test_a_residual_that_falls_slowly_is_no_reason_to_go_on() -> None:
    a, b = spd(torch.logspace(0, -4, 200, dtype=torch.float64), seed=16), randn(200, seed=17)
    damped, exactly = (CG().solve(Matrix(a), b, damping=damping) for damping in (None, 0.0))
    assert exactly.iterations == damped.iterations
    ruled, alone = (CG(tolerance=5e-4).solve(Matrix(a[:50, :50]), b[:50], damping=damping) for damping in (None, 0.0))
    assert ruled.iterations == alone.iterations  # Martens' rule, whatever the system


def test_an_exact_system_of_few_dimensions_is_solved() -> None:
    a, b = spd(torch.logspace(0, -3, 50, dtype=torch.float64), seed=16), randn(50, seed=17)
    assert CG().solve(Matrix(a), b).reason == "progress"
    solution = CG().solve(Matrix(a), b, damping=0)
    assert solution.reason == "residual"
    assert norm(b - a @ solution.x) <= 1e-9 * norm(b)


@pytest.mark.parametrize("regular", [False, True])
def test_little_curvature_ends_a_solve_only_if_the_matrix_may_be_singular(regular: bool) -> None:
    """A second direction with 1e-6 of the first one's curvature, along which a step multiplies the residual."""
    b = randn(4, seed=1).float()
    run = HostCG(CG(), Matrix(torch.eye(4)), b, None, None, regular=regular)
    ad = b / norm(b)
    assert run.curved(1.0, 1.0, 1.0, ad) is None
    assert run.curved(1e-5, 1.0, 1.0, ad) == (None if regular else "singular")
    assert run.curved(1e-7, 1.0, 1.0, ad) == "singular"  # the rounding error of a product in float32


def test_the_more_a_step_costs_the_longer_its_solve() -> None:
    a = spd(torch.logspace(0, -4, 200, dtype=torch.float64), seed=16)
    b = a @ randn(200, seed=17)
    lengths = [CG(overhead=o).solve(Matrix(a), b).iterations for o in (1.0, 30.0, 300.0, 3000.0)]
    assert lengths == sorted(lengths)
    assert len(set(lengths)) == 4
    ruled = [CG(tolerance=5e-4, overhead=o).solve(Matrix(a), b).iterations for o in (1.0, 1000.0)]
    assert ruled[0] == ruled[1]  # Martens' rule, whatever a step costs


def test_iteration_limits() -> None:
    a, b = spd(torch.logspace(0, -6, 60, dtype=torch.float64), seed=19), randn(60, seed=20)
    solution = exact(max_iterations=17).solve(Matrix(a), b)
    assert (solution.reason, solution.iterations, solution.products) == ("iterations", 17, 17)
    easy = CG(tolerance=0.5, min_iterations=33, max_iterations=50).solve(Matrix(a), b)
    assert (easy.reason, easy.iterations) == ("progress", 33)


def test_phi_and_norms_of_checks_and_iterates() -> None:
    a, b = spd(torch.logspace(0, -3, 40, dtype=torch.float64), seed=21), randn(40, seed=22)
    x0 = randn(40, seed=23)
    solution = exact(max_iterations=37, check_every=4).solve(Matrix(a), b, x0)
    assert [c.iteration for c in solution.checks] == [4, 8, 12, 16, 20, 24, 28, 32, 36, 37]
    assert [i.iteration for i in solution.iterates] == [0, 5, 7, 9, 11, 15, 19, 25, 32, 37]
    for iterate in solution.iterates:
        assert iterate.phi == pytest.approx(phi(a, b, iterate.x), rel=1e-10)
    values = history(a, b, 12, x0)
    for check in solution.checks[:3]:
        assert check.model == pytest.approx(values[check.iteration], rel=1e-8)
    assert solution.checks[-1].residual == pytest.approx(float((b - a @ solution.x).norm()), rel=1e-8)
    assert solution.checks[-1].norm == pytest.approx(float(solution.x.norm()), rel=1e-12)
    assert torch.equal(solution.iterates[0].x, x0)
    assert torch.equal(solution.iterates[-1].x, solution.x)


def test_stored_iterations_follow_the_power_law() -> None:
    assert CG(max_iterations=100, growth=1.3).stored_iterations() == {
        math.ceil(5 * 1.3**j) for j in range(12) if math.ceil(5 * 1.3**j) <= 100
    }
    assert len(CG(max_iterations=100000).stored_iterations()) < 45


def test_warm_start() -> None:
    a, b = spd(torch.logspace(0, -4, 40, dtype=torch.float64), seed=24), randn(40, seed=25)
    x = torch.linalg.solve(a, b)
    near = x + 1e-6 * randn(40, seed=26)
    before = near.clone()
    op = Matrix(a)
    warm = exact(residual=1e-6).solve(op, b, near)
    cold = exact(residual=1e-6).solve(Matrix(a), b)
    assert warm.iterations < cold.iterations
    assert op.products == warm.products == warm.iterations + 1  # one for the first residual
    assert torch.equal(near, before)
    assert float((b - a @ warm.x).norm()) <= 1.01e-6 * float(b.norm())
    done = exact(residual=1e-6).solve(Matrix(a), b, x)
    assert (done.reason, done.iterations) == ("residual", 0)
    assert torch.equal(done.x, x)


def test_zero_right_hand_side() -> None:
    a = spd([1.0, 2.0, 3.0])
    solution = CG().solve(Matrix(a), torch.zeros(3, dtype=torch.float64))
    assert (solution.reason, solution.iterations) == ("residual", 0)
    assert not solution.x.any()


def negative(solution: Solution, a: Tensor, b: Tensor) -> None:
    assert solution.reason == "negative curvature"
    assert torch.isfinite(solution.x).all()
    for iterate in solution.iterates:
        assert iterate.phi == pytest.approx(phi(a, b, iterate.x), rel=1e-9, abs=1e-12)
    assert torch.equal(solution.iterates[-1].x, solution.x)
    assert solution.checks[-1].model == pytest.approx(phi(a, b, solution.x), rel=1e-9)
    assert solution.checks[-1].residual == pytest.approx(float((b - a @ solution.x).norm()), rel=1e-9)


def test_negative_curvature_on_the_way() -> None:
    """The answer is the last iterate before the direction that the model has no minimum along."""
    a, b = spd([10.0, 5.0, 2.0, 1.0, -0.01], seed=27), randn(5, seed=28)
    solution = exact().solve(Matrix(a), b)
    assert 1 <= solution.iterations < 5
    negative(solution, a, b)
    assert phi(a, b, solution.x) < 0


@pytest.mark.parametrize("warm", [False, True])
def test_negative_curvature_at_once(warm: bool) -> None:
    """The first direction is taken with the step of the same curvature with the other sign."""
    a, b = -spd([1.0, 2.0, 3.0], seed=29), randn(3, seed=30)
    x0 = randn(3, seed=31) if warm else None
    solution = exact().solve(Matrix(a), b, x0)
    negative(solution, a, b)
    start = torch.zeros_like(b) if x0 is None else x0
    r = b - a @ start
    assert torch.allclose(solution.x, start - (r @ r) / (r @ a @ r) * r)
    assert phi(a, b, solution.x) < phi(a, b, start)


def test_zero_curvature_ends_the_solve() -> None:
    a = torch.zeros(3, 3, dtype=torch.float64)
    solution = exact().solve(Matrix(a), randn(3, seed=32))
    assert solution.reason == "negative curvature"
    assert not solution.x.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "eigenvalues",
    [
        [3.0, 2.0, 1.0, 0.0],
        [5.0] * 3 + [1.0] * 4 + [0.0] * 3,
        [10 ** (-2 * i / 19) for i in range(20)] + [0.0] * 10,
        [10 ** (-4 * i / 29) for i in range(30)] + [0.0],
    ],
)
def test_systems_without_a_solution_end(eigenvalues: list[float], seed: int, scaled: bool, dtype: torch.dtype) -> None:
    """b has a part in A's null space: the solve ends there, long before x is of order ``|b| / eps``."""
    n = len(eigenvalues)
    a, b = spd(torch.tensor(eigenvalues, dtype=torch.float64), seed=seed).to(dtype), randn(n, seed=50 + seed).to(dtype)
    m = (lambda r: r * torch.arange(1, n + 1, dtype=r.dtype)) if scaled else None
    solution = exact(max_iterations=250).solve(Matrix(a), b, preconditioner=m)
    assert solution.reason in ("singular", "negative curvature")
    assert solution.iterations < 250
    flat = torch.finfo(dtype).eps ** (2 / 3) * min(e for e in eigenvalues if e)
    assert float(solution.x.norm()) < float(b.norm()) * n / flat


@pytest.mark.parametrize("seed", range(4))
def test_a_singular_system_with_a_solution_is_solved(seed: int) -> None:
    eigenvalues = torch.cat([torch.logspace(0, -4, 20, dtype=torch.float64), torch.zeros(10, dtype=torch.float64)])
    a = spd(eigenvalues, seed=seed)
    b = a @ randn(30, seed=60 + seed)
    solution = exact(residual=1e-10).solve(Matrix(a), b)
    assert solution.reason == "residual"
    assert float((b - a @ solution.x).norm()) < 2e-10 * float(b.norm())


class Breaks(Matrix):
    """Products turn into NaN from the n-th on."""

    def __init__(self, a: Tensor, n: int, value: float) -> None:
        super().__init__(a)
        self.n, self.value = n, value

    def multiply(self, v: Tensor, out: Tensor | None = None) -> Tensor:
        result = super().multiply(v, out)
        return result.fill_(self.value) if self.products >= self.n else result


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("n", [1, 2, 8])
@pytest.mark.parametrize("warm", [False, True])
def test_products_that_are_not_finite(value: float, n: int, warm: bool) -> None:
    a, b = spd(torch.linspace(1, 2, 30, dtype=torch.float64), seed=33), randn(30, seed=34)
    x0 = 0.1 * randn(30, seed=35) if warm else None
    solution = exact(residual=0.0).solve(Breaks(a, n, value), b, x0)
    assert solution.reason in {"not finite", "negative curvature"}
    assert torch.isfinite(solution.x).all()
    assert all(math.isfinite(i.phi) and torch.isfinite(i.x).all() for i in solution.iterates)
    assert solution.iterates
    assert solution.iterations <= n
    if n == 8:
        assert phi(a, b, solution.x) < 0


def test_a_preconditioner_that_is_not_finite() -> None:
    a, b = spd([1.0, 2.0, 3.0], seed=36), randn(3, seed=37)
    solution = exact().solve(Matrix(a), b, None, lambda r: r * math.nan)
    assert solution.reason == "not finite"
    assert not solution.x.any()


def test_stopped_by_the_caller() -> None:
    a, b = spd(torch.logspace(0, -5, 60, dtype=torch.float64), seed=38), randn(60, seed=39)
    seen: list[tuple[int, float, float]] = []

    def stop(i: int, x: Tensor, value: float) -> bool:
        seen.append((i, phi(a, b, x), value))
        return i >= 30

    solution = exact(check_every=10).solve(Matrix(a), b, None, None, stop)
    assert (solution.reason, solution.iterations) == ("stopped", 30)
    assert [i for i, _, _ in seen] == [10, 20, 30]
    assert all(value == pytest.approx(direct, rel=1e-9) for _, direct, value in seen)
    assert solution.iterates[-1].iteration == 30


@pytest.mark.parametrize(
    "options",
    [
        {"max_iterations": 0},
        {"min_iterations": 0},
        {"min_iterations": 20, "max_iterations": 10},
        {"tolerance": -1.0},
        {"tolerance": math.nan},
        {"overhead": -1.0},
        {"overhead": math.inf},
        {"residual": -1.0},
        {"decay": 1.5},
        {"growth": 1.0},
        {"check_every": 0},
        {"repair_every": -1},
    ],
)
def test_bad_settings_are_refused(options: dict[str, float]) -> None:
    name = next(iter(options))
    with pytest.raises(ValueError, match=name):
        CG(**options)  # type: ignore[arg-type]


def test_bad_vectors_are_refused() -> None:
    a = spd([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="shape"):
        CG().solve(Matrix(a), randn(3, 1))
    with pytest.raises(ValueError, match=r"shapes.*\[3\].*\[2\]"):
        CG().solve(Matrix(a), randn(3), randn(2))
    with pytest.raises(ValueError, match="not finite"):
        CG().solve(Matrix(a), torch.tensor([1.0, math.inf, 0.0], dtype=torch.float64))
