"""Gradients that hooks of parameters mask: what gets no gradient does not move, as for every optimizer of torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hfopt
from hfopt.errors import ClosureError
from hfopt.preconditioners import KFAC, LBFGS, Nystrom, Preconditioner
from tests.hfopt.tools import mlp, randn, theta

X, Y = randn(40, 3, seed=1), randn(40, 2, seed=2)
MASK = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0], dtype=torch.float64).unsqueeze(1).expand(5, 3)
PRECONDITIONERS = ["auto", "kfac", "nystrom", "empirical-fisher", "hutchinson", "lbfgs", None]


def in_place(g: Tensor) -> None:
    """Change the gradient that is handed in."""
    g[MASK == 0] = 0.0


def accumulated(p: Tensor) -> None:
    """Change the gradient that is found at the parameter."""
    assert p.grad is not None
    p.grad.mul_(MASK)


WAYS: dict[str, Callable[[Tensor], object]] = {
    "a product": lambda p: p.register_hook(lambda g: g * MASK),  # type: ignore[no-untyped-call]
    "in place": lambda p: p.register_hook(in_place),  # type: ignore[no-untyped-call]
    "accumulated": lambda p: p.register_post_accumulate_grad_hook(accumulated),  # type: ignore[no-untyped-call]
}


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
@pytest.mark.parametrize("way", WAYS)
def test_masked_rows_stay(preconditioner: str | None, way: str) -> None:
    model = mlp(3, 5, 2, seed=3)
    weight: Tensor = model[0].weight
    WAYS[way](weight)
    optimizer = hfopt.HessianFree(model.parameters(), preconditioner=preconditioner, weight_decay=1e-3)
    before, frozen = weight.detach().clone(), MASK == 0
    losses = [float(optimizer.step(lambda: F.mse_loss(model(X), Y))) for _ in range(4)]
    assert torch.equal(weight[frozen], before[frozen])
    assert not bool((weight[~frozen] == before[~frozen]).any())
    assert losses[-1] < 0.98 * losses[0]
    assert weight.grad is not None
    assert not bool(weight.grad[frozen].any())


@pytest.mark.parametrize("curvature", ["hessian", "fisher", "empirical-fisher"])
def test_masked_rows_stay_with_every_curvature(curvature: str) -> None:
    model = mlp(3, 5, 2, seed=3)
    weight: Tensor = model[0].weight
    WAYS["a product"](weight)
    optimizer = hfopt.HessianFree(model.parameters(), curvature=curvature, preconditioner="nystrom", damping=0.1)
    before, frozen = weight.detach().clone(), MASK == 0
    for _ in range(3):
        optimizer.step(lambda: F.mse_loss(model(X), Y))
    assert torch.equal(weight[frozen], before[frozen])


@pytest.mark.parametrize(
    "preconditioner", [None, KFAC(average=0.9), KFAC(every=3), Nystrom(every=3), LBFGS(), "hutchinson"]
)
@pytest.mark.parametrize("decay", [None, 0.9])
def test_masks_that_change_between_steps_hold_each_for_its_own(
    preconditioner: str | Preconditioner | None, decay: float | None
) -> None:
    """What earlier steps left (the start of a solve, pairs, averages) lies in spaces of other masks."""
    model = mlp(3, 5, 2, seed=4)
    weight: Tensor = model[0].weight
    mask = torch.ones(5, 3, dtype=torch.float64)
    weight.register_hook(lambda g: g * mask)  # type: ignore[no-untyped-call]
    cg = hfopt.CG(decay=decay)
    optimizer = hfopt.HessianFree(model.parameters(), preconditioner=preconditioner, cg=cg)
    for row in (0, 1, 4, 0, 2):
        mask.fill_(1.0)
        mask[row] = 0.0
        before = weight.detach().clone()
        optimizer.step(lambda: F.mse_loss(model(X), Y))
        assert torch.equal(weight[row], before[row])
        assert not torch.equal(weight, before)


def test_new_rows_of_an_embedding_are_trained_alone() -> None:
    """A pretrained table of which the last two rows are new."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Embedding(8, 4), nn.Flatten(), nn.Linear(12, 8)).double()
    table: Tensor = model[0].weight
    tokens, wanted = torch.randint(0, 8, (60, 3)), torch.randint(0, 8, (60,))

    def only_new(g: Tensor) -> Tensor:
        kept = torch.zeros_like(g)
        kept[6:] = g[6:]
        return kept

    table.register_hook(only_new)  # type: ignore[no-untyped-call]
    optimizer = hfopt.HessianFree(model.parameters(), preconditioner="kfac")
    before = table.detach().clone()
    for _ in range(3):
        optimizer.step(lambda: F.cross_entropy(model(tokens), wanted))
    assert torch.equal(table[:6], before[:6])
    assert not bool((table[6:] == before[6:]).any())


def test_a_step_is_that_of_the_free_entries_alone() -> None:
    """Frozen biases by a hook, and by ``requires_grad``; and rows, against a model whose other rows are constants."""
    hooked, plain = mlp(3, 4, 2, seed=6), mlp(3, 4, 2, seed=6)
    hooked[0].bias.register_hook(torch.zeros_like)
    plain[0].bias.requires_grad_(False)
    ours = hfopt.HessianFree(hooked.parameters(), preconditioner=None)
    theirs = hfopt.HessianFree(plain.parameters(), preconditioner=None)
    for _ in range(3):
        ours.step(lambda: F.mse_loss(hooked(X), Y))
        theirs.step(lambda: F.mse_loss(plain(X), Y))
        torch.testing.assert_close(theta(hooked), theta(plain), rtol=1e-9, atol=1e-12)
    assert ours.stats[-1].cg_iterations == theirs.stats[-1].cg_iterations


