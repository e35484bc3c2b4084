"""K-FAC where a criterion sees the outputs of layers joined, flattened, sliced, masked or differentiated."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hfopt
from hfopt.preconditioners import KFAC, Automatic
from tests.hfopt.preconditioners.preconditioned import dense
from tests.hfopt.tools import mlp, randn, relative, theta

Joined = Callable[[Sequence[Tensor]], Tensor]
POINTS = [randn(n, 2, seed=n) for n in (24, 9, 5)]


def zero(z: Tensor) -> Tensor:
    """Mean square."""
    return F.mse_loss(z, torch.zeros_like(z))


def fitted(model: nn.Module) -> list[Tensor]:
    """Differences to a function at three sets of points, (n, 1) each."""
    return [model(x) - torch.sin(3 * x[:, :1]) * x[:, 1:] for x in POINTS]


def heat(model: nn.Module) -> list[Tensor]:
    """Residuals of ``u_t = 0.1 u_xx`` inside, of its initial and of its boundary values."""
    inside, start, edge = (x.clone() for x in POINTS)
    inside.requires_grad_()
    (du,) = torch.autograd.grad(model(inside).sum(), inside, create_graph=True)
    (second,) = torch.autograd.grad(du[:, 0].sum(), inside, create_graph=True)
    start[:, 1] = 0.0
    edge[:, 0] = edge[:, 0].sign()
    return [du[:, 1:] - 0.1 * second[:, :1], model(start) - torch.sin(3 * start[:, :1]), model(edge)]


def burgers(model: nn.Module) -> list[Tensor]:
    """Those of ``u_t + u u_x = 0.01 u_xx``."""
    inside = POINTS[0].clone().requires_grad_()
    u = model(inside)
    (du,) = torch.autograd.grad(u.sum(), inside, create_graph=True)
    (second,) = torch.autograd.grad(du[:, 0].sum(), inside, create_graph=True)
    return [du[:, 1:] + u * du[:, :1] - 0.01 * second[:, :1], *heat(model)[1:]]


JOINED: dict[str, Joined] = {
    "cat": lambda zs: zero(torch.cat(list(zs))),
    "flattened": lambda zs: zero(torch.cat([z.flatten() for z in zs])),
    "squeezed": lambda zs: zero(torch.cat([z.squeeze(1) for z in zs])),
    "in a row": lambda zs: zero(torch.cat([z.t() for z in zs], 1)),
    "padded and sliced": lambda zs: zero(F.pad(torch.cat(list(zs)), (0, 1, 2, 0))[2:, :-1]),
    "masked": lambda zs: zero(torch.cat([torch.cat([z, 1 + z])[torch.arange(2 * len(z)) < len(z)] for z in zs])),
}


def steps(form: Joined | None, residuals: Callable[[nn.Module], list[Tensor]], count: int = 3, **options: Any) -> Any:
    """Parameters and optimizer after a few steps; None is for a criterion of every set of points."""
    model = mlp(2, 8, 8, 1, seed=3)
    optimizer = hfopt.HessianFree(model.parameters(), **{"solver": "cg", **options})

    def closure() -> Tensor:
        zs = residuals(model)
        if form is not None:
            return form(zs)
        whole = sum(z.numel() for z in zs)
        return torch.stack([zero(z) * (z.numel() / whole) for z in zs]).sum()

    for _ in range(count):
        optimizer.step(closure)
    return theta(model), optimizer


@functools.cache
def separate(preconditioner: str) -> Any:
    """The steps of a criterion of every set of points, which all forms are compared with."""
    return steps(None, fitted, preconditioner=preconditioner)


@pytest.mark.parametrize("preconditioner", ["auto", "kfac"])
@pytest.mark.parametrize("form", JOINED)
def test_joined_residuals_take_the_steps_of_separate_criteria(form: str, preconditioner: str) -> None:
    apart, first = separate(preconditioner)
    joined, second = steps(JOINED[form], fitted, preconditioner=preconditioner)
    torch.testing.assert_close(joined, apart, rtol=1e-6, atol=1e-8)
    assert [s.cg_iterations for s in first.stats] == [s.cg_iterations for s in second.stats]
    if preconditioner == "auto":
        assert first.preconditioner.chosen
        assert second.preconditioner.chosen


@pytest.mark.parametrize("residuals", [heat, burgers])
def test_residuals_with_derivatives_do_as_well(residuals: Callable[[nn.Module], list[Tensor]]) -> None:
    apart, _ = steps(None, residuals)
    joined, optimizer = steps(JOINED["cat"], residuals)
    torch.testing.assert_close(joined, apart, rtol=1e-6, atol=1e-8)
    assert optimizer.preconditioner.chosen


class Tokens(nn.Module):
    """A network of tokens (B, T), of one-hot inputs, whose layers see (B, T, k)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp(7, 6, 7, seed=4)

    def forward(self, s: Tensor) -> Tensor:
        found: Tensor = self.layers(F.one_hot(s, 7).double())
        return found


