"""Backward passes that autograd cannot differentiate: products are right, or they are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hfopt
from tests.hfopt.tools import randn

F64 = torch.float64
X, Y = randn(9, 3, seed=1), randn(9, 2, seed=2)


class NoGrad(torch.autograd.Function):
    """tanh, the backward pass under no_grad: the whole of J v is lost."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        ctx.save_for_backward(r := torch.tanh(a))
        return r

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        with torch.no_grad():
            return g * (1 - ctx.saved_tensors[0] ** 2)


class Numpy(NoGrad):
    """tanh, the backward pass in numpy."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return torch.from_numpy(g.detach().numpy() * (1 - ctx.saved_tensors[0].detach().numpy() ** 2))


class HalfHidden(NoGrad):
    """tanh, of whose backward pass half is computed from ``.data``: part of J v is lost."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        slope = 1 - ctx.saved_tensors[0].detach() ** 2
        return 0.5 * g * slope + 0.5 * g.data * slope


class Right(NoGrad):
    """tanh, the backward pass in operations that autograd sees."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * (1 - ctx.saved_tensors[0] ** 2)


def net(function: Callable[[Tensor], Tensor]) -> tuple[nn.Module, Callable[[], Tensor]]:
    torch.manual_seed(0)
    first, last = nn.Linear(3, 4, dtype=F64), nn.Linear(4, 2, dtype=F64)
    return nn.ModuleList([first, last]), lambda: F.mse_loss(last(function(first(X))), Y)


def dense(closure: Callable[[], Tensor], model: nn.Module, **options: Any) -> Tensor:
    op = hfopt.GaussNewton(closure, model.parameters(), **options)
    return op @ torch.eye(len(op.gradient), dtype=F64)


@pytest.mark.parametrize("function", [NoGrad, Numpy, HalfHidden])
@pytest.mark.parametrize("linearisation", ["auto", "double-backward", "recompute"])
def test_hidden_arithmetic_is_refused(function: Any, linearisation: str) -> None:
    model, closure = net(function.apply)
    with pytest.raises(hfopt.NotDifferentiable, match="linearisation='differences'"):
        hfopt.GaussNewton(closure, model.parameters(), linearisation=linearisation)
    with pytest.raises(hfopt.NotDifferentiable):
        hfopt.HessianFree(model.parameters(), linearisation=linearisation).step(closure)  # type: ignore[arg-type]


def test_a_right_backward_pass_is_not_refused() -> None:
    (model, closure), (plain, expected) = net(Right.apply), net(torch.tanh)
    assert torch.allclose(dense(closure, model), dense(expected, plain), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("function", [NoGrad, Numpy, HalfHidden])
def test_differences_are_the_way_out(function: Any) -> None:
    """The error of a central difference in float64 is some eps^(2/3) = 4e-11 of the third derivatives."""
    model, closure = net(function.apply)
    plain, expected = net(torch.tanh)
    G = dense(closure, model, linearisation="differences")
    assert float((G - dense(expected, plain)).norm() / G.norm()) < 1e-8
    optimizer = hfopt.HessianFree(model.parameters(), linearisation="differences", preconditioner=None)
    other = hfopt.HessianFree(plain.parameters(), preconditioner=None)
    for _ in range(12):
        optimizer.step(closure)
        other.step(expected)
    assert float(closure().detach()) < 1.5 * float(expected().detach()) + 1e-6


def test_differences_of_a_recurrent_net_in_float32_with_structural_damping() -> None:
    from models import RNN

    torch.manual_seed(0)
    rnn = RNN(2, 5, 1)
    x, y = torch.randn(6, 4, 2), torch.randn(6, 4, 1)

    def closure() -> Tensor:
        return F.mse_loss(rnn(x), y)

    v = torch.randn(sum(p.numel() for p in rnn.parameters()))
    a = hfopt.GaussNewton(closure, rnn.parameters(), structural=True).damped(0.1, 0.5) @ v
    b = hfopt.GaussNewton(closure, rnn.parameters(), structural=True, linearisation="differences").damped(0.1, 0.5) @ v
    assert float((a - b).norm() / a.norm()) < 1e-3
    rnn_before = [p.detach().clone() for p in rnn.parameters()]
    assert all(torch.equal(p, q) for p, q in zip(rnn.parameters(), rnn_before, strict=True))


class Equilibrium(nn.Module):
    """``z = tanh(W z + U x)``, differentiated by a hook that solves the adjoint fixed point without a graph."""

    def __init__(self, differentiable: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.W, self.U = nn.Parameter(0.2 * torch.randn(4, 4, dtype=F64)), nn.Linear(3, 4, dtype=F64)
        self.R, self.differentiable = nn.Linear(4, 2, dtype=F64), differentiable

    def forward(self, x: Tensor) -> Tensor:
        def f(z: Tensor) -> Tensor:
            return torch.tanh(z @ self.W.t() + self.U(x))

        z = torch.zeros(len(x), 4, dtype=F64)
        with torch.no_grad():
            for _ in range(60):
                z = f(z)
        z = f(z)
        if z.requires_grad:
            z0 = z.detach().requires_grad_()
            f0 = f(z0)

            def hook(g: Tensor) -> Tensor:
                h = g
                for _ in range(60):
                    h = torch.autograd.grad(f0, z0, h, retain_graph=True, create_graph=self.differentiable)[0] + g
                return h

            z.register_hook(hook)
        found: Tensor = self.R(z)
        return found


def test_a_hook_that_solves_without_a_graph_is_refused() -> None:
    model = Equilibrium(differentiable=False)
    with pytest.raises(hfopt.NotDifferentiable, match=r"<w, J v> is .*, but <J'w, v> is"):
        hfopt.HessianFree(model.parameters()).step(lambda: F.mse_loss(model(X), Y))
    good = hfopt.HessianFree(model.parameters(), linearisation="differences")
    first = float(F.mse_loss(model(X), Y).detach())
    for _ in range(3):
        good.step(lambda: F.mse_loss(model(X), Y))
    assert good.stats[-1].new_loss < 0.5 * first


@pytest.mark.parametrize("bound", [1e-4, 1e-2])
def test_a_hook_that_clips_is_refused(bound: float) -> None:
    def clipped(a: Tensor) -> Tensor:
        a = torch.tanh(a)
        if a.requires_grad:
            a.register_hook(lambda g: g.clamp(-bound, bound))
        return a

    model, closure = net(clipped)
    with pytest.raises(hfopt.NotDifferentiable, match=r"not linear|would be wrong"):
        hfopt.HessianFree(model.parameters()).step(closure)


def test_a_straight_through_estimator_is_taken_as_autograd_sees_it() -> None:
    model, closure = net(lambda a: a + (a.round() - a).detach())
    hfopt.HessianFree(model.parameters()).step(closure)


def test_a_hidden_backward_under_the_hessian_is_refused() -> None:
    model, closure = net(NoGrad.apply)
    with pytest.raises((hfopt.CheckFailed, hfopt.NotDifferentiable)):
        hfopt.HessianFree(model.parameters(), curvature="hessian").step(closure)
    right, fine = net(Right.apply)
    hfopt.HessianFree(right.parameters(), curvature="hessian").step(fine)


def test_zero_gradients_without_a_graph_are_no_loss() -> None:
    """torch.round's own derivative is zero and depends on nothing."""
    model, closure = net(torch.round)
    G = dense(closure, model)
    assert np.isfinite(G.numpy()).all()
