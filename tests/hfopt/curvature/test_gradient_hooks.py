"""Operators whose parameters have gradient hooks, against dense matrices: ``P G P`` and ``P g``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hfopt
from tests.hfopt.tools import mlp, randn

X, Y = randn(7, 3, seed=1), randn(7, 2, seed=2)
MASK = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 1.0], [1.0, 1.0, 1.0]], dtype=torch.float64)


def centred(g: Tensor) -> Tensor:
    """The projection onto columns of mean zero."""
    return g - g.mean(0, keepdim=True)


def hooks(model: nn.Module) -> Tensor:
    """Add a mask to the first weight and centring to the second; returns P (P, P)."""
    first, second = model[0].weight, model[2].weight  # type: ignore[index]
    first.register_hook(lambda g: g * MASK)
    second.register_hook(centred)
    blocks = []
    for p in model.parameters():
        if p is first:
            blocks.append(MASK.flatten().diag())
        elif p is second:
            columns = [centred(e.view(p.shape)).flatten() for e in torch.eye(p.numel(), dtype=torch.float64)]
            blocks.append(torch.stack(columns, 1))
        else:
            blocks.append(torch.eye(p.numel(), dtype=torch.float64))
    return torch.block_diag(*blocks)


def build(kind: str, model: nn.Module, **options: Any) -> Any:
    def closure() -> Tensor:
        return F.mse_loss(model(X), Y) + 0.1 * model[0].weight.pow(4).sum()  # type: ignore[index]

    if kind == "hessian":
        return hfopt.Hessian(closure, model.parameters())
    if kind == "fisher":
        return hfopt.Fisher(closure, model.parameters(), kind="empirical", **options)
    return hfopt.GaussNewton(closure, model.parameters(), **options)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("gauss-newton", {}),
        ("gauss-newton", {"linearisation": "linearize"}),
        ("gauss-newton", {"linearisation": "recompute"}),
        ("hessian", {}),
        ("fisher", {}),
    ],
)
def test_products_are_those_of_the_projected_matrix(kind: str, options: dict[str, Any]) -> None:
    plain, model = mlp(3, 4, 2, seed=3), mlp(3, 4, 2, seed=3)
    p = hooks(model)
    reference, op = build(kind, plain, **options), build(kind, model, **options)
    whole = reference.to_dense()
    torch.testing.assert_close(op.gradient, p @ reference.gradient, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(op.to_dense(), p @ whole @ p, rtol=1e-11, atol=1e-13)
    v = randn(op.vector.size, seed=4)
    torch.testing.assert_close(op @ v, p @ whole @ p @ v, rtol=1e-11, atol=1e-12)
    c = torch.linspace(0.1, 0.2, len(v), dtype=torch.float64)
    torch.testing.assert_close(op.damped(0.3, decay=c) @ v, p @ whole @ p @ v + 0.3 * v + c * v, rtol=1e-11, atol=1e-12)
    assert torch.equal(op.project(v), op.projection(v))
    torch.testing.assert_close(op.project(v), p @ v, rtol=1e-12, atol=1e-14)


def test_hooks_are_there_again_after_an_operator() -> None:
    model = mlp(3, 4, 2, seed=5)
    seen: list[Tensor] = []
    model[0].weight.register_hook(lambda g: seen.append(g) or g * MASK)
    op = hfopt.GaussNewton(lambda: F.mse_loss(model(X), Y), model.parameters())
    count = len(seen)
    op @ op.gradient
    op.to_dense()
    assert len(seen) == count
    F.mse_loss(model(X), Y).backward()
    assert len(seen) == count + 1
    assert not bool(model[0].weight.grad[MASK == 0].any())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_mask_is_known_in_every_precision(dtype: torch.dtype) -> None:
    p = nn.Parameter(torch.zeros(4, 3, dtype=dtype))
    p.register_hook(lambda g: g * MASK.to(dtype))  # type: ignore[no-untyped-call]
    target = torch.full((4, 3), 2.0, dtype=dtype)
    op = hfopt.GaussNewton(lambda: F.mse_loss(p * 3, target), [p])
    assert op.projection is not None
    assert torch.equal(op.projection.mask, MASK.flatten().to(op.dtype))
    assert torch.equal(op.gradient != 0, MASK.flatten() != 0)


def test_maps_other_than_masks_are_told_apart(recwarn: pytest.WarningsRecorder) -> None:
    """Hooks that return the gradient as it is, cleaned of NaN, or another tensor of the same numbers."""
    same: list[Callable[[Tensor], Tensor]] = [lambda g: g, torch.nan_to_num, lambda g: g.clone(), lambda g: 1.0 * g]
    for hook in same:
        model = mlp(3, 4, 2, seed=6)
        model[0].weight.register_hook(hook)
        op = hfopt.GaussNewton(lambda model=model: F.mse_loss(model(X), Y), model.parameters())
        assert op.projection is not None
        assert bool((op.projection.mask == 1).all())
        assert not op.projection.others
