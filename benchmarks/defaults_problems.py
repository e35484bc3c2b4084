"""Eight small problems, each trained on all its data at once: what people bring to a second-order optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Task:
    """A model and its loss, as a closure without ``backward()``."""

    model: nn.Module
    loss: Callable[[], Tensor]


@dataclass(frozen=True)
class Problem:
    """What is trained: the same data and the same first parameters from the same seed.

    ``budget`` is in seconds; ``rates`` replace the learning rates of a rival whose usual ones are all too large or too
    small here.
    """

    name: str
    about: str
    build: Callable[[int], Task]
    budget: float
    rates: dict[str, tuple[float, ...]] = field(default_factory=dict)


def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers of torch's initialisation with tanh between them."""
    layers: list[nn.Module] = []
    for n, m in pairwise(sizes):
        layers += [nn.Linear(n, m), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def float32(a: object) -> Tensor:
    """An array as float32."""
    return torch.from_numpy(np.asarray(a)).float()


def regression(seed: int, cases: int = 1000) -> Task:
    """Friedman's first function with noise, standardised targets."""
    from sklearn.datasets import make_friedman1

    inputs, targets = make_friedman1(cases, n_features=10, noise=1.0, random_state=seed)
    x, y = float32(inputs), float32((targets - targets.mean()) / targets.std()).unsqueeze(1)
    torch.manual_seed(seed)
    model = mlp(10, 50, 50, 1)
    return Task(model, lambda: F.mse_loss(model(x), y))


def logistic(seed: int, cases: int = 2000) -> Task:
    """Two classes whose 40 features have scales from 0.001 to 1000; a tenth of the labels is wrong."""
    from sklearn.datasets import make_classification

    inputs, labels = make_classification(
        cases, n_features=40, n_informative=20, n_redundant=0, flip_y=0.1, random_state=seed
    )
    scales = np.random.default_rng(seed).permutation(np.logspace(-3, 3, 40))
    x, y = float32(inputs * scales), float32(labels).unsqueeze(1)
    torch.manual_seed(seed)
    model = nn.Linear(40, 1)
    return Task(model, lambda: F.binary_cross_entropy_with_logits(model(x), y))


def digits(cases: int) -> tuple[Tensor, Tensor]:
    """Images (N, 64) in [0, 1] and labels (N,) of scikit-learn's digits."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return float32(found.data[:cases]) / 16, torch.from_numpy(found.target[:cases]).long()


def autoencoder(seed: int, cases: int = 1797) -> Task:
    """Images of digits through 30 numbers."""
    x, _ = digits(cases)
    torch.manual_seed(seed)
    model = mlp(64, 120, 80, 50, 30, 50, 80, 120, 64)
    return Task(model, lambda: F.mse_loss(model(x), x))


class Factors(nn.Module):
    """``u_i' v_j`` for pairs (i, j)."""

    def __init__(self, rows: int, columns: int, rank: int) -> None:
        super().__init__()
        self.rows, self.columns = nn.Embedding(rows, rank), nn.Embedding(columns, rank)
        for table in (self.rows, self.columns):
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, i: Tensor, j: Tensor) -> Tensor:
        product: Tensor = (self.rows(i) * self.columns(j)).sum(1)
        return product


def factorisation(seed: int, rows: int = 300, columns: int = 200, rank: int = 10) -> Task:
    """A matrix of rank 10 with noise of a tenth of its size, of which 30% are known."""
    torch.manual_seed(seed)
    full = torch.randn(rows, rank) @ torch.randn(rank, columns) / rank**0.5
    i, j = (torch.rand(rows, columns) < 0.3).nonzero(as_tuple=True)
    y = full[i, j] + 0.1 * torch.randn(len(i))
    model = Factors(rows, columns, rank)
    return Task(model, lambda: F.mse_loss(model(i, j), y))


def solution(x: Tensor) -> Tensor:
    """``u = sin(pi x) sin(pi y)`` at points (N, 2), as (N, 1); zero on the unit square's border."""
    return torch.sin(math.pi * x).prod(1, keepdim=True)


