"""Gauss-Newton products for every criterion against J' H J, with H from torch.func.hessian in the logits."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hfopt
from hfopt.errors import ClosureError
from tests.hfopt.tools import (
    DENSE,
    SUMS,
    dense_gauss_newton,
    dense_hessian,
    flat,
    hessian,
    jacobian,
    matrix,
    mlp,
    randn,
    relative,
    rounding,
)

N, C = 5, 3
X = randn(N, 4, seed=1)
CLASSES = torch.tensor([0, 2, 1, 2, 0])
WEIGHT = torch.tensor([0.5, 2.0, 1.3], dtype=torch.float64)
PER_ELEMENT = randn(N, C, seed=2).abs() + 0.1
Y = randn(N, C, seed=3)
BITS = (randn(N, C, seed=4) > 0).double()
SOFT = torch.rand(N, C, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
PROBABILITIES = randn(N, C, seed=6).softmax(1)
UNNORMALISED = randn(N, C, seed=7).exp()
GRID = torch.randint(0, C, (N, 2, 2), generator=torch.Generator().manual_seed(8))
GRID_IGNORED = torch.where(torch.arange(4).view(2, 2) == 1, torch.tensor(-100), GRID)
GRID_PROBABILITIES = randn(N, C, 2, 2, seed=9).softmax(1)


def same(z: Tensor) -> Tensor:
    return z


def log_softmax(z: Tensor) -> Tensor:
    return z.log_softmax(1)


def log_softmax_last(z: Tensor) -> Tensor:
    return z.log_softmax(-1)


def log_softmax_pair(z: Tensor) -> Tensor:
    return z.view(N, 2, 3).log_softmax(-1)


def grid(z: Tensor) -> Tensor:
    return z.view(N, C, 2, 2)


def log_grid(z: Tensor) -> Tensor:
    return grid(z).log_softmax(1)


@dataclass(frozen=True)
class Case:
    """``link`` leads from logits to the criterion's input; ``width`` logits a case."""

    name: str
    criterion: Callable[..., Tensor]
    link: Callable[[Tensor], Tensor] = same
    width: int = C
    reductions: tuple[str, ...] = ("mean", "sum", "none")

    def __str__(self) -> str:
        return self.name


def case(name: str, function: Callable[..., Tensor], target: Tensor, **options: object) -> Case:
    keys = {k: options.pop(k) for k in ("link", "width", "reductions") if k in options}

    def criterion(z: Tensor, reduction: str) -> Tensor:
        return function(z, target, reduction=reduction, **options)

    return Case(name, criterion, **keys)  # type: ignore[arg-type]


def module_case(name: str, module: type[nn.Module], target: Tensor, **options: object) -> Case:
    keys = {k: options.pop(k) for k in ("link", "width", "reductions") if k in options}

    def criterion(z: Tensor, reduction: str) -> Tensor:
        value: Tensor = module(reduction=reduction, **options)(z, target)
        return value

    return Case(name, criterion, **keys)  # type: ignore[arg-type]


