"""What a symbol costs as an index and as a one-hot vector: the rows it takes of a matrix, a gradient, a product.

    python -m benchmarks.indices [--symbols 86] [--hidden 300] [--steps 100] [--batch 100] [--rounds 15]

In float32 with one thread, medians of interleaved rounds, and quartiles of their ratios. "rows" is the input's part of
a network alone: x W for symbols x (T, B) and W (V, h); its gradient in W; and its share of a Gauss-Newton product, a
tangent and an adjoint. The index takes rows of W (torch.nn.functional.embedding), the one-hot form makes the vectors
and multiplies. "network" is a gradient and a product of a whole tanh network of one layer, as `models.LanguageModel`
takes the numbers, and as `models.Stack` takes one-hot vectors.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import hfopt
from hfopt.recurrences import cells
from models import LanguageModel, Stack

Work = Callable[[], Any]


def rows(symbols: int, hidden: int, steps: int, batch: int) -> dict[str, tuple[Work, Work]]:
    """What is measured of the input's part -> (by index, by one-hot vectors)."""
    numbers = torch.randint(0, symbols, (steps, batch))
    W = torch.randn(symbols, hidden, requires_grad=True)
    U, dW = torch.randn(steps, batch, hidden), torch.randn(symbols, hidden)

    def by_index(W: Tensor) -> Tensor:
        return F.embedding(numbers, W)

    def by_vector(W: Tensor) -> Tensor:
        return F.one_hot(numbers, symbols).to(W.dtype) @ W

    def gradient(form: Callable[[Tensor], Tensor]) -> Work:
        return lambda: torch.autograd.grad(form(W), W, U)

    def product(form: Callable[[Tensor], Tensor]) -> Work:
        return lambda: torch.autograd.grad(form(W), W, form(dW))

    forms = (by_index, by_vector)
    return {
        "forward": (lambda: by_index(dW), lambda: by_vector(dW)),
        "gradient": (gradient(forms[0]), gradient(forms[1])),
        "product": (product(forms[0]), product(forms[1])),
    }


def network(symbols: int, hidden: int, steps: int, batch: int) -> dict[str, tuple[Work, Work]]:
    """What is measured of a whole network -> (of numbers, of one-hot vectors)."""
    numbers = torch.randint(0, symbols, (steps + 1, batch))
    torch.manual_seed(0)
    by_index = LanguageModel("rnn", symbols, hidden)
    by_vector = Stack(cells.tanh_rnn, 1, symbols, hidden, symbols)
    by_vector.load_state_dict(by_index.state_dict())
    v = torch.randn(sum(p.numel() for p in by_index.parameters()))
    found = []
    for model, inputs in (
        (by_index, lambda: numbers[:-1]),
        (by_vector, lambda: F.one_hot(numbers[:-1], symbols).float()),
    ):

        def loss(model: torch.nn.Module = model, inputs: Callable[[], Tensor] = inputs) -> Tensor:
            return F.cross_entropy(model(inputs()).flatten(0, 1), numbers[1:].flatten())

        matrix = hfopt.GaussNewton(loss, model.parameters(), linearisation="double-backward")
        parameters = list(model.parameters())
        found.append(
            (lambda loss=loss, ps=parameters: torch.autograd.grad(loss(), ps), lambda matrix=matrix: matrix @ v)
        )
    return {name: (found[0][i], found[1][i]) for i, name in enumerate(("gradient", "product"))}


def measured(first: Work, second: Work, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of both, in turn."""
    found: tuple[list[float], list[float]] = ([], [])
    for k in range(rounds + 2):
        for times, work in zip(found, (first, second), strict=True):
            started = time.perf_counter()
            work()
            if k >= 2:
                times.append(time.perf_counter() - started)
    return found


def main(arguments: list[str] | None = None) -> list[tuple[str, float, float, float, float, float]]:
    """Print a table; its rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.indices", description=str(__doc__).splitlines()[0])
    sizes = {"symbols": 86, "hidden": 300, "steps": 100, "batch": 100, "rounds": 15}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    given = (options.symbols, options.hidden, options.steps, options.batch)
    table = []
    print("| what | index, ms | one-hot, ms | one-hot / index (quartiles) |\n|---|--:|--:|--:|")
    for kind, works in (("rows", rows(*given)), ("network", network(*given))):
        for name, (index, vector) in works.items():
            times = measured(index, vector, options.rounds)
            ratios = [b / a for a, b in zip(*times, strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            a, b = (1000 * statistics.median(t) for t in times)
            table.append((f"{kind}, {name}", a, b, middle, low, high))
            print(f"| {kind}, {name} | {a:.2f} | {b:.2f} | {middle:.2f} ({low:.2f}-{high:.2f}) |", flush=True)
    return table


if __name__ == "__main__":
    main()
