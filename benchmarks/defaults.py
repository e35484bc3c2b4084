"""HessianFree at its defaults beside Adam, LBFGS and SGD: ``python -m benchmarks.defaults``.

Eight small problems (:mod:`benchmarks.defaults_problems`) are trained on all their data, each optimizer from the same
first parameters for the same time. HessianFree gets the parameters and nothing else. The others get six learning rates
each, LBFGS once without a line search and once with strong Wolfe's; what counts is the best of them. For the first seed
all rates are run, for the others the best one of every rival.

A loss is the least that an optimizer has seen up to a time; the rivals' is noted at every evaluation, those inside of a
line search too. Time is that inside of ``step``, after a run that nobody counts, in which kernels are compiled and
libraries loaded. Results are kept as numbers, one file a problem; the page and the picture are made from them.
"""

from __future__ import annotations

import gc
import math
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor, nn

import hfopt
from benchmarks import defaults_report, machine
from benchmarks.defaults_problems import PROBLEMS, Problem
from benchmarks.defaults_report import OURS, Result, Run
from hfopt.experiment.memory import keep_freed_memory

ROOT = Path(__file__).parent
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "processor": time.process_time}
ADAM = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
LBFGS = (0.03, 0.1, 0.3, 1.0, 1.5, 2.0)
SGD = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
QUICK = 0.05
"""Seconds for a problem where only that everything runs is looked at."""


@dataclass(frozen=True)
class Rival:
    """An optimizer, its learning rates, and how it is made."""

    name: str
    rates: tuple[float, ...]
    make: Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer]


RIVALS = (
    Rival("Adam", ADAM, lambda p, lr: torch.optim.Adam(p, lr=lr, fused=True)),
    Rival("LBFGS", LBFGS, lambda p, lr: torch.optim.LBFGS(p, lr=lr)),
    Rival("LBFGS, Wolfe", LBFGS, lambda p, lr: torch.optim.LBFGS(p, lr=lr, line_search_fn="strong_wolfe")),
    Rival("SGD", SGD, lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9, nesterov=True, fused=True)),
)


@dataclass(frozen=True)
class Options:
    """What to run, and for how long."""

    problems: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """names of problems; default: all"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """of data and first parameters; the first one's runs choose the learning rates"""
    time: float = 1.0
    """multiplies every problem's time"""
    threads: int = 2
    """of torch"""
    clock: Literal["wall", "processor"] = "wall"
    """what is counted; with one thread the processor's time does not depend on what else the machine does"""
    ours: bool = False
    """run HessianFree alone, and keep the rivals' results as they are"""
    quick: bool = False
    """a moment of every problem, to see that everything runs"""
    page_only: bool = False
    """make page and picture from the results as they are"""
    results: Path = ROOT / "results" / "defaults"
    """folder of the numbers"""
    page: Path = ROOT.parent / "docs" / "defaults.md"
    """the page"""
    picture: Path = ROOT.parent / "docs" / "images" / "defaults.png"
    """the picture"""


def train(
    problem: Problem, rival: Rival | None, rate: float, seed: int, budget: float, clock: Callable[[], float]
) -> Run:
    """One run of ``budget`` seconds, or one step if that takes longer; of HessianFree if ``rival`` is None."""
    task = problem.build(seed)
    parameters = list(task.model.parameters())
    optimizer = hfopt.HessianFree(parameters) if rival is None else rival.make(parameters, rate)
    first = float(task.loss().detach())
    seen: list[tuple[float, float]] = []
    gc.collect()
    start = clock()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = task.loss()
        loss.backward()  # type: ignore[no-untyped-call]
        if rival is not None:
            seen.append((clock() - start, float(loss.detach())))
        return loss

    steps = 0
    while not steps or clock() - start < budget:
        optimizer.step(closure)  # type: ignore[arg-type]
        steps += 1
        if isinstance(optimizer, hfopt.HessianFree):
            seen.append((clock() - start, optimizer.stats[-1].new_loss))
        elif not math.isfinite(seen[-1][1]):
            break
    return Run.of(OURS if rival is None else rival.name, rate, seed, steps, first, seen, budget)


def measure(problem: Problem, options: Options, old: Result | None) -> Result:
    """All runs of a problem; those of the rivals are taken from ``old`` if it is given."""
    clock = CLOCKS[options.clock]
    budget = problem.budget * options.time

    def run(rival: Rival | None, rate: float, seed: int) -> Run:
        found = train(problem, rival, rate, seed, budget, clock)
        print(f"  {found}", flush=True)
        return found

    runs = [] if old is None else [r for r in old.runs if r.optimizer != OURS]
    train(problem, None, 1.0, options.seeds[0], 0.0, clock)
    for number, seed in enumerate(options.seeds):
        runs.append(run(None, 1.0, seed))
        for rival in RIVALS if old is None else ():
            if number == 0:
                train(problem, rival, rival.rates[0], seed, 0.0, clock)
                rates = problem.rates.get(rival.name, rival.rates)
            else:
                done = [r for r in runs if r.optimizer == rival.name and r.seed == options.seeds[0]]
                rates = (min(done, key=lambda r: r.loss).rate,)
            runs += [run(rival, rate, seed) for rate in rates]
    count = sum(p.numel() for p in problem.build(options.seeds[0]).model.parameters())
    about = {**machine.describe(torch.device("cpu")), "clock": options.clock}
    return Result(problem.name, problem.about, count, budget, about, runs)


def main(args: list[str] | None = None) -> int:
    """Run what the command line asks for, and write the page."""
    options = tyro.cli(Options, args=args, prog="python -m benchmarks.defaults", description=__doc__)
    names = [p.name for p in PROBLEMS]
    if unknown := set(options.problems).difference(names):
        raise SystemExit(f"there is no problem {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    options.results.mkdir(parents=True, exist_ok=True)
    for problem in () if options.page_only else PROBLEMS:
        if options.problems and problem.name not in options.problems:
            continue
        if options.quick:
            problem = replace(problem, budget=QUICK)
        print(f"{problem.name}: {problem.about}", flush=True)
        path = options.results / f"{problem.name}.json"
        if options.ours and not path.exists():
            raise SystemExit(f"{path} is missing: run {problem.name} without --ours first")
        old = Result.read(path) if options.ours else None
        measure(problem, options, old).write(path)
    found = [Result.read(path) for p in PROBLEMS if (path := options.results / f"{p.name}.json").exists()]
    defaults_report.write(found, options.page, options.picture)
    print(defaults_report.table(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