ignored = CLASSES.where(CLASSES != 1, -100)
KL = ("mean", "sum", "none", "batchmean")
LOG_TARGET = PROBABILITIES.log()
CASES = [
    case("mse", F.mse_loss, Y),
    case("mse-weight", F.mse_loss, Y, weight=PER_ELEMENT),
    case("huber", F.huber_loss, Y, delta=0.7),
    case("smooth_l1", F.smooth_l1_loss, Y, beta=0.9),
    case("ce", F.cross_entropy, CLASSES),
    case("ce-weight", F.cross_entropy, CLASSES, weight=WEIGHT),
    case("ce-ignore", F.cross_entropy, ignored),
    case("ce-ignore-2-weight", F.cross_entropy, CLASSES, weight=WEIGHT, ignore_index=2),
    case("ce-smooth", F.cross_entropy, CLASSES, label_smoothing=0.2),
    case("ce-smooth-weight-ignore", F.cross_entropy, ignored, weight=WEIGHT, label_smoothing=0.2),
    case("ce-probabilities", F.cross_entropy, PROBABILITIES),
    case("ce-probabilities-weight", F.cross_entropy, PROBABILITIES, weight=WEIGHT),
    case("ce-probabilities-smooth-weight", F.cross_entropy, PROBABILITIES, weight=WEIGHT, label_smoothing=0.3),
    case("ce-unnormalised-target", F.cross_entropy, UNNORMALISED),
    case("ce-grid", F.cross_entropy, GRID_IGNORED, link=grid, width=4 * C, weight=WEIGHT),
    case("ce-grid-smooth", F.cross_entropy, GRID, link=grid, width=4 * C, label_smoothing=0.1),
    case("ce-grid-probabilities", F.cross_entropy, GRID_PROBABILITIES, link=grid, width=4 * C, weight=WEIGHT),
    case("nll", F.nll_loss, CLASSES, link=log_softmax),
    case("nll-weight-ignore", F.nll_loss, ignored, link=log_softmax, weight=WEIGHT),
    case("nll-grid", F.nll_loss, GRID_IGNORED, link=log_grid, width=4 * C, weight=WEIGHT),
    case("bce", F.binary_cross_entropy, BITS, link=torch.sigmoid),
    case("bce-soft-weight", F.binary_cross_entropy, SOFT, link=torch.sigmoid, weight=PER_ELEMENT),
    case("bce_logits", F.binary_cross_entropy_with_logits, BITS),
    case("bce_logits-soft", F.binary_cross_entropy_with_logits, SOFT),
    case("bce_logits-pos_weight", F.binary_cross_entropy_with_logits, BITS, pos_weight=WEIGHT),
    case(
        "bce_logits-both-weights",
        F.binary_cross_entropy_with_logits,
        SOFT,
        pos_weight=WEIGHT,
        weight=PER_ELEMENT,
    ),
    case("kl", F.kl_div, PROBABILITIES, link=log_softmax_last, reductions=KL),
    case("kl-log_target", F.kl_div, LOG_TARGET, link=log_softmax_last, log_target=True, reductions=KL),
    case("kl-unnormalised-target", F.kl_div, UNNORMALISED, link=log_softmax_last, reductions=KL),
    case(
        "kl-3d",
        F.kl_div,
        randn(N, 2, 3, seed=10).softmax(-1),
        link=log_softmax_pair,
        width=6,
        reductions=KL,
    ),
    module_case("MSELoss", nn.MSELoss, Y),
    module_case("HuberLoss", nn.HuberLoss, Y, delta=0.4),
    module_case("SmoothL1Loss", nn.SmoothL1Loss, Y, beta=0.4),
    module_case("CrossEntropyLoss", nn.CrossEntropyLoss, ignored, weight=WEIGHT, label_smoothing=0.1),
    module_case("NLLLoss", nn.NLLLoss, CLASSES, link=log_softmax, weight=WEIGHT),
    module_case("BCELoss", nn.BCELoss, SOFT, link=torch.sigmoid),
    module_case("BCEWithLogitsLoss", nn.BCEWithLogitsLoss, BITS, pos_weight=WEIGHT),
    module_case("KLDivLoss", nn.KLDivLoss, LOG_TARGET, link=log_softmax, log_target=True, reductions=KL),
]


@functools.cache
def logits_jacobian(width: int) -> Tensor:
    return jacobian(mlp(4, 3, width, seed=11), lambda m: m(X))


BOTH = [(c, r) for c in CASES for r in c.reductions]


