"""Each way to linearise gives the same products; the automatic order and its warnings."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

import hfopt
from hfopt.recurrences import simple_rnn_layer
from tests.hfopt.tools import DENSE, SUMS, dense_gauss_newton, matrix, mlp, randn, relative, theta

X, Y = randn(6, 3, seed=1), randn(6, 2, seed=2)
POLICIES = ["double-backward", "linearize", "recompute"]


class OneWay(torch.autograd.Function):
    """sin, with a forward mode, whose backward pass cannot be differentiated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0].cos()

    @staticmethod
    def jvp(ctx: Any, t: Tensor) -> Tensor:
        return t * ctx.saved_tensors[0].cos()


class NoWay(torch.autograd.Function):
    """sin with neither."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0].cos()


class Wave(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.inner, self.function = mlp(3, 4, seed=3), function
        self.outer = mlp(4, 2, seed=4)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.outer(self.function(self.inner(x)))
        return z


def model_with(kind: str) -> nn.Module:
    torch.manual_seed(0)
    kinds: dict[str, nn.Module] = {
        "mlp": mlp(3, 4, 2, seed=5),
        "norm": nn.Sequential(mlp(3, 4, seed=6), nn.LayerNorm(4, dtype=X.dtype), nn.GELU(), mlp(4, 2, seed=7)),
        "batchnorm": nn.Sequential(mlp(3, 4, seed=8), nn.BatchNorm1d(4, dtype=X.dtype), nn.SiLU(), mlp(4, 2, seed=9)),
        "linear": mlp(3, 2, seed=10),
    }
    return kinds[kind]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", ["mlp", "norm", "batchnorm", "linear"])
def test_policies_agree_with_the_dense_matrix(kind: str, policy: str) -> None:
    model = model_with(kind)
    op = hfopt.GaussNewton(lambda: F.mse_loss(model(X), Y), model.parameters(), linearisation=policy)
    assert op.linearisation.name == policy
    got = matrix(op)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
    expected = dense_gauss_newton(model, lambda m: m(X), lambda z: F.mse_loss(z, Y))
    assert relative(got, expected) < DENSE
    plain = torch.autograd.grad(F.mse_loss(model(X), Y), list(model.parameters()))
    assert relative(op.gradient, torch.cat([g.reshape(-1) for g in plain])) < DENSE


@pytest.mark.parametrize("policy", POLICIES)
def test_policies_train_alike(policy: str) -> None:
    model, reference = mlp(3, 4, 2, seed=11), mlp(3, 4, 2, seed=11)
    cg = hfopt.CG(max_iterations=5)  # long solves let rounding grow until the choice of an iterate turns on it
    a = hfopt.HessianFree(model.parameters(), linearisation=policy, cg=cg)
    b = hfopt.HessianFree(reference.parameters(), cg=cg)
    for _ in range(4):
        a.step(lambda: F.mse_loss(model(X), Y))
        b.step(lambda: F.mse_loss(reference(X), Y))
    assert torch.allclose(theta(model), theta(reference), rtol=1e-6, atol=1e-8)
    assert {s.linearisation for s in a.stats} == {policy}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_part_that_does_not_reach_the_loss(policy: str) -> None:
    """Parameters without influence have zero rows, whichever policy."""
    model = nn.ModuleList([mlp(3, 2, seed=12), mlp(3, 2, seed=13)])
    op = hfopt.GaussNewton(lambda: F.mse_loss(model[0](X), Y), model.parameters(), linearisation=policy)
    got = matrix(op)
    assert not got[8:].any()
    assert not got[:, 8:].any()
    assert got[:8, :8].any()


def test_double_backward_comes_first() -> None:
    model = mlp(3, 4, 2, seed=14)
    op = hfopt.GaussNewton(lambda: F.mse_loss(model(X), Y), model.parameters())
    assert op.linearisation.name == "double-backward"


def test_linearize_where_double_backward_fails() -> None:
    model = Wave(OneWay.apply)
    with pytest.warns(UserWarning, match=r"'linearize'.*double backward failed.*once_differentiable"):
        op = hfopt.GaussNewton(lambda: F.mse_loss(model(X), Y), model.parameters())
    assert op.linearisation.name == "linearize"
    twin = Wave(torch.sin)
    expected = dense_gauss_newton(twin, lambda m: m(X), lambda z: F.mse_loss(z, Y))
    assert relative(matrix(op), expected) < DENSE


def test_a_model_without_any_way() -> None:
    model = Wave(NoWay.apply)
    with pytest.raises(hfopt.NotDifferentiable, match=r"double-backward:.*linearize:.*Replace.*freeze"):
        hfopt.GaussNewton(lambda: F.mse_loss(model(X), Y), model.parameters())


def test_memory_budget() -> None:
    model = mlp(3, 4, 2, seed=15)
    with pytest.warns(UserWarning, match=r"over the budget.*runs the model again.*memory_budget"):
        op = hfopt.GaussNewton(lambda: F.mse_loss(model(X), Y), model.parameters(), memory_budget=100)
    assert op.linearisation.name == "recompute"
    expected = dense_gauss_newton(model, lambda m: m(X), lambda z: F.mse_loss(z, Y))
    assert relative(matrix(op), expected) < DENSE
    optimizer = hfopt.HessianFree(model.parameters(), memory_budget=100)
    with pytest.warns(UserWarning, match="over the budget"):
        optimizer.step(lambda: F.mse_loss(model(X), Y))
    assert optimizer.stats[0].accepted


def test_the_estimate_of_memory_counts_what_the_graph_saves() -> None:
    """Three saved activations of (N, 100) in float64, at the double-backward factor."""
    model = nn.Sequential(nn.Linear(100, 100), nn.Tanh(), nn.Linear(100, 100), nn.Tanh()).double()
    x, y = randn(1000, 100, seed=16), randn(1000, 100, seed=17)
    activations = 1000 * 100 * 8
    for budget, name in ((3 * activations, "recompute"), (9 * activations, "double-backward")):
        if name == "recompute":
            with pytest.warns(UserWarning, match="over the budget"):
                op = hfopt.GaussNewton(lambda: F.mse_loss(model(x), y), model.parameters(), memory_budget=budget)
        else:
            op = hfopt.GaussNewton(lambda: F.mse_loss(model(x), y), model.parameters(), memory_budget=budget)
        assert op.linearisation.name == name


def test_a_parameter_given_straight_to_an_autograd_function_has_its_tangent() -> None:
    weight = nn.Parameter(randn(3, 2, seed=3))
    apply = torch.autograd.Function.apply

    def closure() -> Tensor:
        return F.mse_loss(X @ OneWay.apply(weight), Y)

    def outputs(w: Tensor) -> Tensor:
        return (X @ w.view(3, 2).sin()).flatten()

    op = hfopt.GaussNewton(closure, [weight], linearisation="linearize")
    jacobian = torch.autograd.functional.jacobian(outputs, weight.detach().flatten())
    dense = jacobian.T @ jacobian * (2 / Y.numel())
    assert relative(matrix(op), dense) < SUMS
    assert torch.autograd.Function.apply == apply


@pytest.mark.parametrize("policy", POLICIES)
def test_an_operator_is_freed_with_its_last_reference(policy: str) -> None:
    """Its graph may take most of the memory there is: it must not wait for a garbage collection."""
    model = mlp(3, 4, 2, seed=30)
    gc.collect()
    gc.disable()
    try:
        op = hfopt.GaussNewton(lambda: F.mse_loss(model(X), Y), model.parameters(), linearisation=policy)
        freed = weakref.ref(op)
        del op
        assert freed() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("policy", POLICIES)
def test_hidden_states_of_a_frozen_layer_are_left_out(policy: str) -> None:
    weights = [randn(*shape, seed=31 + i) for i, shape in enumerate([(3, 4), (4, 4), (4,), (4, 2), (2, 2), (2,)])]
    first, second = weights[:3], [w.requires_grad_() for w in weights[3:]]
    inputs, targets = randn(5, 6, 3, seed=40), randn(5, 6, 2, seed=41)

    def closure() -> Tensor:
        return F.mse_loss(simple_rnn_layer(simple_rnn_layer(inputs, *first), *second), targets)

    op = hfopt.GaussNewton(closure, second, structural=True, linearisation=policy)
    hidden = simple_rnn_layer(inputs, *first)
    alone = hfopt.GaussNewton(lambda: F.mse_loss(simple_rnn_layer(hidden, *second), targets), second, structural=True)
    assert relative(matrix(op.damped(0.3, 0.5)), matrix(alone.damped(0.3, 0.5))) < SUMS


def test_a_growing_batch_is_run_once() -> None:
    model, runs = mlp(3, 4, 2, seed=50), [0]
    optimizer = hfopt.HessianFree(model.parameters(), preconditioner=None)
    for n in (2, 4, 6):

        def closure(n: int = n) -> Tensor:
            runs[0] += torch.is_grad_enabled()
            return F.mse_loss(model(X[:n]), Y[:n])

        optimizer.step(closure)
        assert optimizer.chosen == ("double-backward", 2 * n)
    assert runs[0] == 3


def test_the_choice_is_made_anew_where_the_model_has_changed() -> None:
    class ClosureRunner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.one_way = mlp(3, 4, seed=51), mlp(4, 2, seed=52), False

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            z: Tensor = self.second(OneWay.apply(h) if self.one_way else h.sin())  # type: ignore[no-untyped-call]
            return z

    model = ClosureRunner()
    optimizer = hfopt.HessianFree(model.parameters())
    optimizer.step(lambda: F.mse_loss(model(X), Y))
    model.one_way = True
    with pytest.warns(UserWarning, match="double backward failed"):
        optimizer.step(lambda: F.mse_loss(model(X), Y))
    assert [s.linearisation for s in optimizer.stats] == ["double-backward", "linearize"]
    state = optimizer.state_dict()
    asked = hfopt.HessianFree(model.parameters(), linearisation="recompute")
    asked.load_state_dict(state)
    model.one_way = False
    asked.step(lambda: F.mse_loss(model(X), Y))
    assert asked.stats[-1].linearisation == "recompute"


def test_two_threads_that_linearise_leave_autograd_as_it_was() -> None:
    before = torch.autograd.Function.__dict__["apply"]
    entered, products = threading.Event(), {}

    def run(name: str, meet: Callable[[], object]) -> None:
        model = mlp(3, 4, 2, seed=60)

        def closure() -> Tensor:
            if torch.autograd.Function.__dict__["apply"] is not before:
                meet()
            return F.mse_loss(model(X), Y)

        op = hfopt.GaussNewton(closure, model.parameters(), linearisation="linearize")
        products[name] = op @ torch.ones(op.shape[0], dtype=torch.float64)

    def second() -> None:
        entered.wait(10)
        run("second", lambda: None)

    def wait_inside() -> None:
        entered.set()
        thread.join(0.2)  # long enough for the other one to come in as well

    thread = threading.Thread(target=second)
    thread.start()
    run("first", wait_inside)
    thread.join()
    assert torch.equal(products["first"], products["second"])
    assert torch.autograd.Function.__dict__["apply"] is before


def test_lack_of_memory_is_no_reason_to_try_another_policy_than_the_named_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    model = mlp(3, 2, seed=51)
    monkeypatch.setattr("hfopt.curvature.policy.DoubleBackward", full)
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        hfopt.GaussNewton(lambda: F.mse_loss(model(X), Y), model.parameters(), linearisation="double-backward")


def test_a_traced_graph_that_writes_to_its_constants() -> None:
    """torch's simple recurrent layer adds in place, so that its traced graph is another after each product."""
    torch.manual_seed(0)
    layer = nn.RNN(3, 2).double()
    x = randn(3, 4, 3, seed=1)
    ops = [
        hfopt.GaussNewton(
            lambda: F.mse_loss(layer(x)[0], torch.zeros(3, 4, 2, dtype=x.dtype)),
            layer.parameters(),
            linearisation=policy,
        )
        for policy in ("linearize", "double-backward")
    ]
    v = randn(ops[0].shape[0], seed=2)
    expected = ops[1] @ v
    for _ in range(3):
        assert relative(ops[0] @ v, expected) < SUMS
    assert relative((ops[0] @ torch.stack([v, -v], 1))[:, 1], -expected) < SUMS


