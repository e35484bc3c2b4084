"""What preconditioners save: ``python -m benchmarks.preconditioners``.

Three networks are trained for a few Hessian-free steps. At the point reached, the damped Gauss-Newton system is solved
from zero to a given relative residual, with lambda as the optimizer had it there and with a tenth of it. Counted
are CG iterations; timed are a solve and the building of its preconditioner together, interleaved. The L-BFGS
preconditioner comes from a solve of the same kind at the point one step before.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hfopt
from benchmarks import machine
from benchmarks.clock import Quartiles, interleaved
from hfopt import CG
from hfopt.linalg.vector import norm
from hfopt.preconditioners import KFAC, LBFGS, EmpiricalFisherDiagonal, HutchinsonDiagonal, Nystrom, Preconditioner
from models import RNN

NONE = "none"
LAST = "lbfgs"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Problem:
    """A network, the loss of its batch, and the outputs' dimension of cases."""

    name: str
    about: str
    model: nn.Module
    loss: Callable[[], Tensor]
    cases: int
    recurrent: bool = False


def digits(count: int) -> tuple[Tensor, Tensor]:
    """Images (N, 64) in [0, 1] and labels (N,) of scikit-learn's digits."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return torch.from_numpy(found.data[:count]).float() / 16, torch.from_numpy(found.target[:count]).long()


def autoencoder(count: int) -> Problem:
    x, _ = digits(count)
    sizes = (64, 60, 30, 10, 30, 60, 64)
    layers: list[nn.Module] = []
    for n, m in pairwise(sizes):
        layers += [nn.Linear(n, m)] if m in (10, 64) else [nn.Linear(n, m), nn.Tanh()]
    model = nn.Sequential(*layers)
    about = f"autoencoder {'-'.join(map(str, sizes))}, tanh, squared error, {count} digits"
    return Problem("autoencoder", about, model, lambda: F.mse_loss(model(x), x), count)


def addition(count: int, steps: int = 30) -> Problem:
    values = torch.rand(steps, count)
    marks = torch.zeros(steps, count)
    first, second = torch.randint(0, steps // 10, (count,)), torch.randint(steps // 10, steps // 2, (count,))
    each = torch.arange(count)
    marks[first, each] = marks[second, each] = 1.0
    x, y = torch.stack([values, marks], 2), ((values * marks).sum(0) / 2).unsqueeze(1)
    model = RNN(2, 50, 1, output="last").sparse_init(0)
    about = f"tanh RNN, 50 units, addition problem of {steps} steps, {count} sequences"
    return Problem("rnn", about, model, lambda: F.mse_loss(model(x), y), count, recurrent=True)


def convolutions(count: int) -> Problem:
    x, labels = digits(count)
    images = x.view(-1, 1, 8, 8)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(8, 16, 3, padding=1, stride=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )
    about = f"convolutions 8 and 16 (3 x 3), linear readout, cross-entropy, {count} digits"
    return Problem("cnn", about, model, lambda: F.cross_entropy(model(images), labels), count)


PROBLEMS: tuple[Callable[[int], Problem], ...] = (autoencoder, addition, convolutions)


def methods(problem: Problem) -> dict[str, Callable[[], Preconditioner | None]]:
    """What is compared, made again for every solve."""
    found: dict[str, Callable[[], Preconditioner | None]] = {
        NONE: lambda: None,
        "empirical-fisher": EmpiricalFisherDiagonal,
        "hutchinson": HutchinsonDiagonal,
        "nystrom, rank 20": Nystrom,
        "nystrom, rank 60": lambda: Nystrom(rank=60),
        "kfac": KFAC,
        LAST: LBFGS,
    }
    if problem.recurrent:
        found["empirical-fisher, estimated"] = lambda: EmpiricalFisherDiagonal(squares="signs")
    return found


@dataclass(frozen=True)
class Row:
    """One method on one system.

    ``build`` and ``total`` are quartiles of seconds: of the preconditioner alone, and with the solve; ``residual`` is
    that of the solution, from scratch.
    """

    problem: str
    damping: float
    method: str
    iterations: int
    reached: bool
    residual: float
    build: Quartiles
    total: Quartiles


def at_a_point(problem: Problem, steps: int) -> tuple[Callable[[], None], float]:
    """Train for ``steps`` steps; what puts the parameters back one step, and lambda at the end."""
    optimizer = hfopt.HessianFree(problem.model.parameters(), preconditioner=None)
    before: list[Tensor] = []
    for _ in range(steps):
        before = [p.detach().clone() for p in problem.model.parameters()]
        optimizer.step(problem.loss)

    @torch.no_grad()
    def back() -> None:
        for p, old in zip(problem.model.parameters(), before, strict=True):
            p.copy_(old)

    return back, optimizer.stats[-1].new_damping


def measure(problem: Problem, steps: int, residual: float, most: int, rounds: int, budget: float) -> list[Row]:
    """All methods at both dampings."""
    back, damping = at_a_point(problem, steps)
    now = [p.detach().clone() for p in problem.model.parameters()]
    cg = CG(max_iterations=most, tolerance=0.0, residual=residual)
    states = {}
    back()
    op = hfopt.GaussNewton(problem.loss, problem.model.parameters())
    for value in (damping, damping / 10):
        m = LBFGS()
        m.refresh(op, 0)
        m.damp(value, 0.0)
        cg.solve(m.watch(op.damped(value)), -op.gradient, None, m)
        states[value] = m.state_dict()
    with torch.no_grad():
        for p, new in zip(problem.model.parameters(), now, strict=True):
            p.copy_(new)
    op = hfopt.GaussNewton(problem.loss, problem.model.parameters())
    rows = []
    for value, state in states.items():
        rows += _at(problem, op, value, state, cg, rounds, budget)
    return rows


def _at(
    problem: Problem, op: hfopt.GaussNewton, damping: float, last: dict[str, Tensor], cg: CG, rounds: int, budget: float
) -> list[Row]:
    made = methods(problem)
    system = op.damped(damping)

    def build(name: str) -> Preconditioner | None:
        m = made[name]()
        if m is not None:
            if name == LAST:
                m.load_state_dict(last)
            m.refresh(op, 0)
            m.damp(damping, 0.0)
        return m

    def solve(name: str) -> hfopt.linalg.cg.Solution:
        m = build(name)
        return cg.solve(system if m is None else m.watch(system), -op.gradient, None, m)

    found = {name: solve(name) for name in made}
    times = interleaved({n: lambda n=n: solve(n) for n in made}, rounds, CPU, budget=budget)  # type: ignore[misc]
    builds = interleaved({n: lambda n=n: build(n) for n in made}, rounds, CPU, budget=budget / 4)  # type: ignore[misc]
    size = norm(op.gradient)
    return [
        Row(
            problem.name,
            damping,
            name,
            s.iterations,
            s.reason == "residual",
            norm(-op.gradient - system.multiply(s.x)) / size,
            Quartiles.of(builds[name]),
            Quartiles.of(times[name]),
        )
        for name, s in found.items()
    ]


def table(rows: Sequence[Row]) -> str:
    """Markdown, one line a system and method."""
    lines = ["| problem | lambda | preconditioner | iterations | build, ms | build and solve, ms |"]
    lines += ["|---|--:|---|--:|--:|--:|"]
    for r in rows:
        count = f"{r.iterations}" if r.reached else f"> {r.iterations}"
        total = f"{1e3 * r.total.median:.1f} ({1e3 * r.total.low:.1f}-{1e3 * r.total.high:.1f})"
        lines.append(f"| {r.problem} | {r.damping:.2g} | {r.method} | {count} | {1e3 * r.build.median:.1f} | {total} |")
    return "\n".join(lines) + "\n"


def plot(rows: Sequence[Row], path: Path) -> None:
    """Iterations above, times below, a column for each system."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    systems = list(dict.fromkeys((r.problem, r.damping) for r in rows))
    figure, axes = plt.subplots(2, len(systems), figsize=(3.7 * len(systems), 6), squeeze=False, layout="constrained")
    for column, system in enumerate(systems):
        shown = [r for r in rows if (r.problem, r.damping) == system]
        names = [r.method for r in shown]
        colours = ["0.6" if n == NONE else "C0" for n in names]
        axes[0, column].barh(names, [r.iterations for r in shown], color=colours)
        axes[0, column].set_title(f"{system[0]}, lambda = {system[1]:.1g}", fontsize=10)
        axes[0, column].set_xlabel("CG iterations")
        middle = [1e3 * r.total.median for r in shown]
        spread = [
            [1e3 * (r.total.median - r.total.low) for r in shown],
            [1e3 * (r.total.high - r.total.median) for r in shown],
        ]
        axes[1, column].barh(names, middle, xerr=spread, color=colours, error_kw={"lw": 0.8})
        axes[1, column].barh(names, [1e3 * r.build.median for r in shown], color="C1")
        axes[1, column].set_xlabel("ms, of which building is orange")
        plain = next(r for r in shown if r.method == NONE)
        for row, value in ((0, plain.iterations), (1, 1e3 * plain.total.median)):
            axes[row, column].axvline(value, color="0.3", lw=0.8, ls=":")
            axes[row, column].invert_yaxis()
            if column and systems[column - 1][0] == system[0]:
                axes[row, column].set_yticklabels([])
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main(args: Sequence[str] | None = None) -> None:
    """Measure, print, and write the table, the numbers and the plot."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.preconditioners", description=__doc__)
    parser.add_argument("--cases", type=int, default=300, help="images or sequences in a batch")
    parser.add_argument("--steps", type=int, default=6, help="Hessian-free steps before the systems are taken")
    parser.add_argument("--residual", type=float, default=1e-2, help="relative, |b - A x| / |b|")
    parser.add_argument("--most", type=int, default=1000, help="CG iterations at most")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds")
    parser.add_argument("--seconds", type=float, default=15.0, help="for a system, after which no round begins")
    root = Path(__file__).parent
    parser.add_argument("--out", type=Path, default=root / "results" / "preconditioners", help="folder of the table")
    parser.add_argument("--plot", type=Path, default=root.parent / "docs" / "images" / "preconditioners.png")
    given = parser.parse_args(args)
    torch.set_num_threads(1)
    rows: list[Row] = []
    told = [f"- {key}: {value}" for key, value in machine.describe(CPU).items()]
    for build in PROBLEMS:
        torch.manual_seed(0)
        problem = build(given.cases)
        told.append(
            f"- {problem.name}: {problem.about}, {sum(p.numel() for p in problem.model.parameters())} parameters"
        )
        rows += measure(problem, given.steps, given.residual, given.most, given.rounds, given.seconds)
        assert all(math.isfinite(r.residual) for r in rows)
    text = "\n".join(told) + "\n\n" + table(rows)
    print(text, flush=True)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "preconditioners.md").write_text(text, "utf-8")
    (given.out / "preconditioners.json").write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n", "utf-8")
    given.plot.parent.mkdir(parents=True, exist_ok=True)
    plot(rows, given.plot)


if __name__ == "__main__":
    main()