def test_flattened_tokens_take_the_steps_of_the_criterion_on_all_dimensions() -> None:
    """``view(-1, V)``, and the same criterion on (B, V, T); the draws are alike too, up to their places."""
    draws = torch.Generator().manual_seed(0)
    s, wanted = (torch.randint(0, 7, (12, 5), generator=draws) for _ in range(2))

    def factors(loss: Callable[[Tensor], Tensor]) -> Tensor:
        model = Tokens()
        op = hfopt.GaussNewton(lambda: loss(model(s)), model.parameters())
        m = KFAC(samples=200)
        m.refresh(op, 0)
        m.damp(0.05, 0.0)
        return dense(m, op.shape[0])

    whole = factors(lambda z: F.cross_entropy(z.movedim(2, 1), wanted))
    flat = factors(lambda z: F.cross_entropy(z.view(-1, 7), wanted.view(-1)))
    # G is the mean over 200 draws of squares whose sizes differ by about one: to 1 / sqrt(200), five times.
    assert relative(flat, whole) < 0.35
    model = Tokens()
    optimizer = hfopt.HessianFree(model.parameters(), solver="cg")
    losses = [
        float(optimizer.step(lambda: F.cross_entropy(model(s)[:, :-1].reshape(-1, 7), s[:, 1:].reshape(-1))))
        for _ in range(3)
    ]
    assert isinstance(optimizer.preconditioner, Automatic)
    assert optimizer.preconditioner.chosen
    assert losses[-1] < losses[0]


def test_draws_of_joined_outputs_are_those_of_separate_criteria() -> None:
    """With several numbers in a row, what is drawn matters to the factors."""

    def factors(joined: bool) -> list[Tensor]:
        model = mlp(2, 4, 3, seed=10)

        def closure() -> Tensor:
            zs = [model(x) for x in POINTS]
            if joined:
                return zero(torch.cat(zs))
            whole = sum(z.numel() for z in zs)
            return torch.stack([zero(z) * (z.numel() / whole) for z in zs]).sum()

        m = KFAC()
        m.refresh(hfopt.GaussNewton(closure, model.parameters()), 3)
        return [t for f in m.factors for t in (f.a, f.g)]

    assert all(relative(a, b) < 1e-12 for a, b in zip(factors(True), factors(False), strict=True))


def test_factors_of_rows_by_loops() -> None:
    """Different numbers of rows in every call: ``A = (1/R) sum x x'`` and ``G = sum g g'`` over all of them."""
    model = mlp(2, 3, seed=5)
    op = hfopt.GaussNewton(lambda: zero(torch.cat([model(x).flatten() for x in POINTS])), model.parameters())
    m = KFAC(samples=1)
    m.refresh(op, 7)
    (f,) = m.factors
    rows = torch.cat([torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1) for x in POINTS])
    assert relative(f.a, rows.T @ rows / len(rows)) < 1e-13
    # The signs of a draw do not matter to the diagonal of G, each term of which is 2 / (numbers in all).
    assert torch.allclose(f.g.diagonal(), torch.full((3,), 2 / 3, dtype=torch.float64), rtol=1e-13)


def test_a_dimension_of_cases_that_an_output_lacks_is_of_no_matter() -> None:
    """A time-major network with batch_dim=1, flattened; and a number beside the outputs."""
    model, scale = mlp(2, 6, 1, seed=6), nn.Parameter(torch.tensor(1.3, dtype=torch.float64))
    x = randn(4, 5, 2, seed=7)
    for loss in (lambda: zero(model(x).flatten()), lambda: zero(model(x)) + F.mse_loss(scale, torch.ones_like(scale))):
        optimizer = hfopt.HessianFree([*model.parameters(), scale], batch_dim=1, solver="cg")
        optimizer.step(loss)
        assert isinstance(optimizer.preconditioner, Automatic)
        assert optimizer.preconditioner.chosen


def test_layers_inside_a_transform_are_missed_aloud() -> None:
    model, x = mlp(2, 6, 1, seed=8), POINTS[0]
    optimizer = hfopt.HessianFree(model.parameters(), solver="cg")

    def closure() -> Tensor:
        return zero(torch.func.vmap(torch.func.jacrev(lambda one: model(one).sum()))(x) - 1.0)

    with pytest.warns(UserWarning, match=r"K-FAC.*is left out: layers inside a transform of torch.func.*autograd.grad"):
        optimizer.step(closure)
    for _ in range(2):
        optimizer.step(closure)  # says so once
    assert isinstance(optimizer.preconditioner, Automatic)
    assert optimizer.preconditioner.chosen is False


def test_a_network_that_makes_another_ones_weights_is_left_out_aloud() -> None:
    """Its layers have a single row."""
    torch.manual_seed(9)
    maker = mlp(3, 8, 12, seed=9)
    code, x = randn(1, 3, seed=1), POINTS[0]
    optimizer = hfopt.HessianFree(maker.parameters(), solver="cg")

    def closure() -> Tensor:
        made = maker(code).view(6, 2)
        return zero(torch.tanh(x @ made.t()).sum(1) - 0.3)

    with pytest.warns(UserWarning, match="most layers have a single row of inputs"):
        optimizer.step(closure)
    assert isinstance(optimizer.preconditioner, Automatic)
    assert optimizer.preconditioner.chosen is False
