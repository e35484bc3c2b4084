"""docs/own_experiment.md: the experiment that it builds succeeds, and resumes bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hfopt
from tests.docs.test_examples import PAGES

PAGE = "docs/own_experiment.md"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The names that the page defines, and the folder in which it ran."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        folder = tmp_path_factory.mktemp("page")
        monkeypatch.chdir(folder)
        names: dict[str, Any] = {"__name__": "own_experiment"}
        for block in PAGES[PAGE]:
            exec(compile("\n" * block.line + block.code, PAGE, "exec"), names)
        return {**names, "folder": folder}


def test_the_experiment_succeeds(page: Any) -> None:
    assert page["outcome"] == "success"
    errors = page["run"].steps["error_rate"]
    assert errors[-1] < 0.04 < errors[4] < errors[0]
    # The page says that the first call stops after four steps.
    assert len(page["run"].steps) > 5


def test_the_loss_is_that_of_its_formula(page: Any) -> None:
    outputs, targets = torch.linspace(-3, 3, 7, dtype=torch.float64), torch.zeros(7, dtype=torch.float64)
    expected = np.log(np.cosh(outputs.numpy())).mean()
    assert page["log_cosh"](outputs, targets).item() == pytest.approx(expected, rel=1e-14)
    assert torch.isfinite(page["log_cosh"](1e4 * outputs, targets))


def test_the_saved_run_is_restored(page: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(page["folder"])
    saved = page["run"].parameters("last")
    assert all(torch.equal(saved[name], value) for name, value in page["again"].model.state_dict().items())


def test_a_resumed_run_continues_bit_for_bit(page: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A run interrupted at step 3 and loaded into new objects ends as one that was not interrupted."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    first = page["experiment"]()
    first.quiet = True
    first.optimize(max_steps=3)
    resumed = page["experiment"]()
    resumed.quiet = True
    resumed.load()
    resumed.optimize()
    ended = hfopt.read_run(tmp_path / "runs" / "logs" / "wave")
    for column in ("train_loss", "test_loss", "error_rate", "damping"):
        np.testing.assert_array_equal(ended.steps[column], page["run"].steps[column])


def test_batches_depend_on_seed_index_and_forgetting_alone(page: Any) -> None:
    one, other = page["Wave"](seed=3), page["Wave"](seed=3)
    assert torch.equal(one(1).targets, other(1).targets)
    assert not torch.equal(one(0).inputs, one(1).inputs)
    before, test = one(0), one(-1)
    one.forget()
    assert not torch.equal(before.inputs, one(0).inputs)
    assert torch.equal(test.inputs, one(-1).inputs)
