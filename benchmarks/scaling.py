"""How the time and memory of a product of the tanh recurrence grow with T, B and h.

Between products, the cached double backward keeps of one batch, in numbers of four bytes,

    T B (h + V + 1 + 3 O) + 3 P:

the hidden states; the inputs with their column of ones; the outputs, their copy that the loss is taken of, and the
loss's cotangents; the gradient, and the parameters as the operator has them (the weights in one matrix, twice).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.clock import Quartiles, interleaved
from benchmarks.memory import allocated
from benchmarks.methods import closure
from benchmarks.recurrent import rnn_case
from hfopt import GaussNewton

# Each list spans a factor of eight (h: beyond, since T B h^2 is the claim); the other two sizes stay at the middle.
SIZES = {"T": (100, 200, 400, 800), "B": (250, 500, 1000, 2000), "h": (32, 64, 100, 128, 256)}
TOY = {"T": (2, 4), "B": (2, 4), "h": (3, 5)}
INPUTS, OUTPUTS = 2, 1
MIDDLE = {"T": 200, "B": 500, "h": 100}
TOY_MIDDLE = {"T": 3, "B": 3, "h": 4}


@dataclass(frozen=True)
class Row:
    """One size: a product's time, by T B h^2 as well, that relative to the list's median; the bytes that are kept
    between products, as measured and by the formula; and those that a product needs at most.
    """

    along: str
    T: int
    B: int
    h: int
    ms: Quartiles
    ps_per_tbh2: float
    relative: float
    kept: int
    formula: int
    peak: int


def measure(along: str, rounds: int, budget: float, device: torch.device, toy: bool = False) -> list[Row]:
    """Products of `hfopt.GaussNewton` along one size, all interleaved; relative times are medians within rounds."""
    lists, middle = (TOY, TOY_MIDDLE) if toy else (SIZES, MIDDLE)
    tasks: dict[str, Callable[[], object]] = {}
    memory: dict[int, tuple[int, int]] = {}
    for size in lists[along]:
        sizes = {**middle, along: size}
        case = rnn_case(sizes["T"], sizes["B"], sizes["h"], INPUTS, OUTPUTS).to(device)
        assert case.ours is not None
        model = case.ours.model
        build = partial(GaussNewton, closure(model, case), list(model.parameters()), linearisation="double-backward")
        build()
        _, kept = allocated(build, device)
        op = build()
        product = partial(op.multiply, op.gradient.clone(), torch.empty_like(op.gradient))
        product()
        peak, _ = allocated(product, device)
        tasks[str(size)], memory[size] = product, (kept, peak)
    times = interleaved(tasks, rounds, device, budget=budget)
    units = {s: _unit({**middle, along: s}) for s in lists[along]}
    done = len(next(iter(times.values())))
    centre = [Quartiles.of([times[str(s)][i] / units[s] for s in units]).median for i in range(done)]
    rows = []
    for size, unit in units.items():
        sizes, mine = {**middle, along: size}, times[str(size)]
        relative = Quartiles.of([t / unit / c for t, c in zip(mine, centre, strict=True)]).median
        ms = Quartiles.of([1e3 * t for t in mine])
        rows.append(Row(along, **sizes, ms=ms, ps_per_tbh2=1e9 * ms.median / unit, relative=relative,
                        kept=memory[size][0], formula=kept_bytes(**sizes), peak=memory[size][1]))  # fmt: skip
    return rows


def kept_bytes(T: int, B: int, h: int, V: int = INPUTS, O: int = OUTPUTS) -> int:
    """Bytes that the cached double backward keeps between products, in float32."""
    parameters = h + h * h + V * h + h + h * O + O
    return 4 * (T * B * (h + V + 1 + 3 * O) + 3 * parameters)


def _unit(sizes: dict[str, int]) -> float:
    return float(sizes["T"] * sizes["B"] * sizes["h"] ** 2)
