"""Flat vectors: layout, precision, inner products."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfopt.linalg.vector import _BLOCK, _EXACT, ParameterVector, dot, norm
from tests.hfopt.tools import generator, randn, rounding

SHAPES = st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=5)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(shapes=SHAPES, seed=st.integers(0, 1000))
def test_flattening_and_viewing_are_inverse(shapes: list[list[int]], seed: int) -> None:
    params = [randn(*shape, seed=seed + i) for i, shape in enumerate(shapes)]
    vector = ParameterVector(params)
    flat = vector.flatten(params)
    assert flat.shape == (vector.size,) == (sum(p.numel() for p in params),)
    assert torch.equal(flat, torch.cat([p.reshape(-1) for p in params]))
    assert all(torch.equal(v, p) for v, p in zip(vector.views(flat), params, strict=True))
    holes = vector.flatten([None if i % 2 else p for i, p in enumerate(params)])
    for i, view in enumerate(vector.views(holes)):
        assert torch.equal(view, torch.zeros_like(view) if i % 2 else params[i])


def test_moving_and_restoring_is_exact_and_unseen() -> None:
    params = [randn(3, 4, seed=1).t(), randn(2, 3, 2, 2, seed=2).to(memory_format=torch.channels_last), randn(seed=3)]
    vector = ParameterVector(params)
    saved, before = vector.snapshot(), [p.clone() for p in params]
    pointers, versions = [p.data_ptr() for p in params], [p._version for p in params]
    direction = randn(vector.size, seed=4)
    vector.move(saved, direction, 0.3)
    for p, b, d in zip(params, before, vector.views(direction), strict=True):
        # One rounding or, without fused multiply-adds, two.
        assert bool(((p - (b + 0.3 * d)).abs() <= rounding() * (b.abs() + d.abs())).all())
    vector.restore(saved)
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert [p.data_ptr() for p in params] == pointers
    assert [p._version for p in params] == versions


def test_the_widest_precision_wins() -> None:
    half, single, double = (torch.zeros(2, dtype=d) for d in (torch.bfloat16, torch.float32, torch.float64))
    assert ParameterVector([half]).dtype == torch.float32
    assert ParameterVector([half, single]).dtype == torch.float32
    assert ParameterVector([half, double]).dtype == torch.float64
    views = ParameterVector([half, single]).cast_views(torch.ones(4))
    assert [v.dtype for v in views] == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("n", [0, 1, 1000, 70_000, 200_001])
def test_inner_products_are_summed_in_double(n: int) -> None:
    a = torch.randn(n, generator=generator(n)) * 1e3
    b = torch.randn(n, generator=generator(n + 1)) * 1e-3
    exact = float(torch.dot(a.double(), b.double()))
    # Long vectors are summed in float64 over blocks, within which float32 sums.
    size = float((a.double() * b.double()).abs().sum())
    # Errors of rounding have either sign: their sum is as the square root of their number, within a block and over
    # blocks. Partial sums of products of either sign grow like a square root too, those of squares like the number.
    single, double = torch.finfo(torch.float32).eps, rounding(max(n, 1) ** 0.5)
    long = n > _EXACT
    assert dot(a, b) == pytest.approx(exact, rel=0, abs=(single * (_BLOCK / n) ** 0.5 if long else double) * size)
    assert norm(a) == pytest.approx(float(a.double().norm()), rel=single * _BLOCK / n**0.5 if long else double)


@pytest.mark.parametrize("n", [10, 100_000])
@pytest.mark.parametrize("value", [1e30, 1e-30])
def test_lengths_whose_square_no_float32_holds(n: int, value: float) -> None:
    assert norm(torch.full((n,), value)) == pytest.approx(value * n**0.5)


@pytest.mark.parametrize(
    ("params", "error", "match"),
    [
        ([], ValueError, "empty"),
        ([torch.zeros(2, dtype=torch.complex64)], TypeError, r"params\[0\].*complex64.*view_as_real"),
        ([torch.zeros(2), torch.zeros(2, dtype=torch.int64)], TypeError, r"params\[1\].*int64"),
        ([torch.zeros(2).to_sparse()], ValueError, r"sparse"),
        ([torch.zeros(2), torch.zeros(2, device="meta")], ValueError, r"cpu.*params\[1\].*meta"),
    ],
)
def test_bad_parameters_are_refused(params: list[torch.Tensor], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        ParameterVector(params)
