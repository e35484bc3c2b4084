"""Squares written by hand are squared error: same matrix, gradient and K-FAC as mse_loss to zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hfopt
from hfopt.errors import ClosureError
from tests.hfopt.tools import dense_gauss_newton, dense_hessian, flat, matrix, mlp, randn, relative

X, Y = randn(6, 3, seed=1), randn(6, 2, seed=2)
WEIGHTS = randn(6, 2, seed=3).abs() + 0.1


def net(seed: int = 4) -> Any:
    return mlp(3, 3, 2, seed=seed)


def weighted_sum(r: Tensor) -> Tensor:
    return 0.3 * (r[:, :1] ** 2).mean() + 2 * (r[:, 1:].square().sum() - 5) / 7


def accumulated(r: Tensor) -> Tensor:
    total = torch.zeros((), dtype=r.dtype)
    for row in r:
        total += (row**2).sum() / 3
    return total


def in_place(r: Tensor) -> Tensor:
    each = r**2
    each *= WEIGHTS
    return each.mean()


# Each with the weights of the squares: the matrix is J' diag(2 w) J.
FORMS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "power": (lambda r: (r**2).mean(), lambda r: (r * r).mean()),
    "square": (lambda r: torch.mean(torch.square(r)), lambda r: (r * r).mean()),
    "pow": (lambda r: r.pow(2).sum(), lambda r: (r * r).sum()),
    "float exponent": (lambda r: torch.pow(r, 2.0).sum(), lambda r: (r * r).sum()),
    "product": (lambda r: (r * r).mean(), lambda r: (r * r).mean()),
    "dot": (lambda r: torch.dot(r.flatten(), r.flatten()), lambda r: (r * r).sum()),
    "same dot": (lambda r: (lambda v: v @ v)(r.flatten()), lambda r: (r * r).sum()),
    "norm": (lambda r: torch.linalg.vector_norm(r) ** 2, lambda r: (r * r).sum()),
    "norm of rows": (lambda r: r.norm(dim=1).pow(2).mean(), lambda r: (r * r).sum(1).mean()),
    "norm of columns": (lambda r: torch.norm(r, dim=0, keepdim=True).square().sum(), lambda r: (r * r).sum()),
    "frobenius": (lambda r: torch.linalg.matrix_norm(r) ** 2, lambda r: (r * r).sum()),
    "weights": (lambda r: (WEIGHTS * r**2).sum() / WEIGHTS.sum(), lambda r: (WEIGHTS * r**2).sum() / WEIGHTS.sum()),
    "half": (lambda r: 0.5 * (r**2).sum(1).mean(), lambda r: 0.5 * (r * r).sum(1).mean()),
    "several": (weighted_sum, weighted_sum),
    "accumulated": (accumulated, lambda r: (r * r).sum() / 3),
    "in place": (in_place, lambda r: (WEIGHTS * r * r).mean()),
    "root": (lambda r: ((r**2).sum(1).add(1e-9).sqrt() ** 2).mean(), lambda r: (r * r).sum(1).mean()),
}


def mean_square(model: nn.Module) -> Tensor:
    error: Tensor = ((model(X) - Y) ** 2).mean()
    return error


def gauss_newton(model: nn.Module, loss: Callable[[Tensor], Tensor]) -> Tensor:
    return dense_gauss_newton(model, lambda m: m(X) - Y, loss)


@pytest.mark.parametrize("name", [n for n in FORMS if n not in ("dot", "root")])
def test_forms_of_squares(name: str) -> None:
    model = net()
    form, same = FORMS[name]
    op = hfopt.GaussNewton(lambda: form(model(X) - Y), model.parameters())
    assert relative(matrix(op), gauss_newton(model, same)) < 1e-12
    plain = torch.autograd.grad(form(model(X) - Y), list(model.parameters()))
    assert relative(op.gradient, flat(plain)) < 1e-13
    assert float(op.loss) == pytest.approx(float(form(model(X) - Y).detach()), rel=1e-14)


@pytest.mark.parametrize("linearisation", ["double-backward", "linearize", "recompute"])
def test_squares_in_every_linearisation(linearisation: str) -> None:
    model = net()
    op = hfopt.GaussNewton(lambda: mean_square(model), model.parameters(), linearisation=linearisation)
    assert relative(matrix(op), gauss_newton(model, lambda r: (r * r).mean())) < 1e-12


def test_kfac_is_that_of_mse_loss() -> None:
    model, precondition = net(), hfopt.preconditioners.KFAC()
    found = []
    for loss in (mean_square, lambda m: F.mse_loss(m(X) - Y, torch.zeros_like(Y))):
        op = hfopt.GaussNewton(lambda loss=loss: loss(model), model.parameters())  # type: ignore[misc]
        precondition.refresh(op, 0)
        found.append([t.clone() for f in precondition.factors for t in (f.a, f.g)])
    assert len(found[0]) == 4
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_steps_are_those_of_mse_loss() -> None:
    found = []
    for loss in (mean_square, lambda m: F.mse_loss(m(X) - Y, torch.zeros_like(Y))):
        model = net()
        optimizer = hfopt.HessianFree(model.parameters(), preconditioner="kfac")
        for _ in range(3):
            optimizer.step(lambda loss=loss, model=model: loss(model))  # type: ignore[misc]
        found.append(flat(list(model.parameters())))
    assert relative(found[0], found[1]) < 1e-9


T = torch.linspace(0, 1, 8, dtype=torch.float64)[:, None]


def residual(m: nn.Module, t: Tensor) -> Tensor:
    """``u_t - u_tt``."""
    u = m(t)
    (first,) = torch.autograd.grad(u.sum(), t, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), t, create_graph=True)
    return first - second


def by_rows(model: nn.Module, outputs: Tensor, weights: Tensor) -> Tensor:
    """``2 J' diag(w) J``, J one row after the other."""
    params = list(model.parameters())
    rows = [torch.autograd.grad(z, params, retain_graph=True, allow_unused=True) for z in outputs.flatten()]
    full = [[torch.zeros_like(p) if g is None else g for g, p in zip(row, params, strict=True)] for row in rows]
    jacobian = torch.stack([flat(row) for row in full])
    return 2 * jacobian.T @ (weights[:, None] * jacobian)


