"""Nine small problems to count products on, each trained on all its data at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

import pathological
from benchmarks import defaults_problems as small
from benchmarks.defaults_problems import Task
from models import RNN


@dataclass(frozen=True)
class Problem:
    """What is trained, from a seed, and the optimizer's further settings."""

    name: str
    about: str
    build: Callable[[int], Task]
    options: dict[str, Any] = field(default_factory=dict)


def multiplication(seed: int, cases: int = 150, steps: int = 20) -> Task:
    """The product of the two marked numbers of a sequence, sparse initialisation."""
    torch.manual_seed(seed)
    problem = pathological.multiplication(steps, batch_size=cases, seed=seed)
    batch = problem(0)
    model = RNN(problem.V, 50, problem.O)
    model.sparse_init(seed, connections=15, scale=1.0, input_scale=0.25)
    return Task(model, lambda: problem.loss(model(batch.inputs), batch))


PROBLEMS = {
    problem.name: problem
    for problem in (
        Problem(
            "regression",
            "MLP 10-50-50-1 (tanh), Friedman's first function with noise, 300 cases",
            lambda seed: small.regression(seed, 300),
        ),
        Problem(
            "logistic",
            "logistic regression, 40 features with scales from 0.001 to 1000, 500 cases",
            lambda seed: small.logistic(seed, 500),
        ),
        Problem(
            "autoencoder",
            "autoencoder 64-120-80-50-30-50-80-120-64 (tanh), 150 digits",
            lambda seed: small.autoencoder(seed, 150),
        ),
        Problem(
            "factorisation",
            "a noisy 80 x 60 matrix of rank 5 from 30% of its entries",
            lambda seed: small.factorisation(seed, 80, 60, 5),
        ),
        Problem(
            "poisson",
            "physics-informed MLP 2-32-32-1 (tanh), Poisson equation, 210 points",
            lambda seed: small.poisson(seed, 150, 60),
        ),
        Problem(
            "sinusoid", "MLP 1-64-64-1 (tanh), a sum of three sines, 120 points", lambda seed: small.sinusoid(seed, 120)
        ),
        Problem(
            "convolutions",
            "CNN of 8 and 16 filters (ReLU), cross-entropy with penalty, 100 digits",
            lambda seed: small.convolutions(seed, 100),
        ),
        Problem(
            "addition",
            "tanh RNN of 40 units, addition problem of 12 steps, 200 sequences",
            lambda seed: small.addition(seed, 200, 12),
        ),
        Problem(
            "multiplication",
            "tanh RNN of 50 units, multiplication problem of 20 steps, 150 sequences, structural damping 1/30",
            multiplication,
            {"structural": 1 / 30, "weight_decay": 2e-5},
        ),
    )
}
