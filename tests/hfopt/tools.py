"""Small models and dense float64 matrices obtained by other routes than the package's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

Closure = Callable[[], Any]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=dtype)


def mlp(*sizes: int, seed: int = 0, dtype: torch.dtype = torch.float64, last: nn.Module | None = None) -> Any:
    """Linear layers with tanh between them, drawn from ``seed`` alone."""
    draws = generator(seed)
    layers: list[nn.Module] = []
    for n, m in pairwise(sizes):
        linear = nn.Linear(n, m, dtype=dtype)
        with torch.no_grad():
            for p in linear.parameters():
                p.copy_(torch.randn(p.shape, generator=draws, dtype=dtype) * n**-0.5)
        layers += [linear, nn.Tanh()]
    return nn.Sequential(*layers[:-1], *([last] if last is not None else []))


def flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def theta(model: nn.Module) -> Tensor:
    return flat(model.parameters())


def grads(model: nn.Module) -> Tensor:
    """The ``.grad`` of all parameters, flat (P,)."""
    pieces = []
    for p in model.parameters():
        assert p.grad is not None
        pieces.append(p.grad)
    return flat(pieces)


def as_function(model: nn.Module, of: Callable[[nn.Module], Tensor]) -> Callable[[Tensor], Tensor]:
    """``of(model)`` as a function of the flat vector of the model's parameters (P,)."""
    named = dict(model.named_parameters())

    class Applied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self) -> Tensor:
            return of(self.inner)

    applied = Applied()

    def function(vector: Tensor) -> Tensor:
        pieces = vector.split([p.numel() for p in named.values()])
        values = {f"inner.{n}": v.view(p.shape) for (n, p), v in zip(named.items(), pieces, strict=True)}
        result: Tensor = functional_call(applied, values, ())
        return result

    return function


def hessian(function: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """``d2 function / dz2`` as a matrix (n, n), by differentiating twice."""
    matrix = torch.autograd.functional.hessian(function, z.detach())
    assert isinstance(matrix, Tensor)
    return matrix.reshape(z.numel(), z.numel())


def jacobian(model: nn.Module, of: Callable[[nn.Module], Tensor]) -> Tensor:
    """``d of(model) / d theta``, (number of outputs, P), by torch.func."""
    point = theta(model)
    return jacrev(as_function(model, of))(point).reshape(-1, point.numel())


def dense_hessian(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> Tensor:
    """``d2 loss / d theta2`` (P, P), without the package."""
    return hessian(as_function(model, loss), theta(model))


def dense_gauss_newton(
    model: nn.Module, outputs: Callable[[nn.Module], Tensor], loss: Callable[[Tensor], Tensor]
) -> Tensor:
    """``J' H_L J``: the Jacobian by torch.func.jacrev, the Hessian by torch.autograd.functional."""
    z = outputs(model).detach()
    h = hessian(loss, z)
    j = jacobian(model, outputs)
    return j.T @ h @ j


def matrix(op: Any) -> Tensor:
    """The operator's matrix (P, P), product by product, as conjugate gradients see it."""
    eye = torch.eye(op.shape[0], dtype=op.dtype)
    return torch.stack([op @ column for column in eye], 1)


def rounding(terms: float = 1.0, condition: float = 1.0, dtype: torch.dtype = torch.float64) -> float:
    """How far apart, relatively, two ways of computing the same numbers may end.

    ``16 eps terms condition``: so many roundings come one after the other (at worst all to the same side), and an error
    of ``eps`` in the data moves the result by ``condition`` times as much. 16 leaves room for another order of sums,
    fused multiply-adds and the last bits of transcendental functions, which differ from processor to processor.
    """
    return 16 * torch.finfo(dtype).eps * terms * condition


SUMS = rounding(1000)
"""The same sums of at most a thousand terms, in another order: products with one and with many vectors, gradients."""
DENSE = rounding(1000, 30)
"""Products against matrices that came by another route, whose factors' condition is at most thirty."""


def amplification(run: Callable[[Callable[[Tensor], Tensor]], Tensor], size: float = 1e-11, draws: int = 4) -> float:
    """The factor by which relative errors of a computation's intermediate results come out larger in its result.

    For computations that have no condition in closed form, as short recurrences that lose their conjugacy: ``run``
    gets a function to apply to every intermediate result, which multiplies each element by ``1 + size e``, e normal.
    The largest factor of several draws.
    """
    exact, factors = run(lambda v: v), []
    for seed in range(draws):
        draw = generator(seed)
        noisy = run(lambda v: v * (1 + size * torch.randn(v.shape, generator=draw, dtype=v.dtype)))  # noqa: B023
        factors.append(relative(noisy, exact) / size)
    return max(factors)


def relative(a: Tensor, b: Tensor) -> float:
    """Largest deviation of ``a`` in units of the largest entry of ``b``."""
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-300))


def lbfgs_closure(model: nn.Module, loss: Callable[[nn.Module], Tensor], optimizer: torch.optim.Optimizer) -> Closure:
    """The closure as written for torch.optim.LBFGS."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        return value

    return closure


class Point(nn.Module):
    """A bare vector of parameters, for functions that are no networks."""

    def __init__(self, values: Sequence[float] | Tensor, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.as_tensor(values, dtype=dtype).clone())

    def forward(self) -> Tensor:
        return self.x


def spd(eigenvalues: Sequence[float] | Tensor, seed: int = 0) -> Tensor:
    """A symmetric matrix (n, n) with these eigenvalues and random eigenvectors."""
    values = torch.as_tensor(eigenvalues, dtype=torch.float64)
    q, _ = torch.linalg.qr(randn(len(values), len(values), seed=seed))
    matrix = (q * values) @ q.T
    return (matrix + matrix.T) / 2
