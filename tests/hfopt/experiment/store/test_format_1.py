"""Runs of format 1, written by an earlier version and killed in the middle, are read, drawn, and go on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch

import hfopt
from hfopt.cli import main
from hfopt.experiment.driver import HF
from hfopt.experiment.metrics import Metric
from hfopt.experiment.store.format import RunError
from hfopt.experiment.store.reader import read_run
from hfopt.experiment.visualize import plot_runs
from models import RNN
from pathological import addition

KEPT = Path(__file__).parent / "format_1"


def run(folder: Path, kind: str, **options: Any) -> HF:
    """The experiment that wrote the kept runs."""
    torch.manual_seed(0)
    problem = addition(10, batch_size=20, train_batches=2, test_batches=1, seed=3)
    net = RNN(problem.V, 4, problem.O).sparse_init(3, connections=3)

    def hessian_free(parameters: Any) -> Any:
        # Defaults that have changed since change the numbers, and are given as they were.
        search = hfopt.LineSearch(c=0.01)
        return hfopt.HessianFree(parameters, structural=0.1, cg=hfopt.CG(max_iterations=8), line_search=search)

    make = torch.optim.Adam if kind == "adam" else hessian_free
    options = {"threshold": 0.0, "max_steps": 6, "save_freq": 2, "seed": 3, "quiet": True, **options}
    return HF(folder, net, problem, optimizer=make, **options)


@pytest.fixture(params=["adam", "hf"])
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str, dict[str, list[float]]]:
    """A copy of a run that was killed in its fourth step, and the numbers of the same run that was not."""
    shutil.copytree(KEPT / request.param, tmp_path / "run")
    return tmp_path / "run", request.param, json.loads((KEPT / f"{request.param}.json").read_text())


def test_it_is_read_and_drawn(kept: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder, kind, whole = kept
    found = read_run(folder)
    assert (found.version, found.seed, found.configuration["settings"]) == (1, 3, {"note": "of format 1"})
    assert [c.step for c in found.checkpoints] == [0, 2]
    for name, values in whole.items():  # the last row is in the journal alone
        assert found.steps[name].tolist() == values[:3]
    assert found.metrics[0].counted
    assert found.parameters(0).keys() == run(folder, kind).model.state_dict().keys()
    mpl.use("agg")
    assert len(plot_runs([found]).axes) == (4 if kind == "adam" else 10)
    assert main(["show", str(folder)]) == 0
    assert "killed" in capsys.readouterr().out


def test_it_goes_on_in_format_2(kept: Any) -> None:
    folder, kind, whole = kept
    hf = run(folder, kind)
    hf.load()
    assert hf.step == 2
    hf.optimize()
    found = read_run(folder)
    assert (found.version, found.outcome) == (2, "max_steps")
    assert [c.step for c in found.checkpoints] == [2, 4, 6]
    assert found.steps["step"].tolist() == list(range(7))
    assert found.steps["train_loss"][:2].tolist() == whole["train_loss"][:2]
    # Later versions may take other steps: Adam's are the same but for rounding.
    assert np.isfinite(found.steps["train_loss"]).all()
    if kind == "adam":
        assert found.steps["train_loss"].tolist() == pytest.approx(whole["train_loss"], rel=1e-4)
    assert torch.equal(
        found.checkpoint(2)["generators"]["torch"], read_run(KEPT / kind).checkpoint(2)["generators"]["torch"]
    )
    assert not (folder / "journal-2.jsonl").exists()


def test_what_has_been_added_since_is_not_compared(kept: Any) -> None:
    folder, kind, _ = kept

    def distance(outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        return (batch.select(outputs) - batch.select(batch.targets)).abs().squeeze(1)

    hf = run(folder, kind, metrics=[Metric("distance", distance)])
    hf.model.added_option = 3  # type: ignore[assignment]
    type(hf.model).extra_repr, before = (lambda self: "2, 4, 1, nonlinearity='tanh', added_option=3"), RNN.extra_repr
    try:
        again = run(folder, kind, metrics=[Metric("distance", distance)])
        again.optimizer.added = "an option"  # type: ignore[attr-defined]
        again.load()
        again.optimize(3)
    finally:
        RNN.extra_repr = before  # type: ignore[method-assign]
    found = read_run(folder)
    assert np.isfinite(found.steps["distance"]).tolist() == [False, False, True, True]
    assert [m.name for m in found.metrics] == ["error rate", "distance"]


def test_what_differs_is_still_refused(kept: Any) -> None:
    folder, kind, _ = kept
    hf = run(folder, kind, seed=4)
    with pytest.raises(RunError, match="seed was 3 and is 4"):
        hf.load()
    other = RNN(2, 4, 1, nonlinearity="relu").sparse_init(3, connections=3)
    with pytest.raises(RunError, match="nonlinearity was \"'tanh'\" and is \"'relu'\""):
        HF(folder, other, hf.problem, optimizer=type(hf.optimizer), seed=3).load()


def test_a_kill_during_the_change_of_format_loses_nothing(kept: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, kind, whole = kept
    hf = run(folder, kind)
    hf.load()

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hfopt.experiment.store.writer.write_run", killed)
    with pytest.raises(KeyboardInterrupt):
        hf.optimize()
    monkeypatch.undo()
    assert read_run(folder).steps["train_loss"].tolist() == whole["train_loss"][:3]
    hf = run(folder, kind)
    hf.load()
    hf.optimize()
    assert [c.step for c in read_run(folder).checkpoints] == [2, 4, 6]
