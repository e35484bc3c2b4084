"""Training on minibatches: CPU seconds to given test losses.

    python -m benchmarks.minibatches                      all of it, and the tables of docs/minibatches.md
    python -m benchmarks.minibatches cnn --seconds 5      one problem, so many CPU seconds for each run
    python -m benchmarks.minibatches --size 500           other batches

Every step sees a batch that no step before it has seen in this pass over the data. The time is that of the process on
the CPU, without the evaluation of the test data; adam and sgd are tried with several learning rates, and every entry of
the table is the best of them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

import hfopt

LOOKS = 80

Data = tuple[Tensor, ...]
Loss = Callable[[nn.Module, Data], Tensor]


@dataclass(frozen=True)
class Problem:
    """A model, its loss, batches of training data, and test data.

    Attributes:
        about: in words.
        model: from nothing, by torch's generator.
        loss: of a batch, a mean over cases.
        batches: without end, of so many cases, by a generator.
        test: the test data.
        targets: test losses, the hardest last.
        size: cases of a batch where none is asked for.
    """

    about: str
    model: Callable[[], nn.Module]
    loss: Loss
    batches: Callable[[int, torch.Generator], Iterator[Data]]
    test: Data
    targets: tuple[float, ...]
    size: int


def passes(data: Data) -> Callable[[int, torch.Generator], Iterator[Data]]:
    """Passes over the data, each in an order of its own; what does not fill a batch waits for the next."""

    def batches(size: int, generator: torch.Generator) -> Iterator[Data]:
        while True:
            for chosen in torch.split(torch.randperm(len(data[0]), generator=generator), size):
                if len(chosen) == size:
                    yield tuple(t[chosen] for t in data)

    return batches


def digits(images: bool) -> tuple[Data, Data]:
    """Training and test images of scikit-learn's digits with their labels, 1,400 and 397."""
    from sklearn.datasets import load_digits

    found = load_digits()
    x, y = torch.tensor(found.data / 16, dtype=torch.float32), torch.tensor(found.target)
    x = x.view(-1, 1, 8, 8) if images else x
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return (x[:1400], y[:1400]), (x[1400:], y[1400:])


def cnn() -> Problem:
    """Digits told apart by a small convolution net."""
    train, test = digits(images=True)

    def model() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(128, 10),
        )  # fmt: skip

    return Problem(
        "digits, convolution net, cross-entropy",
        model,
        lambda m, d: F.cross_entropy(m(d[0]), d[1]),
        passes(train),
        test,
        (0.5, 0.2, 0.1),
        100,
    )


def autoencoder() -> Problem:
    """Digits squeezed through ten numbers."""
    train, test = digits(images=False)

    def model() -> nn.Module:
        layers: list[nn.Module] = []
        sizes = (64, 100, 50, 10, 50, 100, 64)
        for n, m in pairwise(sizes):
            layers += [nn.Linear(n, m), nn.Tanh()]
        return nn.Sequential(*layers[:-1])

    return Problem(
        "digits, autoencoder 64-100-50-10 and back, squared error summed over pixels",
        model,
        lambda m, d: F.mse_loss(m(d[0]), d[0]) * 64,
        passes(train),
        test,
        (2.0, 1.5, 1.2),
        200,
    )