def poisson_residual(u: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``-(u_xx + u_yy) - f`` at points (N, 2), as (N,), with the f that belongs to :func:`solution`."""
    x = x.detach().requires_grad_()
    (du,) = torch.autograd.grad(u(x).sum(), x, create_graph=True)
    laplace = sum(torch.autograd.grad(du[:, k].sum(), x, create_graph=True)[0][:, k] for k in (0, 1))
    assert isinstance(laplace, Tensor)
    return -laplace - 2 * math.pi**2 * solution(x.detach()).squeeze(1)


def poisson(seed: int, inside: int = 900, border: int = 200) -> Task:
    """A physics-informed network for ``-(u_xx + u_yy) = f`` on the unit square, u = 0 on its border."""
    torch.manual_seed(seed)
    x = torch.rand(inside, 2)
    edge = torch.rand(border, 2)
    side = torch.arange(border)
    edge[side, side % 2] = (side // 2 % 2).float()
    zero, still = torch.zeros(inside), torch.zeros(border, 1)
    model = mlp(2, 32, 32, 1)

    def loss() -> Tensor:
        return F.mse_loss(poisson_residual(model, x), zero) + F.mse_loss(model(edge), still)

    return Task(model, loss)


def sinusoid(seed: int, cases: int = 400) -> Task:
    """``sin 2 pi x + sin(6 pi x) / 2 + sin(10 pi x) / 4`` on [-1, 1]."""
    x = torch.linspace(-1, 1, cases).unsqueeze(1)
    y = torch.sin(2 * math.pi * x) + torch.sin(6 * math.pi * x) / 2 + torch.sin(10 * math.pi * x) / 4
    torch.manual_seed(seed)
    model = mlp(1, 64, 64, 1)
    return Task(model, lambda: F.mse_loss(model(x), y))


def convolutions(seed: int, cases: int = 1000) -> Task:
    """Digits told apart, with a penalty of 1e-4/2 |theta|^2, without which the minimum would lie at infinity."""
    x, labels = digits(cases)
    images = x.view(-1, 1, 8, 8)
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )

    def loss() -> Tensor:
        penalty = sum(p.square().sum() for p in model.parameters())
        return F.cross_entropy(model(images), labels) + 0.5e-4 * penalty

    return Task(model, loss)


class Recurrent(nn.Module):
    """torch's tanh RNN, whose last state is read out."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.recurrent, self.readout = nn.RNN(inputs, hidden), nn.Linear(hidden, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        z: Tensor = self.readout(self.recurrent(inputs)[0][-1])
        return z


def addition(seed: int, cases: int = 1000, steps: int = 12) -> Task:
    """The mean of the two marked numbers of a sequence: one in its first half, one in its second."""
    torch.manual_seed(seed)
    values, marks, each = torch.rand(steps, cases), torch.zeros(steps, cases), torch.arange(cases)
    for low, high in ((0, steps // 2), (steps // 2, steps)):
        marks[torch.randint(low, high, (cases,)), each] = 1.0
    x, y = torch.stack([values, marks], 2), ((values * marks).sum(0) / 2).unsqueeze(1)
    model = Recurrent(2, 40)
    return Task(model, lambda: F.mse_loss(model(x), y))


SMALL = tuple(10.0**-k for k in (9, 8, 7, 6, 5, 4))

PROBLEMS = (
    Problem("regression", "MLP 10-50-50-1 (tanh), Friedman's first function with noise, 1,000 cases", regression, 6.0),
    Problem(
        "logistic",
        "logistic regression, 40 features with scales from 0.001 to 1000, 2,000 cases",
        logistic,
        5.0,
        {"SGD": SMALL},
    ),
    Problem(
        "autoencoder",
        "autoencoder 64-120-80-50-30-50-80-120-64 (tanh), squared error, 1,797 digits",
        autoencoder,
        20.0,
    ),
    Problem(
        "factorisation",
        "a noisy 300 x 200 matrix of rank 10 from 30% of its entries, squared error",
        factorisation,
        5.0,
    ),
    Problem("poisson", "physics-informed MLP 2-32-32-1 (tanh) for a Poisson equation, 1,100 points", poisson, 10.0),
    Problem("sinusoid", "MLP 1-64-64-1 (tanh), a sum of three sines, 400 points", sinusoid, 6.0),
    Problem(
        "convolutions", "CNN of 8 and 16 filters (ReLU), cross-entropy with penalty, 1,000 digits", convolutions, 10.0
    ),
    Problem("addition", "tanh RNN of 40 units, addition problem of 12 steps, 1,000 sequences", addition, 8.0),
)
