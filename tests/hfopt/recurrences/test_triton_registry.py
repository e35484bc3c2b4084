"""Every defined cell that Triton's kernels serve, in all their forms, against its passes in torch's operations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hfopt.recurrences.triton as package
from hfopt.recurrences.triton.pointwise import served
from hfopt.recurrences.triton.sections import Sections
from tests.hfopt.recurrences.registry import NAMES, arguments, cell, like
from tests.hfopt.recurrences.test_triton import DEVICE, FORMS, TOLERANCE, take

SERVED = [name for name in (*NAMES, "tanh+a", "lstm.projected") if served(cell(name).definition)]
SECTIONS = ["mrnn", "mrnn+a", "mrnn.projected", "gru2014", "rhn", "rhn_uncoupled_dropout"]


def close(found: list[Tensor], wanted: list[Tensor], dtype: torch.dtype) -> None:
    assert len(found) == len(wanted)
    for x, y in zip(found, wanted, strict=True):
        assert x.shape == y.shape
        assert x.dtype == dtype
        if y.numel():
            assert float((x.double() - y).abs().max() / y.abs().max().clamp(min=1.0)) < TOLERANCE[dtype]


def compare(name: str, dtype: torch.dtype, vectors: tuple[int, ...], steps: int = 3, batch: int = 2) -> None:
    c, passes = cell(name), package.cell(cell(name).name)
    assert passes is not None
    given = [x.to(DEVICE, dtype) for x in arguments(name, steps, batch, units=5)]
    exact = [x.double() for x in given]
    results = passes.forward(given)
    close(results, c.forward(exact), dtype)
    at = [x.double() for x in results]
    d = [x.to(DEVICE, dtype) for x in like(exact, 1, vectors)]
    for k in (None, *range(len(d))):  # all tangents, and each alone
        some = [x if k in (None, i) else None for i, x in enumerate(d)]
        wanted = c.tangent([None if x is None else x.double() for x in some], exact, at)
        close(passes.tangent(some, given, results), wanted, dtype)
    u = [x.to(DEVICE, dtype) for x in like(results[: c.outputs], 2, vectors)]
    for k in (None, *range(len(u))):
        some = [x if k in (None, i) else None for i, x in enumerate(u)]
        wanted = c.adjoint([None if x is None else x.double() for x in some], exact, at, [True] * len(given))
        close(passes.adjoint(some, given, results, [True] * len(given)), wanted, dtype)


def test_every_traced_cell_is_served() -> None:
    one = {"tanh", "relu", "sigmoid", "identity", "modrelu", "lstm", "gru", "ugrnn", "intersection"}
    assert set(SERVED) == one | {"tanh+a", "lstm.projected"}
    assert all(isinstance(package.cell(cell(name).name), Sections) for name in SECTIONS)


@pytest.mark.parametrize("name", SECTIONS)
def test_several_products_in_a_step(name: str) -> None:
    compare(name, torch.float64, ())
    compare(name, torch.float64, (3,), steps=2)


SOME = ("lstm", "gru", "modrelu", "intersection")


@pytest.mark.quick(where=lambda name, form: name == "lstm" or (form == "resident" and name in SOME))
@pytest.mark.parametrize(("name", "form"), [(n, f) for n in SERVED for f in FORMS if n in SOME or f == "resident"])
def test_float64(name: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take(form, monkeypatch)
    compare(name, torch.float64, ())


@pytest.mark.quick(where=lambda name: name == "intersection")
@pytest.mark.parametrize("name", ["lstm", "gru", "intersection"])
def test_many_vectors_and_one_step(name: str) -> None:
    compare(name, torch.float64, (3,))
    compare(name, torch.float64, (), steps=1, batch=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions(dtype: torch.dtype) -> None:
    compare("ugrnn", dtype, ())
