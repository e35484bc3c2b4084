"""Data objects: what an experiment asks of one, and the bases that have it ready-made."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

import hfopt
from hfopt.experiment.data import Minibatches, Pair, Samples
from hfopt.experiment.driver import HF
from hfopt.experiment.store.format import RunError
from hfopt.experiment.store.reader import read_run


class Spheres:
    """Points (N, D) and the side of a plane on which they lie; nothing is kept, so every use is a draw."""

    train_batches, test_batches = range(3), range(-1, -3, -1)

    def __init__(self) -> None:
        self.epoch = 0
        self.asked: Counter[tuple[int, int]] = Counter()

    def __call__(self, i: int) -> Pair:
        self.asked[self.epoch, i] += 1
        g = torch.Generator().manual_seed(1000 * self.epoch * (i >= 0) + i + 100)
        inputs = torch.randn(20 + 5 * abs(i), 8, generator=g)
        return Pair(inputs, (inputs.sum(1) > 0).long())

    def size(self, batch: Pair) -> int:
        return len(batch.targets)

    def forget(self) -> None:
        self.epoch += 1

    def loss(self, outputs: Tensor, batch: Pair) -> Tensor:
        return F.cross_entropy(outputs, batch.targets)

    def zero_one_loss(self, outputs: Tensor, batch: Pair) -> Tensor:
        return (outputs.argmax(1) != batch.targets).sum()

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch = state["epoch"]


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, hfopt.HessianFree])
def test_cases_are_those_that_the_data_object_counts(tmp_path: Path, optimizer: Any) -> None:
    torch.manual_seed(0)
    model, problem = nn.Linear(8, 2), Spheres()
    wrong = sum(int(problem.zero_one_loss(model(b.inputs), b)) for b in map(problem, problem.test_batches))
    cases = sum(len(problem(i).targets) for i in problem.test_batches)
    hf = HF(tmp_path / "run", model, problem, optimizer=optimizer, max_steps=2, threshold=0.0, quiet=True)
    problem.asked.clear()
    hf.optimize()
    assert read_run(tmp_path / "run").steps["error_rate"][0] == wrong / cases
    # Each training batch is drawn once a step, whatever the roles; the closing loss looks at the next step's.
    assert {key: n for key, n in problem.asked.items() if key[1] >= 0} == {
        (epoch, i): 1 for epoch in (1, 2, 3) for i in range(3)
    }
    assert all(n == 1 for n in problem.asked.values())


def test_which_cases_are_wrong_may_be_told_one_by_one(tmp_path: Path) -> None:
    class Told(Spheres):
        def zero_one_loss(self, outputs: Tensor, batch: Pair) -> Tensor:
            return outputs.argmax(1) != batch.targets

    rates = []
    for name, problem in (("told", Told()), ("counted", Spheres())):
        torch.manual_seed(0)
        HF(tmp_path / name, nn.Linear(8, 2), problem, optimizer=torch.optim.SGD, max_steps=1, quiet=True).optimize()
        rates.append(read_run(tmp_path / name).steps["error_rate"].tolist())
    assert rates[0] == rates[1]


def test_more_wrong_cases_than_there_are_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Few(Spheres):
        def size(self, batch: Pair) -> int:
            return 1

    torch.manual_seed(0)
    HF(tmp_path / "run", nn.Linear(8, 2), Few(), optimizer=torch.optim.SGD, max_steps=2, quiet=True).optimize()
    assert max(read_run(tmp_path / "run").steps["error_rate"]) <= 1
    assert caplog.text.count("cases(batch)") == 1


def test_all_that_is_missing_is_named_at_once(tmp_path: Path) -> None:
    class Little:
        train_batches = test_batches = range(1)

        def __call__(self, i: int) -> Any: ...

        def loss(self, outputs: Tensor, batch: Any) -> Any: ...

    with pytest.raises(TypeError) as error:
        HF(tmp_path / "run", nn.Linear(1, 1), Little())  # type: ignore[arg-type]
    said = str(error.value)
    names = ("size", "forget", "state_dict", "load_state_dict", "zero_one_loss")
    assert all(f"{name} (" in said for name in names)
    assert "Little" in said
    assert "train_batches (" not in said
    with pytest.raises(TypeError, match=r"lacks error_name \(what errors"):
        HF(tmp_path / "run", nn.Linear(1, 1), type("E", (Spheres,), {"errors": None})())
    with pytest.raises(ValueError, match="test_batches of the data object, a NoTest, is empty"):
        HF(tmp_path / "run", nn.Linear(1, 1), type("NoTest", (Spheres,), {"test_batches": range(0)})())
    assert not (tmp_path / "run").exists()


# -- bases ----------------------------------------------------------------------------------------------


class Numbers(Minibatches[Tensor]):
    """Random numbers, and a setting that a later version may have."""

    extra: dict[str, int | float | str] = {}  # noqa: RUF012

    def draw(self, i: int, epoch: int) -> Tensor:
        return torch.rand(4, generator=torch.Generator().manual_seed(100 * epoch + i + 10))

    def identity(self) -> dict[str, int | float | str]:
        return {"four": 4, **self.extra}


def test_minibatches_are_kept_until_they_are_forgotten() -> None:
    problem = Numbers(2, 3)
    first, test = problem(0), problem(-3)
    assert problem(0) is first
    assert (problem.train_batches, problem.test_batches) == (range(2), range(-1, -4, -1))
    problem.forget()
    assert not torch.equal(problem(0), first)
    assert problem(-3) is test
    with pytest.raises(IndexError, match="no minibatch 2: training has 0 to 1, test -1 to -3"):
        problem(2)
    tight = Numbers(2, 1, memory=first.nbytes)
    assert (tight(0) is tight(0), tight(1) is tight(1)) == (True, False)
    assert torch.equal(tight(1), tight(1))
    with pytest.raises(ValueError, match="train_batches is 0"):
        Numbers(0, 1)


def test_a_state_is_loaded_after_a_setting_was_added() -> None:
    problem = Numbers(2, 1)
    problem.forget()
    state, after = problem.state_dict(), problem(1)
    later = Numbers(2, 1)
    later.extra = {"new": 1}
    later.load_state_dict(state)
    assert torch.equal(later(1), after)
    later.extra = {"four": 5}
    with pytest.raises(ValueError, match="four = 4, but Numbers has 5"):
        later.load_state_dict(state)


class Items(Dataset[Any]):
    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, k: int) -> Any:
        return self.x[k], int(self.y[k])


def drawn() -> tuple[Tensor, Tensor]:
    x = torch.randn(33, 3, generator=torch.Generator().manual_seed(0))
    return x, (x.sum(1) > 0).long()


@pytest.mark.parametrize("make", [tuple, lambda pair: TensorDataset(*pair), lambda pair: Items(*pair)])
def test_samples_from_tensors_and_datasets(tmp_path: Path, make: Any) -> None:
    x, y = drawn()
    problem = Samples(make((x[:23], y[:23])), make((x[23:], y[23:])), nn.CrossEntropyLoss(), batch_size=5, seed=3)
    assert [problem.size(problem(i)) for i in problem.train_batches] == [4, 5, 4, 5, 5]
    seen = torch.cat([problem(i).inputs for i in problem.train_batches])
    assert sorted(seen[:, 0].tolist()) == sorted(x[:23, 0].tolist())
    assert torch.equal(torch.cat([problem(i).inputs for i in problem.test_batches]), x[23:])
    assert torch.equal(torch.cat([problem(i).targets for i in problem.test_batches]), y[23:])
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    expected = float((model(x[23:]).argmax(1) != y[23:]).double().mean())
    hf = HF(tmp_path / "run", model, problem, max_steps=4, threshold=0.0, save_freq=2, quiet=True)
    hf.optimize()
    run = read_run(tmp_path / "run")
    assert run.steps["error_rate"][0] == pytest.approx(expected, rel=1e-12)
    assert run.metrics[0].counted
    problem = Samples((x[:23], y[:23]), (x[23:], y[23:]), nn.CrossEntropyLoss(), batch_size=5, seed=3)
    again = HF(tmp_path / "run", nn.Linear(3, 2), problem, max_steps=6, threshold=0.0, quiet=True)
    again.load(2)
    again.optimize(4)
    assert read_run(tmp_path / "run").steps["train_loss"].tobytes() == run.steps["train_loss"].tobytes()


def test_samples_with_numbers_as_targets() -> None:
    x, _ = drawn()
    y = x[:, :2].double()
    problem = Samples((x, y), (x, y), nn.MSELoss())
    outputs = y + torch.tensor([1.0, 2.0])
    batch = problem(-1)
    assert problem.errors(outputs, batch).tolist() == pytest.approx([5.0] * 33, rel=1e-12)
    assert problem.error_name == "squared error"
    assert not hasattr(problem, "zero_one_loss")
    named = Samples((x, y), (x, y), nn.MSELoss(), errors=lambda z, t: (z - t).abs().sum(1), error_name="distance")
    assert named.errors(outputs, batch).tolist() == pytest.approx([3.0] * 33, rel=1e-12)
    for bad in ((x, y[:5]), (x,), 3):
        with pytest.raises(ValueError, match="train"):
            Samples(bad, (x, y), nn.MSELoss())


# -- batches whose loss is not finite ---------------------------------------------------------------------


class Poisoned(Spheres):
    """One batch a step, of which some are NaN."""

    train_batches = range(1)

    def __init__(self, epochs: set[int]) -> None:
        super().__init__()
        self.poisoned = epochs

    def __call__(self, i: int) -> Pair:
        batch = super().__call__(i)
        return Pair(batch.inputs * math.nan, batch.targets) if i >= 0 and self.epoch in self.poisoned else batch


def test_a_skipped_batch_does_not_end_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    problem = Poisoned({2, 4, 5})
    hf = HF(tmp_path / "run", nn.Linear(8, 2), problem, max_steps=7, max_skipped=3, threshold=0.0)
    with pytest.warns(UserWarning, match="skipped"):
        assert hf.optimize() == "max_steps"
    run = read_run(tmp_path / "run")
    assert np.isnan(run.steps["train_loss"]).tolist() == [False, True, False, True, True, False, False, False]
    assert not run.steps["accepted"][[1, 3, 4]].any()
    printed = capsys.readouterr().out
    assert "step 4 was skipped: its training loss is nan" in printed
    assert "given up after 3 such steps in a row (2 so far)" in printed


def test_many_skipped_batches_in_a_row_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    hf = HF(tmp_path / "run", nn.Linear(8, 2), Poisoned(set(range(3, 99))), max_steps=50, max_skipped=4, threshold=0.0)
    with pytest.warns(UserWarning, match="skipped"):
        assert hf.optimize() == "diverged"
    assert len(read_run(tmp_path / "run").steps) == 6
    assert "not finite in 4 steps in a row" in capsys.readouterr().out
    with pytest.raises(RunError, match=r"call load\(\)"):
        hf.optimize()


def test_parameters_that_are_gone_end_it_at_once(tmp_path: Path) -> None:
    hf = HF(tmp_path / "run", nn.Linear(8, 2), Poisoned({2}), optimizer=torch.optim.SGD, threshold=0.0, quiet=True)
    assert hf.optimize() == "diverged"
    assert len(read_run(tmp_path / "run").steps) == 2
