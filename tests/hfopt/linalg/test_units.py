"""Right-hand sides whose squares leave the range of single precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hfopt import CG
from hfopt.linalg.units import unit_of
from tests.hfopt.linalg.test_cg import Matrix
from tests.hfopt.tools import randn, relative, spd


def solved(unit: float, preconditioned: bool) -> tuple[Tensor, list[float], tuple[Tensor, Tensor]]:
    a, b = spd(torch.logspace(0, -2, 20, dtype=torch.float64)).float() * unit, randn(20, seed=1).float() * unit
    m = (lambda r: r / a.diagonal()) if preconditioned else None
    found = CG(tolerance=0.0, max_iterations=5).solve(Matrix(a), b, None, m, directions=4, augment=randn(20).float())
    assert found.pairs is not None
    assert (found.reason, found.iterations) == ("iterations", 5)
    return found.x, [i.phi / unit for i in found.iterates], (found.pairs[0], found.pairs[1] / unit)


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("exponent", [-100, -60, 60, 100])
def test_a_system_in_another_unit_has_the_same_solution(exponent: int, preconditioned: bool) -> None:
    x, phi, (s, a) = solved(1.0, preconditioned)
    other, other_phi, (other_s, other_a) = solved(2.0**exponent, preconditioned)
    assert relative(other, x) < 1e-4
    assert other_phi == pytest.approx(phi, rel=1e-5)
    for rows, products in ((s, a), (other_s, other_a)):
        matrix = spd(torch.logspace(0, -2, 20, dtype=torch.float64)).float()
        assert relative(products, rows @ matrix) < 1e-4


def test_what_has_room_is_left_alone() -> None:
    assert unit_of(1e10, torch.float32) == unit_of(1e-10, torch.float32) == unit_of(1e200, torch.float64) == 1.0
    assert unit_of(2.0**60 * 1.1, torch.float32) == 2.0**60
    assert unit_of(0.0, torch.float32) == 1.0
