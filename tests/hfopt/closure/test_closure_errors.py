"""What cannot be analysed is refused with what was found and a keyword that helps; the keyword then works."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hfopt
from hfopt.errors import ClosureError
from tests.hfopt.tools import DENSE, dense_gauss_newton, matrix, mlp, randn, relative

X, Y = randn(6, 3, seed=1), randn(6, 2, seed=2)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = mlp(3, 3, seed=3), mlp(3, 2, seed=4)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.head(self.features(x))
        return z

    def features(self, x: Tensor) -> Tensor:
        h: Tensor = self.trunk(x).tanh()
        return h


def refused(closure: Callable[[], Any], model: nn.Module, pattern: str, **options: Any) -> None:
    with pytest.raises(ClosureError, match=pattern):
        hfopt.GaussNewton(closure, model.parameters(), **options)
    optimizer = hfopt.HessianFree(model.parameters(), **options)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ClosureError, match=pattern):
        optimizer.step(closure)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert optimizer.stats == []


def works(
    closure: Callable[[], Any],
    model: nn.Module,
    outputs: Callable[[nn.Module], Tensor],
    loss: Callable[[Tensor], Tensor],
    /,
    **options: Any,
) -> None:
    op = hfopt.GaussNewton(closure, model.parameters(), **options)
    assert relative(matrix(op), dense_gauss_newton(model, outputs, loss)) < DENSE
    optimizer = hfopt.HessianFree(model.parameters(), **options)
    for _ in range(3):
        optimizer.step(closure)
    assert optimizer.stats[-1].new_loss < 0.9 * optimizer.stats[0].loss


def own(z: Tensor) -> Tensor:
    return (z - Y).square().square().mean()


def root(z: Tensor) -> Tensor:
    return F.mse_loss(z, Y).sqrt()


@pytest.mark.filterwarnings("ignore:K-FAC.*is left out")  # of losses whose curvature is not diagonal
@pytest.mark.parametrize(
    ("loss", "pattern"),
    [
        (own, r"no known criterion.*MeanBackward.*outputs=.*loss="),
        (root, r"mse_loss.*nonlinearly.*SqrtBackward.*outputs=.*loss="),
        (lambda z: F.mse_loss(z, Y) * F.huber_loss(z, Y), r"mse_loss, huber_loss.*nonlinearly.*outputs=.*loss="),
        (lambda z: (1 - (-F.mse_loss(z, Y, reduction="none")).exp()).mean(), r"mse_loss.*nonlinearly"),
    ],
)
def test_unknown_and_nonlinear_losses(loss: Callable[[Tensor], Tensor], pattern: str) -> None:
    model = Net()
    refused(lambda: loss(model(X)), model, pattern)
    ways: list[tuple[Callable[[], Any], dict[str, Any]]] = [
        (lambda: loss(model(X)), {"outputs": model}),
        (lambda: loss(model(X)), {"outputs": model.head}),
        (lambda: model(X), {"loss": loss}),
        (lambda: (model(X),), {"loss": loss}),
    ]
    for closure, options in ways:
        model.load_state_dict(Net().state_dict())
        works(closure, model, lambda m: m(X), loss, **options)


def test_returning_the_outputs_solves_an_unknown_loss() -> None:
    model = Net()

    def closure() -> tuple[Tensor, Tensor]:
        z = model(X)
        return z, own(z)

    works(closure, model, lambda m: m(X), own)


def test_a_hidden_layer_beside_the_criterion() -> None:
    """An activity penalty is no regulariser of the parameters: the features must be declared."""
    model = Net()

    def both(h: Tensor, z: Tensor) -> Tensor:
        return F.mse_loss(z, Y) + 0.1 * h.square().square().mean()

    def closure() -> Tensor:
        h = model.features(X)
        return both(h, model.head(h))

    refused(closure, model, r"besides the criterion.*result of the network.*outputs=.*loss=")

    def arguments() -> tuple[Tensor, Tensor]:
        h = model.features(X)
        return h, model.head(h)

    def joined(m: nn.Module) -> Tensor:
        h = m.features(X)  # type: ignore[operator]
        return torch.cat([h, m.head(h)], 1)  # type: ignore[operator]

    works(arguments, model, joined, lambda z: both(z[:, :3], z[:, 3:]), loss=both)


def test_the_outputs_of_a_criterion_beside_it() -> None:
    model = Net()

    def closure() -> Tensor:
        z = model(X)
        return F.mse_loss(z, Y) + 0.1 * z.square().square().mean()

    refused(closure, model, r"besides the criterion.*result of the network")


def beside_pair(model: Net) -> Callable[[], Any]:
    def closure() -> tuple[Tensor, Tensor]:
        h = model.features(X)
        z = model.head(h)
        return z, own(z) + 0.1 * h.square().mean()

    return closure


def beside_module(model: Net) -> Callable[[], Any]:
    def closure() -> Tensor:
        h = model.features(X)
        return own(model.head(h)) + 0.1 * h.square().mean()

    return closure


def nested_pair(model: Net) -> Callable[[], Any]:
    def closure() -> tuple[tuple[Tensor, Tensor], Tensor]:
        h = model.features(X)
        z = model.head(h)
        return (h, z), own(z) + 0.1 * h.square().mean()

    return closure


@pytest.mark.parametrize(("build", "keyword"), [(beside_pair, None), (beside_module, "outputs")])
def test_a_loss_that_goes_round_its_declared_outputs(
    build: Callable[[Net], Callable[[], Any]], keyword: str | None
) -> None:
    model = Net()
    options = {} if keyword is None else {"outputs": model.head}
    refused(build(model), model, r"besides the declared outputs.*result of the network.*loss=", **options)

    def both(h: Tensor, z: Tensor) -> Tensor:
        return own(z) + 0.1 * h.square().mean()

    def arguments() -> tuple[Tensor, Tensor]:
        h = model.features(X)
        return h, model.head(h)

    def joined(m: nn.Module) -> Tensor:
        h = m.features(X)  # type: ignore[operator]
        return torch.cat([h, m.head(h)], 1)  # type: ignore[operator]

    works(arguments, model, joined, lambda z: both(z[:, :3], z[:, 3:]), loss=both)


def test_outputs_may_be_computed_from_one_another() -> None:
    model = Net()

    def joined(m: nn.Module) -> Tensor:
        h = m.features(X)  # type: ignore[operator]
        return torch.cat([h, m.head(h)], 1)  # type: ignore[operator]

    works(nested_pair(model), model, joined, lambda z: own(z[:, 3:]) + 0.1 * z[:, :3].square().mean())


def test_outputs_that_the_loss_does_not_use_do_no_harm() -> None:
    """Many models return their features as well; only what the loss is computed from counts."""
    model = Net()

    def closure() -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        h = model.features(X)
        z = model.head(h)
        return (h, z, z.softmax(1)), own(z)

    works(closure, model, lambda m: m(X), own)


class Cell(nn.Module):
    """Called again on its own result."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.readout = mlp(3, 3, seed=5), mlp(3, 2, seed=6)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.cell(x).tanh()
        z: Tensor = self.readout(x)
        return z