class Adder(nn.Module):
    """A tanh recurrence, read out at the last step."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.readout = nn.RNN(2, 40), nn.Linear(40, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        found: Tensor = self.readout(self.recurrent(inputs)[0][-1])
        return found


def sums(size: int, steps: int, generator: torch.Generator) -> Data:
    """Sequences (steps, size, 2) of numbers, of which two are marked, and the mean of those two (size, 1)."""
    values, marks = torch.rand(steps, size, generator=generator), torch.zeros(steps, size)
    each = torch.arange(size)
    for low, high in ((0, steps // 2), (steps // 2, steps)):
        marks[torch.randint(low, high, (size,), generator=generator), each] = 1.0
    return torch.stack([values, marks], 2), (values * marks).sum(0).div(2).unsqueeze(1)


def addition(steps: int = 20) -> Problem:
    """The addition problem; no sequence is seen twice."""

    def batches(size: int, generator: torch.Generator) -> Iterator[Data]:
        while True:
            yield sums(size, steps, generator)

    return Problem(
        f"addition problem, {steps} steps, tanh recurrence of 40 units, squared error",
        Adder,
        lambda m, d: F.mse_loss(m(d[0]), d[1]),
        batches,
        sums(2000, steps, torch.Generator().manual_seed(1)),
        (0.02, 0.002, 0.0002),
        200,
    )


PROBLEMS: dict[str, Callable[[], Problem]] = {"cnn": cnn, "autoencoder": autoencoder, "addition": addition}


@dataclass(frozen=True)
class Method:
    """An optimizer on minibatches.

    Attributes:
        about: in words.
        make: from parameters and a learning rate.
        roles: the roles that get a batch of their own.
        rates: learning rates to try; one where there is nothing to choose.
        larger: how many times the usual batch it takes.
    """

    about: str
    make: Callable[[Any, float], torch.optim.Optimizer]
    roles: tuple[str, ...] = ()
    rates: tuple[float, ...] = (1.0,)
    larger: int = 1


def sgd(params: Any, lr: float) -> torch.optim.Optimizer:
    """With Nesterov's momentum."""
    return torch.optim.SGD(params, lr=lr, momentum=0.9, nesterov=True)


def defaults(params: Any, lr: float) -> torch.optim.Optimizer:
    """The defaults for large batches, without a preconditioner."""
    return hfopt.HessianFree(params, lr, preconditioner=None)


METHODS: dict[str, Method] = {
    "sgd": Method("SGD, Nesterov momentum 0.9, best of 5 rates", sgd, rates=(0.003, 0.01, 0.03, 0.1, 0.3)),
    "adam": Method("Adam, best of 5 rates", torch.optim.Adam, rates=(0.001, 0.003, 0.01, 0.03, 0.1)),
    "defaults": Method("HessianFree(params, preconditioner=None)", defaults),
    "defaults-large": Method("HessianFree(params, preconditioner=None), batches 5 times as large", defaults, larger=5),
    "defaults-evaluation": Method("HessianFree(params, preconditioner=None), evaluation=", defaults, ("evaluation",)),
    "defaults-debias": Method("HessianFree(params, preconditioner=None), debias=", defaults, ("debias",)),
    "minibatches": Method("for_minibatches(params)", hfopt.for_minibatches),
    "minibatches-evaluation": Method("for_minibatches(params), evaluation=", hfopt.for_minibatches, ("evaluation",)),
    "minibatches-debias": Method("for_minibatches(params), debias=", hfopt.for_minibatches, ("debias",)),
    "minibatches-still": Method(
        "for_minibatches(params, decay=0), evaluation=",
        lambda p, lr: hfopt.for_minibatches(p, lr, decay=0.0),
        ("evaluation",),
    ),
}


@dataclass(frozen=True)
class Curve:
    """What a run came to: (CPU seconds, test loss) after every look, and the lambda of the last step."""

    method: str
    rate: float
    seed: int
    points: list[tuple[float, float]]
    steps: int
    damping: float | None

    def seconds_to(self, target: float) -> float:
        """CPU seconds to the first look that found the target; infinite if there was none."""
        return next((s for s, loss in self.points if loss <= target), math.inf)


def train(problem: Problem, name: str, rate: float, seed: int, seconds: float, size: int | None = None) -> Curve:
    """A run of so many CPU seconds, or until the last target is met, with a look at the test loss about 80 times.

    The models and the sequence of batches are the same for every method.
    """
    method = METHODS[name]
    torch.manual_seed(seed)
    model = problem.model()
    optimizer = method.make(model.parameters(), rate)
    data = problem.batches((size or problem.size) * method.larger, torch.Generator().manual_seed(seed))
    points: list[tuple[float, float]] = []
    spent, steps = 0.0, 0
    while spent < seconds:
        start = time.process_time()

        def closure(batch: Data) -> Callable[[], Tensor]:
            def run() -> Tensor:
                optimizer.zero_grad()
                loss = problem.loss(model, batch)
                if loss.requires_grad:
                    loss.backward()  # type: ignore[no-untyped-call]
                return loss

            return run

        roles = {role: closure(next(data)) for role in method.roles}
        step: Callable[..., Any] = optimizer.step
        step(closure(next(data)), **roles)
        spent += time.process_time() - start
        steps += 1
        if spent >= (len(points) + 1) * seconds / LOOKS or spent >= seconds:
            with torch.no_grad():
                value = float(problem.loss(model, problem.test))
            points.append((spent, value))
            if value <= problem.targets[-1] or not math.isfinite(value):
                break
    stats = getattr(optimizer, "stats", None)
    return Curve(name, rate, seed, points, steps, stats[-1].new_damping if stats else None)


