"""The comparison of defaults: its problems, its bookkeeping, and its page. No time is judged."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import hfopt
from benchmarks import defaults, defaults_report
from benchmarks.defaults_problems import PROBLEMS, Problem, digits, mlp, poisson_residual, solution
from benchmarks.defaults_report import OURS, Result, Run

NAMES = [p.name for p in PROBLEMS]
each = pytest.mark.parametrize("problem", PROBLEMS, ids=NAMES)


def test_there_are_eight_problems_with_names_of_their_own() -> None:
    assert len(set(NAMES)) == 8


@each
def test_a_seed_makes_one_problem_and_another_seed_another(problem: Problem) -> None:
    one, same, other = problem.build(3), problem.build(3), problem.build(4)
    assert float(one.loss().detach()) == float(same.loss().detach())
    assert float(one.loss().detach()) != float(other.loss().detach())
    for p, q in zip(one.model.parameters(), same.model.parameters(), strict=True):
        assert torch.equal(p, q)
        assert p.dtype == torch.float32


@each
def test_two_steps_of_defaults_lower_the_loss_and_leave_a_gradient_everywhere(problem: Problem) -> None:
    task = problem.build(0)
    first = float(task.loss().detach())
    optimizer = hfopt.HessianFree(task.model.parameters())
    for _ in range(2):
        optimizer.step(task.loss)
    assert float(task.loss().detach()) < first
    assert optimizer.stats[-1].new_loss == pytest.approx(float(task.loss().detach()), rel=1e-4)
    assert all(p.grad is not None and bool(p.grad.any()) for p in task.model.parameters())


def test_the_solution_of_poissons_equation_has_no_residual() -> None:
    x = torch.rand(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert float(poisson_residual(solution, x).detach().abs().max()) < 1e-12
    bent = poisson_residual(lambda x: solution(x) + x[:, :1] ** 2, x).detach()
    assert float((bent + 2).abs().max()) < 1e-12
    edge = torch.tensor([[0.0, 0.3], [1.0, 0.3], [0.3, 0.0], [0.3, 1.0]], dtype=torch.float64)
    assert float(solution(edge).abs().max()) < 1e-15


def test_the_matrix_of_the_physics_informed_loss_is_that_of_its_residuals() -> None:
    torch.manual_seed(0)
    model = mlp(2, 5, 1).double()
    x, zero = torch.rand(7, 2, dtype=torch.float64), torch.zeros(7, dtype=torch.float64)
    parameters = list(model.parameters())
    G = hfopt.GaussNewton(lambda: F.mse_loss(poisson_residual(model, x), zero), parameters)
    rows = []
    for r in poisson_residual(model, x):
        found = torch.autograd.grad(r, parameters, retain_graph=True, allow_unused=True)
        pieces = [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]
        rows.append(torch.cat([g.flatten() for g in pieces]))
    J = torch.stack(rows)
    expected = 2 / 7 * J.T @ J
    assert torch.allclose(G.to_dense(), expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


def test_scales_of_the_logistic_problem_span_six_orders() -> None:
    model = PROBLEMS[NAMES.index("logistic")].build(0)
    model.loss().backward()  # type: ignore[no-untyped-call]
    (weight, _) = model.model.parameters()
    assert weight.grad is not None
    sizes = weight.grad.abs().flatten()
    assert float(sizes.max() / sizes.min()) > 1e5


def test_digits_are_images_between_0_and_1() -> None:
    x, labels = digits(100)
    assert x.shape == (100, 64)
    assert (float(x.min()), float(x.max())) == (0.0, 1.0)
    assert set(labels.tolist()) == set(range(10))


def test_every_rival_has_six_rates_of_its_own_for_every_problem() -> None:
    for problem in PROBLEMS:
        assert set(problem.rates) <= {r.name for r in defaults.RIVALS}
        for rival in defaults.RIVALS:
            rates = problem.rates.get(rival.name, rival.rates)
            assert len(set(rates)) == 6
            assert list(rates) == sorted(rates)


def ticks(step: float) -> object:
    """A clock that goes on by ``step`` whenever it is looked at."""
    count = 0

    def clock() -> float:
        nonlocal count
        count += 1
        return count * step

    return clock


def test_all_start_at_the_same_loss_and_follow_the_least_they_have_seen() -> None:
    problem = PROBLEMS[NAMES.index("sinusoid")]
    runs = [defaults.train(problem, r, 0.01, 5, 40.0, ticks(1.0)) for r in (None, *defaults.RIVALS)]  # type: ignore[arg-type]
    first = float(problem.build(5).loss().detach())
    for run in runs:
        assert (run.seconds[0], run.losses[0]) == (0.0, first)
        assert list(run.losses) == sorted(run.losses, reverse=True)
        assert run.losses[-1] == run.loss < first
        assert run.seconds[-1] <= 40.0
    assert [r.optimizer for r in runs] == [OURS, "Adam", "LBFGS", "LBFGS, Wolfe", "SGD"]


def test_a_run_that_diverges_ends() -> None:
    problem = PROBLEMS[NAMES.index("logistic")]
    sgd = defaults.RIVALS[-1]
    run = defaults.train(problem, sgd, 1e30, 0, 1e9, ticks(1.0))  # type: ignore[arg-type]
    assert run.steps < 1000
    assert math.isfinite(run.loss)


def test_of_many_falls_some_are_kept_and_nothing_after_the_budget_counts() -> None:
    seen = [(0.01 * i, 100.0 / i) for i in range(1, 2001)] + [(0.5, 200.0)]
    run = Run.of("Adam", 0.1, 0, 2000, 150.0, seen, 10.0)
    assert len(run.seconds) <= 302
    assert run.loss == run.losses[-1] == 100.0 / 1000
    assert run.seconds[-1] == 10.0
    assert run.losses[1] == 100.0
    assert run.reached(50.0) == pytest.approx(0.02)
    assert run.reached(0.01) == math.inf
    assert np.all(np.diff(run.seconds) > 0)


def result(ours: list[float], rival: dict[float, list[float]], other: float) -> Result:
    """HessianFree's losses over seeds, those of SGD by its rates (the first seed's alone but for one), and Adam's."""
    runs = [Run(OURS, 1.0, seed, 3, f, (0.0, 1.0), (9.0, f)) for seed, f in enumerate(ours)]
    runs += [
        Run("SGD", rate, seed, 3, f, (0.0, 1.0), (9.0, f)) for rate, fs in rival.items() for seed, f in enumerate(fs)
    ]
    runs += [Run("Adam", 0.1, seed, 3, other, (0.0, 1.0), (9.0, other)) for seed in range(len(ours))]
    about = dict.fromkeys(("date", "processor", "cores", "threads", "clock", "load average", "system", "Python"), "?")
    return Result("made up", "nothing", 7, 2.0, {**about, "torch": "?", "hfopt": "?"}, runs)


