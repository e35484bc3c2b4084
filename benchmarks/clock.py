"""Interleaved timing: every round runs each task once, and ratios are taken within rounds."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

Times = dict[str, list[float]]


@dataclass(frozen=True)
class Quartiles:
    """Median and quartiles of a sample."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quartiles:
        low, median, high = np.percentile(np.asarray(values), [25, 50, 75])
        return cls(float(low), float(median), float(high))


def ratios(times: Sequence[float], unit: Sequence[float]) -> Quartiles:
    """Quartiles of time / unit, round by round."""
    return Quartiles.of([t / u for t, u in zip(times, unit, strict=True)])


def seconds(task: Callable[[], object], device: torch.device) -> float:
    """Wall-clock time of one run, until the device has finished."""
    synchronize(device)
    start = time.perf_counter()
    task()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    tasks: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, *, budget: float = float("inf")
) -> Times:
    """Times of each task, one per round, after a round of warm-up that is not counted.

    The order is another one in every round, so that no task always follows the same other. Garbage is collected
    between rounds and not within. After `budget` seconds no round is begun, but three are always done.
    """
    names = list(tasks)
    times: Times = {name: [] for name in names}
    order = random.Random(0)
    enabled = gc.isenabled()
    gc.disable()
    gc.collect()
    gc.freeze()  # what there is before stays: looking through it again and again takes longer than a small case
    try:
        end = float("inf")
        for i in range(-1, rounds):
            if i >= 3 and time.perf_counter() > end:
                break
            gc.collect()
            for name in order.sample(names, len(names)):
                elapsed = seconds(tasks[name], device)
                if i >= 0:
                    times[name].append(elapsed)
            if i < 0:
                end = time.perf_counter() + budget
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()
    return times
