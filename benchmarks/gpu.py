"""The tanh recurrence on a CUDA device: a product, conjugate gradients on it, and how long the device waits in them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.claims import Claim
from benchmarks.clock import Quartiles, interleaved
from benchmarks.methods import Vector, closure, general, ours
from benchmarks.products import in_float64, largest_difference
from benchmarks.recurrent import LOOP, rnn_case
from hfopt import CG, GaussNewton
from hfopt.linalg.cuda_graphs import side_stream

SIZES = (200, 1000, 100)  # T, B, h
TOY = (12, 4, 5)
ITERATIONS = 300

NO_DEVICE = "The gpu benchmark needs a CUDA device, and torch sees none here: skipped.\n"

# What of a trace of torch.profiler keeps the device busy.
_WORK = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass(frozen=True)
class Found:
    """Times in milliseconds (the solve: seconds), the product's difference from float64, and the idle share.

    ``idle`` is the part of a solve, from the start of its first kernel to the end of its last, in which no kernel runs
    (None without CUDA).
    """

    T: int
    B: int
    h: int
    product_ms: Quartiles
    loop_ms: Quartiles
    difference: float
    iterations: int
    solve_s: Quartiles
    idle: float | None


def measure(device: torch.device, rounds: int, budget: float, toy: bool = False) -> Found:
    """Products and solves, interleaved; `iterations` of conjugate gradients are done whatever they reach."""
    with side_stream(device):  # as a step does, so that conjugate gradients are recorded into a graph
        return _measure(device, rounds, budget, toy)


def _measure(device: torch.device, rounds: int, budget: float, toy: bool) -> Found:
    T, B, h = TOY if toy else SIZES
    case = rnn_case(T, B, h).to(device)
    assert case.ours is not None
    draws = torch.Generator().manual_seed(1)
    v = [torch.randn(p.shape, generator=draws).to(device) for p in case.plain.parameters()]
    _, exact = in_float64(case, v)
    vector = Vector.of(case.ours.from_plain(v))
    product = ours(case.ours, case, "double-backward")
    difference = largest_difference(case.ours.to_plain(product(vector)), exact)

    loop_form = case.others[LOOP]
    loop_vector = Vector.of(loop_form.from_plain(v))
    loop = general(loop_form, case)

    model = case.ours.model
    op = GaussNewton(closure(model, case), model.parameters(), linearisation="double-backward")
    count = 3 if toy else ITERATIONS
    cg = CG(max_iterations=count, min_iterations=count, tolerance=0.0, residual=0.0)
    system = op.damped(0.1)

    def solve() -> Any:
        return cg.solve(system, -op.gradient)

    tasks = {"product": lambda: product(vector), "loop": lambda: loop(loop_vector), "solve": solve}
    times = interleaved(tasks, rounds, device, budget=budget)
    ms = {name: Quartiles.of([1e3 * t for t in times[name]]) for name in ("product", "loop")}
    idle = idle_share(traced(solve)) if device.type == "cuda" else None
    return Found(T, B, h, ms["product"], ms["loop"], difference, solve().iterations, Quartiles.of(times["solve"]), idle)


def traced(task: Any) -> list[dict[str, Any]]:
    """The events of a run under torch.profiler, in the format of Chrome's traces; the run before it is not recorded."""
    task()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        task()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        record.export_chrome_trace(str(path))
        events: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return events


def idle_share(events: Sequence[dict[str, Any]]) -> float | None:
    """The part of the time from the first piece of work on the device to the last in which there is none; None if none
    was recorded. Pieces that overlap (on several streams) count once.
    """
    spans = sorted((float(e["ts"]), float(e["ts"]) + float(e["dur"])) for e in events if e.get("cat") in _WORK)
    if not spans:
        return None
    busy, (start, until) = 0.0, (spans[0][0], spans[0][0])
    for begin, end in spans:
        busy += max(0.0, end - max(begin, until))
        until = max(until, end)
    return 1.0 - busy / (until - start) if until > start else 0.0


def claims(found: Found) -> list[Claim]:
    """The limits for one H200."""
    size = f"T = {found.T}, B = {found.B}, h = {found.h}"
    made = [
        Claim(f"tanh RNN, {size}: product, ms", found.product_ms.median, 1.5),
        Claim("its difference from float64", found.difference, 1e-5),
        Claim("times faster than the Python loop", found.loop_ms.median / found.product_ms.median, 20.0, at_most=False),
        Claim(f"{found.iterations} iterations of conjugate gradients, s", found.solve_s.median, 0.6),
    ]
    return made if found.idle is None else [*made, Claim("idle share of the device in them, %", 100 * found.idle, 5.0)]
