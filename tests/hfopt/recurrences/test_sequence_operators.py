"""The passes of every cell as operators on plain tensors: values, transposes, missing vectors, many vectors at once."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import jvp, vjp
from torch.testing import assert_close

from hfopt.recurrences import loops, sequence
from hfopt.recurrences.registry import CELLS, with_vectors
from hfopt.recurrences.sequence import sequence_adjoint, sequence_forward, sequence_tangent
from tests.hfopt.recurrences.cells import NAMES, PLAIN, SMALL, Sizes, arguments
from tests.hfopt.recurrences.plain import dot, like

EXACT = {"rtol": 1e-11, "atol": 1e-12}
INT = st.integers(1, 4)
EVERY_SIZE = [SMALL, Sizes(1, 2, 3, 2, 4), Sizes(4, 1, 1, 1, 1), Sizes(30, 2, 0, 3, 2)]


def subsets(count: int) -> list[tuple[bool, ...]]:
    """Every choice of tensors that are there, but none at all."""
    return [c for c in itertools.product((True, False), repeat=count) if any(c)]


def kept(tensors: tuple[Tensor, ...], there: tuple[bool, ...]) -> list[Tensor | None]:
    return [x if on else None for x, on in zip(tensors, there, strict=True)]


def filled(tensors: tuple[Tensor, ...], there: tuple[bool, ...]) -> tuple[Tensor, ...]:
    return tuple(x if on else torch.zeros_like(x) for x, on in zip(tensors, there, strict=True))


@pytest.fixture(params=["as dispatched", "loops", "loops in many blocks"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who runs the passes: whom `backend` chooses, or torch's own operations."""
    if request.param != "as dispatched":
        monkeypatch.setattr(sequence, "backend", lambda cell, _: cell)
    if request.param == "loops in many blocks":
        monkeypatch.setattr(loops, "_BLOCK_BYTES", 200)


def test_all_cells_are_tested() -> None:
    assert set(CELLS) >= set(NAMES)
    assert {name for name in CELLS if name.startswith(("lstm", "gru", "mrnn"))} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sizes", EVERY_SIZE)
def test_values(name: str, sizes: Sizes, way: None) -> None:
    at, cell = arguments(name, sizes), CELLS[name]
    results = sequence_forward(name, at)
    expected = PLAIN[name](*at)
    assert_close(tuple(results[: cell.outputs]), expected, **EXACT)
    assert_close(cell.plain(at), expected, **EXACT)
    assert (len(at), len(results)) == (cell.arguments, cell.results)
    assert [tuple(r.shape) for r in results] == cell.shapes(at)


@pytest.mark.quick(where=lambda name, sizes, way: name in ("lstm", "gru", "mrnn_tanh+a"))
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sizes", EVERY_SIZE)
def test_tangents_of_any_arguments(name: str, sizes: Sizes, way: None) -> None:
    at = arguments(name, sizes)
    results, d = sequence_forward(name, at), like(at, 1)
    for there in subsets(len(at)) if sizes == SMALL else [(True,) * len(at)]:
        mine = tuple(sequence_tangent(name, kept(d, there), at, results))
        assert_close(mine, jvp(PLAIN[name], at, filled(d, there))[1], **EXACT)


@pytest.mark.quick(where=lambda name, sizes, way: name in ("lstm", "gru", "mrnn_tanh+a"))
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sizes", EVERY_SIZE)
def test_adjoints_of_any_outputs_in_any_arguments(name: str, sizes: Sizes, way: None) -> None:
    at = arguments(name, sizes)
    results, (outputs, pullback) = sequence_forward(name, at), vjp(PLAIN[name], *at)
    U = like(outputs, 2)
    for there in subsets(len(outputs)):
        expected = pullback(filled(U, there))
        for needed in subsets(len(at)) if sizes == SMALL else [(True,) * len(at)]:
            mine = sequence_adjoint(name, kept(U, there), at, results, needed)
            for g, e, wanted in zip(mine, expected, needed, strict=True):
                assert_close(g, e if wanted else e.new_empty(0), **EXACT)


@pytest.mark.parametrize("name", NAMES)
def test_adjoint_is_the_tangents_transpose(name: str, way: None) -> None:
    at, cell = arguments(name), CELLS[name]
    results, d = sequence_forward(name, at), like(at, 1)
    U = like(tuple(results[: cell.outputs]), 2)
    for there, on in itertools.product(subsets(len(at)), subsets(cell.outputs)):
        moved = tuple(sequence_tangent(name, kept(d, there), at, results))
        pulled = tuple(sequence_adjoint(name, kept(U, on), at, results, there))
        left = dot(filled(U, on), moved)
        right = dot(tuple(x for x, t in zip(d, there, strict=True) if t), tuple(g for g in pulled if g.numel()))
        assert_close(left, right, rtol=1e-11, atol=1e-11)


