"""What a Gauss-Newton product costs, in gradients of the plain model, against the ways of others."""

from __future__ import annotations

import copy
import gc
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import Case, Form, Tensors
from benchmarks.clock import Quartiles, interleaved, ratios
from benchmarks.memory import allocated
from benchmarks.methods import Method, Vector, double_backward, gradient, methods, reason

UNIT = "gradient"
YARDSTICK = "torch.mm"
# A float32 product that is further from the float64 one than this (relative to its largest entry) is wrong.
TOLERANCE = 1e-3
WRONG = "WRONG: the product differs from the one in float64"


@dataclass(frozen=True)
class Row:
    """One method of one case; fields that do not apply are None (see the package's docstring for the columns)."""

    method: str
    ms: float | None = None
    gradients: Quartiles | None = None
    set_up: float | None = None
    gflops: float | None = None
    of_mm: float | None = None
    of_floor: float | None = None
    difference: float | None = None
    peak: int | None = None
    kept: int | None = None
    skipped: str | None = None


@dataclass(frozen=True)
class Prepared:
    method: Method
    run: Callable[[], Tensors]
    difference: float
    peak: int | None
    kept: int | None


def measure(case: Case, rounds: int, budget: float, memory: bool = True) -> list[Row]:
    """Rows of one case: gradients first, then the methods, then the yardstick.

    A method that is not possible, or whose product is :data:`WRONG`, is not timed; its row tells why.
    Without `memory`, bytes are not measured: the profiler takes a third of a second for each.
    """
    device = case.inputs.device
    plain = Form(case.plain)
    draws = torch.Generator().manual_seed(1)
    v = [torch.randn(p.shape, generator=draws).to(device) for p in case.plain.parameters()]
    exact_gradient, exact_product = in_float64(case, v)

    forms = {UNIT: plain, **({f"{UNIT} of hfopt's": case.ours} if case.ours else {})}
    forms |= {f"{UNIT} of {name}": form for name, form in case.others.items()}
    tasks: dict[str, Callable[[], Any]] = {}
    rows: dict[str, Row] = {}
    for name, form in forms.items():
        tasks[name] = gradient(form.model, case)
        difference = largest_difference(form.to_plain(tasks[name]()), exact_gradient)
        peak = allocated(tasks[name], device)[0] if memory else None
        rows[name] = Row(name, difference=difference, peak=peak)
    prepared: dict[str, Prepared] = {}
    for method in methods(case):
        found = _prepare(method, v, exact_product, device if memory else None)
        if isinstance(found, Row):
            rows[method.name] = found
            continue
        prepared[method.name] = found
        tasks[method.name] = found.run
        if method.cached:
            tasks[_set_up(method.name)] = method.prepare
    tasks[YARDSTICK] = _mm(case.mm, device)

    times = interleaved(tasks, rounds, device, budget=budget)
    unit = times[UNIT]
    m, k, n = case.mm
    repeats = _repeats(case.mm)
    mm = [t / repeats for t in times[YARDSTICK]]
    mm_flops = 2.0 * m * k * n
    one = [t / mm_flops for t in mm]
    for name in forms:
        rows[name] = _timed(rows[name], times[name], unit, case.work.gradient, one)
    for name, p in prepared.items():
        set_up = ratios(times[_set_up(name)], unit).median if p.method.cached else 0.0
        row = Row(name, set_up=set_up, difference=p.difference, peak=p.peak, kept=p.kept)
        rows[name] = _timed(row, times[name], unit, case.work.product, one, case.work.floor)
    yardstick = _timed(Row(f"{YARDSTICK} ({m}, {k}) x ({k}, {n})"), mm, unit, mm_flops, one)
    rows[YARDSTICK] = replace(yardstick, gradients=None)
    return list(rows.values())


def _set_up(name: str) -> str:
    return f"set-up: {name}"


def in_float64(case: Case, v: Sequence[Tensor]) -> tuple[Tensors, Tensors]:
    """Gradient and product of the plain model, in float64, by double backward."""

    def double(t: Tensor) -> Tensor:
        return t.double() if t.is_floating_point() else t

    model = copy.deepcopy(case.plain).double()
    exact = Case(
        case.name, case.about, model, double(case.inputs), double(case.targets), case.criterion, case.work, case.mm
    )
    product = double_backward(Form(model), exact)(Vector.of([t.double() for t in v]))
    return gradient(model, exact)(), product


def _prepare(method: Method, v: Tensors, exact: Tensors, device: torch.device | None) -> Prepared | Row:
    """A method ready to be timed, its memory measured on `device` if given, or the row that says why it is skipped."""
    vector = Vector.of(method.form.from_plain(v))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            product = method.prepare()
            result = product(vector)
    except Exception as error:  # whatever a method does not support is an entry in the table
        return Row(method.name, skipped=reason(error))
    difference = largest_difference(method.form.to_plain(result), exact)
    if not difference < TOLERANCE:
        return Row(method.name, difference=difference, skipped=WRONG)
    del product, result
    gc.collect()
    peak = kept = None
    if device is not None:
        _, kept = allocated(method.prepare, device) if method.cached else (0, 0)
    product = method.prepare()
    if device is not None:
        peak, _ = allocated(lambda: product(vector), device)
    return Prepared(method, lambda: product(vector), difference, peak, kept)


def largest_difference(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Largest |found - exact| / largest |exact|, over all parameters together."""
    worst = max(float((a.double() - b).abs().max()) for a, b in zip(found, exact, strict=True))
    largest = max(float(b.abs().max()) for b in exact)
    return worst / largest if largest > 0 else math.inf


def _mm(shape: tuple[int, int, int], device: torch.device) -> Callable[[], object]:
    """Products of that shape, as many as make a time that can be measured."""
    m, k, n = shape
    a, b, out = (torch.randn(*s, device=device) for s in ((m, k), (k, n), (m, n)))
    times = range(_repeats(shape))
    return lambda: [torch.mm(a, b, out=out) for _ in times]


def _repeats(shape: tuple[int, int, int]) -> int:
    m, k, n = shape
    return min(1000, max(1, int(1e9 / (2.0 * m * k * n))))


def _timed(
    row: Row, times: list[float], unit: list[float], flops: float, mm_seconds: list[float], floor: float | None = None
) -> Row:
    """The row with what follows from times, `flops` of work, and the seconds that torch.mm needs for one flop.

    `floor`: all flops of a product, which torch.mm's rate makes the least time that it can take.
    """
    rates = [flops / t for t in times]
    median = Quartiles.of(times).median
    of_mm = Quartiles.of([rate * one for rate, one in zip(rates, mm_seconds, strict=True)]).median
    of_floor = None
    if floor is not None:
        of_floor = ratios(times, [floor * one for one in mm_seconds]).median
    return replace(
        row, ms=1e3 * median, gradients=ratios(times, unit), gflops=flops / median / 1e9, of_mm=of_mm, of_floor=of_floor
    )
