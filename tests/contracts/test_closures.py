"""Every form of closure that LBFGS users write, under the conventions of torch's optimizers on gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hfopt
from tests.hfopt.tools import DENSE, SUMS, flat, grads, mlp, randn, relative, theta

X, Y = randn(20, 3, seed=1), randn(20, 2, seed=2)
Build = Callable[[nn.Module, torch.optim.Optimizer], Callable[[], Any]]


def lbfgs_style(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    criterion = nn.MSELoss()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = criterion(model(X), Y)
        loss.backward()
        return loss

    return closure


def guarded(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    """As in the documentation of LBFGS."""

    def closure() -> Tensor:
        if torch.is_grad_enabled():
            optimizer.zero_grad()
        loss = F.mse_loss(model(X), Y)
        if loss.requires_grad:
            loss.backward()
        return loss

    return closure


def loss_only(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    return lambda: F.mse_loss(model(X), Y)


def returns_float(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    def closure() -> float:
        optimizer.zero_grad()
        loss = F.mse_loss(model(X), Y)
        loss.backward()
        return loss.item()

    return closure


def guarded_float(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    def closure() -> float:
        optimizer.zero_grad()
        loss = F.mse_loss(model(X), Y)
        if loss.requires_grad:
            loss.backward()
        return loss.item()

    return closure


def returns_nothing(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    def closure() -> None:
        optimizer.zero_grad()
        F.mse_loss(model(X), Y).backward()

    return closure


def returns_pair(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    def closure() -> tuple[Tensor, Tensor]:
        z = model(X)
        return z, F.mse_loss(z, Y)

    return closure


def own_square(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    def closure() -> tuple[Tensor, Tensor]:
        z = model(X)
        return z, (z - Y).square().mean()

    return closure


def own_square_backward(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    def closure() -> tuple[Tensor, Tensor]:
        optimizer.zero_grad()
        z = model(X)
        loss = (z - Y).square().mean()
        loss.backward()
        return z, loss

    return closure


def accumulated(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    """Four batches, one backward pass each; the total is their sum."""

    def closure() -> float:
        optimizer.zero_grad()
        total = 0.0
        for x, y in zip(X.split(5), Y.split(5), strict=True):
            loss = F.mse_loss(model(x), y) / 4
            loss.backward()
            total += loss.item()
        return total

    return closure


def added_in_place(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(model(X[:10]), Y[:10])
        loss += F.mse_loss(model(X[10:]), Y[10:])
        loss /= 2
        loss.backward()
        return loss

    return closure


def summed(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        rows = F.mse_loss(model(X), Y, reduction="none").sum(1)
        loss = sum(rows.unbind(), start=torch.zeros((), dtype=X.dtype)) / Y.numel()
        loss.backward()
        return loss

    return closure


def logs_something_else(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    """Criteria that only serve to look, with and without a graph, are no part of the loss."""
    seen: list[float] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        z = model(X)
        with torch.no_grad():
            seen.append(F.l1_loss(z, Y).item())
        seen.append(F.huber_loss(z, Y).item())
        loss = F.mse_loss(z, Y)
        loss.backward()
        return loss.detach()

    return closure


def clips(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(model(X), Y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        return loss

    return closure


def decorated(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    """As torch's own optimizers call what they are given."""
    return torch.enable_grad()(lbfgs_style(model, optimizer))


