"""States carried from window to window: the values of one long sequence, and the same bits after a resume."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import hfopt
from hfopt.experiment.carried import Carried, Carrier
from hfopt.experiment.driver import HF
from hfopt.experiment.roles import closure, evaluate
from hfopt.recurrences import cells
from models import Stack
from tests.hfopt.tiny import bits

STEPS, COLUMNS, WINDOWS = 5, 3, 4


class Window(NamedTuple):
    inputs: Tensor
    targets: Tensor
    states: tuple[Tensor, ...] | None


class Long:
    """Two batches of columns, each a sequence of 20 steps in windows of 5; the test's three windows are another's."""

    error_name = "squared error"

    def __init__(self) -> None:
        self.train_batches, self.test_batches = range(2), range(-1, -4, -1)
        generator = torch.Generator().manual_seed(1)
        self._x = torch.randn(3, STEPS * WINDOWS, COLUMNS, 2, generator=generator, dtype=torch.float64)
        self._y = self._x.cumsum(1)[..., :1].sin()
        self._carrier, self._draws = Carrier(), 0
        self.handed: list[int] = []

    def __call__(self, i: int) -> Window:
        if i == -1:
            self._carrier.forget_tests()
        k = (max(0, self._draws - 1) % WINDOWS) if i >= 0 else -1 - i
        part = slice(STEPS * k, STEPS * (k + 1))
        return Window(self._x[max(i, -1), part], self._y[max(i, -1), part], self._carrier.states(i))

    def size(self, batch: Window) -> int:
        return batch.targets.numel()

    def loss(self, outputs: Tensor, batch: Window) -> Tensor:
        return torch.nn.functional.mse_loss(outputs, batch.targets)

    def errors(self, outputs: Tensor, batch: Window) -> Tensor:
        return (outputs - batch.targets).square().flatten()

    def carry(self, i: int, states: Sequence[Tensor]) -> None:
        assert not any(state.requires_grad for state in states)
        self.handed.append(i)
        self._carrier.carry(i, states)

    def forget(self) -> None:
        self._carrier.forget(everything=self._draws % WINDOWS == 0)
        self._draws += 1

    def state_dict(self) -> dict[str, Any]:
        return {"draws": self._draws, "states": self._carrier.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._draws = state["draws"]
        self._carrier.load_state_dict(state["states"])


def network() -> Stack:
    torch.manual_seed(0)
    return Stack(cells.gru, 2, 2, 4, 1, dtype=torch.float64)


def forward(model: Any, batch: Window) -> Carried:
    return Carried(*model.with_states(batch.inputs, batch.states))


def run(path: Path, optimizer: Any, steps: int = 7, **options: Any) -> HF:
    options = {"threshold": 0, "quiet": True, "forward": forward, "save_freq": 3, **options}
    return HF(path, network(), Long(), optimizer=optimizer, max_steps=steps, seed=0, **options)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def second_order(parameters: Any) -> torch.optim.Optimizer:
    return hfopt.HessianFree(parameters, damping=hfopt.LevenbergMarquardt(initial=1.0), cg=hfopt.CG(max_iterations=5))


def test_windows_together_have_the_values_of_the_long_sequence() -> None:
    model, problem = network(), Long()
    with torch.no_grad():
        whole = [torch.nn.functional.mse_loss(model(x), y) for x, y in zip(problem._x, problem._y, strict=True)]
    parts = []
    for _ in range(WINDOWS + 1):
        problem.forget()
        parts.append(float(closure(model, problem, [0, 1], forward)().detach()))  # type: ignore[arg-type]
    assert sum(parts[:WINDOWS]) / WINDOWS == pytest.approx(float(whole[0] + whole[1]) / 2, rel=1e-12)
    # The next pass begins afresh, not from the states at the end of the last one.
    assert parts[WINDOWS] == parts[0]


def test_a_test_carries_states_from_batch_to_batch_and_begins_afresh() -> None:
    model, problem = network(), Long()
    with torch.no_grad():
        whole = torch.nn.functional.mse_loss(model(problem._x[2])[:15], problem._y[2, :15])
    for _ in range(2):
        found = evaluate(model, problem, problem.test_batches, forward)  # type: ignore[arg-type]
        assert found.loss == pytest.approx(float(whole), rel=1e-12)
        assert found.error == pytest.approx(float(whole), rel=1e-12)


@pytest.mark.parametrize("optimizer", [sgd, second_order])
def test_states_are_handed_on_once_a_step_before_the_update(optimizer: Any, tmp_path: Path) -> None:
    hf = run(tmp_path / "run", optimizer, 1, curvature_batches=[1])
    before = network()
    hf.problem.forget()
    with torch.no_grad():
        _, expected = before.with_states(hf.problem(1).inputs)
    hf.problem.load_state_dict({"draws": 0, "states": {}})
    hf._begin()
    hf._update()
    hf._close()
    assert sorted(hf.problem.handed) == [0, 1]  # type: ignore[union-attr]
    for found, state in zip(hf.problem.state_dict()["states"]["1"], expected, strict=True):
        torch.testing.assert_close(found, state, rtol=0, atol=0)


@pytest.mark.parametrize("optimizer", [sgd, second_order])
def test_a_resumed_run_has_the_same_bits(optimizer: Any, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", optimizer)
    whole.optimize()
    run(tmp_path / "parts", optimizer, 3).optimize()
    again = run(tmp_path / "parts", optimizer)
    again.load()
    assert again.problem.state_dict()["states"]
    again.optimize()
    assert bits(again) == bits(whole)
    losses = [hfopt.read_run(tmp_path / name).steps["train_loss"].tolist() for name in ("whole", "parts")]
    assert losses[0] == losses[1]
    fresh = run(tmp_path / "fresh", optimizer)
    fresh.problem.carry = lambda i, states: None  # type: ignore[union-attr,method-assign]
    fresh.optimize()
    assert bits(fresh) != bits(whole)


def test_a_data_object_that_takes_no_states_is_named(tmp_path: Path) -> None:
    class Short(Long):
        carry = None  # type: ignore[assignment]

    with pytest.raises(TypeError, match=r"a Short, has no carry\(i, states\)"):
        evaluate(network(), Short(), [-1], forward)  # type: ignore[arg-type]
