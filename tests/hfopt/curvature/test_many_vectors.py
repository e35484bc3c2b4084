"""`op @ V` with many columns: one batched pass in every policy, in pieces that fit into memory."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import hfopt
import models
from benchmarks.memory import allocated
from hfopt.recurrences import simple_rnn_layer
from tests.hfopt.recurrences.plain import Calls
from tests.hfopt.tools import DENSE, SUMS, dense_gauss_newton, dense_hessian, matrix, mlp, randn, relative

X, Y = randn(6, 3, seed=1), randn(6, 2, seed=2)
CLASSES = torch.tensor([0, 1, 1, 0, 1, 0])
POLICIES = ["double-backward", "linearize", "checkpoint", "recompute"]
EVERY = pytest.mark.parametrize("policy", POLICIES)


class Counted(nn.Module):
    """A network that counts its runs."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.runs = inner, 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        z: Tensor = self.inner(x)
        return z


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv1d(1, 2, 2), nn.SiLU(), nn.Flatten(), nn.LayerNorm(4), nn.Linear(4, 2))
    return nn.Sequential(nn.Unflatten(1, (1, 3)), *layers).double()


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "closed": lambda z: F.mse_loss(z, Y) + 0.5 * F.cross_entropy(z, CLASSES),
    "poisson": lambda z: F.poisson_nll_loss(z, Y.exp()),
    "gaussian": lambda z: F.gaussian_nll_loss(z[:, 0], Y[:, 0], z[:, 1].exp()),
}


@pytest.mark.quick(where=lambda make, loss, policy: loss == "closed" or policy == "recompute")
@pytest.mark.filterwarnings("ignore:linearisation='checkpoint' needs a recurrence")
@EVERY
@pytest.mark.parametrize("loss", list(LOSSES))
@pytest.mark.parametrize("make", [lambda: mlp(3, 4, 2, seed=3), convolutional])
def test_columns_are_products(make: Callable[[], nn.Module], loss: str, policy: str) -> None:
    if (loss, policy) == ("gaussian", "linearize"):
        pytest.skip("gaussian_nll_loss looks at its values, which cannot be traced")
    model = Counted(make())
    criterion = LOSSES[loss]

    def penalised() -> Tensor:
        squares = sum((p.pow(4).sum() for p in model.parameters()), start=torch.zeros((), dtype=X.dtype))
        return criterion(model(X)) + 0.1 * squares

    op = hfopt.GaussNewton(penalised, model.parameters(), linearisation=policy)
    one_by_one = matrix(op)
    before = model.runs
    assert relative(op.to_dense(), one_by_one) < SUMS
    assert model.runs - before <= (2 if op.linearisation.name == "recompute" else 0)
    assert op.products == 2 * op.shape[0]
    if loss == "closed":
        quartic = dense_hessian(model, lambda m: 0.1 * sum(p.pow(4).sum() for p in m.parameters()))  # type: ignore[arg-type, return-value]
        dense = dense_gauss_newton(model, lambda m: m(X), criterion) + quartic
        assert relative(one_by_one, dense) < DENSE


@pytest.mark.filterwarnings("ignore:linearisation='checkpoint' needs a recurrence")
@EVERY
def test_a_declared_loss(policy: str) -> None:
    model = mlp(3, 4, 2, seed=3)

    def loss(z: Tensor, y: Tensor) -> Tensor:
        decay = sum((p.square().sum() for p in model.parameters()), start=torch.zeros((), dtype=X.dtype))
        return (z - y).pow(4).mean() + 0.3 * decay * z.square().mean()

    op = hfopt.GaussNewton(lambda: (model(X), Y), model.parameters(), loss=loss, linearisation=policy)
    assert relative(op.to_dense(), matrix(op)) < SUMS


@pytest.mark.quick(where=lambda kind, policy: kind == "gauss-newton" or policy == "double-backward")
@EVERY
@pytest.mark.parametrize("kind", ["gauss-newton", "sampled", "empirical"])
def test_recurrences_carry_all_vectors_in_one_pass(kind: str, policy: str) -> None:
    Ws = [0.6 * randn(*shape, seed=i) for i, shape in enumerate([(3, 4), (4, 4), (4,)])]
    for W in Ws:
        W.requires_grad_()
    inputs, targets = randn(7, 2, 3, seed=5), randn(7, 2, 4, seed=6)
    options: dict[str, Any] = {"structural": True, "linearisation": policy}
    if kind != "gauss-newton":
        options |= {"kind": kind, "batch_dim": 1, "generator": torch.Generator().manual_seed(1)}
    build = hfopt.GaussNewton if kind == "gauss-newton" else hfopt.Fisher
    op = build(lambda: F.mse_loss(simple_rnn_layer(inputs, *Ws), targets), Ws, **options)
    assert op.linearisation.name == policy
    expected = matrix(op.damped(0.3, 0.5))
    with Calls() as calls:
        got = op.damped(0.3, 0.5).to_dense()
    assert relative(got, expected) < SUMS
    # One pass for all vectors: a tangent and an adjoint pass each (twice for each of three segments, and one to see
    # what vectors cost; under "recompute" an adjoint pass makes the graph first).
    assert calls.recurrent["hfopt::sequence_tangent"] <= (6 if policy == "checkpoint" else 1)
    assert calls.recurrent["hfopt::sequence_adjoint"] <= (3 if policy == "checkpoint" else 2)


