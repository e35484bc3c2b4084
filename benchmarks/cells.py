"""Gradient and product of every recurrent cell: hfopt's passes, a Python loop, torch's layer, the work itself.

    python -m benchmarks.cells [--hidden 128] [--steps 100] [--batch 64] [--inputs 32] [--repeats 7] [--threads 1]

For each cell, in float32 and in medians of interleaved repeats: a gradient (forward and adjoint pass) and a product
(tangent and adjoint) by the cell's passes in C and in torch's operations, by autograd through a Python loop of the same
step, and by torch's layer where it has one. "floor" is the multiplications alone, by torch.mm on the same shapes: those
of each step one after the other, what does not recur in one.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hfopt.recurrences.cells import EXAMPLES
from hfopt.recurrences.generated import Generated, generated
from hfopt.recurrences.native.generated import Compiled
from hfopt.recurrences.registry import Passes

Work = Callable[[], Any]


def arguments(c: Generated, steps: int, batch: int, inputs: int, hidden: int) -> list[Tensor]:
    """Random arguments in float32, all sizes h."""
    d = c.definition
    width = hidden * len(d.input_columns)
    found = [torch.randn(steps, batch, inputs), torch.randn(inputs, width) * inputs**-0.5]
    found += [torch.randn(hidden, hidden * len(p.columns)) * hidden**-0.5 for p in d.products]
    found += [torch.zeros(hidden) for _ in d.parameters]
    found += [torch.ones(batch, hidden) for _ in d.masks]
    return found + [torch.zeros(batch, hidden) for _ in d.states]


def by_passes(passes: Passes, given: Sequence[Tensor], outputs: int) -> tuple[Work, Work]:
    """A gradient and a product in all arguments but the inputs."""
    results = passes.forward(given)
    u = [torch.randn_like(y) for y in results[:outputs]]
    d = [None, *(torch.randn_like(x) for x in given[1:])]
    needed = [False] + [True] * (len(given) - 1)

    def gradient() -> None:
        passes.adjoint(u, given, passes.forward(given), needed)

    def product() -> None:
        passes.adjoint(passes.tangent(d, given, results), given, results, needed)

    return gradient, product


def by_autograd(run: Callable[..., Any], given: Sequence[Tensor]) -> tuple[Work, Work]:
    """The same by autograd: the gradient, and a product by double backward on a graph that is kept."""
    leaves = [x.clone().requires_grad_() for x in given]
    outputs = run(*leaves)
    at = leaves[1:]
    u = [torch.randn_like(y) for y in outputs]
    v = [torch.zeros_like(y, requires_grad=True) for y in outputs]
    g = torch.autograd.grad(outputs, at, v, create_graph=True, allow_unused=True)
    live = [(x, torch.randn_like(x)) for x in g if x is not None and x.requires_grad]

    def gradient() -> None:
        torch.autograd.grad(run(*leaves), at, u, allow_unused=True)

    def product() -> None:
        R = torch.autograd.grad([x for x, _ in live], v, [d for _, d in live], retain_graph=True, allow_unused=True)
        heads = [(y, r) for y, r in zip(outputs, R, strict=True) if r is not None]
        torch.autograd.grad([y for y, _ in heads], at, [r for _, r in heads], retain_graph=True, allow_unused=True)

    return gradient, product


def torchs(name: str, inputs: int, hidden: int) -> torch.nn.RNNBase | None:
    """Torch's layer of this kind."""
    kinds: dict[str, Callable[[], torch.nn.RNNBase]] = {
        "tanh": lambda: torch.nn.RNN(inputs, hidden),
        "relu": lambda: torch.nn.RNN(inputs, hidden, nonlinearity="relu"),
        "lstm": lambda: torch.nn.LSTM(inputs, hidden),
        "gru": lambda: torch.nn.GRU(inputs, hidden),
    }
    return kinds[name]() if name in kinds else None


