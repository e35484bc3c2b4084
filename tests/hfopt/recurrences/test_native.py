"""The compiled passes against torch's own operators, and what happens where nothing can be compiled."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import hfopt
from hfopt.recurrences import loops
from hfopt.recurrences.native import build, cell, passes, simple, threads
from hfopt.recurrences.nonlinearities import NONLINEARITIES
from hfopt.recurrences.registry import CELLS, batch_of_vectors, with_vectors

needs_compiler = pytest.mark.skipif(build.library() is None, reason="no C compiler here")

SIZES = [(1, 1, 1, 1, 1), (2, 3, 1, 5, 7), (5, 37, 3, 33, 20), (4, 130, 3, 70, 40)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-5}


def numbers(seed: int, dtype: torch.dtype) -> torch.Generator:
    return torch.Generator().manual_seed(seed + (dtype == torch.float32))


def arguments(name: str, sizes: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> list[Tensor]:
    T, B, V, h, F = sizes

    def r(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, generator=generator)

    if name == "lstm":
        return [r(T, B, V), r(h + V, 4 * h) * h**-0.5, r(B, h), r(B, h)]
    if name == "gru":
        return [r(T, B, V), r(h, 3 * h) * h**-0.5, r(V, 3 * h), r(h), r(B, h)]
    if name.startswith("mrnn"):
        return [r(T, B, V), r(V, F) * 0.5, r(h, F) * h**-0.5, r(F + V, h) * F**-0.5, r(B, h)]
    return [r(T, B, V), r(h + V, h) * h**-0.5, r(B, h), r(h + 1, F) * h**-0.5]


def subsets(count: int) -> list[tuple[bool, ...]]:
    """All, each alone, and each left out."""
    every = [tuple(c) for c in itertools.product((True, False), repeat=count) if any(c)]
    return [c for c in every if sum(c) in (1, count - 1, count)]


def assert_same(found: list[Tensor], wanted: list[Tensor], told: str) -> None:
    assert len(found) == len(wanted), told
    for k, (x, y) in enumerate(zip(found, wanted, strict=True)):
        assert x.shape == y.shape, f"{told}: result {k}"
        assert x.is_contiguous(), f"{told}: result {k}"
        error = (x - y).abs().max() / (1 + y.abs().max()) if x.numel() else 0
        assert error < TOLERANCE[x.dtype], f"{told}: result {k} is off by {float(error)}"


@pytest.fixture(params=[1, 3], ids=["one-range", "three-ranges"])
def ranges(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Sequences in one range, or in three that are worked on one after the other, with sums of their own."""
    count: int = request.param

    def parts(batch: int, _: float) -> list[tuple[int, int]]:
        edges = [batch * i // min(count, batch) for i in range(min(count, batch) + 1)]
        return list(itertools.pairwise(edges))

    for module in ("simple", "cells"):
        monkeypatch.setattr(f"hfopt.recurrences.native.{module}.parts", parts)
    monkeypatch.setattr(threads, "_openmp", lambda: None)
    return count


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("f", list(NONLINEARITIES))
def test_forward_equals_torchs(f: str, dtype: torch.dtype, ranges: int) -> None:
    for sizes in [*SIZES, (3, 4, 0, 9, 1)]:
        g = numbers(sum(sizes), dtype)
        X, K, h0, _ = arguments("readout", sizes, dtype, g)
        P = torch.randn(*X.shape[:2], K.shape[1], dtype=dtype, generator=g)
        for p in (P, None):
            found = simple.forward(p, X, K, h0, f)
            assert_same([found], [loops.forward(p, X, K, h0, NONLINEARITIES[f])], f"forward {sizes}")


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("f", list(NONLINEARITIES))
def test_nonlinearities_are_exact_to_rounding(f: str, dtype: torch.dtype) -> None:
    """Within four units in the last place, where they are small, where they saturate, and beyond all numbers."""
    g = numbers(3, dtype)
    spread = 10 ** torch.empty(20_000, dtype=torch.float64).uniform_(-12, 1.9, generator=g)
    special = torch.tensor([0.0, 1e-30, 0.625, 22.0, 87.0, float("inf")], dtype=torch.float64)
    x = torch.cat([spread, -spread, special, -special, torch.tensor([float("nan")])]).to(dtype).view(1, -1, 1)
    nothing = x.new_zeros(1, 1)
    found = simple.forward(x, x[..., :0], nothing, torch.zeros_like(x[0]), f).flatten()
    x = x.flatten()
    wide = np.asarray(x.numpy(), np.longdouble)
    with np.errstate(over="ignore", invalid="ignore"):
        wanted = {
            "tanh": lambda: np.tanh(wide),
            "sigmoid": lambda: 1 / (1 + np.exp(-wide)),
            "relu": lambda: np.where(wide < 0, 0, wide),
            "identity": lambda: wide,
        }[f]()
    rounded = torch.from_numpy(wanted.astype(found.numpy().dtype))
    assert torch.equal(found.isnan(), x.isnan())
    assert torch.equal(found[rounded.isinf()], rounded[rounded.isinf()])
    at = rounded.isfinite().numpy()
    unit = np.spacing(np.abs(rounded.numpy()[at])).astype(np.longdouble)
    assert float((np.abs(found.numpy()[at].astype(np.longdouble) - wanted[at]) / unit).max()) < 4


@pytest.mark.quick(where=lambda name, dtype, vectors, ranges: (dtype == torch.float64) == (ranges == 3))
@needs_compiler
@pytest.mark.parametrize("vectors", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["lstm", "gru", "mrnn_tanh", "mrnn_relu+a", "readout_tanh", "readout_sigmoid+a"])
def test_passes_of_cells_equal_torchs(name: str, dtype: torch.dtype, vectors: int, ranges: int) -> None:
    compiled, plain = cell(name), CELLS[name]
    assert compiled is not None
    for sizes in SIZES:
        g = numbers(sum(sizes), dtype)
        given = arguments(name, sizes, dtype, g)
        results = plain.forward(given)
        many = (vectors,) if vectors else ()
        for chosen in subsets(len(given)):
            d = [
                torch.randn(with_vectors(x.shape, many), dtype=dtype, generator=g) if on else None
                for x, on in zip(given, chosen, strict=True)
            ]
            assert batch_of_vectors(d, given) == many
            told = f"tangent {sizes} {chosen}"
            assert_same(compiled.tangent(d, given, results), plain.tangent(d, given, results), told)
        outputs = results[: plain.outputs]
        for chosen in subsets(len(outputs)):
            u = [
                torch.randn(with_vectors(x.shape, many), dtype=dtype, generator=g) if on else None
                for x, on in zip(outputs, chosen, strict=True)
            ]
            for needed in ([True] * len(given), [False] + [True] * (len(given) - 1)):
                told = f"adjoint {sizes} {chosen} {needed}"
                found = compiled.adjoint(u, given, results, needed)
                assert_same(found, plain.adjoint(u, given, results, needed), told)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("f", list(NONLINEARITIES))
def test_passes_of_the_simple_recurrence_equal_torchs(f: str, dtype: torch.dtype, ranges: int) -> None:
    for T, B, V, h, _ in SIZES:
        g = numbers(T * h, dtype)

        def r(*shape: int, g: torch.Generator = g) -> Tensor:
            return torch.randn(*shape, dtype=dtype, generator=g)

        X, K, h0 = r(T, B, V), r(h + V, h) * h**-0.5, r(B, h)
        H = loops.forward(None, X, K, h0, NONLINEARITIES[f])
        point = simple.Point(X, H, h0, K, f)
        for with_P, with_K, with_h in subsets(3):
            dP, dK, dh0 = r(T, B, h) if with_P else None, r(h + V, h) if with_K else None, r(B, h) if with_h else None
            found = simple.tangent(point, dP=dP, dK=dK, dh0=dh0, preactivations=True)
            wanted = loops.tangent(dP, dK, dh0, X, H, h0, K, NONLINEARITIES[f], True)
            assert_same([x for x in found if x is not None], [x for x in wanted if x is not None], f"{T, B, V, h}")
        for with_U, with_Ua in subsets(2):
            U, Ua = r(T, B, h) if with_U else None, r(T, B, h) if with_Ua else None
            pulled = simple.adjoint(point, U=U, U_a=Ua, on_P=True)
            wanted = loops.adjoint(U, Ua, X, H, h0, K, NONLINEARITIES[f], True)
            assert pulled.dP is not None
            assert wanted[0] is not None
            assert_same([pulled.dP, pulled.dK, pulled.dh0], [wanted[0], *wanted[1:]], f"{T, B, V, h}")


@needs_compiler
def test_threads_of_openmp_and_of_python_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    g = numbers(0, torch.float64)
    given = arguments("lstm", (4, 9, 3, 6, 0), torch.float64, g)
    results = CELLS["lstm"].forward(given)
    d = [torch.randn(x.shape, dtype=x.dtype, generator=g) for x in given]
    u = [torch.randn(4, 9, 6, dtype=torch.float64, generator=g) for _ in range(2)]
    edges = [(0, 4), (4, 9)]
    monkeypatch.setattr("hfopt.recurrences.native.cells.parts", lambda *_: edges)
    compiled = cell("lstm")
    assert compiled is not None
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        team = compiled.tangent(d, given, results) + compiled.adjoint(u, given, results, [True] * 4)
    finally:
        torch.set_num_threads(before)
    monkeypatch.setattr(threads, "_openmp", lambda: None)
    pool = compiled.tangent(d, given, results) + compiled.adjoint(u, given, results, [True] * 4)
    assert all(torch.equal(x, y) for x, y in zip(team, pool, strict=True))


@needs_compiler
def test_nan_and_infinity_go_through() -> None:
    given = arguments("gru", (3, 2, 1, 4, 0), torch.float64, numbers(1, torch.float64))
    results = CELLS["gru"].forward(given)
    d: list[Tensor | None] = [None, None, None, None, torch.zeros(2, 4, dtype=torch.float64)]
    assert d[4] is not None
    d[4][0, 1] = float("nan")
    compiled = cell("gru")
    assert compiled is not None
    (moved,) = compiled.tangent(d, given, results)
    assert moved[:, 0].isnan().all()
    assert not moved[:, 1].isnan().any()


def test_parts_cover_all_sequences_and_wake_no_thread_for_little() -> None:
    assert threads.parts(10, 1.0) == [(0, 10)]
    found = threads.parts(7, 1e12)
    assert [a for a, _ in found] == [0, *(b for _, b in found[:-1])]
    assert found[-1][1] == 7


@pytest.mark.parametrize("columns", [1, 31, 32, 100, 256, 1024])
def test_padded_rows_hold_whole_panels(columns: int) -> None:
    assert passes.padded(columns) >= columns
    assert passes.padded(columns) % 32 == 0
    assert passes.padded(columns) % 256


def in_a_fresh_process(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment, "PYTHONPATH": str(Path(hfopt.__file__).parent.parent)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


PRODUCT = """
import logging, torch
logging.basicConfig(level=logging.INFO)
from hfopt.recurrences import simple_rnn
from hfopt.recurrences.native import build
from hfopt.recurrences.native.build import library
build.FLAGS = tuple("-O0" if flag == "-O3" else flag for flag in build.FLAGS)  # much sooner compiled
torch.manual_seed(0)
P, W = torch.randn(3, 2, 4, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
simple_rnn(P, W, torch.zeros(4, dtype=torch.float64)).sum().backward()
print("compiled" if library() is not None else "torch", float(W.grad.sum()))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"HFOPT_NATIVE": "0"}, ""),
        ({"CC": "/nowhere/cc"}, "no C compiler found"),
        ({"CC": "false"}, "since the compiled passes failed"),
    ],
    ids=["switched-off", "no-compiler", "broken-compiler"],
)
def test_without_compiled_passes_torch_does_the_work(environment: dict[str, str], said: str, tmp_path: Path) -> None:
    out = in_a_fresh_process(PRODUCT, HFOPT_CACHE=str(tmp_path), **environment)
    assert "torch " in out
    assert said in out


@pytest.mark.slow
@needs_compiler
def test_passes_are_compiled_once_and_found_again(tmp_path: Path) -> None:
    first = in_a_fresh_process(PRODUCT, HFOPT_CACHE=str(tmp_path))
    again = in_a_fresh_process(PRODUCT, HFOPT_CACHE=str(tmp_path))
    assert "compiled hfopt's passes" in first
    assert "compiled hfopt's passes" not in again
    assert len(list(tmp_path.glob("*.so"))) == 1
    plain = in_a_fresh_process(PRODUCT, HFOPT_NATIVE="0")
    values = [float(out.split()[-1]) for out in (again, plain)]
    assert values[0] == pytest.approx(values[1], rel=1e-12)


@pytest.mark.slow
@needs_compiler
def test_code_is_not_loaded_from_where_others_can_write(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    out = in_a_fresh_process(PRODUCT, HFOPT_CACHE=str(tmp_path))
    assert "torch " in out
    assert "can be written by others" in out
    assert not list(tmp_path.glob("*.so"))
