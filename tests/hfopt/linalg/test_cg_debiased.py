"""Directions from one batch, step lengths from another: against dense float64 constructions."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hfopt
from hfopt.linalg.cg import CG
from hfopt.linalg.cg_debiased import Quadratic
from models import RNN
from tests.hfopt.linalg.test_cg import Matrix, exact, phi
from tests.hfopt.tools import DENSE, SUMS, amplification, dense_gauss_newton, mlp, randn, relative, rounding, spd, theta

N = 12
A, B = (spd(torch.logspace(0, -2, N, dtype=torch.float64), seed=s) for s in (1, 2))
b, c = randn(N, seed=3), randn(N, seed=4)
M = spd(torch.logspace(0.5, -0.5, N, dtype=torch.float64), seed=5)


def reference(
    k: int, x0: Tensor, slopes: str, m: Tensor | None = None, a: Tensor = A, second: tuple[Tensor, Tensor] = (B, c)
) -> Tensor:
    """k directions by Gram-Schmidt in A on the first quadratic's Krylov space, steps to the second one's minima."""
    inverse = torch.eye(N, dtype=torch.float64) if m is None else torch.linalg.inv(m)
    v = inverse @ (b - a @ x0)
    directions: list[Tensor] = []
    for _ in range(k):
        d = v
        for _ in range(2):
            for e in directions:
                d = d - (e @ a @ d) / (e @ a @ e) * e
        d = d / d.norm()
        directions.append(d)
        v = inverse @ (a @ d)
    matrix, right = second
    x = x0.clone()
    for d in directions:
        x = x + (right - matrix @ (x if slopes == "iterate" else x0)) @ d / (d @ matrix @ d) * d
    return x


@pytest.mark.parametrize("slopes", ["iterate", "start"])
@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("k", [1, 2, 5, 8])
def test_steps_along_the_directions(slopes: str, preconditioned: bool, warm: bool, k: int) -> None:
    m = M if preconditioned else None
    x0 = 0.1 * randn(N, seed=6) if warm else None
    first, second = Matrix(A), Matrix(B)
    apply = None if m is None else lambda r: torch.linalg.solve(M, r)
    solution = exact(max_iterations=k).solve(first, b, x0, apply, second=Quadratic(second, c, slopes))
    x = reference(k, torch.zeros(N, dtype=torch.float64) if x0 is None else x0, slopes, m)
    if solution.reason == "progress":  # of the sum, once it has left the second quadratic's valley
        assert slopes == "start"
        assert phi(B, c, solution.x) > max(0.0, 0.0 if x0 is None else phi(B, c, x0))
        x = reference(solution.iterations, x * 0 if x0 is None else x0, slopes, m)
    else:
        assert solution.iterations == k
    assert relative(solution.x, x) < DENSE
    assert solution.products == first.products + second.products
    assert solution.checks[-1].residual == pytest.approx(float((c - B @ solution.x).norm()), rel=1e-9)
    for iterate in solution.iterates:
        assert iterate.phi == pytest.approx(phi(B, c, iterate.x), rel=1e-9)
        assert relative(
            iterate.x, reference(iterate.iteration, torch.zeros_like(b) if x0 is None else x0, slopes, m)
        ) < DENSE  # fmt: skip


class Changed(Matrix):
    """Every product is changed by a function."""

    def __init__(self, a: Tensor, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__(a)
        self.change = change

    def multiply(self, v: Tensor, out: Tensor | None = None) -> Tensor:
        product = super().multiply(v, out)
        return product.copy_(self.change(product))


@pytest.mark.parametrize("slopes", ["iterate", "start"])
@pytest.mark.parametrize("repair_every", [0, 3])
@pytest.mark.parametrize("warm", [False, True])
def test_the_same_batch_twice_is_conjugate_gradients(slopes: str, repair_every: int, warm: bool) -> None:
    x0 = randn(N, seed=6) if warm else None
    options = CG(max_iterations=9, residual=1e-9, repair_every=repair_every, check_every=1)
    plain = options.solve(Matrix(A), b, x0, lambda r: torch.linalg.solve(M, r))
    both = options.solve(
        Matrix(A), b, x0, preconditioner=lambda r: torch.linalg.solve(M, r), second=Quadratic(Matrix(A), b, slopes)
    )
    assert (both.reason, both.iterations) == (plain.reason, plain.iterations)
    assert both.products == 2 * plain.products
    # Directions lose their conjugacy by rounding, in one route otherwise than in the other.
    factor = amplification(lambda f: options.solve(Changed(A, f), b, x0, lambda r: torch.linalg.solve(M, r)).x)
    bound = rounding(plain.iterations, factor)
    assert bound < 1e-7
    assert relative(both.x, plain.x) < bound
    for ours, theirs in zip(both.checks, plain.checks, strict=True):
        assert ours.model == pytest.approx(theirs.model, rel=bound)
        assert ours.norm == pytest.approx(theirs.norm, rel=bound)
    assert [i.iteration for i in both.iterates] == [i.iteration for i in plain.iterates]


def test_slopes_at_the_iterate_never_raise_the_second_quadratic() -> None:
    """And those at the start do, after which the solve ends."""
    options = exact(max_iterations=N, check_every=1)
    here = options.solve(Matrix(A), b, second=Quadratic(Matrix(B), c))
    models = [check.model for check in here.checks]
    assert all(new <= old for old, new in pairwise(models))
    assert here.iterations == N
    start = options.solve(Matrix(A), b, second=Quadratic(Matrix(B), c, "start"))
    assert (start.reason, start.iterations < N) == ("progress", True)
    assert start.checks[-1].model > 0 >= start.checks[-2].model


def test_negative_curvature_of_either_batch() -> None:
    sick = B - 3 * torch.eye(N, dtype=torch.float64)
    one = exact().solve(Matrix(A), b, second=Quadratic(Matrix(sick), c))
    step = (c @ b) / abs(float(b @ sick @ b)) * b
    assert (one.reason, one.iterations) == ("negative curvature", 1)
    assert relative(one.x, step) < SUMS
    one = exact().solve(Matrix(-A), b, second=Quadratic(Matrix(B), c))
    assert (one.reason, one.iterations) == ("negative curvature", 1)
    assert relative(one.x, (c @ b) / (b @ B @ b) * b) < SUMS
    # Later on, the solve ends with what it has.
    d = reference(2, torch.zeros(N, dtype=torch.float64), "iterate") - reference(1, torch.zeros_like(b), "iterate")
    d = d / d.norm()
    bent = B - (d @ B @ d + 0.1) * torch.outer(d, d)
    assert b @ bent @ b > 0
    some = exact().solve(Matrix(A), b, second=Quadratic(Matrix(bent), c))
    assert (some.reason, some.iterations) == ("negative curvature", 1)
    assert relative(some.x, reference(1, torch.zeros_like(b), "iterate", second=(bent, c))) < SUMS


class Breaking(Matrix):
    """Products that overflow from the second on."""

    def multiply(self, v: Tensor, out: Tensor | None = None) -> Tensor:
        product = super().multiply(v, out)
        return product if self.products < 2 else product.fill_(math.inf)


def test_a_second_batch_that_overflows_ends_the_solve_where_all_was_finite() -> None:
    found = exact().solve(Matrix(A), b, second=Quadratic(Breaking(B), c))
    assert (found.reason, found.iterations) == ("not finite", 1)
    assert relative(found.x, reference(1, torch.zeros_like(b), "iterate")) < SUMS


def test_what_is_refused() -> None:
    good = Quadratic(Matrix(B), c)
    with pytest.raises(ValueError, match="slopes is 'end'"):
        CG().solve(Matrix(A), b, second=Quadratic(Matrix(B), c, "end"))
    with pytest.raises(ValueError, match="of one shape"):
        CG().solve(Matrix(A), b, b[:3], second=good)
    with pytest.raises(ValueError, match="of one shape"):
        CG().solve(Matrix(A), b, second=Quadratic(Matrix(B), c[:3]))
    with pytest.raises(ValueError, match="not finite"):
        CG().solve(Matrix(A), b, second=Quadratic(Matrix(B), c * math.nan))
    with pytest.raises(ValueError, match="cannot be recorded"):
        CG(cuda_graphs=True).solve(Matrix(A), b, second=good)
    with pytest.raises(ValueError, match="debias_slopes is 'end', but must be one of 'iterate', 'start'"):
        hfopt.HessianFree(mlp(2, 2).parameters(), debias_slopes="end")


# -- whole steps -------------------------------------------------------------------------------------------------------

X, Y = (randn(20, 3, seed=1), randn(20, 3, seed=2)), (randn(20, 2, seed=3), randn(20, 2, seed=4))


def mse(model: nn.Module, i: int) -> Callable[[], Tensor]:
    return lambda: F.mse_loss(model(X[i]), Y[i])


def value(closure: Callable[[], Tensor]) -> float:
    return float(closure().detach())


def derivatives(model: nn.Module, i: int) -> tuple[Tensor, Tensor]:
    """Gradient and Gauss-Newton matrix of a batch, without the package."""
    gradient = torch.autograd.grad(mse(model, i)(), list(model.parameters()))
    matrix = dense_gauss_newton(model, lambda m: m(X[i]), lambda z: F.mse_loss(z, Y[i]))
    return torch.cat([g.reshape(-1) for g in gradient]), matrix


@pytest.mark.parametrize("slopes", ["iterate", "start"])
def test_a_step_is_that_of_the_dense_quadratics(slopes: str) -> None:
    model = mlp(3, 4, 2, seed=7)
    damping, decay, k = 0.3, 0.05, 4
    before = theta(model)
    (g, G), (h, H) = (derivatives(model, i) for i in (0, 1))
    g, h = g + decay * before, h + decay * before
    eye = torch.eye(len(g), dtype=torch.float64)
    optimizer = hfopt.HessianFree(
        model.parameters(),
        weight_decay=decay,
        damping=hfopt.FixedDamping(damping),
        cg=exact(max_iterations=k),
        backtracking="none",
        debias_slopes=slopes,
    )
    loss = optimizer.step(mse(model, 0), debias=mse(model, 1))
    v = -g
    directions: list[Tensor] = []
    for _ in range(k):
        d = v
        for _ in range(2):
            for e in directions:
                d = d - (e @ (G + (damping + decay) * eye) @ d) / (e @ (G + (damping + decay) * eye) @ e) * e
        directions.append(d / d.norm())
        v = G @ directions[-1]
    x = torch.zeros_like(g)
    system = H + (damping + decay) * eye
    for d in directions:
        at = x if slopes == "iterate" else torch.zeros_like(x)
        x = x + (-h - system @ at) @ d / (d @ system @ d) * d
    s = optimizer.stats[-1]
    assert s.accepted
    assert s.step_length == 1.0
    assert relative(theta(model) - before, x) < DENSE
    assert s.quadratic == pytest.approx(float(h @ x + x @ (H + decay * eye) @ x / 2), rel=1e-9)
    assert s.gradient_norm == pytest.approx(float(g.norm()), rel=SUMS)
    # The loss and the gradients that are handed back are the first batch's, the judgement is the second's.
    assert s.loss == float(loss)
    grads = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
    assert relative(grads, g - decay * before) < SUMS
    assert s.new_loss == pytest.approx(value(mse(model, 1)), rel=SUMS)
    change = s.new_loss - s.evaluation_loss + decay / 2 * float(theta(model).square().sum() - before.square().sum())
    assert s.rho == pytest.approx(change / s.quadratic, rel=1e-9)
    assert (s.gradients, s.products) == (2, 2 * k)


def test_the_first_lambda_is_found_by_trial() -> None:
    """Also under the default rule, which otherwise chooses lambda from the space of one batch's directions."""
    model = mlp(3, 4, 2, seed=7)
    (g, G), _ = (derivatives(model, i) for i in (0, 1))
    start = float(g @ G @ g / (g @ g))
    optimizer = hfopt.HessianFree(model.parameters())
    optimizer.step(mse(model, 0), debias=mse(model, 1))
    s = optimizer.stats[-1]
    power = math.log10(s.damping / start)
    assert power == pytest.approx(round(power), abs=1e-6)
    assert s.products > 3 * s.cg_iterations  # of several solves
    optimizer.step(mse(model, 1), debias=mse(model, 0))
    t = optimizer.stats[-1]
    assert t.new_damping / t.damping == pytest.approx({True: 1.0, t.rho < 0.25: 1.5, t.rho > 0.75: 2 / 3}[True])


