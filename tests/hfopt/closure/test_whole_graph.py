"""Closures that differentiate their own criteria, and losses around criteria, against dense references in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

import hfopt
from hfopt.closure.trace import differentiate, evaluate, trace
from hfopt.errors import ClosureError
from tests.hfopt.tools import dense_gauss_newton, dense_hessian, flat, matrix, mlp, randn, relative

X, Y = randn(6, 3, seed=1), randn(6, 2, seed=2)
BITS = (randn(6, 2, seed=3) > 0).double()
CLASSES = Y.argmax(1)


def net() -> Any:
    return mlp(3, 3, 2, seed=4)


def exact(closure: Callable[[], Tensor], model: nn.Module, expected: Tensor, **options: Any) -> None:
    """Matrix, gradient and loss."""
    op = hfopt.GaussNewton(closure, model.parameters(), **options)
    assert relative(matrix(op), expected) < 1e-9
    total = closure()
    found = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
    plain = [torch.zeros_like(p) if g is None else g for g, p in zip(found, model.parameters(), strict=True)]
    assert relative(op.gradient, flat(plain)) < 1e-11
    assert float(op.loss) == pytest.approx(float(total.detach()), rel=1e-13)
    assert float(evaluate(closure, differentiates=op.differentiates)) == pytest.approx(float(op.loss), rel=1e-13)


def adapted(model: nn.Module, p: dict[str, Tensor], outer: bool) -> dict[str, Tensor]:
    """A gradient step, by torch.func or by autograd."""
    if outer:
        g = grad(lambda q: F.mse_loss(functional_call(model, q, (X,)), Y))(p)
    else:
        inner = F.mse_loss(functional_call(model, p, (X,)), Y)
        g = dict(zip(p, torch.autograd.grad(inner, list(p.values()), create_graph=True), strict=True))
    return {k: p[k] - 0.3 * g[k] for k in p}


@pytest.mark.parametrize("functional", [True, False])
def test_a_gradient_step_inside_the_closure(functional: bool) -> None:
    """MAML: the adapted network's outputs are functions of the parameters through the inner criterion's gradient."""
    model = net()

    def outputs() -> Tensor:
        p = dict(model.named_parameters())
        z: Tensor = functional_call(model, adapted(model, p, functional), (X.flip(0),))
        return z

    z, params = outputs(), list(model.parameters())
    rows = [flat(list(torch.autograd.grad(r, params, retain_graph=True))) for r in z.flatten()]
    j = torch.stack(rows)
    exact(lambda: F.mse_loss(outputs(), Y), model, 2 / z.numel() * j.T @ j)


def test_steps_with_a_gradient_step_inside() -> None:
    model = net()
    optimizer = hfopt.HessianFree(model.parameters())

    def closure() -> Tensor:
        fast = adapted(model, dict(model.named_parameters()), False)
        loss = F.mse_loss(functional_call(model, fast, (X,)), Y)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    for _ in range(5):
        optimizer.step(closure)
    assert optimizer.stats[-1].new_loss < 0.5 * optimizer.stats[0].loss


def test_weights_from_gradient_norms() -> None:
    model = net()
    params = list(model.parameters())

    def losses() -> tuple[Tensor, Tensor]:
        z = model(X)
        return F.mse_loss(z, Y), F.cross_entropy(z, CLASSES)

    def norms() -> list[float]:
        return [float(flat(list(torch.autograd.grad(one, params, retain_graph=True))).norm()) for one in losses()]

    def closure() -> Tensor:
        a, b = losses()
        n = [float(flat(list(torch.autograd.grad(one, params, retain_graph=True))).norm()) for one in (a, b)]
        return a + n[0] / n[1] * b + 0.01 * sum(p.square().sum() for p in params)

    ratio = norms()[0] / norms()[1]
    expected = dense_gauss_newton(
        model, lambda m: m(X), lambda z: F.mse_loss(z, Y) + ratio * F.cross_entropy(z, CLASSES)
    )
    exact(closure, model, expected + 0.02 * torch.eye(len(expected), dtype=X.dtype))


def test_weights_from_values_of_criteria() -> None:
    """Detached weights are numbers; those with a graph make the loss no weighted sum, and are refused."""
    model = net()

    def closure(detach: bool = True) -> Tensor:
        a, b = F.mse_loss(model(X), Y), F.mse_loss(model(X[:1]), Y[:1])
        return a + (a.detach() if detach else a) / b.item() * b

    w = float((F.mse_loss(model(X), Y) / F.mse_loss(model(X[:1]), Y[:1])).detach())
    both = dense_gauss_newton(model, lambda m: m(X), lambda z: F.mse_loss(z, Y) + w * F.mse_loss(z[:1], Y[:1]))
    exact(closure, model, both)
    with pytest.raises(ClosureError, match=r"mse_loss.*nonlinearly.*curvature='hessian'"):
        hfopt.GaussNewton(lambda: closure(False), model.parameters())


def test_a_criterion_may_feed_the_network() -> None:
    model = net()

    def outputs(m: nn.Module) -> Tensor:
        z = m(X)
        return torch.cat([z, z * F.mse_loss(z, Y)], 1)

    def closure() -> Tensor:
        z = model(X)
        first = F.mse_loss(z, Y)
        return F.mse_loss(z * first, Y) + first

    expected = dense_gauss_newton(model, outputs, lambda z: F.mse_loss(z[:, :2], Y) + F.mse_loss(z[:, 2:], Y))
    exact(closure, model, expected)


def test_a_criterion_inside_vmap() -> None:
    """Losses of single cases: no criterion of the whole batch is seen, and the advice works."""
    model = net()

    def losses(z: Tensor) -> Tensor:
        return vmap(F.mse_loss)(z, Y).mean()

    with pytest.raises(ClosureError, match=r"outputs.*curvature='hessian'"):
        hfopt.GaussNewton(lambda: losses(model(X)), model.parameters())
    exact(
        lambda: losses(model(X)),
        model,
        dense_gauss_newton(model, lambda m: m(X), lambda z: F.mse_loss(z, Y)),
        outputs=model,
    )


def test_one_output_in_both_places_of_a_criterion() -> None:
    """What one argument is computed from another one does not count twice."""
    model = net()

    def outputs(m: nn.Module) -> Tensor:
        z = m(X)
        return torch.stack([z, z.softmax(1)])

    expected = dense_gauss_newton(model, outputs, lambda z: F.cross_entropy(z[0], z[1]))
    exact(lambda: (lambda z: F.cross_entropy(z, z.softmax(1)))(model(X)), model, expected)


def dice(z: Tensor) -> Tensor:
    p = z.sigmoid()
    return F.binary_cross_entropy_with_logits(z, BITS) + 1 - 2 * (p * BITS).sum() / (p + BITS).sum()


def test_returned_outputs_with_a_criterion_in_the_loss() -> None:
    model = net()
    with pytest.raises(ClosureError, match=r"besides the criterion.*\(outputs, loss\)"):
        hfopt.GaussNewton(lambda: dice(model(X)), model.parameters())

    def closure() -> tuple[Tensor, Tensor]:
        z = model(X)
        return z, dice(z)

    op = hfopt.GaussNewton(closure, model.parameters())
    assert relative(matrix(op), dense_gauss_newton(model, lambda m: m(X), dice)) < 1e-9
    optimizer = hfopt.HessianFree(model.parameters())
    for _ in range(3):
        optimizer.step(closure)
    assert optimizer.stats[-1].new_loss < 0.9 * optimizer.stats[0].loss


class VAE(nn.Module):
    """Mean and logarithm of the variance, and a reconstruction from fixed noise."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = mlp(2, 3, 4, seed=5), mlp(2, 2, seed=6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log = self.encoder(x).chunk(2, 1)
        z = mean + (0.5 * log).exp() * torch.linspace(-1, 1, 12, dtype=x.dtype).view(6, 2)
        return self.decoder(z), mean, log


