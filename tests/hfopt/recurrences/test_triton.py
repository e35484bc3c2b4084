"""The simple RNN's Triton kernels against the loops, interpreted or on a GPU, and what all kernels share."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import hfopt.recurrences.triton as package
from hfopt.recurrences import loops
from hfopt.recurrences.nonlinearities import NONLINEARITIES
from tests.hfopt.recurrences.plain import NAMES, dot

pytest.importorskip("triton")
simple = pytest.importorskip("hfopt.recurrences.triton.simple")
tiles = pytest.importorskip("hfopt.recurrences.triton.tiles")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMS = ("resident", "walked", "stepwise")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.04}


def take(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the kernels take this form whatever the size."""
    if form != "resident":
        monkeypatch.setattr(tiles, "RESIDENT_BYTES", 0)
    if form == "stepwise":
        monkeypatch.setattr(tiles, "WALKED_BYTES", 0)


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Drawn alike for every dtype and device."""
    draws = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=draws, dtype=torch.float64)


def problem(
    steps: int, batch: int, hidden: int, inputs: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(P, X, K, h0)."""
    P, X = randn(steps, batch, hidden), randn(steps, batch, inputs, seed=1)
    K = randn(hidden + inputs, hidden, seed=2) / hidden**0.5
    h0 = randn(batch, hidden, seed=3).tanh()
    P, X, K, h0 = (x.to(DEVICE, dtype) for x in (P, X, K, h0))
    return P, X, K, h0


def exact(x: object) -> object:
    return x.double() if isinstance(x, Tensor) else x


def close(found: object, wanted: object) -> None:
    if wanted is None:
        assert found is None
        return
    assert isinstance(found, Tensor)
    assert isinstance(wanted, Tensor)
    assert found.shape == wanted.shape
    if wanted.numel():
        error = (found.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp(min=1.0)
        assert error < TOLERANCE[found.dtype], float(error)


def compare(steps: int, batch: int, hidden: int, inputs: int, name: str, dtype: torch.dtype, vectors: int = 0) -> None:
    """Forward, tangent and adjoint of both against the loops in float64 at the same numbers."""
    P, X, K, h0 = problem(steps, batch, hidden, inputs, dtype)
    f, many = NONLINEARITIES[name], (vectors,) if vectors else ()
    H = simple.forward(P, X, K, h0, f)
    assert H.dtype == dtype
    close(H, loops.forward(*map(exact, (P, X, K, h0)), f))
    dP, dh0 = (randn(*shape, seed=4).to(P) for shape in ((steps, *many, batch, hidden), (*many, batch, hidden)))
    dK = None if vectors else randn(*K.shape, seed=5).to(K) / hidden**0.5
    tangents, point = (dP, dK, dh0), (X, H, h0, K)
    found = simple.tangent(*tangents, *point, f, True)
    for x, y in zip(found, loops.tangent(*map(exact, tangents), *map(exact, point), f, True), strict=True):
        close(x, y)
    U, Ua = (randn(*dP.shape, seed=seed).to(P) for seed in (6, 7))
    found = simple.adjoint(U, Ua, *point, f, True)
    for x, y in zip(found, loops.adjoint(exact(U), exact(Ua), *map(exact, point), f, True), strict=True):
        close(x, y)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 0), (7, 3, 5, 2), (2, 17, 4, 1), (2, 3, 65, 0)])