def test_who_judges() -> None:
    """The second batch, or the data of evaluation= where that is given."""
    third = randn(20, 3, seed=8), randn(20, 2, seed=9)
    for given in (False, True):
        model = mlp(3, 4, 2, seed=7)
        optimizer = hfopt.HessianFree(model.parameters(), damping=0.3)

        def judge(model: nn.Module = model) -> Tensor:
            return F.mse_loss(model(third[0]), third[1])

        losses = [value(mse(model, 1)), value(judge)]
        optimizer.step(mse(model, 0), debias=mse(model, 1), evaluation=judge if given else None)
        assert optimizer.stats[-1].evaluation_loss == pytest.approx(losses[given], rel=SUMS)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"damping": hfopt.LevenbergMarquardt(), "debias_slopes": "start"},
        {"curvature": "hessian", "damping": hfopt.LevenbergMarquardt(1.0)},
        {"curvature": "fisher", "batch_dim": 0, "damping": 0.1},
        {"preconditioner": "hutchinson", "damping": 0.1},
        {"preconditioner": "kfac", "damping": 0.1},
        {"weight_decay": 0.1, "linearisation": "recompute", "damping": 0.1},
    ],
    ids=lambda o: "-".join(map(str, o)) or "defaults",
)
def test_one_batch_in_both_roles_trains_as_without(options: dict[str, Any]) -> None:
    """To rounding; every solve has to end by its number of iterations, as rounding decides on close calls otherwise."""
    ends = []
    for debias in (False, True):
        model = mlp(3, 4, 2, seed=7)
        groups = [{"params": list(model[0].parameters()), "lr": 0.5}, {"params": list(model[2].parameters())}]
        damping = options.get("damping", hfopt.LevenbergMarquardt())
        rule = hfopt.LevenbergMarquardt(damping.initial if isinstance(damping, hfopt.LevenbergMarquardt) else damping)
        optimizer = hfopt.HessianFree(groups, cg=exact(max_iterations=5, decay=0.0), **{**options, "damping": rule})
        for _ in range(4):
            optimizer.step(mse(model, 0), debias=mse(model, 0) if debias else None)
        ends.append((theta(model), optimizer.stats[-1]))
    assert relative(ends[1][0], ends[0][0]) < 1e-7
    assert ends[1][1].loss < 0.95 * value(mse(mlp(3, 4, 2, seed=7), 0))
    assert ends[1][1].rho == pytest.approx(ends[0][1].rho, rel=1e-4)


