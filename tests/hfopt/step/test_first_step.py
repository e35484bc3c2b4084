"""What every first step finds out, and what it costs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import hfopt
from tests.hfopt.tools import mlp, randn

X, Y = randn(12, 3, seed=1), randn(12, 2, seed=2)


def test_another_loss_under_no_grad_is_refused() -> None:
    model = mlp(3, 4, 2, seed=3)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(hfopt.ClosureError, match=r"where its derivatives are computed.*curvature='hessian'"):
        hfopt.HessianFree(model.parameters()).step(
            lambda: F.mse_loss(model(X), Y) * (1.0 if torch.is_grad_enabled() else 2.0)
        )
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_the_curvature_closure_is_looked_at_too() -> None:
    model = mlp(3, 4, 2, seed=3)
    with pytest.raises(hfopt.ClosureError, match="the curvature= closure's loss"):
        hfopt.HessianFree(model.parameters()).step(
            lambda: F.mse_loss(model(X), Y),
            curvature=lambda: F.mse_loss(model(X), Y) * (1.0 if torch.is_grad_enabled() else 2.0),
        )


def test_the_first_step_leaves_no_trace() -> None:
    """Steps with and without it are the same bits, and its runs are in no record."""

    def run(known: bool) -> tuple[list[Tensor], list[int]]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(mlp(3, 6, 2, seed=4), torch.nn.BatchNorm1d(2).double(), torch.nn.Dropout(0.3))
        optimizer = hfopt.HessianFree(model.parameters())
        if known:
            optimizer.trusted = frozenset(seen)
        for _ in range(3):
            optimizer.step(lambda: F.mse_loss(model(X), Y))
        seen.update(optimizer.trusted)
        counts = [n for s in optimizer.stats for n in (s.gradients, s.products, s.evaluations)]
        return [*model.state_dict().values(), torch.get_rng_state()], counts

    seen: set[str] = set()
    (a, counts), (b, others) = run(False), run(True)
    assert counts == others
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_its_price() -> None:
    """Two adjoint passes, one tangent pass, and one run of the closure; and only once."""
    model = mlp(3, 4, 2, seed=3)
    optimizer, calls = hfopt.HessianFree(model.parameters(), preconditioner=None), [0]

    def closure() -> Tensor:
        calls[0] += 1
        return F.mse_loss(model(X), Y)

    extra = []
    for _ in range(3):
        calls[0] = 0
        optimizer.step(closure)
        extra.append(calls[0] - optimizer.stats[-1].gradients - optimizer.stats[-1].evaluations)
    assert extra == [1, 0, 0]


def test_a_new_kind_of_closure_is_looked_at() -> None:
    model = mlp(3, 2, seed=3)
    optimizer = hfopt.HessianFree(model.parameters())
    optimizer.step(lambda: F.mse_loss(model(X), Y))
    with pytest.raises(hfopt.ClosureError, match="where its derivatives are computed"):
        optimizer.step(lambda: F.cross_entropy(model(X), Y.argmax(1)) * (1.0 if torch.is_grad_enabled() else 2.0))


def failing(kind: str, model: Any) -> Callable[[], Tensor]:
    """A loss that has no value beyond a distance of 0.1 from the start."""
    start = [p.detach().clone() for p in model.parameters()]

    def closure() -> Tensor:
        far = sum(float((p.detach() - q).norm()) for p, q in zip(model.parameters(), start, strict=True)) > 0.1
        if far and kind == "cholesky":
            torch.linalg.cholesky(-torch.eye(2))
        if far and kind == "numpy":
            np.linalg.cholesky(-np.eye(2))
        if far and kind == "distribution":
            torch.distributions.Normal(0.0, torch.tensor(-1.0))
        if far and kind == "overflow":
            math.exp(1e4)
        return F.mse_loss(model(X), Y)

    return closure


@pytest.mark.parametrize("kind", ["cholesky", "numpy", "distribution", "overflow"])
def test_a_trial_point_without_a_loss_is_rejected(kind: str) -> None:
    model = mlp(3, 4, 2, seed=5)
    optimizer = hfopt.HessianFree(model.parameters())
    closure = failing(kind, model)
    first = float(closure().detach())
    for _ in range(4):
        optimizer.step(closure)
    assert float(closure().detach()) < first


def test_an_error_at_the_point_itself_is_raised() -> None:
    model = mlp(3, 4, 2, seed=5)
    with pytest.raises(torch.linalg.LinAlgError):  # type: ignore[attr-defined]
        hfopt.HessianFree(model.parameters()).step(
            lambda: F.mse_loss(model(X), Y) + torch.linalg.cholesky(-torch.eye(2)).sum()
        )


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "cg": ({"cg": 30}, r"cg is 30.*CG\(max_iterations=30\)"),
    "line_search": ({"line_search": "strong_wolfe"}, "line_search is 'strong_wolfe'"),
    "loss": ({"loss": "mse"}, "loss is 'mse', but must be a function"),
    "outputs": ({"outputs": "fc"}, "outputs is 'fc'.*not its name"),
    "memory_budget": ({"memory_budget": "1GB"}, r"memory_budget is '1GB'.*bytes"),
    "negative budget": ({"memory_budget": -1}, "must not be negative"),
    "lr": ({"lr": "fast"}, "lr is 'fast'"),
    "nan": ({"lr": float("nan")}, "lr is nan"),
    "weight_decay": ({"weight_decay": -1.0}, "weight_decay is -1.0"),
    "curvature": ({"curvature": "newton"}, "must be one of 'gauss-newton'"),
    "check": ({"check": "yes"}, "check is 'yes'"),
    "history": ({"history": 2.5}, "history is 2.5"),
    "damping": ({"damping": "auto"}, "damping"),
    "preconditioner": ({"preconditioner": "jacobi"}, "preconditioner"),
    "structural": ({"structural_damping": -1}, "structural_damping is -1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_values_are_refused_by_the_constructor(case: str) -> None:
    options, message = WRONG[case]
    with pytest.raises((TypeError, ValueError), match=message):
        hfopt.HessianFree(mlp(3, 2).parameters(), **options)


def test_a_small_learning_rate_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"lr is 0\.01.*100 times shorter"):
        hfopt.HessianFree(mlp(3, 2).parameters(), lr=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hfopt.HessianFree(mlp(3, 2).parameters(), lr=0.5)
        hfopt.HessianFree(mlp(3, 2).parameters(), lr=0.0)


def test_the_former_name_of_structural_damping_stays() -> None:
    optimizer = hfopt.HessianFree(mlp(3, 2).parameters(), structural=0.25)
    assert optimizer.structural_damping == optimizer.structural == 0.25
    optimizer.structural = 0.5
    assert optimizer.structural_damping == 0.5


def test_line_searches_are_not_shared() -> None:
    a, b = (hfopt.HessianFree(mlp(3, 2).parameters()) for _ in range(2))
    assert a.line_search == b.line_search
    assert a.line_search is not b.line_search


def test_a_step_without_a_closure() -> None:
    with pytest.raises((TypeError, ValueError), match=r"step\(\) needs a closure"):
        hfopt.HessianFree(mlp(3, 2).parameters()).step()  # type: ignore[call-arg]