def reduced(value: Tensor) -> Tensor:
    """What a user makes of unreduced losses: weights of their own, then a mean."""
    weights = torch.linspace(0.2, 2.0, value.numel(), dtype=value.dtype).view(value.shape)
    return value if value.dim() == 0 else (weights * value).mean()


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total:UserWarning")
@pytest.mark.parametrize(("one", "reduction"), BOTH, ids=[f"{c}-{r}" for c, r in BOTH])
def test_product_equals_the_dense_matrix(one: Case, reduction: str) -> None:
    model = mlp(4, 3, one.width, seed=11)

    def loss_of_logits(a: Tensor) -> Tensor:
        return reduced(one.criterion(one.link(a), reduction))

    z = model(X).detach()
    h = hessian(loss_of_logits, z)
    j = logits_jacobian(one.width)
    expected = j.T @ h @ j
    op = hfopt.GaussNewton(lambda: loss_of_logits(model(X)), model.parameters())
    got = matrix(op)
    assert expected.abs().max() > 1e-4  # a zero matrix would prove nothing
    # A dozen operations, of which the link's slopes and their inverses are the worst in condition; torch's second
    # derivative of binary_cross_entropy divides by (p (1 - p) + 1e-12)^2, and terms of the link's cancel half of it.
    bound = rounding(N * one.width, 10)
    if one.link is torch.sigmoid:
        p = one.link(z)
        bound += 6e-12 * float((1 / (p * (1 - p))).max())
    assert bound < 1.5e-10
    assert relative(got, expected) < bound
    assert relative(got, got.T) < rounding(N * one.width)
    assert torch.linalg.eigvalsh((got + got.T) / 2)[0] > -rounding(N * one.width) * got.abs().max()

    plain = torch.autograd.grad(loss_of_logits(model(X)), list(model.parameters()))
    assert relative(op.gradient, flat(plain)) < rounding(N * one.width)
    assert op.loss.item() == pytest.approx(loss_of_logits(model(X)).item(), rel=rounding(N))


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize(
    "name", ["poisson_nll_loss", "soft_margin_loss", "multilabel_soft_margin_loss", "gaussian_nll_loss"]
)
def test_criteria_without_closed_form_are_differentiated(name: str) -> None:
    model = mlp(4, 3, C, seed=12)
    criteria: dict[str, Callable[[Tensor], Tensor]] = {
        "poisson_nll_loss": lambda z: F.poisson_nll_loss(z, SOFT),
        "soft_margin_loss": lambda z: F.soft_margin_loss(z, 2 * BITS - 1),
        "multilabel_soft_margin_loss": lambda z: F.multilabel_soft_margin_loss(z, BITS),
        "gaussian_nll_loss": lambda z: F.gaussian_nll_loss(z, Y, PER_ELEMENT),
    }
    loss = criteria[name]
    expected = dense_gauss_newton(model, lambda m: m(X), loss)
    assert relative(matrix(hfopt.GaussNewton(lambda: loss(model(X)), model.parameters())), expected) < 1e-10


def test_gaussian_likelihood_with_learned_variance_couples_both_outputs() -> None:
    model = mlp(4, 3, 2, seed=13)
    y = randn(N, 1, seed=14)

    def loss(z: Tensor) -> Tensor:
        return F.gaussian_nll_loss(z[:, :1], y, z[:, 1:].exp() + 0.1)

    def pair(m: nn.Module) -> Tensor:
        z = m(X)
        return torch.cat([z[:, :1], z[:, 1:].exp() + 0.1], 1)

    expected = dense_gauss_newton(model, pair, lambda o: F.gaussian_nll_loss(o[:, :1], y, o[:, 1:]))
    got = matrix(hfopt.GaussNewton(lambda: loss(model(X)), model.parameters()))
    assert relative(got, expected) < DENSE


def test_unbatched_logits() -> None:
    model = mlp(4, 3, C, seed=15)

    def loss(z: Tensor) -> Tensor:
        return F.cross_entropy(z, torch.tensor(1), weight=WEIGHT)

    expected = dense_gauss_newton(model, lambda m: m(X[0]), loss)
    got = matrix(hfopt.GaussNewton(lambda: loss(model(X[0])), model.parameters()))
    assert relative(got, expected) < DENSE


@pytest.mark.filterwarnings("ignore:Using a target size:UserWarning")
def test_broadcasting_targets() -> None:
    model = mlp(4, 3, C, seed=16)
    expected = dense_gauss_newton(model, lambda m: m(X), lambda z: F.mse_loss(z, Y[:1].expand(N, C)))
    got = matrix(hfopt.GaussNewton(lambda: F.mse_loss(model(X), Y[:1]), model.parameters()))
    assert relative(got, expected) < DENSE


@pytest.mark.parametrize(("size_average", "reduce"), [*itertools.product([None, True, False], repeat=2)])
@pytest.mark.filterwarnings("ignore:size_average and reduce args:UserWarning")
def test_old_spellings_of_the_reduction(size_average: bool | None, reduce: bool | None) -> None:
    model = mlp(4, 3, C, seed=17)

    def loss(z: Tensor) -> Tensor:
        value = F.mse_loss(z, Y, size_average=size_average, reduce=reduce)
        return value.mean() if value.dim() else value

    expected = dense_gauss_newton(model, lambda m: m(X), loss)
    assert relative(matrix(hfopt.GaussNewton(lambda: loss(model(X)), model.parameters())), expected) < 1e-10