def elbo(out: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    logits, mean, log = out
    rest = -0.5 * torch.sum(1 + log - mean.pow(2) - log.exp())
    return F.binary_cross_entropy_with_logits(logits, BITS, reduction="sum") + rest


def variational(form: str) -> tuple[nn.Module, Callable[[], Any], dict[str, Any]]:
    model = VAE()

    def pair() -> tuple[Any, Tensor]:
        out = model(BITS)
        return out, elbo(out)

    forms: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
        "pair": (pair, {}),
        "loss=": (lambda: (model(BITS),), {"loss": elbo}),
        "outputs=": (lambda: elbo(model(BITS)), {"outputs": model}),
    }
    return model, *forms[form]


@pytest.mark.parametrize("form", ["pair", "loss=", "outputs="])
def test_a_variational_autoencoder(form: str) -> None:
    """The reconstruction is computed from the other outputs, each of which is held fixed for the others."""
    model, closure, options = variational(form)
    expected = dense_gauss_newton(
        model, lambda m: torch.cat(m(BITS), 1), lambda z: elbo((z[:, :2], z[:, 2:4], z[:, 4:]))
    )
    op = hfopt.GaussNewton(closure, model.parameters(), **options)
    assert relative(matrix(op), expected) < 1e-9
    assert relative(op.multiply_many(torch.eye(len(expected), dtype=X.dtype)), expected) < 1e-9
    plain = torch.autograd.grad(elbo(model(BITS)), list(model.parameters()))
    assert relative(op.gradient, flat(plain)) < 1e-11
    optimizer = hfopt.HessianFree(model.parameters(), **options)
    for _ in range(4):
        optimizer.step(closure)
    assert optimizer.stats[-1].new_loss < 0.95 * optimizer.stats[0].loss