def test_a_closure_that_asks_which_parameters_are_trainable() -> None:
    """Tracing puts other tensors in the place of parameters; what is asked about these is answered by them."""
    model = mlp(3, 4, 2)
    x = randn(5, 3, seed=1)

    def closure() -> Tensor:
        trainable = [p for p in model.parameters() if p.requires_grad and p.is_leaf]
        return F.mse_loss(model(x), x[:, :2]) + torch.stack([(p**2).sum() for p in trainable]).sum()

    ops = [hfopt.GaussNewton(closure, model.parameters(), linearisation=p) for p in ("linearize", "double-backward")]
    v = randn(ops[0].shape[0], seed=2)
    assert relative(ops[0] @ v, ops[1] @ v) < SUMS


@pytest.mark.parametrize("policy", ["double-backward", "linearize", "recompute", "hessian"])
def test_an_operation_without_the_derivative_is_named(policy: str) -> None:
    """Whatever policy is asked for by name, it is found at the latest with the first product."""
    bag = nn.EmbeddingBag(4, 2).double()
    tokens = torch.tensor([[0, 1], [2, 3]])

    def closure() -> Tensor:
        return F.mse_loss(bag(tokens), torch.zeros(2, 2, dtype=torch.float64))

    def product() -> None:
        op = (
            hfopt.Hessian(closure, bag.parameters())
            if policy == "hessian"
            else hfopt.GaussNewton(closure, bag.parameters(), linearisation=policy)
        )
        op @ torch.ones(8, dtype=torch.float64)
        op @ torch.ones(8, 2, dtype=torch.float64)

    with pytest.raises(hfopt.NotDifferentiable, match="embedding_bag"):
        product()
