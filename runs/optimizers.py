"""The optimizers that runs can be compared with, and the pace at which each of them makes sense."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

import hfopt
from hfopt.damping import Damping, LevenbergMarquardt
from runs.muon import MuonWithAdam
from runs.nesterov import Nesterov
from runs.settings import Training

Factory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

# Learning rates for recurrent nets with long lags; every comparison should tune its own.
LEARNING_RATES = {"adam": 1e-3, "rmsprop": 1e-3, "sgd": 1e-2, "nag": 1e-3, "muon": 1e-3, "lbfgs": 1.0}
STOCHASTIC = ("adam", "rmsprop", "sgd", "nag", "muon")


def optimizer(
    settings: Training,
    rates: dict[str, float] | None = None,
    rule: Callable[..., Damping] = LevenbergMarquardt,
    decay: Callable[[int], float] | None = None,
    **hessian_free: Any,
) -> Factory:
    """What makes the optimizer that the settings ask for.

    Args:
        settings: of the run.
        rates: learning rates, by optimizer, that suit the run better than those here.
        rule: what lambda follows, made from ``initial=``. Chosen by the loss of a few batches, lambda would follow
            their noise: by default it follows rho.
        decay: a schedule in place of the settings' factor of the last solution.
        hessian_free: further arguments of `hfopt.HessianFree`.
    """
    name, lr = settings.optimizer, settings.lr
    if lr is None:
        lr = (LEARNING_RATES | (rates or {})).get(name)
    if name == "hf":
        cg = hfopt.CG(
            max_iterations=settings.cg_iterations,
            tolerance=settings.cg_tolerance,
            decay=settings.cg_decay if decay is None else decay,
        )
        return lambda parameters: hfopt.HessianFree(
            parameters,
            lr=1.0 if lr is None else lr,
            damping=0.0 if settings.damping == 0 else rule(initial=settings.damping),
            weight_decay=settings.weight_decay,
            cg=cg,
            **hessian_free,
        )
    assert lr is not None
    if name == "lbfgs":
        return lbfgs(lr, iterations=20)
    if name == "nag":
        last = steps(name, settings.max_steps)
        lower_from = last - settings.final_steps if settings.final_steps else None
        return lambda parameters: Nesterov(parameters, lr, settings.momentum, lower_from)
    if name == "muon":
        return lambda parameters: MuonWithAdam(parameters, lr)
    return first_order(name, lr)


def first_order(name: str, lr: float, weight_decay: float = 0.0) -> Factory:
    """Adam, RMSprop, or SGD with Nesterov momentum 0.9; the penalty c/2 |theta|^2 is added to the loss."""
    if name == "adam":
        return lambda parameters: torch.optim.Adam(parameters, lr=lr, weight_decay=weight_decay)
    if name == "rmsprop":
        return lambda parameters: torch.optim.RMSprop(parameters, lr=lr, weight_decay=weight_decay)
    return lambda parameters: torch.optim.SGD(parameters, lr=lr, momentum=0.9, nesterov=True, weight_decay=weight_decay)


def lbfgs(lr: float, iterations: int) -> Factory:
    """L-BFGS with a strong Wolfe line search, `iterations` of it per step."""
    return lambda parameters: torch.optim.LBFGS(
        parameters, lr=lr, max_iter=iterations, history_size=20, line_search_fn="strong_wolfe"
    )


def steps(name: str, max_steps: int | None) -> int:
    """Steps at most: those given, or 500, or 50,000 for stochastic optimizers."""
    if max_steps is not None:
        return max_steps
    return 50_000 if name in STOCHASTIC else 500


def pace(name: str, max_steps: int | None) -> dict[str, Any]:
    """Settings of the driver: batches a step, and how often to test, to save and to stop.

    Stochastic optimizers take one fresh batch a step and very many steps; the others all batches and few.
    """
    chosen = {"max_steps": steps(name, max_steps)}
    if name in STOCHASTIC:
        return {"batches_per_step": 1, "test_freq": 100, "save_freq": 500, **chosen}
    return {"save_freq": 5, **chosen}
