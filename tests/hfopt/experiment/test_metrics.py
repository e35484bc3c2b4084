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


def right(outputs: Tensor, batch: Batch) -> Tensor:
    """Which sequences are answered rightly, (N,)."""
    return (outputs[-1].argmax(-1) == batch.targets[-1]).double()


def nats(outputs: Tensor, batch: Batch) -> tuple[Tensor, int]:
    """The cross-entropy of all answers together, and how many there are."""
    answers = outputs[-1].double()
    return torch.nn.functional.cross_entropy(answers, batch.targets[-1], reduction="sum"), len(answers)


ACCURACY = Metric("accuracy", right, unit="%", better="higher")
PERPLEXITY = Metric("perplexity", nats, finish=math.exp)


class Uneven(Sums):
    """Test batches of 8 and of 2 sequences, with metrics of its own."""

    metrics = (ACCURACY, PERPLEXITY)

    def __call__(self, index: int) -> Batch:
        batch = super().__call__(index)
        return Batch(batch.inputs[:, :2], batch.targets[:, :2], batch.mask[:, :2]) if index == -2 else batch


def test_several_metrics_are_averaged_over_the_cases_of_all_batches(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model, problem = Running(dropout=0.0), Uneven()
    model.eval()
    with torch.no_grad():
        outputs = [model(problem(i).inputs)[-1].double() for i in (-1, -2)]
    targets = [problem(i).targets[-1] for i in (-1, -2)]
    z, y = torch.cat(outputs), torch.cat(targets)
    assert len(y) == 10
    model.train()
    hf = HF(tmp_path / "run", model, problem, optimizer=torch.optim.Adam, max_steps=3, threshold=0.0)
    hf.optimize()
    run = read_run(tmp_path / "run")
    assert [m.name for m in run.metrics] == ["error rate", "accuracy", "perplexity"]
    first = run.steps[0]
    accuracy = float((z.argmax(1) == y).double().mean())
    assert first["accuracy"] == pytest.approx(accuracy, rel=1e-12)
    assert first["error_rate"] == pytest.approx(1 - accuracy, rel=1e-12)
    log_p = z.log_softmax(1).gather(1, y.unsqueeze(1))
    assert first["perplexity"] == pytest.approx(math.exp(-float(log_p.mean())), rel=1e-6)
    assert run.steps.dtype.names[-2:] == ("accuracy", "perplexity")
    text = (tmp_path / "run" / "results").read_text()
    assert f"accuracy             {100 * accuracy:.3f}%" in text
    capsys.readouterr()
    assert main(["show", str(tmp_path / "run")]) == 0
    assert "accuracy %" in capsys.readouterr().out
    assert [axes.get_ylabel() for axes in plot_runs([run]).axes[::2]][:4] == [
        "loss",
        "wrong (%)",
        "accuracy (%)",
        "perplexity",
    ]


class Judged(Uneven):
    """Neither counted nor measured: its first metric judges it, and higher is better."""

    def __getattribute__(self, name: str) -> object:
        if name == "zero_one_loss":
            raise AttributeError(name)
        return super().__getattribute__(name)


def test_a_first_metric_may_be_better_where_it_is_higher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    hf = HF(
        tmp_path / "run",
        Running(dropout=0.0),
        Judged(),
        optimizer=lambda p: torch.optim.Adam(p, lr=0.05),
        threshold=0.75,
        max_steps=200,
        save_freq=1,
        keep_checkpoints=1,
    )
    assert hf.optimize() == "success"
    run = read_run(tmp_path / "run")
    values = run.steps["accuracy"]
    assert (values[:-1] <= 0.75).all()
    assert values[-1] > 0.75
    assert np.isnan(run.steps["error_rate"]).all()
    assert run.find("best").step == hf.step
    printed = capsys.readouterr().out
    assert "success above accuracy 75%" in printed
    assert f"accuracy {100 * values[-1]:.2f}%" in printed
    hf = HF(tmp_path / "best", Running(), Judged(), optimizer=torch.optim.Adam, threshold=0, max_steps=9, quiet=True)
    hf.keep_checkpoints, hf.save_freq = 1, 1
    hf.optimize()
    run = read_run(tmp_path / "best")
    kept = {c.step for c in run.checkpoints}
    assert max(run.steps["accuracy"]) in run.steps["accuracy"][sorted(kept)]


def test_a_metric_that_is_added_later_has_a_column_from_then_on(tmp_path: Path) -> None:
    experiment(tmp_path / "run", save_freq=2).optimize(4)
    hf = experiment(tmp_path / "run", save_freq=2, metrics=[ACCURACY])
    hf.load()
    hf.optimize(6)
    run = read_run(tmp_path / "run")
    assert np.isfinite(run.steps["accuracy"]).tolist() == [False] * 4 + [True] * 3
    assert np.isfinite(run.steps["error_rate"]).all()
    hf = experiment(tmp_path / "run", save_freq=2)  # and it may be left out again
    hf.load()
    hf.optimize(8)
    run = read_run(tmp_path / "run")
    assert np.isfinite(run.steps["accuracy"]).tolist() == [False] * 4 + [True] * 2 + [False] * 3


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ([Metric("seconds", right)], "'seconds', as a column of every run is"),
        ([ACCURACY, ACCURACY], "two metrics are called 'accuracy'"),
        ([Metric("error_rate", right)], "two metrics are called 'error_rate'"),
    ],
)
def test_names_that_are_taken(tmp_path: Path, metrics: list[Metric], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        experiment(tmp_path / "run", metrics=metrics)


def test_metrics_that_are_none(tmp_path: Path) -> None:
    for name in ("", "1st", "a\nb", "x" * 41, "λ"):
        with pytest.raises(ValueError, match="a metric is called"):
            Metric(name)
    with pytest.raises(ValueError, match="better='up'"):
        Metric("x", better="up")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="the metric 'odd' measured float; return the values of the cases"):
        experiment(tmp_path / "run", metrics=[Metric("odd", lambda z, b: 1.0)]).optimize(1)