@dataclass(frozen=True)
class Options:
    """What to run."""

    problems: Annotated[tuple[str, ...], tyro.conf.Positional] = tuple(PROBLEMS)
    """names of problems: cnn, autoencoder, addition"""
    methods: tuple[str, ...] = tuple(METHODS)
    """names of methods; the others' numbers are taken from the folder"""
    seconds: float = 5.0
    """CPU seconds of a run"""
    seeds: tuple[int, ...] = (0,)
    """of models and batches; the table has means over those that got there"""
    size: int | None = None
    """cases of a batch; by default 100 for cnn, 200 for the others"""
    out: Path | None = Path(__file__).parent / "results" / "minibatches"
    """where numbers and tables go; None: nowhere"""


def entry(curves: list[Curve], target: float) -> str:
    """CPU seconds to a target: of the rate that gets there first, the mean over seeds; a dash if any seed did not."""
    best = min(
        (sum(c.seconds_to(target) for c in curves if c.rate == rate) / sum(c.rate == rate for c in curves))
        for rate in {c.rate for c in curves}
    )
    return f"{best:.2f}" if math.isfinite(best) else "-"


def table(problem: Problem, curves: list[Curve]) -> str:
    """One line for a method: seconds to every target, the best test loss, steps per second, lambda at the end."""
    heads = ["", *(f"{t:g}" for t in problem.targets), "least test loss", "steps/s", "last lambda"]
    rows = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name, method in METHODS.items():
        own = [c for c in curves if c.method == name]
        if own:
            least = min(own, key=lambda c: min((loss for _, loss in c.points), default=math.inf))
            value = min(loss for _, loss in least.points)
            pace = least.steps / least.points[-1][0]
            damping = "" if least.damping is None else f"{least.damping:.2g}"
            found = [method.about, *(entry(own, t) for t in problem.targets), f"{value:.2g}", f"{pace:.3g}", damping]
            rows.append("| " + " | ".join(found) + " |")
    return "\n".join(rows) + "\n"


def main(args: list[str] | None = None) -> None:
    """Run what the command line asks for."""
    options = tyro.cli(Options, args=args, prog="python -m benchmarks.minibatches", description=__doc__)
    torch.set_num_threads(1)
    for name in options.problems:
        problem = PROBLEMS[name]()
        curves = [
            train(problem, method, rate, seed, options.seconds, options.size)
            for method in options.methods
            for rate in METHODS[method].rates
            for seed in options.seeds
        ]
        kept = options.out / f"{name}.json" if options.out is not None else None
        if kept is not None and kept.exists():
            earlier = [Curve(**row) for row in json.loads(kept.read_text("utf-8"))]
            curves += [curve for curve in earlier if curve.method not in options.methods]
        size = options.size or problem.size
        sentence = (
            f"{problem.about}; batches of {size}; CPU seconds to a test loss, runs of {options.seconds:g} s, "
            f"seeds {', '.join(map(str, options.seeds))}."
        )
        text = f"{sentence[0].upper()}{sentence[1:]}\n\n{table(problem, curves)}"
        print(f"{name}\n\n{text}", flush=True)
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / f"{name}.md").write_text(text, "utf-8")
            rows = [dataclasses.asdict(curve) for curve in curves]
            (options.out / f"{name}.json").write_text(json.dumps(rows) + "\n", "utf-8")


if __name__ == "__main__":
    main()