def test_a_variational_autoencoder_without_outputs_is_told_the_ways_out() -> None:
    model = VAE()
    with pytest.raises(ClosureError, match=r"\(outputs, loss\).*outputs=.*loss=.*curvature='hessian'"):
        hfopt.HessianFree(model.parameters()).step(lambda: elbo(model(BITS)))
    optimizer = hfopt.HessianFree(model.parameters(), curvature="hessian")
    for _ in range(4):
        optimizer.step(lambda: elbo(model(BITS)))
    assert optimizer.stats[-1].new_loss < 0.95 * optimizer.stats[0].loss


def test_policy_gradients() -> None:
    """REINFORCE: linear in log-probabilities, so the logits are the outputs."""
    model, advantage = net(), randn(6, seed=7)

    def reinforce(z: Tensor) -> Tensor:
        distribution = torch.distributions.Categorical(logits=z, validate_args=False)
        return -(distribution.log_prob(CLASSES) * advantage).mean() - 0.01 * distribution.entropy().mean()

    with pytest.raises(ClosureError, match=r"no known criterion.*curvature='hessian'"):
        hfopt.HessianFree(model.parameters()).step(lambda: reinforce(model(X)))
    expected = dense_gauss_newton(model, lambda m: m(X), reinforce)
    exact(lambda: reinforce(model(X)), model, expected, outputs=model)
    for options in ({"outputs": model}, {"curvature": "hessian"}, {"outputs": model, "curvature": "empirical-fisher"}):
        optimizer = hfopt.HessianFree(model.parameters(), **options)
        optimizer.step(lambda: reinforce(model(X)))
        assert optimizer.stats[0].new_loss < optimizer.stats[0].loss


