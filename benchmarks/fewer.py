"""Ways to fewer products: ``python -m benchmarks.fewer``.

Every method of :mod:`benchmarks.fewer_tried` trains every problem of :mod:`benchmarks.fewer_problems` from the same
seeds. What a step costs is counted in products: those that were made, and gradients (with what is made ready for
products) and evaluations of the loss, each with a weight that is measured first. The clock is that of the process; runs
take turns.
Two targets come from the baseline's run of the same seed: the least loss after a fifth and after three fifths of its
budget. A method's number is what it takes to the target, divided by what the baseline takes; the geometric mean over
seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import hfopt
from benchmarks import machine
from benchmarks.fewer_problems import PROBLEMS, Problem
from benchmarks.fewer_tried import METHODS, NEW, OLD, Method

EARLY, LATE = 0.2, 0.6
SHOWN = (OLD, "stop by rate from 0", "lambda by the loss", NEW)


@dataclass(frozen=True)
class Weights:
    """What a gradient and an evaluation cost in products, and a product in seconds."""

    gradient: float
    evaluation: float
    product: float


@dataclass(frozen=True)
class Curve:
    """A run: after every step the cost in products, the seconds of processor time and the loss."""

    problem: str
    seed: int
    method: str
    cost: list[float]
    seconds: list[float]
    loss: list[float]

    def least_until(self, cost: float) -> float:
        """The least loss at steps up to ``cost``, or of the first step."""
        return min(loss for c, loss in zip(self.cost, self.loss, strict=True) if c <= max(cost, self.cost[0]))

    def reaches(self, target: float, measure: str) -> float:
        """Cost or seconds after which the loss was no more than ``target``; infinite if it never was."""
        spent: list[float] = getattr(self, measure)
        return next((s for s, loss in zip(spent, self.loss, strict=True) if loss <= target), math.inf)


def least_time(task: Callable[[], object], rounds: int) -> float:
    """The least processor time of several runs, after one that is not counted."""
    task()
    times = []
    for _ in range(rounds):
        start = time.process_time()
        task()
        times.append(time.process_time() - start)
    return min(times)


def weigh(problem: Problem, rounds: int = 15) -> Weights:
    """Measure a product, a gradient with what is made ready for products, and an evaluation."""
    task = problem.build(0)
    parameters = list(task.model.parameters())
    op = hfopt.GaussNewton(task.loss, parameters, structural="structural" in problem.options)
    v, out = op.gradient.clone(), torch.empty_like(op.gradient)
    product = least_time(lambda: op.multiply(v, out), rounds)
    structural = "structural" in problem.options
    gradient = least_time(lambda: hfopt.GaussNewton(task.loss, parameters, structural=structural).gradient, rounds)
    evaluation = least_time(lambda: float(task.loss().detach()), rounds)
    return Weights(gradient / product, evaluation / product, product)


def run(problem: Problem, seed: int, method: Method, weights: Weights, budget: float) -> Curve:
    """Train until ``budget`` products have been spent, or nothing moves any more."""
    task = problem.build(seed)
    options: dict[str, Any] = {"preconditioner": None, **problem.options}
    options |= {name: made() for name, made in method.options.items()}
    optimizer = hfopt.HessianFree(task.model.parameters(), cg=method.cg(), damping=method.damping(), **options)
    curve = Curve(problem.name, seed, method.name, [], [], [])
    spent = seconds = 0.0
    while spent < budget and not (len(optimizer.stats) > 20 and not any(s.accepted for s in optimizer.stats[-10:])):
        if method.before is not None:
            method.before(optimizer)
        start = time.process_time()
        optimizer.step(task.loss)
        seconds += time.process_time() - start
        s = optimizer.stats[-1]
        spent += s.products + weights.gradient * s.gradients + weights.evaluation * s.evaluations
        curve.cost.append(spent)
        curve.seconds.append(seconds)
        curve.loss.append(s.new_loss)
    return curve


def ratio(curves: Sequence[Curve], problem: str, method: str, share: float, measure: str) -> tuple[float, bool]:
    """Mean over seeds of the cost to the target relative to the baseline's, and whether it is only a lower bound."""
    found = []
    for base in (c for c in curves if (c.problem, c.method) == (problem, OLD)):
        ours = [c for c in curves if (c.problem, c.method, c.seed) == (problem, method, base.seed)]
        target = base.least_until(share * base.cost[-1])
        mine, its = (ours[0].reaches(target, measure) if ours else math.nan), base.reaches(target, measure)
        found.append((mine / its, False) if math.isfinite(mine) else (getattr(ours[0], measure)[-1] / its, True))
    return mean([value for value, _ in found]), any(bound for _, bound in found)


def mean(values: Sequence[float]) -> float:
    """The geometric mean."""
    return math.exp(sum(map(math.log, values)) / len(values))