def test_rows_that_no_case_uses_stay_with_a_low_rank_preconditioner() -> None:
    torch.manual_seed(7)
    model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(8, 9)).double()
    tokens, wanted = torch.randint(0, 6, (50, 2)), torch.randint(0, 9, (50,))
    optimizer = hfopt.HessianFree(model.parameters(), preconditioner="nystrom")
    before = model[0].weight.detach().clone()
    for _ in range(3):
        optimizer.step(lambda: F.cross_entropy(model(tokens), wanted))
    assert torch.equal(model[0].weight[6:], before[6:])


@pytest.mark.parametrize("check", [False, True])
def test_a_hook_that_looks_on_changes_nothing_and_sees_the_gradient_once(check: bool) -> None:
    model, twin = mlp(3, 4, 2, seed=8), mlp(3, 4, 2, seed=8)
    seen: list[Tensor] = []
    model[0].weight.register_hook(lambda g: seen.append(g.clone()))
    ours = hfopt.HessianFree(model.parameters(), check=check)
    plain = hfopt.HessianFree(twin.parameters())
    for n in range(1, 4):
        ours.step(lambda: F.mse_loss(model(X), Y))
        plain.step(lambda: F.mse_loss(twin(X), Y))
        assert torch.equal(theta(model), theta(twin))
        if not check:
            assert len(seen) == n
            assert torch.equal(seen[-1], model[0].weight.grad)


@pytest.mark.parametrize("curvature", ["gauss-newton", "hessian"])
def test_self_checks_pass_where_entries_are_masked(curvature: str) -> None:
    model = mlp(3, 5, 2, seed=9)
    WAYS["a product"](model[0].weight)
    model[2].bias.register_hook(lambda g: g - g.mean())
    model[0].bias.register_hook(torch.zeros_like)
    optimizer = hfopt.HessianFree(model.parameters(), curvature=curvature, check=True, damping=1.0)
    before = float(model[2].bias.detach().sum())
    loss = float(optimizer.step(lambda: F.mse_loss(model(X), Y)))
    assert F.mse_loss(model(X), Y).item() < loss
    assert model[2].bias.sum().item() == pytest.approx(before, rel=1e-12)


REFUSED: dict[str, Callable[[Tensor], Tensor]] = {
    "clipping": lambda g: g.clamp(-1.0, 1.0),
    "clipping by norm": lambda g: g * min(1.0, 1.0 / float(g.norm())),
    "scaling": lambda g: 0.5 * g,
    "signs": torch.sign,
    "a threshold": lambda g: g * (g.abs() > 1e-3),
    "the positive part": torch.relu,
    "an oblique projection": lambda g: g - g[:, :1],
    "the largest entries": lambda g: g * (g.abs() >= g.abs().flatten().sort().values[-3]),
}


@pytest.mark.parametrize("hook", REFUSED)
@pytest.mark.parametrize("late", [False, True])
def test_what_is_no_projection_is_refused(hook: str, late: bool) -> None:
    model = mlp(3, 4, 2, seed=10)
    weight: Tensor = model[0].weight

    def accumulated(p: Tensor) -> None:
        assert p.grad is not None
        p.grad = REFUSED[hook](p.grad)

    handle = weight.register_post_accumulate_grad_hook(accumulated) if late else weight.register_hook(REFUSED[hook])  # type: ignore[no-untyped-call]
    optimizer, before = hfopt.HessianFree(model.parameters()), theta(model)
    with pytest.raises(ClosureError, match=r"gradient hook on parameter 0, of shape \(4, 3\).*Remove the hook"):
        optimizer.step(lambda: F.mse_loss(model(X), Y))
    assert torch.equal(theta(model), before)
    handle.remove()
    optimizer.step(lambda: F.mse_loss(model(X), Y))
    assert not torch.equal(theta(model), before)


def test_an_optimizer_inside_backward_is_refused() -> None:
    model = mlp(3, 4, 2, seed=11)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(p: Tensor) -> None:
        inner.step()
        inner.zero_grad()

    model[0].weight.register_post_accumulate_grad_hook(step)
    optimizer = hfopt.HessianFree(model.parameters())
    with pytest.raises(ClosureError, match="moves the parameter, or takes its gradient away"):
        optimizer.step(lambda: F.mse_loss(model(X), Y))


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
def test_units_that_a_module_hook_silences_stay(preconditioner: str | None) -> None:
    """A hook on a module's output gradient, which is a part of the graph: the rows of its weight get no gradient."""
    model = mlp(3, 4, 5, 2, seed=12)
    kept = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    model[2].register_full_backward_pre_hook(lambda module, grads: (grads[0] * kept,))
    optimizer = hfopt.HessianFree(model.parameters(), preconditioner=preconditioner)
    before = model[2].weight.detach().clone(), model[2].bias.detach().clone()
    for _ in range(3):
        optimizer.step(lambda: F.mse_loss(model(X), Y))
    for p, start in zip(model[2].parameters(), before, strict=True):
        assert torch.equal(p[kept == 0], start[kept == 0])
        assert not torch.equal(p, start)