def test_the_best_rate_is_the_first_seeds_and_medians_decide() -> None:
    found = result([1.0, 5.0, 2.0], {0.1: [3.0], 0.2: [1.5, 1.9, 2.1]}, 4.0)
    assert found.rate("SGD") == 0.2
    assert found.rival() == "SGD"
    assert (found.loss(OURS), found.loss("SGD"), found.loss("Adam")) == (2.0, 1.9, 4.0)
    assert not found.wins()
    assert found.seeds_won() == 2
    assert found.time_reached() == 1.0
    assert result([1.9] * 3, {0.2: [1.9] * 3}, 4.0).wins()  # reached
    assert result([1.9 * (1 + 2**-22)] * 3, {0.2: [1.9] * 3}, 4.0).wins()  # a rounding apart
    assert not result([1.9 * (1 + 1e-5)] * 3, {0.2: [1.9] * 3}, 4.0).wins()
    assert result([3.0] * 3, {0.2: [1.9] * 3}, 4.0).time_reached() == math.inf
    assert "| made up | 7 | 2 | SGD, 0.2 | 1.9 | 2 | 1.1 | 1.0 | 2 of 3 |" in defaults_report.table([found])


@pytest.mark.slow
def test_the_command_writes_page_picture_and_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defaults, "QUICK", 0.005)
    paths = {"results": tmp_path / "numbers", "page": tmp_path / "page.md", "picture": tmp_path / "images" / "p.png"}
    args = [a for name, path in paths.items() for a in (f"--{name}", str(path))]
    threads = torch.get_num_threads()
    try:
        assert defaults.main(["sinusoid", "logistic", "--quick", "--threads", "1", "--seeds", "0", "1", *args]) == 0
        numbers = {p.name: json.loads(p.read_text("utf-8")) for p in paths["results"].iterdir()}
        assert set(numbers) == {"sinusoid.json", "logistic.json"}
        runs = numbers["sinusoid.json"]["runs"]
        for rival in defaults.RIVALS:
            mine = [(r["seed"], r["rate"]) for r in runs if r["optimizer"] == rival.name]
            assert [rate for seed, rate in mine if seed == 0] == list(rival.rates)
            assert len([rate for seed, rate in mine if seed == 1]) == 1
        page = paths["page"].read_text("utf-8")
        assert "on {} of 2 problems".format(page.count("| **")) in page
        assert all(f"| {name} |" in page for name in ("sinusoid", "logistic"))
        assert f"- torch: {torch.__version__}" in page
        assert paths["picture"].read_bytes().startswith(b"\x89PNG")
        # Ours again: the rivals' runs stay as they are.
        assert defaults.main(["sinusoid", "--quick", "--ours", "--threads", "1", "--seeds", "0", "1", *args]) == 0
        again = json.loads((paths["results"] / "sinusoid.json").read_text("utf-8"))["runs"]
        assert [r for r in again if r["optimizer"] != OURS] == [r for r in runs if r["optimizer"] != OURS]
        paths["page"].unlink()
        assert defaults.main(["--page-only", *args]) == 0
        assert paths["page"].exists()
    finally:
        torch.set_num_threads(threads)


def test_an_unknown_problem_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no problem xor; there are regression, logistic"):
        defaults.main(["xor", "--results", str(tmp_path)])


def test_ours_cannot_be_renewed_where_nothing_was_run(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"sinusoid.json is missing: run sinusoid without --ours first"):
        defaults.main(["sinusoid", "--ours", "--threads", str(torch.get_num_threads()), "--results", str(tmp_path)])
