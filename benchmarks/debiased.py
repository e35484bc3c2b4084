"""What a second batch for step lengths is worth: least squares from noisy data, solved by conjugate gradients.

    python -m benchmarks.debiased

Targets are a linear function of inputs (N, 100), whose variances go from 1 to 0.001, and noise. The table has the share
of the decrease of the expected loss that the minimum offers, after so many iterations, as a mean over draws: 1 is all
of it, below 0 is worse than no step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hfopt.linalg.cg import CG
from hfopt.linalg.cg_debiased import Quadratic
from hfopt.linalg.solution import Solution

ITERATIONS = (1, 2, 5, 10, 20, 30)
DRAWS = 20


@dataclass(frozen=True)
class Setting:
    """``cases`` of a batch, standard deviation of the noise, and lambda."""

    cases: int
    noise: float
    damping: float


SETTINGS = (Setting(50, 1.0, 0.1), Setting(200, 0.5, 0.05), Setting(200, 0.5, 0.001), Setting(1000, 0.5, 0.001))
FORMS = ("one batch", "both batches as one", "two, slopes at the iterate", "two, slopes at the start")


class Dense:
    """A matrix as an operator."""

    def __init__(self, a: Tensor) -> None:
        self.a = a

    def multiply(self, v: Tensor, out: Tensor | None = None) -> Tensor:
        """``A v``."""
        return torch.mv(self.a, v, out=out)


def solve(form: str, k: int, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Solution:
    """So many iterations with two batches' matrices and right-hand sides."""
    options = CG(max_iterations=k, tolerance=0.0, residual=0.0)
    if form == FORMS[0]:
        return options.solve(Dense(a[0]), a[1])
    if form == FORMS[1]:
        return options.solve(Dense((a[0] + b[0]) / 2), (a[1] + b[1]) / 2)
    return options.solve(Dense(a[0]), a[1], second=Quadratic(Dense(b[0]), b[1], form.rpartition(" ")[2]))


def shares(setting: Setting, form: str) -> Iterator[list[float]]:
    """For every draw, the share of the possible decrease after each of ``ITERATIONS``."""
    draws = torch.Generator().manual_seed(0)
    p = 100
    scale = torch.logspace(0, -1.5, p, dtype=torch.float64)
    eye = torch.eye(p, dtype=torch.float64)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draws, dtype=torch.float64)

    for _ in range(DRAWS):
        truth = normal(p)

        def batch(truth: Tensor = truth) -> tuple[Tensor, Tensor]:
            x = normal(setting.cases, p) * scale
            y = x @ truth + setting.noise * normal(setting.cases)
            return x.T @ x / setting.cases + setting.damping * eye, x.T @ y / setting.cases

        def expected(x: Tensor, truth: Tensor = truth) -> float:
            return float(0.5 * (x * scale).square().sum() - (x * truth * scale.square()).sum())

        a, b = batch(), batch()
        yield [expected(solve(form, k, a, b).x) / expected(truth) for k in ITERATIONS]


def table(setting: Setting) -> str:
    """One line for a form."""
    lines = [
        f"Batches of {setting.cases}, noise {setting.noise:g}, lambda {setting.damping:g}:",
        "",
        "| iterations | " + " | ".join(map(str, ITERATIONS)) + " |",
        "|---|" + "---|" * len(ITERATIONS),
    ]
    for form in FORMS:
        found = torch.tensor(list(shares(setting, form))).mean(0)
        lines.append(f"| {form} | " + " | ".join(f"{share:.2f}" for share in found.tolist()) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("\n\n".join(map(table, SETTINGS)))
