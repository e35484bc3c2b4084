"""Runs under a root, written by loops of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import hfopt

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a run of a name below the root `tmp_path / "root"`."""

    def written(name: str, steps: int = 2, **settings: object) -> Path:
        folder = tmp_path / "root" / name
        with hfopt.Run(folder, settings) as run:
            for step in range(steps):
                run.log(step, loss=1.0 / (step + 1))
            run.save({})
        return folder

    return written
