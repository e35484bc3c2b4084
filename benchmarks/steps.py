"""What a whole step costs beyond its gradients, products and evaluations."""

from __future__ import annotations

import copy
import gc
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.case import Case
from benchmarks.clock import Quartiles, seconds
from benchmarks.methods import closure
from hfopt import CG, GaussNewton, HessianFree

# Steps before the measured one: the first calibrates lambda, and from the second on CG starts warm.
BEFORE = 3
# Products are timed this many at a time, as conjugate gradients run them.
RUN = 5


@dataclass(frozen=True)
class Row:
    """One case: the counts of the step's parts, the medians of their times, and the ratio of the whole to the sum."""

    case: str
    step_ms: float
    gradients: int
    products: int
    evaluations: int
    gradient_ms: float
    product_ms: float
    evaluation_ms: float
    ratio: Quartiles
    linearisation: str


def measure(case: Case, rounds: int, budget: float = float("inf"), iterations: int = 50) -> Row:
    """The fourth step on a fixed batch, taken again in every round from the same parameters and state.

    The parts are timed right after each step, on the same closure and at the same parameters; the ratio is taken within
    the round. CG makes `iterations` iterations at most and its rules may stop it earlier.
    After `budget` seconds no round is begun, but three are always done.
    """
    model = case.ours.model if case.ours else case.plain
    device = case.inputs.device
    step = closure(model, case)
    optimizer = HessianFree(model.parameters(), cg=CG(max_iterations=iterations), preconditioner=None)
    ratios: list[float] = []
    times: dict[str, list[float]] = {"step": [], "gradient": [], "product": [], "evaluation": []}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(BEFORE):
            optimizer.step(step)
        weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
        end = time.perf_counter() + budget
        for i in range(-1, rounds):
            if i >= 3 and time.perf_counter() > end:
                break
            gc.collect()
            model.load_state_dict(weights)
            optimizer.load_state_dict(copy.deepcopy(state))
            whole = seconds(lambda: optimizer.step(step), device)
            stats = optimizer.stats[-1]
            model.load_state_dict(weights)
            parts = _parts(model, case, step)
            if i < 0:
                continue
            times["step"].append(whole)
            for name, value in parts.items():
                times[name].append(value)
            total = stats.gradients * parts["gradient"] + stats.products * parts["product"]
            ratios.append(whole / (total + stats.evaluations * parts["evaluation"]))
    ms = {name: 1e3 * Quartiles.of(values).median for name, values in times.items()}
    return Row(
        case.name,
        ms["step"],
        stats.gradients,
        stats.products,
        stats.evaluations,
        ms["gradient"],
        ms["product"],
        ms["evaluation"],
        Quartiles.of(ratios),
        stats.linearisation,
    )


def _parts(model: torch.nn.Module, case: Case, step: Callable[[], object]) -> dict[str, float]:
    """Seconds of one gradient, one product and one evaluation: each the median of :data:`RUN` after a first one."""
    device = case.inputs.device
    op = GaussNewton(step, model.parameters())
    v, out = op.gradient.clone(), torch.empty_like(op.gradient)

    def evaluate() -> None:
        with torch.no_grad():
            step()

    def product() -> object:
        return op.multiply(v, out)

    tasks: dict[str, Callable[[], object]] = {"gradient": step, "product": product, "evaluation": evaluate}
    return {
        name: Quartiles.of([seconds(task, device) for _ in range(1 + RUN)][1:]).median for name, task in tasks.items()
    }
