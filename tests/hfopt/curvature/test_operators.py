"""Operators as matrices: vectors of every form, sums with damping, structural damping, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hfopt
from hfopt import structural
from tests.hfopt.tools import DENSE, SUMS, dense_gauss_newton, dense_hessian, jacobian, matrix, mlp, randn, relative

X, Y = randn(6, 3, seed=1), randn(6, 2, seed=2)
CLASSES = torch.tensor([0, 1, 1, 0, 1, 0])


def loss(z: Tensor) -> Tensor:
    return F.mse_loss(z, Y) + F.cross_entropy(z, CLASSES)


def operators(model: nn.Module) -> dict[str, Any]:
    def closure() -> Tensor:
        return loss(model(X))

    return {
        "gauss-newton": hfopt.GaussNewton(closure, model.parameters()),
        "hessian": hfopt.Hessian(closure, model.parameters()),
        "fisher": hfopt.Fisher(closure, model.parameters()),
        "empirical-fisher": hfopt.Fisher(closure, model.parameters(), kind="empirical"),
        "damped": hfopt.GaussNewton(closure, model.parameters()).damped(0.3, decay=0.1),
    }


NAMES = list(operators(mlp(3, 2)))
EVERY = pytest.mark.parametrize("name", NAMES)


@pytest.mark.parametrize("decay", [0.0, 0.2])
def test_hessian_equals_the_dense_matrix(decay: float) -> None:
    model = mlp(3, 4, 2, seed=3)

    def whole(m: nn.Module) -> Tensor:
        squares = sum((p.pow(4).sum() for p in m.parameters()), start=torch.zeros((), dtype=X.dtype))
        return loss(m(X)).sqrt() + decay * squares

    op = hfopt.Hessian(lambda: whole(model), model.parameters())
    got = matrix(op)
    assert relative(got, dense_hessian(model, whole)) < DENSE
    assert relative(got, got.T) < SUMS
    assert torch.linalg.eigvalsh((got + got.T) / 2)[0] < 0  # indefinite here: the sign must not be lost
    assert op.loss.item() == pytest.approx(whole(model).item(), rel=SUMS)


@EVERY
def test_every_form_of_vector_gives_the_same(name: str) -> None:
    model = mlp(3, 4, 2, seed=4)
    op = operators(model)[name]
    P = op.shape[0]
    dense = matrix(op)
    assert op.shape == (P, P) == (26, 26)
    assert (op.dtype, op.device) == (torch.float64, torch.device("cpu"))
    v = randn(P, seed=5)
    assert relative(op @ v, dense @ v) < SUMS
    pieces = [
        t.view(p.shape)
        for t, p in zip(v.split([p.numel() for p in model.parameters()]), model.parameters(), strict=True)
    ]
    result = op @ pieces
    assert isinstance(result, list)
    assert [t.shape for t in result] == [p.shape for p in model.parameters()]
    assert relative(torch.cat([t.reshape(-1) for t in result]), dense @ v) < SUMS
    assert relative(torch.cat([t.reshape(-1) for t in op @ tuple(pieces)]), dense @ v) < SUMS
    for k in (1, 3, 70):
        columns = randn(P, k, seed=k)
        assert relative(op @ columns, dense @ columns) < SUMS
        stacked = [
            t.view(*p.shape, k)
            for t, p in zip(columns.split([p.numel() for p in model.parameters()]), model.parameters(), strict=True)
        ]
        found = op @ stacked
        assert [t.shape for t in found] == [(*p.shape, k) for p in model.parameters()]
        assert relative(torch.cat([t.reshape(-1, k) for t in found]), dense @ columns) < SUMS
    assert (op @ torch.zeros(P, 0, dtype=torch.float64)).shape == (P, 0)
    assert relative(op.to_dense(), dense) < SUMS


@EVERY
def test_products_are_linear_and_repeatable(name: str) -> None:
    op = operators(mlp(3, 4, 2, seed=6))[name]
    u, v = randn(26, seed=7), randn(26, seed=8)
    first = op @ v
    assert relative(op @ (2 * u - 3 * v), 2 * (op @ u) - 3 * first) < SUMS
    assert torch.equal(op @ v, first)
    assert float(u @ (op @ v)) == pytest.approx(float(v @ (op @ u)), rel=DENSE)
    assert not first.requires_grad


@EVERY
def test_products_are_counted(name: str) -> None:
    op = operators(mlp(3, 4, 2, seed=9))[name]
    v = randn(26, seed=10)
    _ = op @ v
    _ = op @ randn(26, 5, seed=11)
    assert op.products == 6


@EVERY
def test_writing_to_a_given_tensor(name: str) -> None:
    op = operators(mlp(3, 4, 2, seed=12))[name]
    v, out = randn(26, seed=13), torch.full((26,), 7.0, dtype=torch.float64)
    assert op.multiply(v, out) is out
    assert torch.equal(out, op @ v)


@pytest.mark.parametrize("name", ["gauss-newton", "fisher", "empirical-fisher"])
def test_positive_semi_definite(name: str) -> None:
    for seed in range(5):
        dense = matrix(operators(mlp(3, 4, 2, seed=14 + seed))[name])
        assert torch.linalg.eigvalsh((dense + dense.T) / 2)[0] > -1e-12 * dense.abs().max()


@pytest.mark.parametrize("name", ["gauss-newton", "hessian", "fisher"])
def test_damping_adds_to_the_diagonal(name: str) -> None:
    model = mlp(3, 4, 2, seed=20)
    op = operators(model)[name]
    dense, eye = matrix(op), torch.eye(26, dtype=torch.float64)
    assert relative(matrix(op.damped(0.7)), dense + 0.7 * eye) < SUMS
    assert relative(matrix(op.damped(0.7, decay=0.2)), dense + 0.9 * eye) < SUMS
    c = randn(26, seed=21).abs()
    assert relative(matrix(op.damped(0.7, decay=c)), dense + 0.7 * eye + c.diag()) < SUMS
    assert relative(op.damped(0.7, decay=c).to_dense(), dense + 0.7 * eye + c.diag()) < SUMS


class Hidden(nn.Module):
    """Two hidden layers that are marked, one with a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = mlp(3, 3, seed=22), mlp(3, 4, seed=23), mlp(4, 2, seed=24)
        self.mask = torch.tensor([True, True, False, True, False, True])

    def preactivations(self) -> tuple[Tensor, Tensor]:
        first: Tensor = self.a(X)
        return first, self.b(first.tanh())

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.preactivations()
        structural.mark(first, 1 - first.tanh().square(), batch_dim=0)
        structural.mark(second, 1 - second.tanh().square(), batch_dim=0, mask=self.mask)
        z: Tensor = self.c(second.tanh())
        return z


