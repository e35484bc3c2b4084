"""Parameters of every sort: frozen, unused, tied, 0-dim, empty, transposed; complex ones are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hfopt
from tests.hfopt.tools import flat, mlp, randn, theta

X, Y = randn(20, 3, seed=1), randn(20, 2, seed=2)


def lbfgs_style(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(model(X), Y)
        loss.backward()
        return loss

    return closure


class Odd(nn.Module):
    """0-dim, empty, unused, frozen, tied, transposed and 4-d parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.3, dtype=torch.float64))
        self.empty = nn.Parameter(torch.zeros(0, 4, dtype=torch.float64))
        self.unused = nn.Parameter(randn(3, seed=8))
        self.frozen = nn.Parameter(randn(3, 3, seed=9), requires_grad=False)
        self.tied = nn.Linear(3, 3, dtype=torch.float64)
        self.again = nn.Linear(3, 3, dtype=torch.float64)
        self.again.weight = self.tied.weight
        self.transposed = nn.Parameter(randn(2, 3, seed=10).t())
        self.kernel = nn.Parameter(randn(1, 2, 2, 2, seed=11).to(memory_format=torch.channels_last))
        with torch.no_grad():
            for i, p in enumerate([*self.tied.parameters(), self.again.bias]):
                p.copy_(0.5 * randn(*p.shape, seed=12 + i))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.tied(x @ self.frozen))
        h = torch.tanh(self.again(h)) * self.scale + torch.cat([self.empty.sum(1), h.new_zeros(1)]).sum()
        return h @ self.transposed + self.kernel.sum()


def test_parameters_of_every_sort() -> None:
    model = Odd()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    strides = {n: p.stride() for n, p in model.named_parameters()}
    optimizer = hfopt.HessianFree(model.parameters())
    for _ in range(5):
        optimizer.step(lbfgs_style(model, optimizer))
    losses = [s.loss for s in optimizer.stats]
    assert losses[-1] < 0.7 * losses[0]
    after = dict(model.named_parameters())
    assert model.again.weight is model.tied.weight
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved == set(before) - {"empty", "unused", "frozen"}
    assert model.frozen.grad is None
    assert {n: p.stride() for n, p in after.items()} == strides
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.shape == p.shape for p in trainable)


def test_product_with_tied_and_odd_parameters() -> None:
    model = Odd()
    params = [p for p in model.parameters() if p.requires_grad]

    def loss(*values: Tensor) -> Tensor:
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (X,))

    jac = torch.autograd.functional.jacobian(loss, tuple(params))
    j = torch.cat([x.reshape(Y.numel(), -1) for x in jac], 1)
    op = hfopt.GaussNewton(lambda: F.mse_loss(model(X), Y), model.parameters())
    v = randn(op.shape[0], seed=20)
    assert torch.allclose(op @ v, j.T @ (2 / Y.numel() * (j @ v)), rtol=1e-10)


def test_parameters_frozen_in_the_course_of_training() -> None:
    model = mlp(3, 4, 2, seed=21)
    optimizer = hfopt.HessianFree(model.parameters())
    optimizer.step(lbfgs_style(model, optimizer))
    model[0].requires_grad_(False)
    frozen = flat(model[0].parameters())
    optimizer.step(lbfgs_style(model, optimizer))
    assert torch.equal(flat(model[0].parameters()), frozen)
    model[0].requires_grad_(True)
    optimizer.step(lbfgs_style(model, optimizer))
    assert not torch.equal(flat(model[0].parameters()), frozen)
    losses = [s.loss for s in optimizer.stats]
    assert losses == sorted(losses, reverse=True)


def test_frozen_parameters_are_as_if_they_were_constants() -> None:
    """Handed to the optimizer or not, the other parameters take the same steps."""
    model, twin = mlp(3, 4, 2, seed=22), mlp(3, 4, 2, seed=22)
    model[0].requires_grad_(False)
    twin[0].requires_grad_(False)
    a, b = hfopt.HessianFree(model.parameters()), hfopt.HessianFree(twin[2].parameters())
    for _ in range(3):
        a.step(lbfgs_style(model, a))
        b.step(lbfgs_style(twin, b))
        assert torch.equal(theta(model), theta(twin))


def test_complex_parameters_are_refused_with_the_way_out() -> None:
    with pytest.raises(TypeError, match="view_as_real"):
        hfopt.HessianFree([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])


def test_complex_numbers_inside_a_model_are_no_obstacle() -> None:
    """The way out: a complex weight as a real parameter of its real and imaginary parts."""
    weight = nn.Parameter(randn(3, 2, 2, seed=23))
    optimizer = hfopt.HessianFree([weight])
    for _ in range(5):
        optimizer.step(lambda: F.mse_loss((X.to(torch.complex128) @ torch.view_as_complex(weight)).abs(), Y))
    assert optimizer.stats[-1].new_loss < 0.9 * optimizer.stats[0].loss
