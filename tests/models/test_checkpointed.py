"""Gated and multiplicative networks under the policy "checkpoint": the same curvature, in memory like sqrt(T)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

import hfopt
import models
from benchmarks.memory import allocated

NETWORKS: dict[str, Callable[..., torch.nn.Module]] = {
    "lstm": lambda **options: models.LSTM(3, 6, 2, **options),
    "gru": lambda **options: models.GRU(3, 6, 2, **options),
    "mrnn": lambda **options: models.MRNN(3, 6, 5, 2, **options),
    "bounded": lambda **options: models.MRNN(3, 6, 5, 2, bounded_factors=True, **options),
    "no-readout": lambda **options: models.GRU(3, 2, None, **options),
}


def operator(model: torch.nn.Module, steps: int, batch: int, policy: str) -> hfopt.GaussNewton:
    g = torch.Generator().manual_seed(1)
    inputs = torch.randn(steps, batch, 3, dtype=torch.float64, generator=g)
    if model.batch_first:
        inputs = inputs.transpose(0, 1)
    with torch.no_grad():
        targets = torch.randn(model(inputs).shape, dtype=torch.float64, generator=g)
    return hfopt.GaussNewton(lambda: F.mse_loss(model(inputs), targets), list(model.parameters()), linearisation=policy)


@pytest.mark.quick(where=lambda name, options: name == "lstm" or options.get("output") == "last")
@pytest.mark.parametrize("options", [{}, {"output": "last"}, {"batch_first": True}], ids=["all", "last", "batch-first"])
@pytest.mark.parametrize("name", list(NETWORKS))
def test_products_and_gradient_are_those_of_the_whole_sequence(name: str, options: dict[str, object]) -> None:
    torch.manual_seed(0)
    model = NETWORKS[name](**options).double()
    whole, parts = (operator(model, 7, 3, policy) for policy in ("double-backward", "checkpoint"))
    torch.testing.assert_close(parts.gradient, whole.gradient, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(parts.to_dense(), whole.to_dense(), rtol=1e-10, atol=1e-13)


@pytest.mark.quick(where=lambda name: name == "lstm")
@pytest.mark.parametrize("name", ["lstm", "gru", "mrnn"])
def test_memory_of_products_grows_like_the_square_root_of_the_steps(name: str) -> None:
    torch.manual_seed(0)
    kind = {"lstm": models.LSTM, "gru": models.GRU}
    model = models.MRNN(3, 24, 24, 2, output="last") if name == "mrnn" else kind[name](3, 24, 2, output="last")
    model.double()
    sizes = []
    for steps in (32, 512):
        op = operator(model, steps, 8, "checkpoint")
        v = torch.randn_like(op.gradient)
        op @ v
        sizes.append(allocated(lambda op=op, v=v: op @ v, torch.device("cpu"))[0])
    # Sixteen times the steps, four times the memory.
    assert sizes[1] < 5 * sizes[0]


def test_structural_damping_is_that_of_the_whole_sequence() -> None:
    torch.manual_seed(0)
    inputs, targets = torch.randn(9, 4, 3, dtype=torch.float64), torch.randn(9, 4, 2, dtype=torch.float64)
    taken = []
    for policy in ("double-backward", "checkpoint"):
        torch.manual_seed(2)
        model = NETWORKS["lstm"]().double()
        optimizer = hfopt.HessianFree(
            model.parameters(), structural=0.5, linearisation=policy, cg=hfopt.CG(max_iterations=4)
        )
        optimizer.step(lambda model=model: F.mse_loss(model(inputs), targets))
        taken.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*taken, rtol=1e-9, atol=1e-12)
