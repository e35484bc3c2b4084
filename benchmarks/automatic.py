"""What K-FAC does for the loss, and where ``preconditioner="auto"`` takes it: ``python -m benchmarks.automatic``.

The eight problems of :mod:`benchmarks.defaults_problems`, trained by HessianFree with and without K-FAC and otherwise
at its defaults, on one thread for the same processor time. Shown is the least loss after a quarter, half and all of it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import hfopt
from benchmarks import machine
from benchmarks.defaults_problems import PROBLEMS, Problem
from hfopt.preconditioners import Automatic

SHARES = (0.25, 0.5, 1.0)


@dataclass(frozen=True)
class Row:
    """A problem: least losses at the shares of its time, without and with K-FAC, and what is taken by itself."""

    problem: str
    seconds: float
    none: tuple[float, ...]
    kfac: tuple[float, ...]
    taken: str


def losses(problem: Problem, preconditioner: str, seconds: float, seed: int) -> tuple[float, ...]:
    """The least loss up to each share of so many processor seconds; at least one step is made."""
    task = problem.build(seed)
    optimizer = hfopt.HessianFree(task.model.parameters(), preconditioner=preconditioner, solver="cg")
    seen: list[tuple[float, float]] = []
    start = time.process_time()
    while not seen or seen[-1][0] < seconds:
        optimizer.step(task.loss)
        seen.append((time.process_time() - start, optimizer.stats[-1].new_loss))
    return tuple(min((f for t, f in seen if t <= share * seconds), default=seen[0][1]) for share in SHARES)


def taken(problem: Problem, seed: int) -> str:
    """What ``"auto"`` chooses."""
    task = problem.build(seed)
    optimizer = hfopt.HessianFree(task.model.parameters(), preconditioner="auto", solver="cg")
    optimizer.step(task.loss)
    assert isinstance(optimizer.preconditioner, Automatic)
    return "kfac" if optimizer.preconditioner.chosen else "none"


def table(rows: Sequence[Row]) -> str:
    """Markdown, a line a problem."""
    shares = " / ".join(f"{share:g}" for share in SHARES)
    lines = [f"| problem | seconds | none, after {shares} of them | K-FAC | auto takes |", "|---|--:|---|---|---|"]
    for r in rows:
        none, kfac = (" / ".join(f"{f:.3g}" for f in side) for side in (r.none, r.kfac))
        lines.append(f"| {r.problem} | {r.seconds:g} | {none} | {kfac} | {r.taken} |")
    return "\n".join(lines) + "\n"


def main(args: Sequence[str] | None = None) -> None:
    """Measure, print, and write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.automatic", description=__doc__)
    parser.add_argument("--problems", nargs="*", default=[p.name for p in PROBLEMS], help="names; default: all")
    parser.add_argument("--time", type=float, default=1.0, help="multiplies every problem's time")
    parser.add_argument("--seed", type=int, default=0, help="of data and first parameters")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "preconditioners")
    given = parser.parse_args(args)
    torch.set_num_threads(1)
    rows = []
    for problem in PROBLEMS:
        if problem.name not in given.problems:
            continue
        seconds = problem.budget * given.time
        losses(problem, "kfac", 0.0, given.seed)  # kernels are compiled and libraries loaded outside of the clock
        both = [losses(problem, name, seconds, given.seed) for name in ("none", "kfac")]
        rows.append(Row(problem.name, seconds, *both, taken(problem, given.seed)))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    about = machine.describe(torch.device("cpu"))
    text = "\n".join(f"- {key}: {value}" for key, value in about.items()) + f"\n- seed: {given.seed}\n\n" + table(rows)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "automatic.md").write_text(text, "utf-8")


if __name__ == "__main__":
    main()
