"""LSTM, GRU and MRNN as Triton kernels against the same passes in torch's operations."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import hfopt.recurrences.triton as package
from hfopt.recurrences.registry import CELLS, with_vectors
from tests.hfopt.recurrences.cells import Sizes, arguments
from tests.hfopt.recurrences.plain import dot, like
from tests.hfopt.recurrences.test_triton import DEVICE, FORMS, TOLERANCE, take

NAMES = ("lstm", "gru", "mrnn_tanh+a", "mrnn_relu", "mrnn_sigmoid")


def problem(name: str, sizes: Sizes, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [x.to(DEVICE, dtype) for x in arguments(name, sizes)]


def vectors_like(tensors: list[Tensor], count: int = 0, seed: int = 1) -> list[Tensor]:
    many = (count,) if count else ()
    shaped = tuple(torch.empty(with_vectors(x.shape, many), dtype=torch.float64) for x in tensors)
    return [v.to(x) for v, x in zip(like(shaped, seed), tensors, strict=True)]


def close(found: list[Tensor], wanted: list[Tensor], dtype: torch.dtype = torch.float64) -> None:
    assert len(found) == len(wanted)
    for x, y in zip(found, wanted, strict=True):
        assert x.shape == y.shape
        assert x.dtype == dtype
        if y.numel():
            error = (x.double() - y).abs().max() / y.abs().max().clamp(min=1.0)
            assert error < TOLERANCE[dtype], float(error)


def compare(name: str, sizes: Sizes, dtype: torch.dtype = torch.float64, count: int = 0) -> None:
    given, cell, passes = problem(name, sizes, dtype), CELLS[name], package.cell(name)
    assert passes is not None
    exact = [x.double() for x in given]
    results = passes.forward(given)
    close(results, cell.forward(exact), dtype)
    at = [x.double() for x in results]
    d = vectors_like(given, count)
    close(passes.tangent(d, given, results), cell.tangent([x.double() for x in d], exact, at), dtype)
    u, needed = vectors_like(results[: cell.outputs], count, seed=2), [True] * len(given)
    wanted = cell.adjoint([x.double() for x in u], exact, at, needed)
    close(passes.adjoint(u, given, results, needed), wanted, dtype)


@pytest.mark.quick(where=lambda name, form: name == "lstm" or form == FORMS[0])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES[:3])
def test_float64(name: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take(form, monkeypatch)
    compare(name, Sizes(3, 2, 2, 5, 3))


@pytest.mark.parametrize("name", NAMES[3:])
def test_nonlinearities(name: str) -> None:
    compare(name, Sizes(2, 2, 2, 5, 3))


@pytest.mark.quick(where=lambda name, sizes: name == "lstm")
@pytest.mark.parametrize("name", NAMES[:3])
@pytest.mark.parametrize("sizes", [Sizes(1, 1, 1, 1, 1), Sizes(2, 17, 1, 4, 5), Sizes(2, 3, 0, 3, 2)])
def test_sizes(name: str, sizes: Sizes) -> None:
    compare(name, sizes)


@pytest.mark.quick(where=lambda name, form: name == "lstm")
@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("name", NAMES[:3])
def test_several_blocks_of_units(name: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More units than a program works out at once, and more rows than it multiplies at once."""
    take(form, monkeypatch)
    compare(name, Sizes(2, 2, 1, 33, 40))


@pytest.mark.parametrize("name", NAMES[:3])
def test_the_matrix_in_pieces(name: str) -> None:
    compare(name, Sizes(2, 2, 1, 40, 33), torch.float32)


@pytest.mark.quick(where=lambda name, form: name == "lstm" or form == FORMS[0])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES[:3])
def test_many_vectors(name: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take(form, monkeypatch)
    compare(name, Sizes(2, 3, 2, 4, 3), count=2)


@pytest.mark.quick(where=lambda name, dtype, form: name == "gru")
@pytest.mark.parametrize(
    ("dtype", "form"), [(torch.float32, "walked"), (torch.bfloat16, "resident"), (torch.bfloat16, "walked")]
)
@pytest.mark.parametrize("name", NAMES[:3])
def test_lower_precision(name: str, dtype: torch.dtype, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take(form, monkeypatch)
    compare(name, Sizes(2, 3, 2, 5, 3), dtype)


@pytest.mark.quick(where=lambda name: name == "gru")
@pytest.mark.parametrize("name", NAMES[:3])
def test_vectors_left_out(name: str) -> None:
    given, cell, passes = problem(name, Sizes(2, 2, 1, 3, 2)), CELLS[name], package.cell(name)
    assert passes is not None
    results = cell.forward(given)
    d, u = vectors_like(given), vectors_like(results[: cell.outputs], seed=2)
    choices = [c for c in itertools.product((True, False), repeat=len(d)) if sum(c) in (1, len(d) - 1)]
    for there in choices:
        some = [x if on else None for x, on in zip(d, there, strict=True)]
        close(passes.tangent(some, given, results), cell.tangent(some, given, results))
    for there in itertools.product((True, False), repeat=len(u)):
        if any(there):
            some = [x if on else None for x, on in zip(u, there, strict=True)]
            for needed in [c for c in choices if sum(c) == 1] if all(there) else choices[:1]:
                wanted = cell.adjoint(some, given, results, needed)
                close(passes.adjoint(some, given, results, needed), wanted)


@pytest.mark.parametrize("name", NAMES[:3])
def test_tangent_and_adjoint_are_transposes(name: str) -> None:
    given, passes = problem(name, Sizes(3, 2, 2, 5, 3)), package.cell(name)
    assert passes is not None
    results = passes.forward(given)
    d = vectors_like(given)
    moved = passes.tangent(d, given, results)
    u = vectors_like(moved, seed=2)
    pulled = passes.adjoint(u, given, results, [True] * len(given))
    forwards, backwards = dot(tuple(u), tuple(moved)), dot(tuple(pulled), tuple(d))
    torch.testing.assert_close(forwards, backwards, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES[:3])
def test_any_layout(name: str) -> None:
    given, passes = problem(name, Sizes(2, 2, 2, 3, 2)), package.cell(name)
    assert passes is not None

    def shuffled(x: Tensor) -> Tensor:
        return torch.stack((x, x), -1)[..., 0]

    results = passes.forward(given)
    d, u, needed = vectors_like(given), vectors_like(results[: CELLS[name].outputs], seed=2), [True] * len(given)
    strided, at = [shuffled(x) for x in given], [shuffled(x) for x in results]
    assert not strided[0].is_contiguous()
    close(passes.forward(strided), results)
    close(passes.tangent([shuffled(x) for x in d], strided, at), passes.tangent(d, given, results))
    adjoint = passes.adjoint([shuffled(x) for x in u], strided, at, needed)
    close(adjoint, passes.adjoint(u, given, results, needed))


@pytest.mark.parametrize("name", NAMES[:3])
def test_errors_name_the_argument(name: str) -> None:
    given, passes = problem(name, Sizes(1, 1, 1, 2, 2)), package.cell(name)
    assert passes is not None
    with pytest.raises(TypeError, match=r"X is torch.float16"):
        passes.forward([x.half() for x in given])
    results, d = passes.forward(given), vectors_like(given)
    with pytest.raises(TypeError, match=r"dh0 is torch.float32 .*X is torch.float64"):
        passes.tangent([x.float() if i == (2 if name == "lstm" else 4) else x for i, x in enumerate(d)], given, results)
    with pytest.raises(TypeError, match=r"U is torch.float16"):
        passes.adjoint([x.half() for x in results[: CELLS[name].outputs]], given, results, [True] * len(given))
