"""Nesterov's momentum on the schedule of 2013, against the two sequences of the paper."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from runs.nesterov import Nesterov


def quadratic() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    return root @ root.T / 5, torch.randn(5, generator=generator, dtype=torch.float64)


def mu(t: int, largest: float) -> float:
    return min(1 - 2 ** (-1 - math.log2(math.floor(t / 250) + 1)), largest)


def test_it_follows_the_two_sequences_of_the_paper() -> None:
    A, b = quadratic()
    theta, v = torch.ones(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    p = torch.nn.Parameter(theta.clone())
    optimizer = Nesterov([p], lr=0.01, momentum=0.9)
    for t in range(1300):
        looked = theta + mu(t, 0.9) * v
        torch.testing.assert_close(p.detach(), looked, rtol=1e-9, atol=1e-12)
        p.grad = A @ p.detach() - b
        optimizer.step()
        v = mu(t, 0.9) * v - 0.01 * (A @ looked - b)
        theta = theta + v


def test_the_schedule() -> None:
    optimizer = Nesterov([torch.nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.99, lower_from=20_000)
    values = [optimizer.mu(t, 0.99) for t in (0, 249, 250, 499, 500, 1000, 19_999, 20_000)]
    assert values == pytest.approx([0.5, 0.5, 0.75, 0.75, 1 - 1 / 6, 0.9, 0.99, 0.9])


def test_it_is_torchs_where_the_momentum_stays() -> None:
    A, b = quadratic()
    own, other = (torch.nn.Parameter(torch.ones(5, dtype=torch.float64)) for _ in range(2))
    optimizers = [Nesterov([own], lr=0.05, momentum=0.5), torch.optim.SGD([other], 0.05, 0.5, nesterov=True)]
    for _ in range(100):
        for p, optimizer in zip((own, other), optimizers, strict=True):

            def closure(p: Tensor = p, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
                optimizer.zero_grad()
                loss = 0.5 * p @ A @ p - b @ p
                loss.backward()
                return loss

            optimizer.step(closure)
        torch.testing.assert_close(own.detach(), other.detach(), rtol=1e-10, atol=1e-12)


def test_its_state_goes_on() -> None:
    A, b = quadratic()
    p = torch.nn.Parameter(torch.ones(5, dtype=torch.float64))
    optimizer = Nesterov([p], lr=0.01)

    def advance(p: Tensor, optimizer: Nesterov, steps: int) -> None:
        for _ in range(steps):
            p.grad = A @ p.detach() - b
            optimizer.step()

    advance(p, optimizer, 300)
    twin = torch.nn.Parameter(p.detach().clone())
    resumed = Nesterov([twin], lr=0.5)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    advance(p, optimizer, 300)
    advance(twin, resumed, 300)
    assert torch.equal(p, twin)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"lr": 0.0}, "lr is 0.0, but must be positive"), ({"lr": 0.1, "momentum": 1.0}, "momentum is 1.0")],
)
def test_refusals(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Nesterov([torch.nn.Parameter(torch.zeros(1))], **options)  # type: ignore[arg-type]