def enables_inside(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    """Measures first, without gradients, and then says that it wants them."""

    def closure() -> Tensor:
        with torch.no_grad():
            F.l1_loss(model(X), Y)
        with torch.enable_grad():
            optimizer.zero_grad(set_to_none=False)
            loss = F.mse_loss(model(X), Y)
            loss.backward()
        return loss

    return closure


def clears_by_the_model(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    def closure() -> Tensor:
        model.zero_grad()
        with torch.set_grad_enabled(True):
            loss = F.mse_loss(model(X), Y)
        loss.backward(retain_graph=True)
        return loss

    return closure


FORMS = [
    lbfgs_style,
    decorated,
    enables_inside,
    clears_by_the_model,
    guarded,
    loss_only,
    returns_float,
    guarded_float,
    returns_nothing,
    returns_pair,
    own_square,
    own_square_backward,
    accumulated,
    added_in_place,
    summed,
    logs_something_else,
    clips,
]


@pytest.fixture(scope="module")
def reference() -> tuple[Tensor, list[float]]:
    return trained(lbfgs_style)


def trained(build: Build) -> tuple[Tensor, list[float]]:
    model = mlp(3, 4, 2, seed=3)
    optimizer = hfopt.HessianFree(model.parameters())
    closure = build(model, optimizer)
    for _ in range(3):
        optimizer.step(closure)
    return theta(model), [s.loss for s in optimizer.stats]


@pytest.mark.parametrize("build", FORMS)
def test_every_form_takes_the_same_steps(build: Build, reference: tuple[Tensor, list[float]]) -> None:
    end, losses = trained(build)
    assert losses == pytest.approx(reference[1], rel=DENSE)
    assert torch.allclose(end, reference[0], rtol=1e-7, atol=1e-9)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    "build", [b for b in FORMS if b not in (returns_pair, own_square, own_square_backward, loss_only)]
)
def test_step_returns_and_leaves_what_lbfgs_does(build: Build) -> None:
    """The loss before the step, of the same type and value."""
    ours, theirs = mlp(3, 4, 2, seed=4), mlp(3, 4, 2, seed=4)
    a, b = hfopt.HessianFree(ours.parameters()), torch.optim.LBFGS(theirs.parameters(), max_iter=1)
    if build is returns_nothing:
        assert float(a.step(build(ours, a))) == pytest.approx(F.mse_loss(theirs(X), Y).item())
        return
    x, y = a.step(build(ours, a)), b.step(build(theirs, b))
    assert type(x) is type(y)
    assert float(torch.as_tensor(x).detach()) == pytest.approx(float(torch.as_tensor(y).detach()), rel=SUMS)


@pytest.mark.parametrize("build", FORMS)
def test_grad_is_the_gradient_at_the_old_point(build: Build) -> None:
    model, plain = mlp(3, 4, 2, seed=5), mlp(3, 4, 2, seed=5)
    optimizer = hfopt.HessianFree(model.parameters(), weight_decay=0.1)
    optimizer.step(build(model, optimizer))
    F.mse_loss(plain(X), Y).backward()
    assert not torch.equal(theta(model), theta(plain))
    assert torch.allclose(grads(model), grads(plain), rtol=1e-10, atol=1e-14)


def test_parameters_keep_their_storage_and_their_identity() -> None:
    model = mlp(3, 4, 2, seed=6)
    optimizer = hfopt.HessianFree(model.parameters())
    before = [(id(p), p.data_ptr(), p.dtype, p.stride()) for p in model.parameters()]
    for _ in range(4):
        optimizer.step(lbfgs_style(model, optimizer))
        assert [(id(p), p.data_ptr(), p.dtype, p.stride()) for p in model.parameters()] == before
        assert all(p.is_leaf and p.requires_grad for p in model.parameters())


def test_a_step_shows_in_the_version_counters() -> None:
    """A graph that was recorded before the step must not be used after it."""
    model = mlp(3, 4, 2, seed=7)
    optimizer = hfopt.HessianFree(model.parameters())
    old = F.mse_loss(model(X), Y)
    optimizer.step(lbfgs_style(model, optimizer))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        old.backward()


def test_nothing_to_optimize_is_an_error() -> None:
    model = mlp(3, 2)
    model.requires_grad_(False)
    optimizer = hfopt.HessianFree(model.parameters())
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        optimizer.step(loss_only(model, optimizer))
    with pytest.raises(ValueError, match="closure"):
        optimizer.step(None)  # type: ignore[arg-type]


def test_a_criterion_that_only_measures_is_passed_over() -> None:
    model, x, y = mlp(3, 2, seed=1), randn(6, 3, seed=1), randn(6, 2, seed=2)

    def closure() -> Any:
        z = model(x)
        F.mse_loss(z, y)  # a metric, with its graph
        return z, ((z - y) ** 4).mean()

    op = hfopt.GaussNewton(closure, model.parameters())
    assert relative(op.gradient, flat(torch.autograd.grad(closure()[1], list(model.parameters())))) < 1e-12


def test_evaluation_that_differentiates_on_its_own() -> None:
    model, x = mlp(1, 1, seed=1), torch.linspace(0, 1, 7, dtype=torch.float64).unsqueeze(1)

    def slope() -> Any:
        inputs = x.clone().requires_grad_()
        (derivative,) = torch.autograd.grad(model(inputs).sum(), inputs, create_graph=True)
        return F.mse_loss(model(x), x.sin()) + 1e-6 * F.mse_loss(derivative, x.cos())

    optimizer = hfopt.HessianFree(model.parameters())
    optimizer.step(lambda: F.mse_loss(model(x), x.sin()), evaluation=slope)
    assert optimizer.stats[-1].accepted


@pytest.mark.parametrize("backwards", [1, 2])
def test_a_step_under_no_grad_and_a_closure_without_result(backwards: int) -> None:
    model, x, y = mlp(3, 2, seed=1), randn(6, 3, seed=1), randn(6, 2, seed=2)

    def closure() -> None:
        for _ in range(backwards):
            loss = F.mse_loss(model(x), y)
            if loss.requires_grad:
                loss.backward()

    optimizer = hfopt.HessianFree(model.parameters())
    with torch.no_grad():
        before = optimizer.step(closure)
    assert optimizer.stats[-1].new_loss < 0.9 * float(before)


class Asks(nn.Module):
    """Notes whether gradients are enabled."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.seen = mlp(3, 4, 2, seed=8), [torch.is_grad_enabled()]

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(torch.is_grad_enabled())
        z: Tensor = self.inner(x)
        return z


@pytest.mark.parametrize("around", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("build", [lbfgs_style, guarded, decorated, enables_inside])
def test_the_mode_around_a_step_does_not_matter_and_stays(build: Build, around: Any) -> None:
    """LBFGS enables gradients for its closure, whatever is around it, and leaves the mode as it was; so do we."""
    ours, theirs, plain = Asks(), Asks(), Asks()
    a = hfopt.HessianFree(ours.parameters())
    b = torch.optim.LBFGS(theirs.parameters(), max_iter=1)
    c = hfopt.HessianFree(plain.parameters())
    for _ in range(2):
        with around():
            a.step(build(ours, a))
            assert torch.is_grad_enabled() == (around is torch.enable_grad)
            b.step(build(theirs, b))
            assert torch.is_grad_enabled() == (around is torch.enable_grad)
        c.step(build(plain, c))
    assert torch.equal(theta(ours), theta(plain))
    assert ours.seen == plain.seen
    assert ours.seen[1] == theirs.seen[1] == (build is not enables_inside)


def test_a_closure_that_fails_leaves_the_mode_and_the_parameters() -> None:
    model = mlp(3, 4, 2, seed=9)
    optimizer = hfopt.HessianFree(model.parameters())
    before = theta(model)

    def closure() -> Tensor:
        raise OSError("no more data")

    for around in (torch.no_grad, torch.enable_grad):
        with around():
            with pytest.raises(OSError, match="no more data"):
                optimizer.step(closure)
            assert torch.is_grad_enabled() == (around is torch.enable_grad)
    assert torch.equal(theta(model), before)
    optimizer.step(loss_only(model, optimizer))
    assert optimizer.stats[-1].accepted


def test_inference_mode_is_refused_as_by_torch() -> None:
    """Neither can leave it from within; the message says what was found."""
    model = mlp(3, 4, 2, seed=10)
    optimizer, lbfgs = hfopt.HessianFree(model.parameters()), torch.optim.LBFGS(model.parameters())
    with torch.inference_mode():
        with pytest.raises(RuntimeError, match="does not require grad"):
            lbfgs.step(lbfgs_style(model, lbfgs))
        with pytest.raises(hfopt.ClosureError, match="does not depend on any parameter that requires a gradient"):
            optimizer.step(lbfgs_style(model, optimizer))
