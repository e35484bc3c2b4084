"""Learning-rate schedulers change the largest step length from step to step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, ReduceLROnPlateau, SequentialLR, StepLR

import hfopt
from tests.hfopt.tools import mlp, randn, theta

X, Y = randn(20, 3, seed=1), randn(20, 2, seed=2)
SCHEDULERS: dict[str, Any] = {
    "step": lambda o: StepLR(o, step_size=2, gamma=0.5),
    "cosine": lambda o: CosineAnnealingLR(o, T_max=8),
    "warm-up": lambda o: LambdaLR(o, lambda step: min(1.0, step / 3)),
    "sequence": lambda o: SequentialLR(o, [StepLR(o, 1), StepLR(o, 2)], milestones=[2]),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_step_is_that_of_the_lr_set_by_hand(name: str) -> None:
    one, two = mlp(3, 4, 2, seed=3), mlp(3, 4, 2, seed=3)
    ours, by_hand = hfopt.HessianFree(one.parameters(), lr=0.8), hfopt.HessianFree(two.parameters(), lr=0.8)
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.8)
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


def test_a_plateau_is_seen_in_the_returned_loss() -> None:
    model = mlp(3, 4, 2, seed=4)
    optimizer = hfopt.HessianFree(model.parameters())
    scheduler = ReduceLROnPlateau(optimizer, patience=1, threshold=0.5)
    for _ in range(12):
        scheduler.step(optimizer.step(lambda: F.mse_loss(model(X), Y)))
    assert optimizer.param_groups[0]["lr"] < 1.0
