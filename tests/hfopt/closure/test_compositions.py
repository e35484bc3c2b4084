"""Losses made of several parts: criteria, weights, batches, regularisers, declared outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import hfopt
from tests.hfopt.tools import DENSE, SUMS, Point, dense_gauss_newton, dense_hessian, flat, matrix, mlp, randn, relative

X, Y = randn(6, 3, seed=1), randn(6, 4, seed=2)
X2, CLASSES = randn(5, 3, seed=3), torch.tensor([0, 3, 1, 2, 2])
LINEARISATIONS = ["double-backward", "linearize", "recompute"]
MANY = pytest.mark.parametrize("linearisation", LINEARISATIONS)


def net(seed: int = 4) -> Any:
    return mlp(3, 3, 4, seed=seed)


def check(
    closure: Callable[[], Any], model: nn.Module, expected: Tensor, total: Callable[[], Tensor], **options: Any
) -> None:
    op = hfopt.GaussNewton(closure, model.parameters(), **options)
    assert expected.abs().max() > 1e-6
    assert relative(matrix(op), expected) < DENSE
    plain = torch.autograd.grad(total(), list(model.parameters()), allow_unused=True)
    known = [torch.zeros_like(p) if g is None else g for p, g in zip(model.parameters(), plain, strict=True)]
    assert relative(op.gradient, flat(known)) < DENSE
    assert op.loss.item() == pytest.approx(total().item(), rel=SUMS)


@MANY
def test_several_criteria_with_weights(linearisation: str) -> None:
    model = net()

    def loss() -> Tensor:
        a = F.mse_loss(model(X), Y)
        b = F.cross_entropy(model(X2), CLASSES, reduction="sum")
        c = F.huber_loss(model(X), Y, reduction="none", delta=0.5).sum(1).mean()
        return 0.3 * a + 2 * (b - 5) / 7 - c * -0.5

    expected = (
        0.3 * dense_gauss_newton(model, lambda m: m(X), lambda z: F.mse_loss(z, Y))
        + 2 / 7 * dense_gauss_newton(model, lambda m: m(X2), lambda z: F.cross_entropy(z, CLASSES, reduction="sum"))
        + 0.5 * dense_gauss_newton(model, lambda m: m(X), lambda z: F.huber_loss(z, Y, delta=0.5) * 4)
    )
    check(loss, model, expected, loss, linearisation=linearisation)


@MANY
def test_two_criteria_on_the_same_output(linearisation: str) -> None:
    model = net()

    def both(z: Tensor) -> Tensor:
        return F.mse_loss(z, Y) + 0.5 * F.cross_entropy(z, CLASSES[[0, 1, 2, 3, 4, 0]])

    expected = dense_gauss_newton(model, lambda m: m(X), both)
    check(lambda: both(model(X)), model, expected, lambda: both(model(X)), linearisation=linearisation)


@MANY
def test_gradient_accumulation(linearisation: str) -> None:
    """Several backward() calls: loss, gradient and matrix are sums."""
    model = net()

    def closure() -> float:
        model.zero_grad()
        for x, y in zip(X.split(2), Y.split(2), strict=True):
            (F.mse_loss(model(x), y) / 3).backward()
        return 0.0

    def total() -> Tensor:
        return F.mse_loss(model(X), Y)

    expected = dense_gauss_newton(model, lambda m: m(X), lambda z: F.mse_loss(z, Y))
    check(closure, model, expected, total, linearisation=linearisation)


REGULARISERS: dict[str, Callable[[nn.Module], Tensor]] = {
    "l2": lambda m: 0.5 * sum((p.square().sum() for p in m.parameters()), start=torch.zeros(())),
    "l2 of one": lambda m: next(m.parameters()).pow(2).mean(),
    "quartic": lambda m: sum((p.pow(4).sum() for p in m.parameters()), start=torch.zeros(())),
    "norm": lambda m: torch.cat([p.reshape(-1) for p in m.parameters()]).norm(),
    "coupled": lambda m: torch.cat([p.reshape(-1) for p in m.parameters()]).sum().cosh(),
    "l1": lambda m: sum((p.abs().sum() for p in m.parameters()), start=torch.zeros(())),
    "orthogonal": lambda m: (m[0].weight @ m[0].weight.T - torch.eye(3)).square().sum(),  # type: ignore[index]
    "as a criterion": lambda m: F.mse_loss(m[0].weight, torch.zeros(3, 3, dtype=torch.float64)),  # type: ignore[index]
}


@pytest.mark.quick(where=lambda name, linearisation: name == "l1" or linearisation == "double-backward")
@MANY
@pytest.mark.parametrize("name", REGULARISERS)
def test_regularisers_enter_with_their_exact_hessian(name: str, linearisation: str) -> None:
    model, penalty = net(), REGULARISERS[name]

    def loss() -> Tensor:
        return F.cross_entropy(model(X2), CLASSES) + 0.1 * penalty(model)

    expected = dense_gauss_newton(model, lambda m: m(X2), lambda z: F.cross_entropy(z, CLASSES))
    expected = expected + 0.1 * dense_hessian(model, penalty)
    check(loss, model, expected, loss, linearisation=linearisation)


def test_regulariser_with_a_backward_of_its_own() -> None:
    model = net()

    def closure() -> None:
        F.mse_loss(model(X), Y).backward()
        (0.1 * REGULARISERS["quartic"](model)).backward()

    expected = dense_gauss_newton(model, lambda m: m(X), lambda z: F.mse_loss(z, Y))
    expected = expected + 0.1 * dense_hessian(model, REGULARISERS["quartic"])
    check(closure, model, expected, lambda: F.mse_loss(model(X), Y) + 0.1 * REGULARISERS["quartic"](model))


def log_cosh(z: Tensor, y: Tensor) -> Tensor:
    return (z - y).cosh().log().mean()


@pytest.mark.quick(where=lambda form, penalty, linearisation: penalty > 0)
@MANY
@pytest.mark.parametrize("form", ["pair", "loss=", "outputs="])
@pytest.mark.parametrize("penalty", [0.0, 0.1])
def test_declared_outputs(form: str, penalty: float, linearisation: str) -> None:
    """A loss of the user's own, by each of the three ways out, with and without a regulariser beside it."""
    model = net()
    inner = nn.ModuleList([model])

    def extra() -> Tensor:
        return penalty * REGULARISERS["coupled"](model)

    def pair() -> tuple[Tensor, Tensor]:
        z = model(X)
        return z, log_cosh(z, Y) + extra()

    forms: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
        "pair": (pair, {}),
        "loss=": (lambda: (model(X), Y), {"loss": lambda z, y: log_cosh(z, y) + extra()}),
        "outputs=": (lambda: log_cosh(model(X), Y) + extra(), {"outputs": inner[0]}),
    }
    closure, options = forms[form]
    expected = dense_gauss_newton(model, lambda m: m(X), lambda z: log_cosh(z, Y))
    expected = expected + penalty * dense_hessian(model, REGULARISERS["coupled"])
    check(
        closure,
        model,
        expected,
        lambda: log_cosh(model(X), Y) + extra(),
        linearisation=linearisation,
        **options,
    )