def by_layer(layer: torch.nn.RNNBase, X: Tensor) -> Work:
    """A gradient by torch's layer."""

    def gradient() -> None:
        torch.autograd.grad(layer(X)[0].sum(), list(layer.parameters()))

    return gradient


def by_mm(c: Generated, given: Sequence[Tensor]) -> tuple[Work, Work]:
    """The multiplications of a gradient and a product alone, by torch.mm on the same shapes."""
    p = c.parts(given)
    steps, batch, _ = p.X.shape
    rows = p.X.flatten(0, 1)
    whole = [torch.randn(steps * batch, K.shape[0]) for K in p.K]  # what the products take, at all steps
    deltas = [torch.randn(steps * batch, K.shape[1]) for K in p.K]
    on_x = torch.randn(steps * batch, p.Kx.shape[1])
    back = [K.t().contiguous() for K in p.K]
    now, out = ([x[:batch].clone() for x in xs] for xs in (whole, deltas))

    def onwards() -> None:
        for _ in range(steps):
            for x, K, y in zip(now, p.K, out, strict=True):
                torch.mm(x, K, out=y)

    def backwards() -> None:
        for _ in range(steps):
            for x, K, y in zip(now, back, out, strict=True):
                torch.mm(y, K, out=x)
        for x, y in zip(whole, deltas, strict=True):
            torch.mm(x.t(), y)
        torch.mm(rows.t(), on_x)

    def gradient() -> None:
        torch.mm(rows, p.Kx)
        onwards()
        backwards()

    def product() -> None:
        torch.mm(rows, p.Kx)
        for x, K in zip(whole, p.K, strict=True):
            torch.mm(x, K)
        onwards()
        backwards()

    return gradient, product


def seconds(works: Sequence[Work], repeats: int) -> list[float]:
    """Medians of interleaved repeats."""
    found: list[list[float]] = [[] for _ in works]
    for work in works:
        work()
    for _ in range(repeats):
        for times, work in zip(found, works, strict=True):
            begin = time.perf_counter()
            work()
            times.append(time.perf_counter() - begin)
    return [statistics.median(times) for times in found]


def compare(name: str, options: argparse.Namespace) -> None:
    """One row for the gradient and one for the product."""
    c = generated(EXAMPLES[name]())
    inputs = options.hidden if c.definition.raw is not None else options.inputs
    given = arguments(c, options.steps, options.batch, inputs, options.hidden)
    ways = {"C": by_passes(Compiled(c), given, c.outputs), "torch": by_passes(c, given, c.outputs)}
    ways["floor"] = by_mm(c, given)
    if not options.quick:
        ways["loop"] = by_autograd(lambda *x: c.plain(x), given)
    layer = torchs(name, inputs, options.hidden)
    gradients = {way: work for way, (work, _) in ways.items()}
    if layer is not None:
        gradients["layer"] = by_layer(layer, given[0])
    products = {way: work for way, (_, work) in ways.items()}
    for kind, works in (("gradient", gradients), ("product", products)):
        times = dict(zip(works, seconds(list(works.values()), options.repeats), strict=True))
        told = "  ".join(f"{way} {t * 1e3:8.2f}" for way, t in times.items())
        ratios = "  ".join(f"{way}/C {t / times['C']:5.2f}" for way, t in times.items() if way != "C")
        floors = times["C"] / times["floor"]
        print(f"{name:22s} {kind:9s} {told}   {ratios}  C is {floors:.2f} floors", flush=True)


def main() -> None:
    """Print the table in milliseconds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for name, default in (("hidden", 128), ("steps", 100), ("batch", 64), ("inputs", 32), ("repeats", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="leave out the Python loop")
    parser.add_argument("cells", nargs="*", default=[], help="names; all if none")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print("times in ms")
    for name in options.cells or EXAMPLES:
        compare(name, options)


if __name__ == "__main__":
    main()