class Kernel(nn.Module):
    """The covariance of a Gaussian process."""

    def __init__(self) -> None:
        super().__init__()
        self.logs = nn.Parameter(torch.tensor([0.1, -0.2, -1.0], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        length, scale, noise = self.logs.exp()
        squared = ((x[:, None] - x) / length).square().sum(-1)
        k: Tensor = scale * (-0.5 * squared).exp() + noise * torch.eye(len(x), dtype=x.dtype)
        return k


def evidence(k: Tensor) -> Tensor:
    factor = torch.linalg.cholesky(k)
    alpha = torch.linalg.solve_triangular(factor, Y[:, :1], upper=False)
    return 0.5 * (alpha**2).sum() + factor.diagonal().log().sum()


@pytest.mark.parametrize("way", ["hessian", "outputs=", "loss=", "pair"])
def test_gaussian_processes(way: str) -> None:
    """A square of the network beside its logarithm is no squared error; every way out works."""
    model = Kernel()
    with pytest.raises(ClosureError, match=r"no known criterion.*\(outputs, loss\).*outputs=.*loss=.*'hessian'"):
        hfopt.HessianFree(model.parameters()).step(lambda: evidence(model(X)))
    closures: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
        "hessian": (lambda: evidence(model(X)), {"curvature": "hessian"}),
        "outputs=": (lambda: evidence(model(X)), {"outputs": model}),
        "loss=": (lambda: model(X), {"loss": evidence}),
        "pair": (lambda: (lambda k: (k, evidence(k)))(model(X)), {}),
    }
    closure, options = closures[way]
    optimizer = hfopt.HessianFree(model.parameters(), **options)
    for _ in range(3):
        optimizer.step(closure)
    assert optimizer.stats[-1].new_loss < optimizer.stats[0].loss
    if way == "hessian":
        expected = dense_hessian(model, lambda m: evidence(m(X)))
        assert relative(matrix(hfopt.Hessian(closure, model.parameters())), expected) < 1e-9


@pytest.mark.parametrize(
    "loss",
    [
        lambda z: F.multi_margin_loss(z, CLASSES),
        lambda z: F.multilabel_margin_loss(z, CLASSES[:, None].expand(6, 2).contiguous()),
        lambda z: F.ctc_loss(z[:, None].log_softmax(2), torch.tensor([[1, 1]]), torch.tensor([6]), torch.tensor([2])),
    ],
)
def test_losses_without_a_second_derivative(loss: Callable[[Tensor], Tensor]) -> None:
    model = net()
    with pytest.raises(ClosureError, match=r"no second derivative.*not implemented.*empirical-fisher"):
        hfopt.HessianFree(model.parameters(), outputs=model).step(lambda: loss(model(X)))
    optimizer = hfopt.HessianFree(model.parameters(), outputs=model, curvature="empirical-fisher")
    for _ in range(3):
        optimizer.step(lambda: loss(model(X)))
    assert optimizer.stats[-1].new_loss < optimizer.stats[0].loss


def test_embeddings_that_renormalise_are_refused() -> None:
    model = nn.Embedding(9, 2, max_norm=0.5)
    with pytest.raises(ClosureError, match=r"changes parameters in place.*\(9, 2\).*max_norm"):
        hfopt.HessianFree(model.parameters()).step(lambda: F.cross_entropy(model(torch.arange(6)), CLASSES))


@pytest.mark.parametrize("curvature", ["gauss-newton", "hessian"])
@pytest.mark.parametrize("separate", [True, False])
def test_backward_as_a_function(curvature: str, separate: bool) -> None:
    model = net()
    optimizer = hfopt.HessianFree(model.parameters(), curvature=curvature)

    def closure() -> None:
        optimizer.zero_grad()
        torch.autograd.backward([F.mse_loss(model(X), Y), F.cross_entropy(model(X), CLASSES)])

    total = F.mse_loss(model(X), Y) + F.cross_entropy(model(X), CLASSES)
    expected = torch.autograd.grad(total, list(model.parameters()))
    loss = optimizer.step(closure, curvature=closure if separate else None)
    assert float(loss) == pytest.approx(float(total.detach()), rel=1e-13)
    assert relative(flat([p.grad for p in model.parameters()]), flat(list(expected))) < 1e-12  # type: ignore[misc]
    assert optimizer.stats[0].new_loss < optimizer.stats[0].loss


def test_a_gradient_of_the_loss_for_show() -> None:
    """A closure may look at its loss's gradient without keeping the graph for it."""
    model = net()

    def closure() -> Tensor:
        loss = F.mse_loss(model(X), Y)
        torch.autograd.grad(loss, list(model.parameters()))
        return loss

    loss, _ = differentiate(closure, list(model.parameters()))
    op = hfopt.GaussNewton(closure, model.parameters())
    assert float(op.loss) == float(loss)
    assert relative(matrix(op), dense_gauss_newton(model, lambda m: m(X), lambda z: F.mse_loss(z, Y))) < 1e-10


@pytest.mark.parametrize("asks", [True, False])
def test_closures_that_return_nothing_run_once_per_evaluation(asks: bool) -> None:
    model = net()
    runs: list[bool] = []

    def closure() -> None:
        runs.append(torch.is_grad_enabled())
        loss = F.mse_loss(model(X), Y)
        if not asks or loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]

    seen = trace(closure)
    assert seen.differentiates == asks
    runs.clear()
    value = evaluate(closure, differentiates=seen.differentiates)
    assert float(value) == pytest.approx(float(F.mse_loss(model(X), Y).detach()), rel=1e-14)
    assert runs == [asks]


def test_learned_weights_of_criteria() -> None:
    """Weights that are learned make the loss no weighted sum of numbers; the outputs may be declared."""
    model = nn.ModuleDict({"net": net()})
    model["log"] = nn.ParameterList([torch.tensor(0.3, dtype=torch.float64)])  # type: ignore[assignment]
    log = model["log"][0]  # type: ignore[index]

    def loss(z: Tensor) -> Tensor:
        return (-log).exp() * F.mse_loss(z, Y) + log

    with pytest.raises(ClosureError, match=r"mse_loss.*nonlinearly.*loss="):
        hfopt.GaussNewton(lambda: loss(model["net"](X)), model.parameters())

    def pair() -> tuple[Tensor, Tensor]:
        z = model["net"](X)
        return z, loss(z)

    op = hfopt.GaussNewton(pair, model.parameters())
    other = hfopt.GaussNewton(lambda: loss(model["net"](X)), model.parameters(), outputs=model["net"])
    assert relative(matrix(op), matrix(other)) < 1e-12
    assert math.isclose(float(op.loss), float(other.loss), rel_tol=1e-14)
