"""Loading: the same bits, the checkpoint asked for, and refusals that say what differs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hfopt
from hfopt.experiment.driver import HF
from hfopt.experiment.identity import describe, describe_optimizer, differences
from hfopt.experiment.roles import Growth
from hfopt.experiment.store.format import RunError
from hfopt.experiment.store.reader import read_run
from hfopt.preconditioners import KFAC
from tests.hfopt.tiny import OPTIMIZERS, Running, Sums, bits, experiment


def rows(path: Path) -> dict[str, bytes]:
    """The columns of a run without those of time, as bytes that can be compared."""
    steps = read_run(path).steps
    names = [name for name in steps.dtype.names or () if "seconds" not in name and name != "finished"]
    return {name: steps[name].tobytes() for name in names}


WAYS: dict[str, dict[str, Any]] = {
    "all": {},
    "stochastic": {"batches_per_step": 1, "test_freq": 3},
    "growing": {"batches_per_step": Growth(1, 3, 8)},
    "averaging": {"average": 0.8},
}


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [  # each optimizer and each way once among the quick tests
        pytest.param(optimizer, WAYS[way], id=f"{way}-{optimizer}", marks=[] if i == j else pytest.mark.slow)
        for i, way in enumerate(WAYS)
        for j, optimizer in enumerate(OPTIMIZERS)
    ],
)
def test_resuming_gives_the_same_bits(tmp_path: Path, optimizer: str, options: dict[str, Any]) -> None:
    whole = experiment(tmp_path / "whole", optimizer=optimizer, save_freq=3, **options)
    assert whole.optimize() == "max_steps"
    # The same in three parts: within one process, in a new one, and from a checkpoint before the last.
    parts = experiment(tmp_path / "parts", optimizer=optimizer, save_freq=3, **options)
    parts.optimize(4)
    parts.optimize(7)
    parts = experiment(tmp_path / "parts", optimizer=optimizer, save_freq=3, **options)
    torch.rand(17)  # the generators' states come from the run
    parts.load()
    assert parts.step == 7
    parts.optimize(10)
    parts = experiment(tmp_path / "parts", optimizer=optimizer, save_freq=3, **options)
    parts.load(7)
    parts.optimize()
    assert bits(parts) == bits(whole)
    for one, other in zip(parts.tested.parameters(), whole.tested.parameters(), strict=True):
        assert torch.equal(one, other)
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    assert [c.step for c in read_run(tmp_path / "parts").checkpoints][-2:] == [9, 12]


def test_named_checkpoints(tmp_path: Path) -> None:
    hf = experiment(tmp_path / "run", save_freq=2, keep_checkpoints=1)
    hf.save("start")
    start = bits(hf)
    hf.optimize()
    end = bits(hf)
    hf.load("start")
    assert hf.step == 0
    assert bits(hf) == start != end
    hf.load(12)
    assert bits(hf) == end
    hf.load("best")
    run = read_run(tmp_path / "run")
    saved = {c.step for c in run.checkpoints}
    best = min(row["error_rate"] for row in run.steps if row["step"] in saved)
    assert run.steps["error_rate"][hf.step] == best
    with pytest.raises(KeyError, match="no checkpoint 3"):
        hf.load(3)


def changed_parameters(path: Path) -> HF:
    return experiment(path, hidden=6)


def changed_problem(path: Path) -> HF:
    return experiment(path, T=4)


def changed_optimizer(path: Path) -> HF:
    return experiment(path, optimizer="rmsprop")


def changed_seed(path: Path) -> HF:
    return experiment(path, seed=1)


def changed_batches(path: Path) -> HF:
    return experiment(path, gradient_batches=[0, 1])


def changed_rate(path: Path) -> HF:
    hf = experiment(path)
    return HF(path, hf.model, hf.problem, optimizer=torch.optim.Adam(hf.model.parameters(), lr=0.02), seed=0)


def changed_dropout(path: Path) -> HF:
    return HF(path, Running(dropout=0.3), Sums(), optimizer=OPTIMIZERS["adam"], seed=0)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (changed_parameters, r"readout\.weight was 'float32 \(2, 5\)' and is 'float32 \(2, 6\)'"),
        (changed_problem, r"problem\.T was 3 and is 4"),
        (changed_optimizer, r"optimizer\.class was 'Adam' and is 'RMSprop'"),
        (changed_seed, r"seed was 0 and is 1"),
        (changed_batches, r"batches\.gradient was \[0, 1, 2\] and is \[0, 1\]"),
        (changed_rate, r"optimizer\.groups\[0\]\.lr was 0\.01 and is 0\.02"),
        (changed_dropout, r"drop\.p was 0\.2 and is 0\.3"),
    ],
)
def test_loading_refuses_what_does_not_continue(tmp_path: Path, change: Callable[[Path], HF], sentence: str) -> None:
    experiment(tmp_path / "run").optimize()
    hf = change(tmp_path / "run")
    before = bits(hf)
    with pytest.raises(RunError, match=sentence) as error:
        hf.load()
    assert "read_run(path).parameters()" in str(error.value)
    assert bits(hf) == before


def test_settings_that_may_change(tmp_path: Path) -> None:
    experiment(tmp_path / "run").optimize()
    hf = experiment(tmp_path / "run", threshold=0.2, save_freq=1, keep_checkpoints=7, test_freq=2, max_steps=14)
    hf.load()
    hf.optimize()
    assert hf.step == 14


def test_loading_without_a_run(tmp_path: Path) -> None:
    hf = experiment(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="there is no run at"):
        hf.load()
    assert not (tmp_path / "run").exists()


def test_a_run_that_went_on_elsewhere(tmp_path: Path) -> None:
    one, two = experiment(tmp_path / "run"), experiment(tmp_path / "run")
    one.optimize(3)
    two.load()
    two.optimize(6)
    with pytest.raises(RunError, match="gone on elsewhere"):
        one.optimize()
    one.load()
    assert one.step == 6


def test_arguments_of_a_preconditioner_are_compared() -> None:
    """Objects that can be called are no functions: they have settings, and state that is none."""
    found = [describe(KFAC(average=share)) for share in (0.5, 0.9)]
    assert differences(*found) == ["average was 0.5 and is 0.9"]
    assert found[0]["class"] == "KFAC"
    assert "runs" not in found[0]
    assert [describe(f) for f in (len, KFAC, functools.partial(len))] == ["len", "KFAC", "partial"]


def test_the_state_of_an_optimizer_is_no_setting() -> None:
    """What its constructor takes is compared, not what it notes down while it runs."""
    model = Running()
    optimizer = hfopt.HessianFree(model.parameters(), structural=0.1)
    before = describe_optimizer(optimizer)
    optimizer.noted = {3, 1}  # type: ignore[attr-defined]
    assert describe_optimizer(optimizer) == before
    assert before["cg"]["class"] == "CG"
    assert describe({"b", "a"}) == describe(frozenset("ab")) == ["a", "b"]
    other = describe_optimizer(hfopt.HessianFree(model.parameters(), structural=0.2))
    assert len(differences(before, other)) == 1
