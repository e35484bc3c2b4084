"""Stochastic gradient descent with Nesterov's momentum, on the schedule of 2013."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer


class Nesterov(Optimizer):
    """Nesterov's accelerated gradient with a momentum that grows.

    `v_{t+1} = mu_t v_t - lr grad f(theta_t + mu_t v_t)`, `theta_{t+1} = theta_t + v_{t+1}`, with
    `mu_t = min(1 - 2^(-1 - log2(floor(t/250) + 1)), mu_max)`. The parameters hold `theta_t + mu_t v_t`, the point where
    the gradient is wanted, and `torch.optim.SGD(nesterov=True)` does the same while mu stays as it is.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        momentum: mu_max.
        lower_from: step from which mu is at most 0.9: a lower momentum for the last thousand steps or so lets the fine
            structure of a solution settle; None for never.

    Raises:
        ValueError: a learning rate that is not positive, or a momentum outside 0 to 1.

    Source: Sutskever, Martens, Dahl & Hinton, "On the importance of initialization and momentum in deep learning",
    ICML 2013, equations 3 to 5 and section 3.
    """

    def __init__(self, params: Iterable[Any], lr: float, momentum: float = 0.99, lower_from: int | None = None) -> None:
        if not lr > 0:
            raise ValueError(f"lr is {lr}, but must be positive")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum is {momentum}, but must be at least 0 and below 1")
        # Private, as it is no part of what a run has to have in common with its continuation.
        self._lower_from = lower_from
        super().__init__(params, {"lr": lr, "momentum": momentum, "t": 0})

    def mu(self, t: int, largest: float) -> float:
        """mu_t."""
        if self._lower_from is not None and t >= self._lower_from:
            largest = min(largest, 0.9)
        return min(1 - 2 ** (-1 - math.log2(t // 250 + 1)), largest)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what the closure returned, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            now, after = (self.mu(t, group["momentum"]) for t in (group["t"], group["t"] + 1))
            group["t"] += 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "v" not in state:
                    state["v"] = torch.zeros_like(p)
                v = state["v"].mul_(now).sub_(p.grad, alpha=group["lr"])
                p.sub_(p.grad, alpha=group["lr"]).add_(v, alpha=after)
        return loss
