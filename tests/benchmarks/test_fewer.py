"""The ways to fewer products that are measured: what they compute, and what the command writes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks import fewer
from benchmarks.fewer import Curve
from benchmarks.fewer_tried import METHODS, NEW, OLD, Continuous, Ritz, ScaledStart, Thin, window
from hfopt import CG
from hfopt.linalg.krylov import DampingPath as Solutions
from tests.hfopt.linalg.test_cg import Matrix, phi
from tests.hfopt.tools import randn, relative, rounding, spd

A = spd(torch.logspace(0, -3, 40, dtype=torch.float64), seed=1)
B = randn(40, seed=2)


def test_a_start_is_scaled_to_the_least_phi() -> None:
    x = randn(40, seed=3)
    solver = ScaledStart(max_iterations=6, tolerance=0.0, check_every=1)
    solution = solver.solve(Matrix(A), B, x)
    c = float(B @ x) / float(x @ A @ x)
    expected = CG(max_iterations=6, tolerance=0.0).solve(Matrix(A), B, max(c, 0.0) * x)
    assert relative(solution.x, expected.x) < 1e-9
    assert solution.products == 7
    uphill = x if float(B @ x) < 0 else -x
    assert relative(solver.solve(Matrix(A), B, uphill).x, solver.solve(Matrix(A), B).x) < 1e-12


def test_another_window() -> None:
    lengths = [window(least).solve(Matrix(A), B).iterations for least in (2, 5, 12)]
    assert lengths[0] < lengths[1] < lengths[2]
    assert lengths[1] == CG().solve(Matrix(A), B).iterations


def test_a_thin_space_holds_the_iterates() -> None:
    # Few iterations: lengths d'b for d'r rest on conjugacy, whose loss multiplies rounding by a thousand after
    # fourteen, and by 1e9 after twenty.
    options = {"max_iterations": 14, "tolerance": 0.0}
    damped = A + 0.05 * torch.eye(40, dtype=torch.float64)
    solution = Thin(**options).solve(Matrix(damped), B, directions=100)  # type: ignore[arg-type]
    assert solution.pairs is not None
    s, product = solution.pairs
    assert relative(product, s @ damped) < 1e-10
    assert len(s) == len(solution.iterates)
    assert relative(s.cumsum(0), torch.stack([i.x for i in solution.iterates])) < rounding(14, 1e4)
    assert phi(damped, B, Solutions(s, product, B, 0.0).solution(0.0)) <= phi(damped, B, solution.x) + 1e-9


@pytest.mark.parametrize(("rho", "factor"), [(1.0, 0.2), (0.5, 1.0), (0.25, 1.125), (0.0, 4.0), (-3.0, 4.0)])
def test_lambda_follows_rho_continuously(rho: float, factor: float) -> None:
    rule = Continuous(2.0)
    rule.update(rho, True)
    assert rule.value == pytest.approx(2.0 * factor)
    rule.update(math.nan, False)
    assert rule.value == pytest.approx(8.0 * factor)


def test_ritz_vectors_of_the_last_solve() -> None:
    """After a solve that has seen everything, M is the matrix up to a factor; before any, nothing."""
    damped = A + 0.1 * torch.eye(40, dtype=torch.float64)
    m = Ritz(rank=40, most=200)
    m.damp(0.1, 0.0)
    assert torch.equal(m.apply(B), B)
    CG(max_iterations=60, tolerance=0.0, residual=0.0).solve(m.watch(Matrix(damped)), B, None, m)
    m.refresh(None, 1)  # type: ignore[arg-type]
    m.damp(0.02, 0.0)
    again = A + 0.02 * torch.eye(40, dtype=torch.float64)
    inverse = torch.stack([m.apply(e) for e in torch.eye(40, dtype=torch.float64)])
    assert torch.allclose(inverse, inverse.t(), atol=1e-8)
    cg = CG(tolerance=0.0, residual=1e-6)
    assert cg.solve(Matrix(again), B, None, m).iterations < cg.solve(Matrix(again), B).iterations / 2


def curve(method: str, seed: int, loss: list[float], problem: str = "a") -> Curve:
    cost = [10.0 * (i + 1) for i in range(len(loss))]
    return Curve(problem, seed, method, cost, [c / 100 for c in cost], loss)


def test_ratios_are_those_of_the_cost_to_the_baselines_loss() -> None:
    base = [5.0, 4.0, 3.0, 2.0, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5]
    curves = [curve(OLD, 0, base), curve(NEW, 0, [4.5, 0.9, 0.1])]
    assert fewer.ratio(curves, "a", NEW, 0.2, "cost") == (pytest.approx(1.0), False)  # to 4.0: 20 against 20
    third, bound = fewer.ratio(curves, "a", NEW, 0.6, "cost")  # to 0.9: 20 against 60
    assert third == pytest.approx(1 / 3)
    assert not bound
    assert fewer.ratio(curves, "a", OLD, 0.6, "seconds") == (pytest.approx(1.0), False)
    curves[1] = curve(NEW, 0, [4.5, 4.4, 4.3])
    assert fewer.ratio(curves, "a", NEW, 0.6, "cost") == (
        pytest.approx(0.5),
        True,
    )  # never reached: no more than a bound
    assert "| default | > 0.50 |" in fewer.table(curves)
    curves += [curve(OLD, 1, base), curve(NEW, 1, [4.5, 0.9])]
    both, bound = fewer.ratio(curves, "a", NEW, 0.6, "cost")
    assert both == pytest.approx((0.5 / 3) ** 0.5)
    assert bound


@pytest.mark.slow
def test_the_command_measures_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "picture.png"
    options = ["--problems", "logistic", "--methods", f"{NEW},start scaled", "--seeds", "1", "--budget", "40"]
    fewer.main([*options, "--out", str(tmp_path), "--plot", str(picture)])
    saved = json.loads((tmp_path / "logistic.json").read_text("utf-8"))
    assert [c["method"] for c in saved["curves"]] == [OLD, NEW, "start scaled"]
    assert all(c["cost"][-1] >= 40 for c in saved["curves"])
    assert saved["weights"]["gradient"] > 0
    assert "| default |" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    fewer.main(["--report", "--out", str(tmp_path), "--plot", str(picture)])
    assert "| start scaled |" in capsys.readouterr().out


def test_names_can_be_typed() -> None:
    assert not any("," in name for name in METHODS)
    assert set(fewer.SHOWN) <= set(METHODS)
