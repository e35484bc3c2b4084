"""The recurrence as an ordinary Python loop over time, and small problems to compare on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "identity": lambda a: a,
}
NAMES = tuple(FUNCTIONS)


def plain_rnn(P: Tensor, W: Tensor, h0: Tensor, nonlinearity: str = "tanh") -> Tensor:
    """H (T, B, h) by the definition."""
    return plain_states(P, W, h0, nonlinearity)[0]


def plain_states(P: Tensor, W: Tensor, h0: Tensor, nonlinearity: str = "tanh") -> tuple[Tensor, Tensor]:
    """H and the pre-activations A, each (T, B, h)."""
    states, inputs, h = [], [], h0
    for p in P.unbind():
        a = h @ W + p
        h = FUNCTIONS[nonlinearity](a)
        states.append(h)
        inputs.append(a)
    return torch.stack(states), torch.stack(inputs)


def problem(
    steps: int = 6, batch: int = 3, hidden: int = 4, *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """(P, W, h0), away from relu's corner at these seeds, and drawn alike in every dtype."""
    draws = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draws, dtype=torch.float64)

    P, W, h0 = randn(steps, batch, hidden), randn(hidden, hidden) / hidden**0.5, randn(batch, hidden).tanh()
    return P.to(dtype), W.to(dtype), h0.to(dtype)


def like(tensors: tuple[Tensor, ...], seed: int) -> tuple[Tensor, ...]:
    """Random tensors of the same shapes and dtypes."""
    draws = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(t.shape, generator=draws, dtype=t.dtype) for t in tensors)


def dot(xs: tuple[Tensor, ...], ys: tuple[Tensor, ...]) -> Tensor:
    return sum((torch.vdot(x.reshape(-1), y.reshape(-1)) for x, y in zip(xs, ys, strict=True)), torch.zeros(()))


class Calls(TorchDispatchMode):
    """Counts the operators of torch that run inside the block, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func.name()] += 1
        return func(*args, **(kwargs or {}))

    @property
    def recurrent(self) -> dict[str, int]:
        """The calls of the package's own operators."""
        return {name: n for name, n in self.count.items() if name.startswith("hfopt::")}
