"""One function per step: random draws and running statistics happen once, as in one plain forward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hfopt
from tests.hfopt.tools import mlp, randn, theta

X, Y = randn(16, 3, seed=1), randn(16, 2, seed=2)
X2, Y2 = randn(16, 3, seed=3), randn(16, 2, seed=4)
POLICIES = pytest.mark.parametrize("policy", ["auto", "linearize", "recompute", "hessian"])


class Noisy(nn.Module):
    """Dropout, noise of its own, and a record of what was drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = mlp(3, 6, seed=5), mlp(6, 2, seed=6)
        self.drop = nn.Dropout(0.4)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(self.inner(x).tanh())
        h = h + 0.01 * torch.randn_like(h)
        self.seen.append(h.detach().ne(0).double() + torch.rand((), dtype=h.dtype))
        z: Tensor = self.outer(h)
        return z


def normal() -> nn.Sequential:
    return nn.Sequential(mlp(3, 6, seed=7), nn.BatchNorm1d(6, dtype=X.dtype), nn.Tanh(), mlp(6, 2, seed=8))


def built(model: nn.Module, policy: str, **options: Any) -> hfopt.HessianFree:
    if policy == "hessian":
        return hfopt.HessianFree(
            model.parameters(), curvature="hessian", damping=1e-3, backtracking="smallest", **options
        )
    return hfopt.HessianFree(model.parameters(), linearisation=policy, solver="cg", backtracking="smallest", **options)


@POLICIES
def test_the_generator_ends_where_a_forward_pass_leaves_it(policy: str) -> None:
    model = Noisy()
    optimizer = built(model, policy)
    for step in range(3):
        twin = Noisy()
        torch.manual_seed(step)
        F.mse_loss(twin(X), Y)
        expected = torch.get_rng_state()
        torch.manual_seed(step)
        optimizer.step(lambda: F.mse_loss(model(X), Y))
        assert torch.equal(torch.get_rng_state(), expected)


@POLICIES
def test_every_run_inside_a_step_sees_the_same_draws(policy: str) -> None:
    torch.manual_seed(9)
    model = Noisy()
    optimizer = built(model, policy)
    masks = []
    for _ in range(3):
        model.seen.clear()
        optimizer.step(lambda: F.mse_loss(model(X), Y))
        draws = model.seen
        assert len(draws) > 2
        assert all(torch.equal(d, draws[0]) for d in draws)
        masks.append(draws[0])
    assert not torch.equal(masks[0], masks[1])  # and another step another


def test_every_policy_multiplies_for_the_draws_of_the_first_run() -> None:
    """Five products a policy, for the same mask, and none of them draws."""
    model = nn.Sequential(mlp(3, 6, seed=5), nn.Tanh(), nn.Dropout(0.4), mlp(6, 2, seed=6))
    vectors = randn(5, sum(p.numel() for p in model.parameters()), seed=12)
    products = {}
    for policy in ("double-backward", "linearize", "recompute"):
        torch.manual_seed(0)
        op = hfopt.GaussNewton(lambda: F.mse_loss(model(X), Y), model.parameters(), linearisation=policy)
        state = torch.get_rng_state()
        products[policy] = torch.stack([op @ v for v in vectors])
        assert torch.equal(torch.get_rng_state(), state)
    for policy, got in products.items():
        assert torch.allclose(got, products["double-backward"], rtol=1e-9, atol=1e-12), policy


def test_products_and_losses_belong_to_the_same_draw() -> None:
    """rho of a model that is quadratic for every mask is one, which no second mask would give."""
    torch.manual_seed(10)
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 2, dtype=X.dtype))
    optimizer = hfopt.HessianFree(model.parameters(), damping=0.3)
    for _ in range(4):
        optimizer.step(lambda: F.mse_loss(model(X), Y))
        assert optimizer.stats[-1].rho == pytest.approx(1.0, abs=1e-8)


@POLICIES
@pytest.mark.parametrize("roles", [False, True])
def test_running_statistics_are_updated_once_a_step(policy: str, roles: bool) -> None:
    """They equal those of one plain forward pass of the gradient's data, at the parameters before the step."""
    model = normal()
    optimizer = built(model, policy)
    others = {"curvature": lambda: F.mse_loss(model(X2), Y2), "evaluation": lambda: F.mse_loss(model(X2), Y2)}
    for step in range(1, 4):
        twin = normal()
        twin.load_state_dict(model.state_dict())
        twin(X)
        expected = {n: b.clone() for n, b in twin.named_buffers()}
        optimizer.step(lambda: F.mse_loss(model(X), Y), **(others if roles else {}))
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer, expected[name]), name
        assert int(model[1].num_batches_tracked) == step
        assert optimizer.stats[-1].evaluations >= 1


def test_several_batches_a_step_update_once_each() -> None:
    model, twin = normal(), normal()
    optimizer = hfopt.HessianFree(model.parameters())

    def closure() -> None:
        for x, y in ((X, Y), (X2, Y2)):
            F.mse_loss(model(x), y).backward()

    twin(X)
    twin(X2)
    optimizer.step(closure)
    assert int(model[1].num_batches_tracked) == 2
    assert torch.equal(model[1].running_mean, twin[1].running_mean)


class Counter(nn.Module):
    """A buffer that is replaced and not changed in place, and one that is changed through a view."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = mlp(3, 2, seed=11)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("history", torch.zeros(50))

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.history, Tensor)
        self.history[int(self.calls) % 50] += 1
        self.calls = self.calls + 1
        z: Tensor = self.linear(x) * (1 + 0.1 * self.calls)  # type: ignore[operator]
        return z


def test_buffers_of_every_kind() -> None:
    model = Counter()
    optimizer = hfopt.HessianFree(model.parameters())
    for step in range(1, 4):
        optimizer.step(lambda: F.mse_loss(model(X), Y))
        assert int(model.calls) == step  # type: ignore[arg-type]
        assert float(model.history.sum()) == step  # type: ignore[operator]
        assert optimizer.stats[-1].accepted or optimizer.stats[-1].gradient_norm < 1e-6


def test_training_in_evaluation_mode_leaves_statistics_alone() -> None:
    model = normal().eval()
    before = {n: b.clone() for n, b in model.named_buffers()}
    optimizer = hfopt.HessianFree(model.parameters())
    for _ in range(2):
        optimizer.step(lambda: F.mse_loss(model(X), Y))
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    assert optimizer.stats[-1].new_loss < optimizer.stats[0].loss


def test_an_error_in_the_closure_restores_everything() -> None:
    model = normal()
    optimizer = hfopt.HessianFree(model.parameters())
    optimizer.step(lambda: F.mse_loss(model(X), Y))
    before, calls = theta(model), [0]

    def closure() -> Tensor:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        return F.mse_loss(model(X), Y)

    twin = normal()
    twin.load_state_dict(model.state_dict())
    twin(X)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert torch.equal(theta(model), before)
    assert torch.equal(model[1].running_mean, twin[1].running_mean)
    assert torch.is_grad_enabled()
    optimizer.step(lambda: F.mse_loss(model(X), Y))
    assert optimizer.stats[-1].accepted