class Heads(nn.Module):
    """Outputs as a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.a, self.b = mlp(3, 3, seed=5), mlp(3, 2, seed=6), mlp(3, 1, seed=7)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.trunk(x).tanh()
        return {"mean": self.a(h), "scale": self.b(h)}


@MANY
@pytest.mark.parametrize("form", ["pair", "loss=", "outputs="])
def test_declared_outputs_that_are_a_dictionary(form: str, linearisation: str) -> None:
    model = Heads()

    def nll(out: dict[str, Tensor]) -> Tensor:
        scale = F.softplus(out["scale"]) + 0.5
        return (((out["mean"] - Y[:, :2]) / scale).square() + scale.log()).mean()

    def pair() -> tuple[dict[str, Tensor], Tensor]:
        out = model(X)
        return out, nll(out)

    forms: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
        "pair": (pair, {}),
        "loss=": (lambda: (model(X),), {"loss": nll}),
        "outputs=": (lambda: nll(model(X)), {"outputs": model}),
    }
    closure, options = forms[form]

    def both(m: nn.Module) -> Tensor:
        out = m(X)
        return torch.cat([out["mean"], out["scale"]], 1)

    expected = dense_gauss_newton(model, both, lambda z: nll({"mean": z[:, :2], "scale": z[:, 2:]}))
    check(closure, model, expected, lambda: nll(model(X)), linearisation=linearisation, **options)


def test_the_output_module_may_be_called_several_times() -> None:
    model = net()
    expected = dense_gauss_newton(model, lambda m: m(torch.cat([X, X2])), lambda z: z.square().square().mean())

    def loss() -> Tensor:
        return torch.cat([model(X), model(X2)]).square().square().mean()

    check(loss, model, expected, loss, outputs=model)


def test_outputs_may_be_the_parameters_themselves() -> None:
    model = Point([0.3, -0.7, 1.1])
    target = torch.zeros(3, dtype=torch.float64)
    for linearisation in LINEARISATIONS:
        op = hfopt.GaussNewton(lambda: F.mse_loss(model(), target), model.parameters(), linearisation=linearisation)
        assert relative(matrix(op), 2 / 3 * torch.eye(3, dtype=torch.float64)) < SUMS


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    cases=st.integers(1, 5),
    classes=st.integers(2, 4),
    factors=st.lists(st.floats(0.1, 3), min_size=3, max_size=3),
    reductions=st.lists(st.sampled_from(["mean", "sum", "none"]), min_size=3, max_size=3),
    decay=st.floats(0, 1),
    seed=st.integers(0, 10**6),
)
def test_random_sums_of_criteria(
    sizes: list[int],
    cases: int,
    classes: int,
    factors: list[float],
    reductions: list[str],
    decay: float,
    seed: int,
) -> None:
    """Any weighted sum of three criteria on any small network, with weight decay in the loss."""
    model = mlp(*sizes, classes, seed=seed)
    x, y = randn(cases, sizes[0], seed=seed + 1), randn(cases, classes, seed=seed + 2)
    labels = y.argmax(1)

    def parts(z: Tensor) -> Tensor:
        values = [
            F.mse_loss(z, y, reduction=reductions[0]).mean(),
            F.cross_entropy(z, labels, reduction=reductions[1], label_smoothing=0.1).sum(),
            F.binary_cross_entropy_with_logits(z, y.sigmoid(), reduction=reductions[2]).mean(),
        ]
        return sum((c * v for c, v in zip(factors, values, strict=True)), start=torch.zeros((), dtype=z.dtype))

    def loss() -> Tensor:
        squares = sum((p.square().sum() for p in model.parameters()), start=torch.zeros((), dtype=x.dtype))
        return parts(model(x)) + decay / 2 * squares

    expected = dense_gauss_newton(model, lambda m: m(x), parts)
    expected = expected + decay * torch.eye(len(expected), dtype=torch.float64)
    got = matrix(hfopt.GaussNewton(loss, model.parameters()))
    assert relative(got, expected) < DENSE
    assert torch.linalg.eigvalsh((got + got.T) / 2)[0] > decay - 1e-10 * float(got.abs().max())
