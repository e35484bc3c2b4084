"""A gradient step of networks whose recurrent matrix is constrained, beside that of a plain RNN of the same size.

    python -m benchmarks.long_memory [--hidden 128] [--steps 220] [--batch 10] [--repeats 25] [--threads 1]

In float32, forward and backward, on the copy problem's sizes. Medians of interleaved repeats in processor time, and
medians of the ratios to the plain RNN's in the same round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

from models import long_memory

NETS = {
    "RNN, tanh": ("RNN", "tanh"),
    "RNN, modReLU": ("RNN", "modrelu"),
    "expRNN": ("expRNN", "modrelu"),
    "nnRNN": ("nnRNN", "modrelu"),
    "EURNN": ("EURNN", "modrelu"),
    "LSTM": ("LSTM", "modrelu"),
}


def measure(hidden: int, steps: int, batch: int, repeats: int) -> dict[str, list[float]]:
    """Processor seconds of every repeat, by network."""
    x, y = torch.randn(steps, batch, 1), torch.randint(0, 9, (steps * batch,))

    def step_of(kind: str, nonlinearity: str) -> Callable[[], None]:
        network = long_memory(kind, 1, hidden, 9, nonlinearity=nonlinearity)

        def step() -> None:
            network.zero_grad()
            F.cross_entropy(network(x).flatten(0, 1), y).backward()

        return step

    work = {name: step_of(*kind) for name, kind in NETS.items()}
    for step in work.values():
        step()
    found: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(repeats):
        for name, step in work.items():
            start = time.process_time()
            step()
            found[name].append(time.process_time() - start)
    return found


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.long_memory")
    for name, default in {"hidden": 128, "steps": 220, "batch": 10, "repeats": 25, "threads": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    found = measure(given.hidden, given.steps, given.batch, given.repeats)
    plain = found["RNN, tanh"]
    print("| network | ms | times a plain RNN's step |\n|---|--:|--:|")
    for name, seconds in found.items():
        ratio = statistics.median(s / p for s, p in zip(seconds, plain, strict=True))
        print(f"| {name} | {1e3 * statistics.median(seconds):.1f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