def test_hessians_are_one_pass() -> None:
    model = mlp(3, 4, 2, seed=7)
    op = hfopt.Hessian(lambda: F.cross_entropy(model(X), CLASSES), model.parameters())
    with Calls() as calls:
        got = op.to_dense()
    many = sum(calls.count.values())
    with Calls() as calls:
        _ = op @ torch.ones(op.shape[0], dtype=torch.float64)
    assert many < 3 * sum(calls.count.values())
    assert relative(got, dense_hessian(model, lambda m: F.cross_entropy(m(X), CLASSES))) < DENSE
    assert relative(op.damped(0.5).to_dense(), got + 0.5 * torch.eye(len(got), dtype=got.dtype)) < SUMS
    assert op.products == 2 * len(got) + 1


@pytest.mark.filterwarnings("ignore:linearisation='checkpoint' needs a recurrence")
@EVERY
def test_parameters_without_influence_have_zero_rows(policy: str) -> None:
    model = nn.ModuleList([mlp(3, 2, seed=12), mlp(3, 2, seed=13)])
    op = hfopt.GaussNewton(lambda: F.mse_loss(model[0](X), Y), model.parameters(), linearisation=policy)
    assert relative(op.to_dense(), matrix(op)) < SUMS
    assert not op.to_dense()[8:].any()
    hessian = hfopt.Hessian(lambda: F.mse_loss(model[0](X), Y), model.parameters())
    assert relative(hessian.to_dense(), matrix(hessian)) < SUMS


def test_dropout_draws_the_same_for_all_vectors() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 2)).double()
    for policy in ("double-backward", "linearize", "recompute"):
        op = hfopt.GaussNewton(lambda: F.mse_loss(model(X), Y), model.parameters(), linearisation=policy)
        assert relative(op.to_dense(), matrix(op)) < SUMS


def test_mixed_precision_parameters() -> None:
    weight, bias = nn.Parameter(randn(2, 3, seed=29)), nn.Parameter(randn(2, seed=30).float())
    op = hfopt.GaussNewton(lambda: F.mse_loss(X @ weight.T + bias.double(), Y), [weight, bias])
    assert op.to_dense().dtype == torch.float64
    assert relative(op.to_dense(), matrix(op)) < 1e-6


class Stubborn(torch.autograd.Function):
    """sin, which does not know what to do with many tangents at once."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        gradient: Tensor = StubbornBack.apply(g, *ctx.saved_tensors)  # type: ignore[no-untyped-call]
        return gradient


class StubbornBack(torch.autograd.Function):
    @staticmethod
    def forward(g: Tensor, x: Tensor) -> Tensor:
        return g * x.cos()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, h: Tensor) -> tuple[Tensor, None]:
        return h * ctx.saved_tensors[1].cos(), None


def test_one_by_one_where_nothing_else_goes_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    inner, outer = mlp(3, 4, seed=3), mlp(4, 2, seed=4)
    params = [*inner.parameters(), *outer.parameters()]
    op = hfopt.GaussNewton(lambda: F.mse_loss(outer(Stubborn.apply(inner(X))), Y), params)  # type: ignore[no-untyped-call]
    twin = hfopt.GaussNewton(lambda: F.mse_loss(outer(inner(X).sin()), Y), params)
    with caplog.at_level(logging.WARNING, logger="hfopt"):
        for _ in range(2):
            assert relative(op.to_dense(), twin.to_dense()) < SUMS
    assert [r.getMessage().partition(",")[0] for r in caplog.records] == ["vectors are multiplied one by one"]
    assert op.products == 2 * op.shape[0]


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["double-backward", "checkpoint", "recompute"])
def test_columns_go_through_in_pieces_that_fit(policy: str) -> None:
    """Eight times the columns, and the same memory: as much as the budget has, beside the vectors themselves."""
    model = models.RNN(1, 16, 1, output="last")
    inputs, targets = torch.randn(64, 32, 1), torch.randn(32, 1)
    op = hfopt.GaussNewton(
        lambda: F.mse_loss(model(inputs), targets), model.parameters(), linearisation=policy, memory_budget=1 << 20
    )
    whole = hfopt.GaussNewton(
        lambda: F.mse_loss(model(inputs), targets), model.parameters(), linearisation=policy, memory_budget=1 << 40
    )
    V = torch.randn(op.shape[0], 64)
    expected = whole @ V
    assert relative(op @ V, expected) < 1e-4

    def most(k: int) -> int:
        columns = V[:, :k].contiguous()
        return allocated(lambda: op @ columns, torch.device("cpu"))[0] - 3 * 4 * columns.numel()

    assert most(64) < 1.5 * max(most(8), 1 << 20)
    unlimited = allocated(lambda: whole @ V, torch.device("cpu"))[0]
    assert most(64) < unlimited / 2
