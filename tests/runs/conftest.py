"""Runs, typed in this process, without windows."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib as mpl
import pytest
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parents[2]
Typed = Callable[..., "int | str | None"]


@pytest.fixture(autouse=True)
def no_windows() -> Iterator[None]:
    mpl.use("agg")
    yield
    plt.close("all")


@pytest.fixture
def typed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Typed:
    """`python -m runs.<RUN> ...` in this process, RUN being the test module's: its exit status."""
    name = request.module.RUN

    def run(*arguments: str) -> int | str | None:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        try:
            runpy.run_path(str(ROOT / "runs" / f"{name}.py"), run_name="__main__")
        except SystemExit as end:
            return end.code
        return None

    return run