def test_structural_damping_of_both_batches() -> None:
    """Hidden states are damped in either quadratic."""
    ends = []
    inputs, targets = randn(6, 5, 2, seed=1), randn(6, 5, 1, seed=2)
    for debias in (False, True):
        torch.manual_seed(0)
        model = RNN(2, 4, 1).double()
        optimizer = hfopt.HessianFree(
            model.parameters(),
            structural=0.5,
            damping=hfopt.LevenbergMarquardt(0.1),
            cg=exact(max_iterations=4, decay=0.0),
        )

        def closure(model: nn.Module = model) -> Tensor:
            return F.mse_loss(model(inputs), targets)

        for _ in range(3):
            optimizer.step(closure, debias=closure if debias else None)
        ends.append((theta(model), optimizer.stats[-1].quadratic))
    assert relative(ends[1][0], ends[0][0]) < 1e-8
    assert ends[1][1] == pytest.approx(ends[0][1], rel=1e-6)


def test_dropout_draws_once_a_step() -> None:
    ends = []
    for debias in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2)).double()
        optimizer = hfopt.HessianFree(
            model.parameters(), damping=hfopt.LevenbergMarquardt(1.0), cg=exact(max_iterations=4, decay=0.0)
        )
        for _ in range(3):
            optimizer.step(mse(model, 0), debias=mse(model, 0) if debias else None)
        assert model[1].num_batches_tracked == 3
        ends.append((theta(model), torch.rand(1)))
    assert relative(ends[1][0], ends[0][0]) < 1e-8
    assert torch.equal(ends[0][1], ends[1][1])


