"""Runs to draw, and no windows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import matplotlib as mpl
import pytest
import torch
from matplotlib import pyplot as plt

import hfopt
import models
import pathological


@pytest.fixture(autouse=True)
def no_windows() -> Iterator[None]:
    mpl.use("agg")
    yield
    plt.close("all")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a recurrent net with everything recorded."""
    folder = tmp_path_factory.mktemp("drawn") / "recorded"
    problem = pathological.multiplication(10, batch_size=40, train_batches=1, test_batches=1, seed=1)
    model = models.RNN(problem.V, 12, problem.O).sparse_init(1)
    optimizer = hfopt.HessianFree(
        model.parameters(), damping=hfopt.LevenbergMarquardt(), cg=hfopt.CG(max_iterations=12)
    )
    record = [
        hfopt.HiddenStates(1, sequences=3),
        hfopt.GradientByLag(1),
        hfopt.Spectrum(2),
        hfopt.CurvatureDensity(2, iterations=8),
    ]
    hfopt.HF(folder, model, problem, optimizer=optimizer, record=record, seed=1, max_steps=5, quiet=True).optimize()
    return folder


@pytest.fixture(scope="session")
def adam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of Adam on the same problem, without recorders."""
    folder = tmp_path_factory.mktemp("drawn") / "adam"
    problem = pathological.multiplication(10, batch_size=40, train_batches=1, test_batches=1, seed=1)
    model = models.RNN(problem.V, 12, problem.O).sparse_init(1)
    hfopt.HF(folder, model, problem, optimizer=torch.optim.Adam, seed=1, max_steps=8, quiet=True).optimize()
    return folder
