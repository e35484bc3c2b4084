"""A browser without a window, and runs for it to show."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import hfopt
from hfopt.damping import LevenbergMarquardt
from hfopt.linalg.cg import CG
from hfopt.optimizer import HessianFree
from tests.hfopt.tiny import OPTIMIZERS, experiment


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two runs with hidden states and spectra, by different optimizers."""
    folder = tmp_path_factory.mktemp("runs")
    cg = CG(max_iterations=12, tolerance=5e-4, decay=0.95)
    OPTIMIZERS["hf"] = lambda parameters: HessianFree(parameters, damping=LevenbergMarquardt(), cg=cg)
    for name in ("hf", "adam"):
        record = [hfopt.HiddenStates(every=2, sequences=3), hfopt.Spectrum(every=2)]
        experiment(folder / name, optimizer=name, max_steps=8, record=record).optimize()
    return {name: folder / name for name in ("hf", "adam")}


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium of the system, driven by playwright."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        # Without its sandbox, which does not work for root or in containers; it opens these pages alone.
        opened = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()