SWAPPED: dict[str, Callable[[Tensor], Tensor]] = {
    "mse": lambda z: F.mse_loss(Y, z),
    "huber": lambda z: F.huber_loss(Y, z, delta=0.5),
    "smooth_l1": lambda z: F.smooth_l1_loss(Y, z, beta=0.5),
    "kl": lambda z: F.kl_div(LOG_TARGET, z.softmax(1), reduction="batchmean"),
    "ce": lambda z: F.cross_entropy(Y, z.softmax(1)),
    "bce_logits": lambda z: F.binary_cross_entropy_with_logits(Y, z.sigmoid()),
    "mse-weight": lambda z: F.mse_loss(Y, BITS, weight=z.sigmoid()),
}


@pytest.mark.parametrize("name", SWAPPED)
def test_network_in_another_argument_than_the_input(name: str) -> None:
    """The outputs may stand at the place of the target: the curvature is then that in the target."""
    model = mlp(4, 3, C, seed=18)
    loss = SWAPPED[name]
    links: dict[str, Callable[[Tensor], Tensor]] = {
        "kl": lambda z: z.softmax(1),
        "ce": lambda z: z.softmax(1),
        "bce_logits": torch.sigmoid,
        "mse-weight": torch.sigmoid,
    }
    inner: dict[str, Callable[[Tensor], Tensor]] = {
        "kl": lambda q: F.kl_div(LOG_TARGET, q, reduction="batchmean"),
        "ce": lambda q: F.cross_entropy(Y, q),
        "bce_logits": lambda q: F.binary_cross_entropy_with_logits(Y, q),
        "mse-weight": lambda q: F.mse_loss(Y, BITS, weight=q),
    }
    link = links.get(name, same)
    expected = dense_gauss_newton(model, lambda m: link(m(X)), inner.get(name, loss))
    got = matrix(hfopt.GaussNewton(lambda: loss(model(X)), model.parameters()))
    assert float((got - expected).abs().max()) < 1e-10 * max(1.0, float(expected.abs().max()))


def test_both_arguments_from_the_network() -> None:
    """Two branches compared with each other: both move."""
    model = nn.ModuleList([mlp(4, 3, C, seed=19), mlp(4, 2, C, seed=20)])

    def both(m: nn.Module) -> Tensor:
        a, b = m.children()
        return torch.stack([a(X), b(X)])

    expected = dense_gauss_newton(model, both, lambda z: F.mse_loss(z[0], z[1]))
    got = matrix(hfopt.GaussNewton(lambda: F.mse_loss(model[0](X), model[1](X)), model.parameters()))
    assert relative(got, expected) < DENSE


@pytest.mark.parametrize("name", ["l1_loss", "smooth_l1_loss"])
def test_losses_without_curvature_are_refused(name: str) -> None:
    model = mlp(4, C, seed=21)
    options = {"beta": 0.0} if name == "smooth_l1_loss" else {}
    with pytest.raises(ClosureError, match=r"l1_loss.*no curvature.*huber_loss.*loss="):
        hfopt.GaussNewton(lambda: getattr(F, name)(model(X), Y, **options), model.parameters())


@pytest.mark.parametrize("criterion", [F.nll_loss, F.kl_div])
def test_log_probabilities_that_are_not_normalised_are_refused(criterion: Callable[..., Tensor]) -> None:
    model = mlp(4, C, seed=22)
    target = CLASSES if criterion is F.nll_loss else PROBABILITIES
    options = {} if criterion is F.nll_loss else {"reduction": "batchmean"}
    with pytest.raises(ClosureError, match=rf"{criterion.__name__}.*log_softmax.*loss= or outputs="):
        hfopt.GaussNewton(lambda: criterion(model(X), target, **options), model.parameters())


def test_hessian_equals_gauss_newton_for_a_linear_model() -> None:
    """With J constant both are the same matrix, for a loss with curvature in its input."""
    model = mlp(4, C, seed=23)

    def closure() -> Tensor:
        return F.cross_entropy(model(X), CLASSES, label_smoothing=0.1)

    gn = hfopt.GaussNewton(closure, model.parameters()).to_dense()
    full = hfopt.Hessian(closure, model.parameters()).to_dense()
    dense = dense_hessian(model, lambda m: F.cross_entropy(m(X), CLASSES, label_smoothing=0.1))
    assert relative(gn, dense) < SUMS
    assert relative(full, dense) < SUMS