@pytest.mark.parametrize("linearisation", ["double-backward", "linearize", "recompute"])
@pytest.mark.parametrize("kind", ["gauss-newton", "fisher"])
def test_structural_damping(kind: str, linearisation: str) -> None:
    """``lambda (I + mu J_a' D'' J_a)`` with ``D'' = (1 - h^2) / B`` at the valid cases."""
    model = Hidden()
    build: Callable[..., Any] = hfopt.GaussNewton if kind == "gauss-newton" else hfopt.Fisher
    options = {} if kind == "gauss-newton" else {"generator": torch.Generator().manual_seed(1)}
    op = build(lambda: loss(model(X)), model.parameters(), structural=True, linearisation=linearisation, **options)
    assert not structural.wanted()
    weights = []
    for i, mask in ((0, torch.ones(6, dtype=torch.bool)), (1, model.mask)):
        h = model.preactivations()[i].detach().tanh()
        weights.append((1 - h.square()) * mask[:, None] / 6)
    j = jacobian(model, lambda m: torch.cat([t.reshape(-1) for t in m.preactivations()]))  # type: ignore[operator]
    s = j.T @ (torch.cat([w.reshape(-1) for w in weights])[:, None] * j)
    plain = matrix(op)
    if kind == "gauss-newton":
        assert relative(plain, dense_gauss_newton(model, lambda m: m(X), loss)) < DENSE
    damped = op.damped(0.4, 0.25)
    expected = plain + 0.4 * torch.eye(op.shape[0], dtype=torch.float64) + 0.4 * 0.25 * s
    assert relative(matrix(damped), expected) < DENSE
    assert relative(damped.to_dense(), expected) < DENSE
    v = randn(op.shape[0], seed=25)
    assert relative(op.structural_product(v), s @ v) < DENSE
    assert op.structural_quadratic(v) == pytest.approx(float(v @ s @ v), rel=DENSE)


