"""Data, targets and parameters that are wrong: a step works, is skipped, or says in a sentence what is wrong."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import hfopt
from hfopt.optimizer import CURVATURES
from tests.fuzz.drawn import searched
from tests.hfopt.tools import mlp, randn, theta

X, Y = randn(5, 3, seed=1), randn(5, 2, seed=2)
CLASSES, BITS = torch.tensor([0, 1, 1, 0, 1]), (randn(5, 2, seed=3) > 0).double()

Criterion = Callable[[Tensor, Tensor], Tensor]
# With the targets that belong to each.
CRITERIA: dict[str, tuple[Criterion, Tensor]] = {
    "mse": (F.mse_loss, Y),
    "huber": (F.huber_loss, Y),
    "cross_entropy": (F.cross_entropy, CLASSES),
    "cross_entropy-soft": (F.cross_entropy, Y.softmax(1)),
    "nll": (lambda z, y: F.nll_loss(z.log_softmax(1), y), CLASSES),
    "bce_logits": (F.binary_cross_entropy_with_logits, BITS),
    "bce": (lambda z, y: F.binary_cross_entropy(z.sigmoid(), y), BITS),
    "kl": (lambda z, y: F.kl_div(z.log_softmax(1), y, reduction="batchmean"), Y.softmax(1)),
    "poisson": (F.poisson_nll_loss, BITS),
}
# What can go wrong with inputs and targets; torch's own criteria refuse some of it.
FAULTS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "empty batch": lambda x, y: (x[:0], y[:0]),
    "NaN in the inputs": lambda x, y: (x * math.nan, y),
    "infinite inputs": lambda x, y: (x * math.inf, y),
    "huge inputs": lambda x, y: (x * 1e300, y),
    "NaN in the targets": lambda x, y: (x, y * math.nan if y.is_floating_point() else y),
    "infinite targets": lambda x, y: (x, y * math.inf if y.is_floating_point() else y),
    "targets of another dtype": lambda x, y: (x, y.float() if y.is_floating_point() else y.double()),
    "integer targets": lambda x, y: (x, y.long()),
    "fewer targets": lambda x, y: (x, y[:3]),
    "one target": lambda x, y: (x, y[:1]),
    "classes that are not there": lambda x, y: (x, y + 7),
    "all ignored": lambda x, y: (x, y if y.is_floating_point() else y * 0 - 100),
    "inputs of another width": lambda x, y: (x[:, :2], y),
    "inputs of another dtype": lambda x, y: (x.float(), y),
}


def said(closure: Callable[[], Any]) -> str | None:
    """What torch says of a closure by itself, for its loss and gradient."""
    try:
        loss = closure()
        loss.backward()
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        return str(error)
    return None


@searched(
    25,
    100,
    st.sampled_from(list(CRITERIA)),
    st.sampled_from(list(FAULTS)),
    st.sampled_from(CURVATURES),
    st.sampled_from(["auto", "linearize", "recompute"]),
    st.sampled_from([None, 0.1]),
    st.booleans(),
    st.sampled_from([None, "empirical-fisher", "kfac"]),
)
def test_faults(
    name: str,
    fault: str,
    curvature: str,
    policy: str,
    damping: float | None,
    check: bool,
    preconditioner: str | None,
) -> None:
    """What torch refuses is refused in torch's words; all else is skipped, taken, or refused in hfopt's."""
    criterion, y = CRITERIA[name]
    x, y = FAULTS[fault](X, y)
    model = mlp(3, 4, 2)

    def closure() -> Tensor:
        return criterion(model(x), y)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's on broadcasting, ours on skipped steps
        torchs = said(closure)
        before = theta(model)
        optimizer = hfopt.HessianFree(
            model.parameters(),
            curvature=curvature,
            linearisation=policy,
            damping=damping,
            check=check,
            preconditioner=None if curvature == "hessian" else preconditioner,
            cg=hfopt.CG(max_iterations=5),
        )
        if torchs is not None:
            with pytest.raises((ValueError, TypeError, RuntimeError, IndexError)) as raised:
                optimizer.step(closure)
            assert str(raised.value)[:40] == torchs[:40]
            return
        try:
            for _ in range(2):
                optimizer.step(closure)
        except hfopt.HfoptError as error:
            text = str(error)
            assert torch.equal(theta(model), before)
        else:
            text = "a step was taken or skipped, and stats say which"
            assert all(s.accepted or s.step_length == 0 for s in optimizer.stats)
    assert len(text) > 40
    assert bool(theta(model).isfinite().all())


@pytest.mark.parametrize("curvature", CURVATURES)
def test_nothing_to_train(curvature: str) -> None:
    model = mlp(3, 4, 2)
    for p in model.parameters():
        p.requires_grad_(False)
    optimizer = hfopt.HessianFree(model.parameters(), curvature=curvature)
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        optimizer.step(lambda: F.mse_loss(model(X), Y))


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("batch_dim", [-3, 2, 7])
def test_cases_along_a_dimension_that_is_not_there(curvature: str, batch_dim: int) -> None:
    """Only the Fisher matrices look for cases."""
    model = mlp(3, 4, 2)
    optimizer = hfopt.HessianFree(model.parameters(), curvature=curvature, batch_dim=batch_dim)
    if "fisher" not in curvature:
        optimizer.step(lambda: F.mse_loss(model(X), Y))
        return
    with pytest.raises(ValueError, match=f"batch_dim is {batch_dim}, but an output has shape"):
        optimizer.step(lambda: F.mse_loss(model(X), Y))


@pytest.mark.parametrize("preconditioner", ["empirical-fisher", "kfac"])
def test_a_preconditioner_of_cases_that_are_not_there(preconditioner: str) -> None:
    model = mlp(3, 4, 2)
    optimizer = hfopt.HessianFree(model.parameters(), preconditioner=preconditioner, batch_dim=2)
    with pytest.raises(ValueError, match="batch_dim is 2, but an output has shape"):
        optimizer.step(lambda: F.mse_loss(model(X), Y))


@pytest.mark.parametrize(
    "result", [None, 1.0, "loss", (1, 2), {}, [torch.ones(2)], torch.ones(3), torch.tensor(1), torch.tensor(1.0)]
)
@pytest.mark.parametrize("curvature", ["gauss-newton", "hessian"])
@pytest.mark.parametrize("options", [{}, {"outputs": nn.Identity()}, {"loss": lambda *z: z}])
def test_closures_that_return_nothing_of_use(result: Any, curvature: str, options: dict[str, Any]) -> None:
    optimizer = hfopt.HessianFree(mlp(3, 2).parameters(), curvature=curvature, **options)
    with pytest.raises((hfopt.HfoptError, TypeError)) as raised:
        optimizer.step(lambda: result)
    assert len(str(raised.value)) > 30
