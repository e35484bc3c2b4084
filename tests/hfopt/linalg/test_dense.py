"""Solutions for every lambda from the whole matrix, against direct solves."""

from __future__ import annotations

import pytest
import torch

from hfopt.linalg.dense import DenseSystem
from tests.hfopt.tools import randn, relative, spd


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("at", [0.0, 0.7])
def test_solutions_for_every_lambda(weighed: bool, at: float) -> None:
    a, b = spd(torch.logspace(0, -6, 12, dtype=torch.float64)), randn(12, seed=1)
    metric = torch.linspace(0.5, 3.0, 12, dtype=torch.float64) if weighed else torch.ones(12, dtype=torch.float64)
    system = DenseSystem(a + at * torch.diag(metric), b, at, metric if weighed else None)
    for damping in (1e-3, 0.2, 5.0):
        p = torch.linalg.solve(a + damping * torch.diag(metric), b)
        assert relative(system.solution(damping), p) < 1e-10
        assert system.model(damping) == pytest.approx((float(b @ p), float(p @ a @ p)), rel=1e-9)


def test_without_damping_a_singular_system_has_its_shortest_solution() -> None:
    a, b = spd([1.0, 0.5, 0.0, 0.0]), randn(4, seed=2)
    assert relative(DenseSystem(a, b).solution(0.0), torch.linalg.pinv(a, hermitian=True, rtol=1e-10) @ b) < 1e-12
    assert not DenseSystem(torch.zeros(3, 3), torch.zeros(3)).solution(0.0).any()


def test_negative_curvature_leads_downhill() -> None:
    a, b = torch.diag(torch.tensor([2.0, -4.0], dtype=torch.float64)), torch.ones(2, dtype=torch.float64)
    system = DenseSystem(a, b)
    assert system.solution(1.0).tolist() == pytest.approx([1 / 3, 1 / 5])
    assert system.least == 2.0


@pytest.mark.parametrize("unit", [1e-35, 1e30])
def test_the_unit_of_the_matrix_does_not_matter(unit: float) -> None:
    a, b = spd(torch.logspace(0, -2, 6, dtype=torch.float64)).float(), randn(6, seed=3).float()
    one, other = DenseSystem(a, b), DenseSystem(a * unit, b * unit)
    assert relative(other.solution(0.1 * unit), one.solution(0.1)) < 1e-5
