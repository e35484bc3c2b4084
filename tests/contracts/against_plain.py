"""What every model must give: products equal to a dense reference by torch.func, gradients to backward(), descent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import hfopt
from tests.hfopt.tools import DENSE, dense_gauss_newton, flat, grads, randn, relative

Of = Callable[[Any], Tensor]


def check(model: Any, outputs: Of, criterion: Of, *, reference: Any = None, steps: int = 5, **options: Any) -> None:
    """``outputs(model)`` are the network's outputs, ``criterion`` their loss; ``reference`` is the same model in a form
    that torch.func can differentiate."""
    other = model if reference is None else reference
    op = hfopt.GaussNewton(lambda: criterion(outputs(model)), model.parameters(), **options)
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        dense = dense_gauss_newton(other, outputs, criterion)
    v = randn(op.shape[0], seed=99)
    assert relative(op @ v, dense @ v) < DENSE
    plain = flat(torch.autograd.grad(criterion(outputs(model)), list(model.parameters())))
    assert relative(op.gradient, plain) < DENSE
    optimizer = hfopt.HessianFree(model.parameters(), **options)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = criterion(outputs(model))
        loss.backward()
        return loss

    optimizer.step(closure)
    assert relative(grads(model), plain) < DENSE
    for _ in range(steps - 1):
        optimizer.step(closure)
    losses = [s.loss for s in optimizer.stats]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]
