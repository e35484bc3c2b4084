"""Learning-rate schedulers, every one that torch has: they change the largest step length from step to step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler as of
from torch.optim.swa_utils import SWALR

import hfopt
from tests.hfopt.tools import mlp, randn, theta

X, Y = randn(20, 3, seed=1), randn(20, 2, seed=2)
SCHEDULERS: dict[str, Any] = {
    "LambdaLR": lambda o: of.LambdaLR(o, lambda step: min(1.0, step / 3)),
    "MultiplicativeLR": lambda o: of.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: of.StepLR(o, step_size=2, gamma=0.5),
    "MultiStepLR": lambda o: of.MultiStepLR(o, [2, 3]),
    "ConstantLR": lambda o: of.ConstantLR(o, factor=0.5, total_iters=2),
    "LinearLR": lambda o: of.LinearLR(o, start_factor=0.2, total_iters=4),
    "ExponentialLR": lambda o: of.ExponentialLR(o, gamma=0.8),
    "PolynomialLR": lambda o: of.PolynomialLR(o, total_iters=8),
    "CosineAnnealingLR": lambda o: of.CosineAnnealingLR(o, T_max=8),
    "CosineAnnealingWarmRestarts": lambda o: of.CosineAnnealingWarmRestarts(o, T_0=3),
    "SequentialLR": lambda o: of.SequentialLR(o, [of.StepLR(o, 1), of.StepLR(o, 2)], milestones=[2]),
    "ChainedScheduler": lambda o: of.ChainedScheduler([of.StepLR(o, 2), of.ExponentialLR(o, 0.9)]),
    "CyclicLR": lambda o: of.CyclicLR(o, base_lr=0.2, max_lr=0.9, step_size_up=2, cycle_momentum=False),
    "OneCycleLR": lambda o: of.OneCycleLR(o, max_lr=0.9, total_steps=8, cycle_momentum=False),
    "SWALR": lambda o: SWALR(o, swa_lr=0.1, anneal_epochs=4),
}
MEASURED = {"ReduceLROnPlateau"}  # by a test of its own


def test_every_scheduler_of_torch_is_here() -> None:
    found = {name for name, c in vars(of).items() if isinstance(c, type) and issubclass(c, of.LRScheduler)}
    assert {name for name in found if not name.startswith("_")} - {"LRScheduler"} <= set(SCHEDULERS) | MEASURED


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_step_is_that_of_the_lr_set_by_hand(name: str) -> None:
    one, two = mlp(3, 4, 2, seed=3), mlp(3, 4, 2, seed=3)
    ours, by_hand = hfopt.HessianFree(one.parameters(), lr=0.8), hfopt.HessianFree(two.parameters(), lr=0.8)
    sgd = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.8)
    ours_schedule, reference = SCHEDULERS[name](ours), SCHEDULERS[name](sgd)
    rates = []
    sgd.step()
    for _ in range(6):
        rates.append(sgd.param_groups[0]["lr"])
        by_hand.param_groups[0]["lr"] = rates[-1]
        ours.step(lambda: F.mse_loss(one(X), Y))
        by_hand.step(lambda: F.mse_loss(two(X), Y))
        assert torch.equal(theta(one), theta(two))
        ours_schedule.step()
        reference.step()
    assert len(set(rates)) > 1


@pytest.mark.parametrize("cyclic", [of.CyclicLR, of.OneCycleLR])
def test_momentum_that_is_not_there_cannot_be_cycled(cyclic: Any) -> None:
    """torch refuses by itself, and names the option that helps."""
    optimizer = hfopt.HessianFree(mlp(3, 2).parameters())
    options = {"base_lr": 0.1} if cyclic is of.CyclicLR else {"total_steps": 5}
    with pytest.raises(ValueError, match=r"momentum.*cycle_momentum"):
        cyclic(optimizer, max_lr=0.9, **options)


def test_a_plateau_is_seen_in_the_returned_loss() -> None:
    model = mlp(3, 4, 2, seed=4)
    optimizer = hfopt.HessianFree(model.parameters())
    scheduler = of.ReduceLROnPlateau(optimizer, patience=1, threshold=0.5)
    for _ in range(12):
        scheduler.step(optimizer.step(lambda: F.mse_loss(model(X), Y)))
    assert optimizer.param_groups[0]["lr"] < 1.0


def test_groups_are_scheduled_each_for_itself() -> None:
    """A factor per group, against the rates set by hand."""
    one, two = mlp(3, 4, 2, seed=5), mlp(3, 4, 2, seed=5)

    def built(model: Any) -> hfopt.HessianFree:
        return hfopt.HessianFree([{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters()}])

    ours, by_hand = built(one), built(two)
    schedule = of.LambdaLR(ours, [lambda step: 0.5**step, lambda step: 1.0 / (1 + step)])
    for step in range(4):
        by_hand.param_groups[0]["lr"], by_hand.param_groups[1]["lr"] = 0.1 * 0.5**step, 1.0 / (1 + step)
        ours.step(lambda: F.mse_loss(one(X), Y))
        by_hand.step(lambda: F.mse_loss(two(X), Y))
        schedule.step()
        assert torch.equal(theta(one), theta(two))


def test_a_rate_that_is_a_tensor() -> None:
    one, two = mlp(3, 4, 2, seed=6), mlp(3, 4, 2, seed=6)
    ours = hfopt.HessianFree(one.parameters(), lr=torch.tensor(0.5, dtype=torch.float64))  # type: ignore[arg-type]
    plain = hfopt.HessianFree(two.parameters(), lr=0.5)
    schedules = of.ExponentialLR(ours, 0.5), of.ExponentialLR(plain, 0.5)
    for _ in range(4):
        ours.step(lambda: F.mse_loss(one(X), Y))
        plain.step(lambda: F.mse_loss(two(X), Y))
        for schedule in schedules:
            schedule.step()
        assert torch.equal(theta(one), theta(two))
        assert math.isfinite(ours.stats[-1].new_loss)


def test_schedulers_go_on_after_a_resumption() -> None:
    """Both states are saved; the steps after it are those of the run that went on."""
    model, other = mlp(3, 4, 2, seed=7), mlp(3, 4, 2, seed=8)
    optimizer = hfopt.HessianFree(model.parameters())
    schedule = of.StepLR(optimizer, 2, gamma=0.3)

    def run(net: Any, o: hfopt.HessianFree, s: Any, steps: int) -> None:
        for _ in range(steps):
            o.step(lambda: F.mse_loss(net(X), Y))
            s.step()

    run(model, optimizer, schedule, 3)
    saved = model.state_dict(), optimizer.state_dict(), schedule.state_dict()
    resumed = hfopt.HessianFree(other.parameters())
    again = of.StepLR(resumed, 2, gamma=0.3)
    for target, state in zip((other, resumed, again), saved, strict=True):
        target.load_state_dict(state)
    run(model, optimizer, schedule, 4)
    run(other, resumed, again, 4)
    assert torch.equal(theta(model), theta(other))
    assert resumed.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] < 0.1


def test_schedulers_and_clipping_do_not_disturb() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(50, 4), torch.randn(50, 2)
    model = nn.Sequential(nn.Linear(4, 10), nn.Tanh(), nn.Linear(10, 2))
    optimizer = hfopt.HessianFree(model.parameters(), lr=1.0)
    scheduler = of.ExponentialLR(optimizer, gamma=0.9)
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append(1))
    for step in range(4):
        optimizer.step(lambda: F.mse_loss(model(x), y))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scheduler.step()
        if optimizer.stats[-1].line_search_tries == 1 and optimizer.stats[-1].accepted:
            assert optimizer.stats[-1].step_length == pytest.approx(0.9**step)
    assert len(seen) == 4
    assert optimizer.stats[-1].new_loss < optimizer.stats[0].loss
