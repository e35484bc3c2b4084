"""Whole steps: rejection, bad batches, weight decay, roles of data, the record of a step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hfopt
from hfopt import CG, FixedDamping, LineSearch
from tests.hfopt.tools import DENSE, SUMS, Point, dense_gauss_newton, flat, matrix, mlp, randn, theta

X, Y = randn(20, 3, seed=1), randn(20, 2, seed=2)
X2, Y2 = randn(15, 3, seed=3), randn(15, 2, seed=4)


def mse(model: nn.Module, x: Tensor = X, y: Tensor = Y) -> Callable[[], Tensor]:
    return lambda: F.mse_loss(model(x), y)


def dense(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return dense_gauss_newton(model, lambda m: m(x), lambda z: F.mse_loss(z, y))


def gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return flat(torch.autograd.grad(F.mse_loss(model(x), y), list(model.parameters())))


EXACT = CG(tolerance=0.0, residual=1e-13)
PLAIN: dict[str, Any] = {"cg": EXACT, "backtracking": "none", "line_search": None, "damping": FixedDamping(0.5)}


def test_a_step_solves_the_damped_system() -> None:
    model = mlp(3, 4, 2, seed=5)
    before, g, G = theta(model), gradient(model, X, Y), dense(model, X, Y)
    optimizer = hfopt.HessianFree(model.parameters(), **PLAIN)
    optimizer.step(mse(model))
    p = torch.linalg.solve(G + 0.5 * torch.eye(len(g), dtype=torch.float64), -g)
    assert torch.allclose(theta(model) - before, p, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("lr", [0.5, 0.1])
def test_lr_is_the_largest_step_length(lr: float) -> None:
    model = mlp(3, 4, 2, seed=6)
    before, g, G = theta(model), gradient(model, X, Y), dense(model, X, Y)
    optimizer = hfopt.HessianFree(model.parameters(), lr=lr, **PLAIN)
    optimizer.step(mse(model))
    p = torch.linalg.solve(G + 0.5 * torch.eye(len(g), dtype=torch.float64), -g)
    assert torch.allclose(theta(model) - before, lr * p, rtol=1e-9, atol=1e-12)
    assert optimizer.stats[0].step_length == lr
    optimizer.param_groups[0]["lr"] = lr / 2  # as a scheduler does
    optimizer.step(mse(model))
    assert optimizer.stats[1].step_length == lr / 2


def test_a_group_with_lr_zero_stays() -> None:
    model = mlp(3, 4, 2, seed=7)
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2].parameters()}]
    optimizer = hfopt.HessianFree(groups)
    still = flat(model[0].parameters())
    for _ in range(3):
        optimizer.step(mse(model))
    assert torch.equal(flat(model[0].parameters()), still)
    assert optimizer.stats[-1].new_loss < optimizer.stats[0].loss
    frozen = mlp(3, 4, 2, seed=7)
    frozen[0].requires_grad_(False)
    other = hfopt.HessianFree(frozen.parameters())
    for _ in range(3):
        other.step(mse(frozen))
    assert torch.equal(theta(model), theta(frozen))


def test_a_warm_up_from_lr_zero_does_not_disturb() -> None:
    """The first step with another lr finds lambda as the first step of all would."""
    model, other = mlp(3, 4, 2, seed=7), mlp(3, 4, 2, seed=7)
    optimizer = hfopt.HessianFree(model.parameters(), lr=0.0)
    g = gradient(model, X, Y)
    optimizer.step(mse(model))
    s = optimizer.stats[0]
    assert (s.cg_reason, s.accepted, s.evaluations) == ("zero learning rate", False, 0)
    assert torch.allclose(flat(p.grad for p in model.parameters() if p.grad is not None), g)
    optimizer.param_groups[0]["lr"] = 1.0
    optimizer.step(mse(model))
    hfopt.HessianFree(other.parameters()).step(mse(other))
    assert torch.equal(theta(model), theta(other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_evaluations_leave_no_rounding(dtype: torch.dtype) -> None:
    """theta + p - p is not theta: a step that is not taken must restore, not subtract."""
    model = Point([1.0, 1e8, 3e-8], dtype=dtype)
    before = model.x.detach().clone()
    optimizer = hfopt.HessianFree(model.parameters(), line_search=LineSearch(max_tries=5))
    calls = []

    def closure() -> Tensor:
        calls.append(None)
        elsewhere = not torch.equal(model.x, before)
        return F.mse_loss(model() * (1.0 + 100 * elsewhere), torch.zeros(3, dtype=dtype))

    optimizer.step(closure)
    assert not optimizer.stats[0].accepted
    assert len(calls) > 5
    assert torch.equal(model.x, before)


def test_a_minimum_is_left_alone() -> None:
    model = Point(torch.zeros(3))
    optimizer = hfopt.HessianFree(model.parameters(), damping=0.5)
    for _ in range(3):
        optimizer.step(lambda: F.mse_loss(model(), torch.zeros(3, dtype=torch.float64)))
    assert not model.x.any()
    assert optimizer.stats[-1].new_damping == 0.5


@pytest.mark.parametrize("curvature", ["gauss-newton", "hessian"])
@pytest.mark.parametrize("backtracking", ["walk", "smallest", "none"])
def test_weight_decay_is_the_penalty_in_the_closure(curvature: str, backtracking: str) -> None:
    a, b = mlp(3, 4, 2, seed=10), mlp(3, 4, 2, seed=10)
    options: dict[str, Any] = {"curvature": curvature, "backtracking": backtracking, "cg": CG(max_iterations=8)}
    ours = hfopt.HessianFree(a.parameters(), weight_decay=0.1, **options)
    theirs = hfopt.HessianFree(b.parameters(), **options)

    def penalised() -> Tensor:
        squares = sum((p.square().sum() for p in b.parameters()), start=torch.zeros((), dtype=X.dtype))
        return F.mse_loss(b(X), Y) + 0.1 / 2 * squares

    for _ in range(6):
        ours.step(mse(a))
        theirs.step(penalised)
        assert torch.allclose(theta(a), theta(b), rtol=1e-8, atol=1e-10)
        s, t = ours.stats[-1], theirs.stats[-1]
        assert (s.rho, s.damping, s.gradient_norm) == pytest.approx(
            (t.rho, t.damping, t.gradient_norm), rel=1e-5, nan_ok=True
        )
        assert (s.cg_iterations, s.backtracked) == (t.cg_iterations, t.backtracked)
        assert s.new_loss == pytest.approx(F.mse_loss(a(X), Y).item(), rel=DENSE)  # the penalty is not in it


def test_weight_decay_of_one_group() -> None:
    model = mlp(3, 4, 2, seed=11)
    groups = [{"params": model[0].parameters(), "weight_decay": 0.7}, {"params": model[2].parameters()}]
    optimizer = hfopt.HessianFree(groups, **PLAIN)
    c = 0.7 * (torch.arange(26) < 16).double()
    before = theta(model)
    g, A = gradient(model, X, Y) + c * before, dense(model, X, Y) + c.diag()
    optimizer.step(mse(model))
    p = torch.linalg.solve(A + 0.5 * torch.eye(26, dtype=torch.float64), -g)
    assert torch.allclose(theta(model) - before, p, rtol=1e-8, atol=1e-11)


def test_roles_of_data() -> None:
    """Gradient from one batch, curvature from a second, rho from a third, each by hand."""
    model = mlp(3, 4, 2, seed=12)
    x3, y3 = randn(12, 3, seed=13), randn(12, 2, seed=14)
    before, g, G = theta(model), gradient(model, X, Y), dense(model, X2, Y2)
    f0 = F.mse_loss(model(x3), y3).item()
    optimizer = hfopt.HessianFree(model.parameters(), **PLAIN)
    returned = optimizer.step(mse(model), curvature=mse(model, X2, Y2), evaluation=mse(model, x3, y3))
    p = torch.linalg.solve(G + 0.5 * torch.eye(26, dtype=torch.float64), -g)
    s = optimizer.stats[0]
    if s.accepted:
        assert torch.allclose(theta(model) - before, p, rtol=1e-8, atol=1e-11)
    nn.utils.vector_to_parameters(before + p, model.parameters())
    change = F.mse_loss(model(x3), y3).item() - f0
    nn.utils.vector_to_parameters(before, model.parameters())
    assert s.accepted == (change < 0)
    assert s.rho == pytest.approx(change / float(g @ p + 0.5 * p @ G @ p), rel=1e-8)
    assert s.evaluation_loss == pytest.approx(f0, rel=SUMS)
    assert float(returned) == s.loss == pytest.approx(F.mse_loss(model(X), Y).item(), rel=SUMS)
    assert torch.allclose(flat(q.grad for q in model.parameters() if q.grad is not None), g)  # type: ignore[misc]


def test_the_evaluation_data_decide() -> None:
    """A step that helps the gradient's batch but hurts the evaluation's is rejected."""
    model = mlp(3, 2, seed=15)
    optimizer = hfopt.HessianFree(model.parameters(), damping=1.0)
    for _ in range(30):
        optimizer.step(mse(model, X2, Y2))
    before = theta(model)
    optimizer.step(mse(model), evaluation=mse(model, X2, Y2))
    assert not optimizer.stats[-1].accepted
    assert torch.equal(theta(model), before)
    optimizer.step(mse(model))
    assert optimizer.stats[-1].accepted


def test_curvature_and_evaluation_closures_may_be_written_for_lbfgs() -> None:
    model, twin = mlp(3, 4, 2, seed=16), mlp(3, 4, 2, seed=16)

    def written(m: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            m.zero_grad()
            loss = F.mse_loss(m(x), y)
            loss.backward()
            return loss

        return closure

    a, b = hfopt.HessianFree(model.parameters()), hfopt.HessianFree(twin.parameters())
    for _ in range(3):
        a.step(written(model, X, Y), curvature=written(model, X2, Y2), evaluation=written(model, X, Y))
        b.step(mse(twin), curvature=mse(twin, X2, Y2), evaluation=mse(twin))
    assert torch.equal(theta(model), theta(twin))
    assert torch.allclose(flat(p.grad for p in model.parameters()), flat(p.grad for p in twin.parameters()))  # type: ignore[misc]


def test_curvature_on_the_same_data_changes_nothing() -> None:
    a, b = mlp(3, 4, 2, seed=17), mlp(3, 4, 2, seed=17)
    one, two = hfopt.HessianFree(a.parameters()), hfopt.HessianFree(b.parameters())
    for _ in range(3):
        one.step(mse(a))
        two.step(mse(b), curvature=mse(b), evaluation=mse(b))
    assert torch.allclose(theta(a), theta(b), rtol=1e-6, atol=1e-9)


def test_line_search_shortens_steps_that_are_too_long() -> None:
    """Along the solution of an undamped solve of atan(x) from far out Newton overshoots."""
    model = Point([3.0])
    optimizer = hfopt.HessianFree(model.parameters(), damping=0.0, backtracking="none")
    zero = torch.zeros(1, dtype=torch.float64)
    for _ in range(40):
        optimizer.step(lambda: F.mse_loss(model().atan(), zero))
    first = optimizer.stats[0]
    assert 0 < first.step_length < 1
    assert first.line_search_tries == round(math.log(first.step_length) / math.log(0.8)) + 1
    assert first.update_norm == pytest.approx(first.step_length * first.solution_norm, rel=SUMS)
    assert abs(float(model.x.detach())) < 1e-6
    stuck = Point([3.0])
    none = hfopt.HessianFree(stuck.parameters(), damping=0.0, backtracking="none", line_search=None)
    none.step(lambda: F.mse_loss(stuck().atan(), zero))
    assert not none.stats[0].accepted
    assert none.stats[0].line_search_tries == 1


def test_backtracking_by_hand() -> None:
    """Every stored iterate of an undamped solve is evaluated by hand; each mode picks its own."""
    ends = {}
    for mode in ("walk", "smallest", "none"):
        model = mlp(3, 6, 2, seed=18)
        before = theta(model)
        op = hfopt.GaussNewton(mse(model), model.parameters())
        cg = CG(max_iterations=40, tolerance=0.0)
        iterates = cg.solve(op.damped(1e-6), -op.gradient).iterates
        losses = []
        for iterate in iterates:
            nn.utils.vector_to_parameters(before + iterate.x, model.parameters())
            losses.append(F.mse_loss(model(X), Y).item())
        nn.utils.vector_to_parameters(before, model.parameters())
        f0 = F.mse_loss(model(X), Y).item()
        best = len(losses) - 1
        if mode == "smallest":
            best = min(range(len(losses)), key=losses.__getitem__)
        elif mode == "walk":
            for i in range(best - 1, -1, -1):
                if losses[i] < losses[best]:
                    best = i
                elif losses[best] < f0:
                    break
        optimizer = hfopt.HessianFree(model.parameters(), damping=FixedDamping(1e-6), cg=cg, backtracking=mode)
        optimizer.step(mse(model))
        s = optimizer.stats[0]
        assert s.backtracked == iterates[best].iteration
        ends[mode] = s.backtracked
        for check in s.checks:
            if check.evaluation is not None:
                i = [it.iteration for it in iterates].index(check.iteration)
                assert check.evaluation == pytest.approx(losses[i] - f0, rel=1e-8)
    assert ends["smallest"] < ends["none"]  # the undamped solution goes too far here


def test_evaluations_on_the_checks_are_those_of_the_solve_that_was_taken() -> None:
    """The calibrating first step tries several lambdas; its record is of one."""
    model = mlp(3, 6, 2, seed=19)
    before = theta(model)
    twin = mlp(3, 6, 2, seed=19)
    op = hfopt.GaussNewton(mse(twin), twin.parameters())
    f0 = op.loss.item()
    optimizer = hfopt.HessianFree(model.parameters(), cg=CG(check_every=1), preconditioner=None)
    optimizer.step(mse(model))
    s = optimizer.stats[0]
    solution = CG(check_every=1).solve(op.damped(s.damping), -op.gradient)
    at = {i.iteration: i.x for i in solution.iterates}
    looked = [c for c in s.checks if c.evaluation is not None]
    assert looked
    for check in looked:
        nn.utils.vector_to_parameters(before + at[check.iteration], model.parameters())
        assert check.evaluation == pytest.approx(F.mse_loss(model(X), Y).item() - f0, rel=1e-8)


def test_the_next_solve_starts_from_the_decayed_last_solution() -> None:
    model = mlp(3, 4, 2, seed=20)
    optimizer = hfopt.HessianFree(model.parameters(), damping=FixedDamping(0.3), cg=CG(decay=0.5))
    optimizer.step(mse(model))
    start = torch.cat([optimizer.state[p]["cg_start"].reshape(-1) for p in model.parameters()])
    assert float(start.norm()) == pytest.approx(optimizer.stats[0].solution_norm, rel=SUMS)
    op = hfopt.GaussNewton(mse(model), model.parameters())
    expected = CG(decay=0.5).solve(op.damped(0.3), -op.gradient, 0.5 * start)
    optimizer.step(mse(model))
    assert optimizer.stats[1].cg_iterations == expected.iterations
    assert optimizer.stats[1].solution_norm == pytest.approx(float(expected.x.norm()), rel=1e-9)


def test_the_record_of_a_step() -> None:
    model = mlp(3, 4, 2, seed=21)
    optimizer = hfopt.HessianFree(model.parameters(), preconditioner=None)
    count = {"calls": 0}

    def closure() -> Tensor:
        count["calls"] += 1
        return F.mse_loss(model(X), Y)

    for step in range(1, 5):
        before, count["calls"] = theta(model), 0
        f0, g = F.mse_loss(model(X), Y).item(), gradient(model, X, Y)
        returned = optimizer.step(closure)
        s = optimizer.stats[-1]
        assert (s.step, s.gradients) == (step, 1)
        assert float(returned) == s.loss == s.evaluation_loss == pytest.approx(f0, rel=SUMS)
        assert s.new_loss == pytest.approx(F.mse_loss(model(X), Y).item(), rel=SUMS)
        assert s.gradient_norm == pytest.approx(float(g.norm()), rel=SUMS)
        assert s.update_norm == pytest.approx(float((theta(model) - before).norm()), rel=1e-9)
        checked = 1 if step == 1 else 0  # the first step evaluates the closure once more, at theta
        assert s.gradients + s.evaluations + checked == count["calls"]
        assert s.products >= s.cg_iterations
        assert s.checks[-1].iteration == s.cg_iterations
        assert s.checks[-1].norm == pytest.approx(s.solution_norm, rel=SUMS)
        assert s.quadratic < 0
        assert s.seconds > 0
        assert s.cg_reason in {"progress", "residual", "iterations"}
        assert s.linearisation == "double-backward"
    assert len(optimizer.stats) == 4


def test_every_curvature_descends() -> None:
    for curvature in ("gauss-newton", "hessian", "fisher", "empirical-fisher"):
        model = mlp(3, 5, 2, seed=22)
        optimizer = hfopt.HessianFree(model.parameters(), curvature=curvature)
        for _ in range(10):
            optimizer.step(mse(model))
        losses = [s.loss for s in optimizer.stats]
        assert losses == sorted(losses, reverse=True)
        assert losses[-1] < 0.75 * losses[0], curvature


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_precision_of_the_products(dtype: torch.dtype) -> None:
    model = mlp(3, 4, 2, seed=23, dtype=dtype)
    x, y = X.to(dtype), Y.to(dtype)
    op = hfopt.GaussNewton(mse(model, x, y), model.parameters())
    reference = dense(model.double(), X, Y)
    assert op.dtype == dtype
    model.to(dtype)
    limit = 1e-5 if dtype == torch.float32 else 1e-12
    twin = mlp(3, 4, 2, seed=23, dtype=dtype)
    got = matrix(hfopt.GaussNewton(mse(twin, x, y), twin.parameters())).double()
    assert float((got - reference).abs().max() / reference.abs().max()) < limit


@pytest.mark.parametrize(
    ("options", "known"),
    [
        ({"damping": 0.5}, 0.5),
        ({"damping": 0.0}, 0.0),
        ({"damping": 0.5, "curvature": "fisher"}, 0.5),
        ({"damping": 0.5, "curvature": "hessian"}, None),
        ({"damping": 0.0, "curvature": "hessian"}, 0.0),
    ],
)
def test_a_solve_is_told_of_lambda_where_that_bounds_the_eigenvalues(
    options: dict[str, Any], known: float | None
) -> None:
    seen: list[float | None] = []

    class Watched(hfopt.CG):
        def solve(self, *args: Any, damping: float | None = None, **given: Any) -> Any:
            seen.append(damping)
            return super().solve(*args, damping=damping, **given)

    model = mlp(3, 4, 2, seed=1)
    optimizer = hfopt.HessianFree(model.parameters(), cg=Watched(), **options)
    optimizer.step(lambda: F.mse_loss(model(randn(8, 3, seed=2)), randn(8, 2, seed=3)))
    assert seen == [known]