def test_residuals_of_differential_equations() -> None:
    """The form of every physics-informed code: residual, boundary and penalty."""
    model = mlp(1, 4, 1, seed=5)
    t = T.clone().requires_grad_()

    def loss() -> Tensor:
        penalty = sum((p**2).sum() for p in model.parameters())
        return (residual(model, t) ** 2).mean() + 10 * ((model(T[:1]) - 1) ** 2).mean() + 1e-3 * penalty

    weights = torch.cat([torch.full((8,), 1 / 8), torch.tensor([10.0])]).double()
    expected = by_rows(model, torch.cat([residual(model, t), model(T[:1]) - 1]), weights)
    expected = expected + 2e-3 * torch.eye(len(expected), dtype=torch.float64)
    op = hfopt.GaussNewton(loss, model.parameters())
    assert relative(matrix(op), expected) < 1e-9
    assert op.outputs == len(T) + 1  # the penalty is none of the outputs


def test_a_residual_beside_a_criterion() -> None:
    model = mlp(1, 4, 1, seed=6)
    t = T.clone().requires_grad_()

    def loss() -> Tensor:
        return F.mse_loss(model(T[:2]), T[:2]) + (residual(model, t) ** 2).mean()

    weights = torch.cat([torch.full((8,), 1 / 8), torch.full((2,), 1 / 2)]).double()
    expected = by_rows(model, torch.cat([residual(model, t), model(T[:2]) - T[:2]]), weights)
    assert relative(matrix(hfopt.GaussNewton(loss, model.parameters())), expected) < 1e-9


def test_an_activity_penalty_beside_a_criterion() -> None:
    model = nn.ModuleList([mlp(3, 3, seed=7), mlp(3, 2, seed=8)])

    def loss() -> Tensor:
        h = model[0](X).tanh()
        return F.cross_entropy(model[1](h), Y.argmax(1)) + 0.1 * h.square().mean()

    def both(m: nn.Module) -> Tensor:
        h = m[0](X).tanh()  # type: ignore[index]
        return torch.cat([h, m[1](h)], 1)  # type: ignore[index]

    expected = dense_gauss_newton(
        model, both, lambda z: F.cross_entropy(z[:, 3:], Y.argmax(1)) + 0.1 * z[:, :3].square().mean()
    )
    assert relative(matrix(hfopt.GaussNewton(loss, model.parameters())), expected) < 1e-9


PENALTIES: dict[str, Callable[[nn.Module], Any]] = {
    "l2": lambda m: sum((p**2).sum() for p in m.parameters()),
    "l2 of differences": lambda m: sum((p - 0.3).pow(2).mean() for p in m.parameters()),
    "l2 of all": lambda m: torch.cat([p.flatten() for p in m.parameters()]).norm() ** 2,
    "orthogonal": lambda m: (m[0].weight @ m[0].weight.T - torch.eye(3)).square().sum(),  # type: ignore[index]
    "quartic": lambda m: sum(p.square().square().sum() for p in m.parameters()),
}