def test_an_output_module_that_feeds_itself() -> None:
    model = Cell()
    refused(lambda: own(model(X)), model, r"computed from another.*called again.*outputs=.*loss=", outputs=model.cell)
    works(lambda: own(model(X)), model, lambda m: m(X), own, outputs=model)


@pytest.mark.parametrize(
    ("closure", "pattern"),
    [
        (lambda m: F.mse_loss(m(X), Y, reduction="none"), r"tensor of shape \(6, 2\).*scalar"),
        (lambda m: F.mse_loss(m(X), Y).item(), r"no backward\(\).*float"),
        (lambda m: None, r"no backward\(\).*NoneType"),
        (lambda m: F.mse_loss(m(X), Y).detach(), r"does not depend on any parameter"),
        (lambda m: F.mse_loss(m(X).detach(), Y), r"does not depend on any parameter"),
        (lambda m: {"loss": F.mse_loss(m(X), Y)}, r"no backward\(\).*dict"),
        (lambda m: F.mse_loss(m(X), Y, reduction="none").backward(), r"\(6, 2\).*reduce the loss"),
        (lambda m: (m(X).detach(), own(m(X))), r"no known criterion"),
        (lambda m: (m(X), own(m(X))), r"does not depend on the declared outputs"),
        (lambda m: (F.mse_loss(m(X), Y), m(X).sum())[1], r"does not use the value of any criterion"),
    ],
)
def test_losses_that_lead_nowhere(closure: Callable[[nn.Module], Any], pattern: str) -> None:
    model = Net()
    refused(lambda: closure(model), model, pattern)