def test_float64(form: str, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    take(form, monkeypatch)
    compare(*sizes, "tanh", torch.float64)


@pytest.mark.parametrize("name", NAMES)
def test_nonlinearities(name: str) -> None:
    compare(3, 2, 5, 1, name, torch.float64)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(form: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    take(form, monkeypatch)
    for name in ("tanh", "sigmoid"):
        compare(2, 3, 5, 2, name, dtype)


def test_a_hundred_units() -> None:
    """The matrix in four pieces, and 28 units of padding."""
    assert tiles.plan(torch.empty(1), 3, 100, 1).pieces == 4
    compare(2, 3, 100, 1, "tanh", torch.float32)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("vectors", [1, 3])
def test_many_vectors(form: str, vectors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    take(form, monkeypatch)
    compare(3, 7, 4, 1, "tanh", torch.float64, vectors)


@pytest.mark.parametrize("form", ["resident", "walked"])
def test_arguments_left_out(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take(form, monkeypatch)
    P, X, K, h0 = problem(2, 3, 4, 2)
    f = NONLINEARITIES["tanh"]
    H = loops.forward(None, X, K, h0, f)
    close(simple.forward(None, X, K, h0, f), H)
    no_inputs = X[..., :0], K[:4], h0, f
    close(simple.forward(None, *no_inputs), loops.forward(None, *no_inputs))
    for there in itertools.product((True, False), repeat=4):
        tangents = (x if on else None for x, on in zip((P, K.cos(), h0.cos()), there, strict=False))
        arguments = (*tangents, X, H, h0, K, f, there[3])
        for x, y in zip(simple.tangent(*arguments), loops.tangent(*arguments), strict=True):
            close(x, y)
    for first, second, inputs in itertools.product((True, False), repeat=3):
        if first or second:
            given = (P if first else None, P.cos() if second else None)
            for x, y in zip(
                simple.adjoint(*given, X, H, h0, K, f, inputs),
                loops.adjoint(*given, X, H, h0, K, f, inputs),
                strict=True,
            ):
                close(x, y)


@pytest.mark.parametrize("form", FORMS)
def test_tangent_and_adjoint_are_transposes(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take(form, monkeypatch)
    P, X, K, h0 = problem(4, 3, 5, 2)
    f = NONLINEARITIES["sigmoid"]
    H = simple.forward(P, X, K, h0, f)
    d = (P.sin(), K.sin(), h0.sin())
    u = (P.cos(), P.sin() + 0.5)
    forwards = dot(u, simple.tangent(*d, X, H, h0, K, f, True))
    backwards = dot(simple.adjoint(*u, X, H, h0, K, f, True), d)
    torch.testing.assert_close(forwards, backwards, rtol=1e-12, atol=1e-12)


def test_any_layout() -> None:
    f = NONLINEARITIES["tanh"]
    straight = problem(3, 2, 4, 2)

    def shuffled(x: Tensor) -> Tensor:
        return torch.stack((x.transpose(-1, -2), x.transpose(-1, -2)), -1)[..., 0].transpose(-1, -2)

    def results(change: object) -> list[Tensor]:
        P, X, K, h0 = (change(x) for x in straight)  # type: ignore[operator]
        H = change(simple.forward(P, X, K, h0, f))  # type: ignore[operator]
        moved = simple.tangent(P, K, h0, X, H, h0, K, f, True)
        return [H, *moved, *simple.adjoint(P, P, X, H, h0, K, f, True)]

    assert not shuffled(straight[0]).is_contiguous()
    for x, y in zip(results(shuffled), results(lambda x: x), strict=True):
        close(x, y)


def test_arguments_are_left_as_they_are() -> None:
    P, X, K, h0 = problem(3, 2, 4, 0)
    f = NONLINEARITIES["tanh"]
    H = simple.forward(P, X, K, h0, f)
    given = (P, X, K, h0, H)
    copies = [x.clone() for x in given]
    simple.tangent(P, None, h0, X, H, h0, K, f, True)
    simple.adjoint(P, P, X, H, h0, K, f, True)
    for now, before in zip(given, copies, strict=True):
        assert torch.equal(now, before)


def test_errors_name_the_argument() -> None:
    P, X, K, h0 = problem(2, 2, 3, 1)
    f = NONLINEARITIES["tanh"]
    half = [x.half() for x in (P, X, K, h0)]
    with pytest.raises(TypeError, match=r"K is torch.float16 .*float32, float64 and bfloat16"):
        simple.forward(*half, f)
    with pytest.raises(TypeError, match=r"dP is torch.float32 .*H is torch.float64.*\.to\(\)"):
        simple.tangent(P.float(), None, None, X, P, h0, K, f, False)
    with pytest.raises(TypeError, match=r"Ua is torch.int64"):
        simple.adjoint(None, P.long(), X, P, h0, K, f, False)
    with pytest.raises(ValueError, match=r"mode is 'exact'.*'ieee', 'tf32x3', 'tf32'"):
        package.precision("exact")


def test_precision_is_a_setting() -> None:
    assert package.precision() == "ieee"
    like = torch.empty(1, device=DEVICE)
    try:
        assert package.precision("tf32x3") == package.precision() == "tf32x3"
        assert tiles.plan(like, 1000, 100, 1).precision == "tf32x3"
        assert tiles.plan(like.double(), 1000, 100, 1).precision == "ieee"
        compare(2, 3, 5, 1, "tanh", torch.float32)
    finally:
        package.precision("ieee")
    assert tiles.plan(like, 1000, 100, 1).precision == "ieee"


def test_forms_by_size() -> None:
    one = torch.empty(1)

    def form(units: int, matrices: int, dtype: torch.dtype = torch.float32) -> str:
        plan = tiles.plan(one.to(dtype), 1000, units, matrices)
        return str(plan.form)

    assert [form(units, 1) for units in (16, 100, 128, 129, 256, 512, 513)] == [
        *("resident",) * 3, *("walked",) * 3, "stepwise",
    ]  # fmt: skip
    assert [form(units, 4) for units in (64, 65, 256, 257)] == ["resident", "walked", "walked", "stepwise"]
    assert form(256, 1, torch.bfloat16) == form(128, 1, torch.float64) == "resident"
    # Eight sequences a tile while there are multiprocessors to fill, then sixteen.
    assert [tiles.plan(one, rows, 100, 1).tile for rows in (1000, 10000)] == [8, 16]


def test_who_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    here = torch.empty(1, device=DEVICE)
    assert package.available(here)
    assert package.available(here.double())
    assert package.available(here.bfloat16())
    assert not package.available(here.half())
    assert not package.available(here.to("meta"))
    assert package.cell("elman") is None
    if DEVICE == "cpu":
        monkeypatch.delenv("TRITON_INTERPRET")
        assert not package.available(here)


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    package.installed.cache_clear()
    try:
        assert not package.available(torch.empty(1, device=DEVICE))
        assert package.cell("lstm") is None
    finally:
        package.installed.cache_clear()


@pytest.mark.slow
def test_triton_is_not_imported_with_the_package() -> None:
    program = "import sys, hfopt.recurrences.triton as t; assert 'triton' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
