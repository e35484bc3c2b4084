"""The sampled Fisher matrix is unbiased; the empirical one is the second moment of per-case gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import hfopt
from tests.hfopt.tools import DENSE, flat, generator, jacobian, matrix, mlp, randn, relative

N = 5
X, Y = randn(N, 3, seed=1), randn(N, 3, seed=2)
CLASSES = torch.tensor([0, 2, 1, 2, 0])
WEIGHT = torch.tensor([0.5, 2.0, 1.3], dtype=torch.float64)
LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "mse": lambda z: F.mse_loss(z, Y),
    "mse-sum": lambda z: F.mse_loss(z, Y, reduction="sum"),
    "ce": lambda z: F.cross_entropy(z, CLASSES),
    "ce-weight-smooth": lambda z: F.cross_entropy(z, CLASSES, weight=WEIGHT, label_smoothing=0.2),
    "bce": lambda z: F.binary_cross_entropy_with_logits(z, Y.sigmoid()),
    "two": lambda z: F.mse_loss(z, Y) + 0.5 * F.cross_entropy(z, CLASSES),
    "grid": lambda z: F.cross_entropy(z.view(1, 3, 5), CLASSES.view(1, 5)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_sampled_fisher_is_unbiased(name: str) -> None:
    """In output space, where the mean over 1000 draws is cheap: ``E[g g'] = H_L`` to four standard errors."""
    z = randn(N, 3, seed=3).requires_grad_()
    loss, draws = LOSSES[name], generator(4)
    gauss_newton = hfopt.GaussNewton(lambda: loss(z), [z])
    expected = matrix(gauss_newton)
    op = hfopt.Fisher(lambda: loss(z), [z], samples=1000, generator=draws)
    got = torch.stack([op @ e for e in torch.eye(15, dtype=torch.float64)[:6]], 1)
    scale = float(expected.abs().max())
    assert float((got - expected[:, :6]).abs().max()) < 4 * 3 * 1000**-0.5 * scale
    few = hfopt.Fisher(lambda: loss(z), [z], samples=1, generator=generator(5))
    v = randn(15, seed=20)
    assert name.startswith("mse") or float((few @ v - expected @ v).abs().max()) > 1e-3 * scale


def test_mean_over_operators_equals_gauss_newton() -> None:
    """Through a network, one draw an operator: the mean over many operators."""
    model = mlp(3, 2, 3, seed=6)
    draws = generator(7)

    def closure() -> Tensor:
        return F.cross_entropy(model(X), CLASSES)

    v = randn(17, seed=8)
    exact = hfopt.GaussNewton(closure, model.parameters()) @ v
    products = torch.stack([hfopt.Fisher(closure, model.parameters(), generator=draws) @ v for _ in range(150)])
    error = products.std(0) / 150**0.5
    assert ((products.mean(0) - exact).abs() < 4.5 * error + 1e-12).all()


def test_draws_are_seeded_and_kept() -> None:
    model, v = mlp(3, 2, 3, seed=9), randn(17, seed=10)

    def build(seed: int) -> hfopt.Fisher:
        return hfopt.Fisher(lambda: LOSSES["ce"](model(X)), model.parameters(), generator=generator(seed))

    op = build(11)
    assert torch.equal(op @ v, op @ v)
    assert torch.equal(op @ v, build(11) @ v)
    assert not torch.equal(op @ v, build(12) @ v)


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("name", ["mse", "ce", "bce"])
def test_empirical_fisher_is_the_second_moment_of_gradients(name: str, decay: float) -> None:
    model = mlp(3, 2, 3, seed=13)
    per_case: dict[str, Callable[[Tensor, int], Tensor]] = {
        "mse": lambda z, n: F.mse_loss(z, Y[n]),
        "ce": lambda z, n: F.cross_entropy(z, CLASSES[n]),
        "bce": lambda z, n: F.binary_cross_entropy_with_logits(z, Y[n].sigmoid()),
    }
    rows = torch.stack(
        [flat(torch.autograd.grad(per_case[name](model(X[n]), n), list(model.parameters()))) for n in range(N)]
    )

    def closure() -> Tensor:
        squares = sum((p.square().sum() for p in model.parameters()), start=torch.zeros((), dtype=X.dtype))
        return LOSSES[name](model(X)) + decay / 2 * squares

    op = hfopt.Fisher(closure, model.parameters(), kind="empirical")
    expected = rows.T @ rows / N + decay * torch.eye(17, dtype=torch.float64)
    assert relative(matrix(op), expected) < DENSE
    assert relative(op.to_dense(), expected) < DENSE


@pytest.mark.parametrize("batch_dim", [0, 1, -2])
def test_cases_along_another_dimension(batch_dim: int) -> None:
    """Sequences (T, B, O): a case is one index of ``batch_dim``, all its steps together."""
    model = mlp(3, 2, seed=14)
    x, y = randn(4, 3, 3, seed=15), randn(4, 3, 2, seed=16)
    dim = batch_dim % 3
    rows = []
    for n in range(x.shape[dim]):
        one = F.mse_loss(model(x.select(dim, n)), y.select(dim, n))
        rows.append(flat(torch.autograd.grad(one, list(model.parameters()))))
    g = torch.stack(rows)
    op = hfopt.Fisher(lambda: F.mse_loss(model(x), y), model.parameters(), kind="empirical", batch_dim=batch_dim)
    assert relative(matrix(op), g.T @ g / len(g)) < DENSE


def test_empirical_fisher_of_a_loss_of_ones_own() -> None:
    model = mlp(3, 2, 3, seed=17)

    def own(z: Tensor) -> Tensor:
        return (z - Y).cosh().log().mean()

    j = jacobian(model, lambda m: m(X)).view(N, 3, -1)
    slope = (model(X).detach() - Y).tanh() / 3
    rows = (slope[:, :, None] * j).sum(1)
    op = hfopt.Fisher(lambda: model(X), model.parameters(), kind="empirical", loss=own)
    assert relative(matrix(op), rows.T @ rows / N) < DENSE


def test_refusals() -> None:
    model = mlp(3, 2, 3, seed=18)
    with pytest.raises(ValueError, match="kind is 'true'"):
        hfopt.Fisher(lambda: LOSSES["ce"](model(X)), model.parameters(), kind="true")
    with pytest.raises(ValueError, match="samples is 0"):
        hfopt.Fisher(lambda: LOSSES["ce"](model(X)), model.parameters(), samples=0)
    with pytest.raises(hfopt.ClosureError, match=r"known distribution.*empirical"):
        hfopt.Fisher(lambda: (model(X), model(X).cosh().sum())[::-1], model.parameters(), loss=lambda a, b: a)
    with pytest.raises(hfopt.ClosureError, match=r"negative"):
        hfopt.Fisher(lambda: LOSSES["ce"](model(X)) - F.mse_loss(model(X), Y), model.parameters())


@pytest.mark.parametrize("curvature", ["fisher", "empirical-fisher"])
def test_optimizer_draws_by_the_step_alone(curvature: str) -> None:
    """The user's generator is left alone, and the same step draws the same targets."""
    ends = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = mlp(3, 2, 3, seed=19)
        state = torch.get_rng_state()
        optimizer = hfopt.HessianFree(model.parameters(), curvature=curvature)
        for _ in range(3):
            optimizer.step(lambda: LOSSES["ce"](model(X)))  # noqa: B023 - used at once
        assert torch.equal(torch.get_rng_state(), state)
        ends.append(flat(model.parameters()))
        assert optimizer.stats[-1].new_loss < optimizer.stats[0].loss
    assert torch.equal(*ends)
