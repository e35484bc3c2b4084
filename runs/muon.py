"""Muon for the matrices inside a network and Adam for everything else, as one optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """The method of torch.optim.Muon in the precision of the parameters: M <- mu M + (1 - mu) G, then W -= lr s O.

    O has the singular vectors of (1 - mu) G + mu M and singular values near 1, by five steps of a Newton-Schulz
    iteration; s = 0.2 sqrt(larger side) makes updates as large as Adam's usually are. torch's own iterates in bfloat16,
    which many processors only emulate: a step of it took longer there than the gradient.

    Args:
        params: matrices.
        lr: learning rate.
        momentum: mu.

    Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024; Liu et al.,
    arXiv:2502.16982 (s).
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the parameters by their gradients."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                M = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p.grad))
                M.lerp_(p.grad, 1 - group["momentum"])
                O = orthogonal(p.grad.lerp(M, group["momentum"]))
                p.sub_(O, alpha=group["lr"] * 0.2 * math.sqrt(max(p.shape)))


def orthogonal(G: Tensor, steps: int = 5) -> Tensor:
    """A matrix with the singular vectors of G and singular values near 1."""
    tall = G.shape[0] > G.shape[1]
    X: Tensor = G.t() if tall else G
    X = X / X.norm().clamp(min=1e-7)
    for _ in range(steps):
        A = X @ X.t()
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X.t() if tall else X


class MuonWithAdam(torch.optim.Optimizer):
    """Muon for parameters with two dimensions, torch.optim.Adam for the others, with the same learning rate.

    Args:
        params: the parameters.
        lr: learning rate.
        outside: identities of matrices that Adam has nevertheless: those next to the symbols of a language model.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, outside: Collection[int] = ()) -> None:
        all_of_them = list(params)
        inside = [p for p in all_of_them if p.dim() == 2 and id(p) not in outside]
        rest = [p for p in all_of_them if not any(p is q for q in inside)]
        super().__init__(all_of_them, {"lr": lr})
        self.parts: list[torch.optim.Optimizer] = []
        if inside:
            self.parts.append(Muon(inside, lr))
        if rest:
            self.parts.append(torch.optim.Adam(rest, lr))
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step of both; the loss that the closure returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Those of the two."""
        return {type(part).__name__: part.state_dict() for part in self.parts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        for part in self.parts:
            part.load_state_dict(state_dict[type(part).__name__])
        self.param_groups = [group for part in self.parts for group in part.param_groups]
