"""How errors are called: shares of wrong cases, or errors that a problem measures."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from hfopt.cli import main
from hfopt.experiment.driver import HF
from hfopt.experiment.metrics import ERROR_RATE, Metric
from hfopt.experiment.store.reader import read_run
from hfopt.experiment.visualize import plot_runs
from tests.hfopt.tiny import Batch, Running, Sums, experiment


class Distances(Sums):
    """The same problem, judged by how far the answer's probability is from 1."""

    error_name = "distance"

    def errors(self, outputs: Tensor, batch: Batch) -> Tensor:
        p = outputs[-1].softmax(-1)
        return 1 - p.gather(1, batch.targets[-1].unsqueeze(1)).squeeze(1)


def test_words() -> None:
    share, distance = Metric("error rate", unit="%", column=ERROR_RATE), Metric("distance", column=ERROR_RATE)
    assert (share.title, share.number(0.125), share.quantity(0.125), share.bound(0.01)) == (
        "wrong %",
        "12.50",
        "12.50%",
        "1% wrong",
    )
    assert (distance.title, distance.number(0.125), distance.quantity(0.125), distance.bound(1.4)) == (
        "distance",
        "0.125",
        "0.125",
        "distance 1.4",
    )
    assert share.sentence(0.5) == "50.00% of the test cases are wrong"
    assert distance.sentence(1.4) == "distance 1.4 per test case"
    assert share.number(math.nan) == distance.number(math.nan) == ""
    assert (share.factor, distance.factor) == (100, 1)


def test_measured_errors_are_averaged_over_cases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model, problem = Running(dropout=0.0), Distances()
    with torch.no_grad():
        model.eval()
        each = torch.cat([problem.errors(model(problem(i).inputs), problem(i)) for i in problem.test_batches])
        model.train()
    hf = HF(tmp_path / "run", model, problem, optimizer=torch.optim.Adam(model.parameters()), max_steps=2)
    hf.optimize()
    run = read_run(tmp_path / "run")
    assert run.steps["error_rate"][0] == pytest.approx(float(each.double().mean()), rel=1e-6)
    assert run.configuration["problem"]["error_name"] == "distance"
    printed = capsys.readouterr().out
    assert "success below distance 0.01" in printed
    assert f"distance {run.steps['error_rate'][-1]:.4g} per test case" in printed
    assert main(["show", str(tmp_path / "run")]) == 0
    assert "wrong" not in capsys.readouterr().out


def test_different_errors_are_drawn_apart(tmp_path: Path) -> None:
    experiment(tmp_path / "counted", max_steps=1).optimize()
    model = Running()
    HF(tmp_path / "measured", model, Distances(), optimizer=torch.optim.Adam, max_steps=1, quiet=True).optimize()
    runs = [read_run(tmp_path / name) for name in ("counted", "measured")]
    with pytest.raises(ValueError, match="different errors: distance, wrong %; draw them apart"):
        plot_runs(runs)
    assert np.isfinite(runs[1].steps["error_rate"]).all()