@pytest.mark.parametrize("curvature", ["gauss-newton", "hessian"])
def test_a_model_that_is_not_the_optimizers(curvature: str) -> None:
    other = Net()
    optimizer = hfopt.HessianFree(Net().parameters(), curvature=curvature)
    with pytest.raises(ClosureError, match=r"not depend on any of the parameters given.*copy"):
        optimizer.step(lambda: F.mse_loss(other(X), Y))


def test_wrong_keywords() -> None:
    model = Net()
    refused(lambda: F.mse_loss(model(X), Y), model, r"outputs= was not called", outputs=mlp(3, 2))
    refused(lambda: model(X), model, r"loss= must return a scalar tensor", loss=lambda z: z - Y)
    refused(lambda: model(X), model, r"loss= must return a scalar tensor.*float", loss=lambda z: 1.0)
    with pytest.raises(ValueError, match="not both"):
        hfopt.HessianFree(model.parameters(), loss=own, outputs=model)


def test_the_hessian_needs_no_outputs() -> None:
    """With curvature="hessian" any differentiable loss will do."""
    model = Net()
    optimizer = hfopt.HessianFree(model.parameters(), curvature="hessian")

    def closure() -> Tensor:
        h = model.features(X)
        return root(model.head(h)) + 0.1 * h.square().square().mean()

    for _ in range(5):
        optimizer.step(closure)
    assert optimizer.stats[-1].new_loss < 0.9 * optimizer.stats[0].loss


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"curvature": "newton"}, r"curvature is 'newton'.*gauss-newton"),
        ({"backtracking": "all"}, r"backtracking is 'all'.*walk"),
        ({"linearisation": "fast"}, r"linearisation is 'fast'.*double-backward"),
        ({"preconditioner": "jacobi"}, r"preconditioner is 'jacobi'.*empirical-fisher"),
        ({"structural": -1.0}, "structural"),
        ({"structural": 0.1, "curvature": "hessian"}, r"structural_damping needs"),
        ({"lr": -1.0}, "lr"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"damping": -1.0}, "initial"),
        ({"damping": float("nan")}, "initial"),
    ],
)
def test_bad_arguments(options: dict[str, Any], pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        hfopt.HessianFree(Net().parameters(), **options)


def test_bad_parameters() -> None:
    with pytest.raises(TypeError, match="complex"):
        hfopt.HessianFree([torch.zeros(2, dtype=torch.complex64, requires_grad=True)])
    with pytest.raises(ValueError, match="empty"):
        hfopt.HessianFree([])
    with pytest.raises(TypeError, match=r"\[tensor\]"):
        hfopt.GaussNewton(lambda: None, torch.zeros(2, requires_grad=True))


def clamped(model: nn.Module) -> Tensor:
    loss = F.mse_loss(model(X), Y)
    loss.backward()
    for p in model.parameters():
        p.grad.clamp_(-1, 1)  # type: ignore[union-attr]
    return loss


def created(model: nn.Module) -> Tensor:
    model.zero_grad()
    loss = F.mse_loss(model(X), Y)
    loss.backward(create_graph=True)  # type: ignore[no-untyped-call]
    return loss + sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None)


def attacked(model: nn.Module) -> Tensor:
    x = X.clone().requires_grad_()
    F.mse_loss(model(x), Y).backward(inputs=[x])  # type: ignore[no-untyped-call]
    return F.mse_loss(model(X + x.grad.sign()), Y)  # type: ignore[union-attr]


def clamps(model: nn.Module) -> Tensor:
    with torch.no_grad():
        for p in model.parameters():
            p.clamp_(-9, 9)
    return F.mse_loss(model(X), Y)


@pytest.mark.parametrize(
    ("closure", "advice"),
    [
        (clamped, "p.grad is set when the step is done"),
        (created, r"torch.autograd.grad\(loss, params, create_graph=True\)"),
        (attacked, r"inputs=.*torch.autograd.grad"),
        (clamps, r"changes parameters in place.*after step\(\)"),
    ],
)
def test_closures_that_count_on_backward_at_once_are_told(closure: Callable[[nn.Module], Tensor], advice: str) -> None:
    model = Net()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ClosureError, match=advice):
        hfopt.HessianFree(model.parameters()).step(lambda: closure(model))
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
