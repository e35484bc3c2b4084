"""The Lanczos process against dense eigenvalues and moments."""

from __future__ import annotations

import pytest
import torch

from hfopt.linalg.lanczos import lanczos


def matrix(values: list[float], seed: int = 0) -> torch.Tensor:
    """A symmetric matrix with these eigenvalues."""
    n = len(values)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    return q @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ q.t()


def test_all_eigenvalues_and_the_weights_of_the_start() -> None:
    values = [-2.0, 1e-6, 0.3, 1.0, 5.0, 80.0]
    a = matrix(values)
    start = torch.randn(6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    nodes, weights = lanczos(lambda v: a @ v, start, 10)
    t, u = torch.linalg.eigh(a)
    torch.testing.assert_close(nodes, t, rtol=1e-10, atol=1e-11 * 80)
    torch.testing.assert_close(weights, (u.t() @ start / start.norm()).square(), rtol=1e-8, atol=1e-10)


def test_the_quadrature_is_exact_for_polynomials() -> None:
    a = matrix([float(k) / 10 for k in range(30)])
    start = torch.ones(30, dtype=torch.float64)
    nodes, weights = lanczos(lambda v: a @ v, start, 4)
    assert len(nodes) == 4
    v, moment = start / start.norm(), start / start.norm()
    for degree in range(8):  # below 2m
        torch.testing.assert_close((weights * nodes**degree).sum(), v @ moment, rtol=1e-10, atol=1e-12)
        moment = a @ moment
    assert abs(float((weights * nodes**8).sum() - v @ moment)) > 1e-6


def test_it_ends_in_an_invariant_space() -> None:
    a = torch.diag(torch.tensor([1.0, 1.0, 1.0, 4.0, 4.0, 0.0]))
    nodes, weights = lanczos(lambda v: a @ v, torch.ones(6), 6)
    assert len(nodes) == 3
    torch.testing.assert_close(nodes.float(), torch.tensor([0.0, 1.0, 4.0]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights.float(), torch.tensor([1 / 6, 3 / 6, 2 / 6]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("start", [torch.zeros(3), torch.full((3,), float("nan"))])
def test_starts_that_are_none(start: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        lanczos(lambda v: v, start, 2)
    with pytest.raises(ValueError, match="iterations is 0"):
        lanczos(lambda v: v, torch.ones(3), 0)
