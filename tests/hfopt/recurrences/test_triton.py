"""What all Triton kernels share: their forms, precision, and who is served."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import hfopt.recurrences.triton as package
from hfopt.recurrences.cells import lstm
from hfopt.recurrences.generated import generated

pytest.importorskip("triton")
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


def test_precision_is_a_setting() -> None:
    assert package.precision() == "ieee"
    like = torch.empty(1, device=DEVICE)
    try:
        assert package.precision("tf32x3") == package.precision() == "tf32x3"
        assert tiles.plan(like, 1000, 100, 1).precision == "tf32x3"
        assert tiles.plan(like.double(), 1000, 100, 1).precision == "ieee"
    finally:
        package.precision("ieee")
    assert tiles.plan(like, 1000, 100, 1).precision == "ieee"
    with pytest.raises(ValueError, match=r"mode is 'exact'.*'ieee', 'tf32x3', 'tf32'"):
        package.precision("exact")


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
        assert package.cell(generated(lstm).name) is None
    finally:
        package.installed.cache_clear()


@pytest.mark.slow
def test_triton_is_not_imported_with_the_package() -> None:
    program = "import sys, hfopt.recurrences.triton as t; assert 'triton' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
