"""The compiled passes against torch's own operators, and what happens where nothing can be compiled."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import hfopt
from hfopt.recurrences import NONLINEARITIES
from hfopt.recurrences.generated import generated
from hfopt.recurrences.native import build, passes, threads
from hfopt.recurrences.native.generated import Compiled
from tests.hfopt.recurrences.registry import arguments, cell, like

needs_compiler = pytest.mark.skipif(build.library() is None, reason="no C compiler here")


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("f", list(NONLINEARITIES))
def test_nonlinearities_are_exact_to_rounding(f: str, dtype: torch.dtype) -> None:
    """Within four units in the last place, where they are small, where they saturate, and beyond all numbers."""
    g = torch.Generator().manual_seed(3)
    spread = 10 ** torch.empty(20_000, dtype=torch.float64).uniform_(-12, 1.9, generator=g)
    special = torch.tensor([0.0, 1e-30, 0.625, 22.0, 87.0, float("inf")], dtype=torch.float64)
    x = torch.cat([spread, -spread, special, -special, torch.tensor([float("nan")])]).to(dtype).view(1, -1, 1)
    nothing = x.new_zeros(1, 1)
    compiled = Compiled(generated(NONLINEARITIES[f]))
    found = compiled.forward([x, nothing[:0], nothing, torch.zeros_like(x[0])])[0].flatten()
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


@needs_compiler
def test_threads_of_openmp_and_of_python_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    given, c = arguments("lstm", 4, 9, units=6), cell("lstm")
    results = c.forward(given)
    d, u = like(given, 1), like(results[:2], 2)
    monkeypatch.setattr("hfopt.recurrences.native.generated.parts", lambda *_: [(0, 4), (4, 9)])
    compiled = Compiled(c)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        team = compiled.tangent(d, given, results) + compiled.adjoint(u, given, results, [True] * len(given))
    finally:
        torch.set_num_threads(before)
    monkeypatch.setattr(threads, "_openmp", lambda: None)
    pool = compiled.tangent(d, given, results) + compiled.adjoint(u, given, results, [True] * len(given))
    assert all(torch.equal(x, y) for x, y in zip(team, pool, strict=True))


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


def value(out: str, by: str) -> float:
    """What `PRODUCT` printed, among what was logged."""
    found = re.search(rf"^{by} (\S+)$", out, re.MULTILINE)
    assert found, out
    return float(found[1])


@pytest.mark.slow
@needs_compiler
def test_passes_are_compiled_once_and_found_again(tmp_path: Path) -> None:
    first = in_a_fresh_process(PRODUCT, HFOPT_CACHE=str(tmp_path))
    again = in_a_fresh_process(PRODUCT, HFOPT_CACHE=str(tmp_path))
    assert "compiled hfopt's passes" in first
    assert "compiled hfopt's passes" not in again
    assert len(list(tmp_path.glob("*.so"))) == 2  # what all cells share, and the cell
    plain = in_a_fresh_process(PRODUCT, HFOPT_NATIVE="0")
    assert value(again, "compiled") == pytest.approx(value(plain, "torch"), rel=1e-12)


@pytest.mark.slow
@needs_compiler
def test_code_is_not_loaded_from_where_others_can_write(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    out = in_a_fresh_process(PRODUCT, HFOPT_CACHE=str(tmp_path))
    assert "torch " in out
    assert "can be written by others" in out
    assert not list(tmp_path.glob("*.so"))