@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("own", [False, True])
def test_squares_of_parameters_are_regularisers(name: str, own: bool) -> None:
    """Beside a criterion, or squares by hand."""
    model, penalty = net(), PENALTIES[name]
    error = (lambda r: (r**2).mean()) if own else (lambda r: F.mse_loss(r, torch.zeros_like(r)))
    op = hfopt.GaussNewton(lambda: error(model(X) - Y) + 0.1 * penalty(model), model.parameters())
    expected = gauss_newton(model, lambda r: (r * r).mean()) + 0.1 * dense_hessian(model, penalty)
    assert relative(matrix(op), expected) < 1e-10
    assert op.outputs == Y.numel()


class RMSNorm(nn.Module):
    """Normalises by a root of a mean of squares, and returns how large they were."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()


def normalised() -> nn.Sequential:
    return nn.Sequential(mlp(3, 4, seed=9), RMSNorm(), mlp(4, 2, seed=10))


@pytest.mark.parametrize("own", [False, True])
def test_squares_inside_a_network_are_part_of_it(own: bool) -> None:
    model = normalised()

    def loss() -> Tensor:
        z = model(X)
        return ((z - Y) ** 2).mean() if own else F.mse_loss(z, Y)

    op = hfopt.GaussNewton(loss, model.parameters())
    assert relative(matrix(op), dense_gauss_newton(model, lambda m: m(X), lambda z: F.mse_loss(z, Y))) < 1e-10
    assert op.outputs == Y.numel()


def log_cosh(z: Tensor) -> Tensor:
    return (z - Y).cosh().log().mean()


@pytest.mark.parametrize(
    "loss",
    [
        lambda z: (z**2).mean().sqrt(),
        lambda z: (z**2).mean().log() + 1,
        lambda z: ((z - Y) ** 2).mean() * z.exp().mean(),
        lambda z: ((z - Y) ** 2).mean() + z.exp().mean(),
        lambda z: ((z - Y) ** 2 / (1 + z**2)).mean(),
        lambda z: (z - z.mean(0)).pow(2).mean().clamp_min(1e-3).rsqrt() * z.sum(),
        lambda z: ((z - Y) ** 2).square().mean(),
        log_cosh,
    ],
)
def test_squares_that_are_used_otherwise_are_no_loss(loss: Callable[[Tensor], Tensor]) -> None:
    model = net()
    with pytest.raises(ClosureError, match=r"no known criterion.*curvature='hessian'"):
        hfopt.GaussNewton(lambda: loss(model(X)), model.parameters())


@pytest.mark.parametrize("penalty", [0.0, 0.1])
def test_penalties_do_not_make_an_unknown_loss_known(penalty: float) -> None:
    model = net()
    with pytest.raises(ClosureError, match="no known criterion"):
        hfopt.GaussNewton(lambda: log_cosh(model(X)) + penalty * PENALTIES["l2"](model), model.parameters())


def test_squares_beside_another_unknown_loss_are_refused() -> None:
    model = net()
    with pytest.raises(ClosureError, match="no known criterion"):
        hfopt.GaussNewton(lambda: log_cosh(model(X)) + ((model(X[:2]) - 1) ** 2).mean(), model.parameters())


def test_least_squares_in_parameters_alone() -> None:
    theta = torch.tensor([-1.2, 1.0], dtype=torch.float64, requires_grad=True)
    optimizer = hfopt.HessianFree([theta])

    def rosenbrock() -> Tensor:
        return (1 - theta[0]) ** 2 + 100 * (theta[1] - theta[0] ** 2) ** 2

    jacobian = torch.tensor([[-1.0, 0.0], [2.4, 1.0]], dtype=torch.float64)
    expected = 2 * jacobian.T @ torch.diag(torch.tensor([1.0, 100.0], dtype=torch.float64)) @ jacobian
    assert relative(matrix(hfopt.GaussNewton(rosenbrock, [theta])), expected) < 1e-12
    for _ in range(30):
        optimizer.step(rosenbrock)
    assert float(rosenbrock().detach()) < 1e-12


def test_batches_one_by_one() -> None:
    model = net()

    def closure() -> Tensor:
        total = torch.zeros((), dtype=X.dtype)
        for x, y in zip(X.split(2), Y.split(2), strict=True):
            loss = ((model(x) - y) ** 2).mean() / 3
            loss.backward()  # type: ignore[no-untyped-call]
            total = total + loss
        (0.1 * PENALTIES["l2"](model)).backward()
        return total

    op = hfopt.GaussNewton(closure, model.parameters(), linearisation="recompute")
    assert len(op.parts) == 4
    expected = gauss_newton(model, lambda r: (r * r).mean())
    assert relative(matrix(op), expected + 0.2 * torch.eye(len(expected), dtype=X.dtype)) < 1e-12