def test_a_bad_second_batch_is_passed_over() -> None:
    model = mlp(3, 4, 2, seed=7)
    optimizer = hfopt.HessianFree(model.parameters(), damping=0.3)
    optimizer.step(mse(model, 0), debias=mse(model, 1))
    before, damping = theta(model), optimizer.damping.value
    with pytest.warns(UserWarning, match="not finite before the step"):
        optimizer.step(mse(model, 0), debias=lambda: F.mse_loss(model(X[1] * math.nan), Y[1]))
    assert torch.equal(theta(model), before)
    assert optimizer.damping.value == damping
    optimizer.step(mse(model, 0), debias=mse(model, 1))
    assert optimizer.stats[-1].accepted


def test_twenty_further_steps_are_the_same_bits() -> None:
    def train(model: nn.Module, optimizer: hfopt.HessianFree, steps: int) -> list[float]:
        found = []
        for step in range(steps):
            optimizer.step(mse(model, step % 2), debias=mse(model, (step + 1) % 2))
            s = optimizer.stats[-1]
            found += [s.loss, s.new_loss, s.damping, s.rho if math.isfinite(s.rho) else 0.0, float(s.products)]
        return found

    model = mlp(3, 4, 2, seed=7)
    optimizer = hfopt.HessianFree(model.parameters())
    train(model, optimizer, 4)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    record = train(model, optimizer, 20)
    other = mlp(3, 4, 2, seed=8)
    resumed = hfopt.HessianFree(other.parameters())
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert train(other, resumed, 20) == record
    assert torch.equal(theta(other), theta(model))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_cuda_device_the_host_follows() -> None:
    found = exact(max_iterations=5).solve(Matrix(A.cuda()), b.cuda(), second=Quadratic(Matrix(B.cuda()), c.cuda()))
    assert relative(found.x.cpu(), reference(5, torch.zeros_like(b), "iterate")) < DENSE
