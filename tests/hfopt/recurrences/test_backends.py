"""Who is asked to carry out the passes, by device and dtype."""

from __future__ import annotations

import logging

import pytest
import torch

from hfopt.recurrences import backends, triton
from hfopt.recurrences.backends import backend
from hfopt.recurrences.cells import gru2014, lstm
from hfopt.recurrences.generated import generated
from hfopt.recurrences.readout import generated_readout


class Somewhere:
    """What the choice reads of a tensor."""

    def __init__(self, kind: str, dtype: torch.dtype) -> None:
        self.device, self.dtype = torch.device(kind), dtype


@pytest.fixture(autouse=True)
def untold() -> None:
    backends._told_of_loops.cache_clear()


@pytest.mark.parametrize(
    ("kind", "dtype", "kernels"),
    [
        ("cuda", torch.float32, True),
        ("cuda", torch.float64, True),
        ("cuda", torch.bfloat16, True),
        ("cuda", torch.float16, False),
        ("cpu", torch.float32, False),
        ("meta", torch.float32, False),
    ],
)
def test_kernels_serve_cuda_devices_in_the_dtypes_they_have(
    kind: str, dtype: torch.dtype, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton, "installed", lambda: True)
    assert backends.kernels_serve(Somewhere(kind, dtype)) is kernels  # type: ignore[arg-type]


def test_a_cuda_device_without_triton_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(triton, "installed", lambda: False)
    like = Somewhere("cuda", torch.float32)
    with caplog.at_level(logging.WARNING, logger="hfopt"):
        assert backend(generated(lstm), like) is generated(lstm)  # type: ignore[arg-type]
        backends.kernels_serve(like)  # type: ignore[arg-type]
    assert [r.message for r in caplog.records if "Triton is not installed" in r.message] == [caplog.records[0].message]


def test_cells_without_kernels_and_other_devices_stay_with_the_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "installed", lambda: True)
    for cell, kind in ((generated(lstm), "meta"), (generated_readout(gru2014), "cuda")):
        assert backend(cell, Somewhere(kind, torch.float32)) is cell  # type: ignore[arg-type]
