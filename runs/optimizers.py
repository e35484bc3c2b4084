"""The optimizers that runs can be compared with, and the pace at which each of them makes sense."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

Factory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

# Learning rates for recurrent nets with long lags; every comparison should tune its own.
FIRST_ORDER: dict[str, Callable[[Iterable[nn.Parameter], float | None], torch.optim.Optimizer]] = {
    "adam": lambda parameters, lr: torch.optim.Adam(parameters, lr=lr or 1e-3),
    "rmsprop": lambda parameters, lr: torch.optim.RMSprop(parameters, lr=lr or 1e-3),
    "sgd": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr or 1e-2, momentum=0.9, nesterov=True),
}


def first_order(name: str, lr: float | None) -> Factory:
    """Adam, RMSprop, or SGD with Nesterov momentum."""
    make = FIRST_ORDER[name]
    return lambda parameters: make(parameters, lr)


def lbfgs(lr: float | None, iterations: int) -> Factory:
    """L-BFGS with a strong Wolfe line search, `iterations` of it per step."""
    return lambda parameters: torch.optim.LBFGS(
        parameters, lr=lr or 1.0, max_iter=iterations, history_size=20, line_search_fn="strong_wolfe"
    )


def pace(name: str, max_steps: int | None) -> dict[str, Any]:
    """Settings of the driver: batches a step, and how often to test, to save and to stop.

    Stochastic optimizers take one fresh batch a step and very many steps; the others all batches and few.
    """
    if name in FIRST_ORDER:
        return {
            "batches_per_step": 1,
            "test_freq": 100,
            "save_freq": 500,
            "max_steps": 50_000 if max_steps is None else max_steps,
        }
    return {"save_freq": 5, "max_steps": 500 if max_steps is None else max_steps}