def table(curves: Sequence[Curve]) -> str:
    """Markdown, a line for a method: the later target for every problem, and means over problems."""
    problems = list(dict.fromkeys(c.problem for c in curves))
    lines = ["| method | " + " | ".join(problems) + " | products, early | products, late | seconds, late |"]
    lines.append("|---|" + "--:|" * (len(problems) + 3))
    for method in dict.fromkeys(c.method for c in curves):
        late = [ratio(curves, p, method, LATE, "cost") for p in problems]
        cells = [f"{'> ' if bound else ''}{r:.2f}" for r, bound in late]
        for share, measure in ((EARLY, "cost"), (LATE, "cost"), (LATE, "seconds")):
            cells.append(f"{mean([ratio(curves, p, method, share, measure)[0] for p in problems]):.2f}")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(curves: Sequence[Curve], path: Path) -> None:
    """Loss over products of the first seed, a picture for each problem."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    problems = list(dict.fromkeys(c.problem for c in curves))
    rows = -(-len(problems) // 3)
    figure, axes = plt.subplots(rows, 3, figsize=(11, 2.9 * rows), squeeze=False, layout="constrained")
    for axis, problem in zip(axes.flat, problems, strict=False):
        for colour, method in zip(("0.6", "C2", "C1", "C0"), SHOWN, strict=True):
            for curve in curves:
                if (curve.problem, curve.method) == (problem, method):
                    first = curve.seed == min(c.seed for c in curves)
                    label = method if first else None
                    axis.plot(curve.cost, curve.loss, color=colour, lw=1.4, alpha=1.0 if first else 0.35, label=label)
        axis.set_yscale("log")
        axis.set_title(problem, fontsize=10)
    axes.flat[0].legend(fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("cost in products")
    for axis in axes[:, 0]:
        axis.set_ylabel("loss")
    for axis in axes.flat[len(problems) :]:
        axis.remove()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def report(out: Path, picture: Path) -> str:
    """Table and picture of all problems measured in ``out``."""
    files = [out / f"{name}.json" for name in PROBLEMS if (out / f"{name}.json").exists()]
    saved = [json.loads(f.read_text("utf-8")) for f in files]
    curves = [Curve(**c) for s in saved for c in s["curves"]]
    told = [f"- {key}: {value}" for key, value in saved[0]["about"].items()]
    for s in saved:
        w, name = s["weights"], s["problem"]
        told.append(
            f"- {name}: {PROBLEMS[name].about}; {s['parameters']} parameters; a gradient {w['gradient']:.1f} products, "
            f"an evaluation {w['evaluation']:.2f}, a product {1e3 * w['product']:.2f} ms; seeds {s['seeds']}, budget "
            f"{s['budget']:.0f} products"
        )
    text = "\n".join(told) + "\n\n" + table(curves)
    (out / "fewer.md").write_text(text, "utf-8")
    picture.parent.mkdir(parents=True, exist_ok=True)
    plot(curves, picture)
    return text


def main(args: Sequence[str] | None = None) -> None:
    """Measure what was asked for, save it problem by problem, and report on all that is saved."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fewer", description=__doc__)
    parser.add_argument("--problems", default=",".join(PROBLEMS), help="comma-separated")
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated; the baseline is always run")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method on each problem")
    parser.add_argument("--budget", type=float, default=500.0, help="products of a run")
    parser.add_argument("--report", action="store_true", help="measure nothing, report on what is saved")
    root = Path(__file__).parent
    parser.add_argument("--out", type=Path, default=root / "results" / "fewer", help="folder of tables and curves")
    parser.add_argument("--plot", type=Path, default=root.parent / "docs" / "images" / "fewer_products.png")
    given = parser.parse_args(args)
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    for name in [] if given.report else given.problems.split(","):
        problem, weights = PROBLEMS[name], weigh(PROBLEMS[name])
        methods = dict.fromkeys([OLD, *given.methods.split(",")])
        curves = [run(problem, seed, METHODS[m], weights, given.budget) for seed in range(given.seeds) for m in methods]
        found = {
            "problem": name,
            "about": machine.describe(torch.device("cpu")),
            "weights": asdict(weights),
            "parameters": sum(p.numel() for p in problem.build(0).model.parameters()),
            "seeds": given.seeds,
            "budget": given.budget,
            "curves": [_rounded(asdict(c)) for c in curves],
        }
        (given.out / f"{name}.json").write_text(json.dumps(found) + "\n", "utf-8")
        print(f"{name}: done", flush=True)
    print(report(given.out, given.plot), flush=True)


def _rounded(curve: dict[str, Any]) -> dict[str, Any]:
    """Numbers to six digits."""
    lists = {name: [float(f"{v:.6g}") for v in value] for name, value in curve.items() if isinstance(value, list)}
    return {**curve, **lists}


if __name__ == "__main__":
    main()