def test_structural_damping_of_a_step() -> None:
    """rho and the solution of a step with mu > 0, by hand."""
    model = Hidden()
    optimizer = hfopt.HessianFree(
        model.parameters(),
        structural=0.5,
        damping=hfopt.FixedDamping(0.3),
        cg=hfopt.CG(tolerance=0.0, residual=1e-13),
        backtracking="none",
        line_search=None,
    )
    op = hfopt.GaussNewton(lambda: loss(model(X)), model.parameters(), structural=True)
    dense, a = matrix(op), matrix(op.damped(0.3, 0.5))
    before = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    optimizer.step(lambda: loss(model(X)))
    p = torch.linalg.solve(a, -op.gradient)
    after = torch.cat([q.detach().reshape(-1) for q in model.parameters()])
    s = optimizer.stats[0]
    assert torch.allclose(after - before, p, rtol=1e-8, atol=1e-10)
    assert s.quadratic == pytest.approx(float(op.gradient @ p + 0.5 * p @ dense @ p), rel=1e-8)
    assert s.structural == 0.5


def test_structural_damping_needs_marks() -> None:
    model = mlp(3, 2)
    with pytest.raises(hfopt.ClosureError, match=r"no hidden state was marked.*structural\.mark.*structural to 0"):
        hfopt.GaussNewton(lambda: loss(model(X)), model.parameters(), structural=True)
    op = hfopt.Hessian(lambda: loss(model(X)), model.parameters())
    with pytest.raises(ValueError, match="structural"):
        op.damped(0.1, 0.1)
    with pytest.raises(ValueError, match="curvature has shape"), structural.collecting():
        structural.mark(torch.zeros(2, 3, 4), torch.zeros(2, 3))


@EVERY
def test_vectors_that_do_not_fit_are_refused(name: str) -> None:
    op = operators(mlp(3, 4, 2, seed=26))[name]
    with pytest.raises(ValueError, match=r"\(25,\).*P = 26"):
        op @ randn(25)
    with pytest.raises(ValueError, match=r"\(1, 1, 26\)"):
        op @ randn(1, 1, 26)
    with pytest.raises(ValueError, match="float32"):
        op @ randn(26).float()
    with pytest.raises(ValueError, match="shapes"):
        op @ [randn(3)]
    with pytest.raises(ValueError, match=r"\(4, 3, 5\).*one more dimension, the last, in all tensors"):
        op @ [randn(4, 3, 5), randn(4, 5), randn(2, 4, 5), randn(2, 6)]
    with pytest.raises(ValueError, match="negative"):
        op.damped(-1.0)


@pytest.mark.parametrize("linearisation", ["double-backward", "linearize", "recompute"])
def test_a_point_that_has_moved_is_noticed(linearisation: str) -> None:
    model = mlp(3, 4, 2, seed=27)
    op = hfopt.GaussNewton(lambda: loss(model(X)), model.parameters(), linearisation=linearisation)
    with torch.no_grad():
        model[2].weight.add_(0.1)  # of the second layer, on which the first one's derivative depends
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation|has changed since"):
        op @ randn(26, seed=28)


def test_mixed_precision_parameters() -> None:
    """Flat vectors take the widest dtype; lists keep each parameter's own."""
    weight = torch.nn.Parameter(randn(2, 3, seed=29))
    bias = torch.nn.Parameter(randn(2, seed=30).float())
    op = hfopt.GaussNewton(lambda: F.mse_loss(X @ weight.T + bias.double(), Y), [weight, bias])
    assert op.dtype == torch.float64
    result = op @ [torch.ones_like(weight), torch.ones_like(bias)]
    assert [t.dtype for t in result] == [torch.float64, torch.float32]
    several = op @ [torch.ones(2, 3, 4, dtype=torch.float64), torch.ones(2, 4)]
    assert [(t.dtype, t.shape) for t in several] == [(torch.float64, (2, 3, 4)), (torch.float32, (2, 4))]
    assert relative(several[0][..., 2], result[0]) < 1e-12
    narrow = torch.nn.Parameter(randn(2, 3, seed=31).bfloat16())
    low = hfopt.GaussNewton(lambda: F.mse_loss(X.bfloat16() @ narrow.T, Y.bfloat16()), [narrow])
    assert low.dtype == torch.float32
    assert (low @ torch.ones(6)).dtype == torch.float32