@pytest.mark.quick(where=lambda name, count, way: name in ("lstm", "gru", "mrnn_tanh+a"))
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", [1, 3])
def test_many_vectors_carried_together(name: str, count: int, way: None) -> None:
    at, cell = arguments(name), CELLS[name]
    results = sequence_forward(name, at)
    outputs = tuple(results[: cell.outputs])

    def many(tensors: tuple[Tensor, ...], seed: int) -> tuple[Tensor, ...]:
        return like(tuple(x.new_empty(with_vectors(x.shape, (count,))) for x in tensors), seed)

    def one(tensors: tuple[Tensor, ...], k: int) -> tuple[Tensor, ...]:
        return tuple(x.select(1 if x.dim() == 4 else 0, k) for x in tensors)

    d, U = many(at, 1), many(outputs, 2)
    for there in subsets(len(at)):
        mine = tuple(sequence_tangent(name, kept(d, there), at, results))
        for k in range(count):
            alone = sequence_tangent(name, kept(one(d, k), there), at, results)
            assert_close(one(mine, k), tuple(alone), **EXACT)
    for on in subsets(cell.outputs):
        mine = tuple(sequence_adjoint(name, kept(U, on), at, results, [True] * len(at)))
        for k in range(count):
            alone = sequence_adjoint(name, kept(one(U, k), on), at, results, [True] * len(at))
            assert_close(one(mine, k), tuple(alone), **EXACT)


@pytest.mark.parametrize("name", NAMES)
def test_finite_differences(name: str) -> None:
    at = arguments(name)
    results, d = sequence_forward(name, at), like(at, 3)
    moved = sequence_tangent(name, d, at, results)
    eps = 1e-6
    ahead, behind = (
        sequence_forward(name, [x + sign * eps * v for x, v in zip(at, d, strict=True)]) for sign in (1, -1)
    )
    for R, a, b in zip(moved, ahead, behind, strict=False):
        assert_close(R, (a - b) / (2 * eps), rtol=1e-6, atol=1e-7)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    sizes=st.builds(Sizes, st.integers(1, 6), INT, st.integers(0, 3), INT, INT),
    seed=st.integers(0, 1000),
)
def test_any_small_shape(name: str, sizes: Sizes, seed: int) -> None:
    at, cell = arguments(name, sizes, seed), CELLS[name]
    results, d = sequence_forward(name, at), like(at, seed + 1)
    outputs = tuple(results[: cell.outputs])
    assert_close(outputs, PLAIN[name](*at), **EXACT)
    U = like(outputs, seed + 2)
    moved = tuple(sequence_tangent(name, d, at, results))
    pulled = tuple(sequence_adjoint(name, U, at, results, [True] * len(at)))
    assert_close(dot(U, moved), dot(pulled, d), rtol=1e-10, atol=1e-10)
    assert_close(moved, jvp(cell.plain, (at,), (d,))[1], rtol=1e-10, atol=1e-11)


@pytest.mark.quick(where=lambda name: name in ("lstm", "gru", "mrnn_tanh+a"))
@pytest.mark.parametrize("name", NAMES)
def test_operators_keep_torchs_rules(name: str) -> None:
    at, cell = arguments(name, Sizes(3, 2, 2, 2, 3)), CELLS[name]
    leaves = [x.clone().requires_grad_() for x in at]
    torch.library.opcheck(sequence_forward, (name, leaves))
    results, d = sequence_forward(name, at), like(at, 1)
    U = like(tuple(results[: cell.outputs]), 2)
    rules = ("test_schema", "test_faketensor")
    for there in ((True,) * len(at), (True,) + (False,) * (len(at) - 1)):
        torch.library.opcheck(sequence_tangent, (name, kept(d, there), at, results), test_utils=rules)
        torch.library.opcheck(sequence_adjoint, (name, U, at, results, there), test_utils=rules)
    many = tuple(torch.stack((x, -x), 1 if x.dim() == 3 else 0) for x in d)
    torch.library.opcheck(sequence_tangent, (name, many, at, results), test_utils=rules)
    cotangents = tuple(torch.stack((u, -u), 1) for u in U)
    torch.library.opcheck(sequence_adjoint, (name, cotangents, at, results, [True] * len(at)), test_utils=rules)
