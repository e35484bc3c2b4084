"""Draws of targets: their places, and that those of different numbers have nothing to do with each other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hfopt.curvature.draws import case_dim, draw
from hfopt.losses import Diagonal, OutputCurvature, Softmax
from tests.hfopt.tools import randn


def form(kind: str, z: Tensor, dim: int) -> OutputCurvature:
    """Curvature of the shape of z, classes along ``dim``."""
    if kind == "diagonal":
        return Diagonal(z.square() + 0.1, z.shape)
    return Softmax(z.softmax(dim), torch.ones_like(z).select(dim, 0).unsqueeze(dim), dim)


@pytest.mark.parametrize("kind", ["diagonal", "softmax"])
@pytest.mark.parametrize("batch_dim", [0, 1, -2, 2])
def test_draws_belong_to_cases(kind: str, batch_dim: int) -> None:
    """A criterion of all cases, of some after the other, and processes, of two criteria too."""
    zs = [randn(6, 6, 6, seed=1), randn(6, 12, 6, seed=2)]
    dim = next(d for d in range(3) if d != batch_dim % 3)

    def drawn(batches: list[list[Tensor]], *place: int) -> list[Tensor]:
        given = [[(i, form(kind, z, dim)) for i, z in enumerate(batch)] for batch in batches]
        return [g for found in draw(given, batches, batch_dim, 5, 1, *place) for _, g in found or ()]

    def same(got: list[Tensor], expected: list[Tensor]) -> bool:
        return all(torch.allclose(g, e, rtol=1e-12) for g, e in zip(got, expected, strict=True))

    (one,), two = drawn([zs[:1]]), drawn([zs])
    for count in (2, 3, 6):
        pieces = list(zs[0].chunk(count, batch_dim))
        assert same(drawn([pieces]), list(one.chunk(count, batch_dim)))
        assert same(drawn([[z] for z in pieces]), list(one.chunk(count, batch_dim)))
        for rank in range(count):
            own = [z.chunk(count, batch_dim)[rank] for z in zs]
            assert same(drawn([own], rank, count), [g.chunk(count, batch_dim)[rank] for g in two])


def test_numbers_and_criteria_draw_apart() -> None:
    """Signs of 4,000 numbers: correlations are below 5 / sqrt(4000)."""
    z = torch.ones(4000, dtype=torch.float64)
    forms = [(0, form("diagonal", z, 0)), (0, form("diagonal", z, 0))]
    signs = []
    for seed in (0, 1, 1 << 31):
        for number in (0, 1, 2):
            (found,) = draw([forms], [[z]], 0, seed, number)
            signs += [g.sign() for _, g in found or ()]
    table = torch.stack(signs)
    correlations = table @ table.T / 4000 - torch.eye(len(signs), dtype=torch.float64)
    assert float(correlations.abs().max()) < 5 / 4000**0.5


def test_cases_stand_along_the_first_dimension_where_there_is_no_other() -> None:
    assert [case_dim(torch.ones(2, 3), d) for d in (0, 1, -1, -2, 2, -3)] == [0, 1, 1, 0, 0, 0]
    assert case_dim(torch.tensor(1.0), 0) == 0
    (found,) = draw([[(0, Diagonal(torch.tensor(4.0), torch.Size([])))]], [[torch.tensor(1.0)]], 1, 0)
    assert found is not None
    assert float(found[0][1].abs()) == 2.0
