"""What exact squares of single cases' gradients cost beside their estimate: ``python -m benchmarks.squares``.

The empirical-Fisher preconditioner's diagonal is refreshed both ways about one point of a recurrent network,
interleaved with the gradient of the same loss, which is the unit. Exact squares come from the rows and the gradients of
every weight's products; the estimate is eight adjoint passes with random signs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import hfopt
from benchmarks import machine
from benchmarks.clock import Quartiles, interleaved, ratios
from hfopt.preconditioners import EmpiricalFisherDiagonal
from models import GRU, LSTM, MRNN, RNN

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """A network (inputs, hidden, outputs) and its sequences."""

    name: str
    build: Callable[[int, int], nn.Module]
    inputs: int
    hidden: int
    steps: int
    sequences: int

    def toy(self) -> Case:
        """The same, small."""
        return Case(self.name, self.build, self.inputs, 4, 5, 6)


CASES = (
    Case("tanh RNN", lambda v, h: RNN(v, h, 1, output="last"), 2, 50, 30, 300),
    Case("tanh RNN", lambda v, h: RNN(v, h, 1, output="last"), 2, 100, 100, 500),
    Case("LSTM", lambda v, h: LSTM(v, h, 5, output="last"), 10, 64, 50, 200),
    Case("GRU", lambda v, h: GRU(v, h, 5, output="last"), 10, 64, 50, 200),
    Case("multiplicative RNN", lambda v, h: MRNN(v, h, h, 5, output="last"), 10, 64, 50, 200),
)


def measure(case: Case, rounds: int, budget: float) -> dict[str, Quartiles]:
    """Exact squares and their estimate, in gradients."""
    torch.manual_seed(0)
    model = case.build(case.inputs, case.hidden)
    x = torch.randn(case.steps, case.sequences, case.inputs)
    y = torch.randn_like(model(x).detach())

    def loss() -> torch.Tensor:
        return F.mse_loss(model(x), y)

    op = hfopt.GaussNewton(loss, model.parameters())

    def refresh(squares: str) -> None:
        EmpiricalFisherDiagonal(squares=squares).refresh(op, 0)

    tasks: dict[str, Callable[[], object]] = {
        "gradient": lambda: torch.autograd.grad(loss(), list(model.parameters())),
        "exact": lambda: refresh("layers"),
        "estimate": lambda: refresh("signs"),
    }
    times = interleaved(tasks, rounds, CPU, budget=budget)
    return {name: ratios(times[name], times["gradient"]) for name in ("exact", "estimate")}


def row(case: Case, found: dict[str, Quartiles]) -> str:
    """One line of the table."""
    size = f"{case.hidden} units, {case.steps} steps, {case.sequences} sequences"
    told = (f"{found[name].median:.2f} ({found[name].low:.2f}-{found[name].high:.2f})" for name in found)
    return f"| {case.name}, {size} | {' | '.join(told)} |"


def main(args: Sequence[str] | None = None) -> None:
    """Measure, print, and write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.squares", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds")
    parser.add_argument("--seconds", type=float, default=20.0, help="for a network, after which no round begins")
    parser.add_argument("--toy", action="store_true", help="at toy size")
    out = Path(__file__).parent / "results" / "preconditioners" / "squares.md"
    parser.add_argument("--out", type=Path, default=out, help="file of the table")
    given = parser.parse_args(args)
    torch.set_num_threads(1)
    lines = [f"- {key}: {value}" for key, value in machine.describe(CPU).items()]
    lines += ["", "| network | exact squares, gradients | estimate, gradients |", "|---|--:|--:|"]
    for case in (c.toy() if given.toy else c for c in CASES):
        lines.append(row(case, measure(case, given.rounds, given.seconds)))
    text = "\n".join(lines) + "\n"
    print(text, flush=True)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
