"""Muon for the matrices inside a network and Adam for everything else, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import nn


class MuonWithAdam(torch.optim.Optimizer):
    """torch.optim.Muon for parameters with two dimensions, torch.optim.Adam for the others.

    Both have the same learning rate: Muon's is scaled so that its updates are as large as Adam's usually are.

    Args:
        params: the parameters.
        lr: learning rate.
        outside: identities of matrices that Adam has nevertheless: those next to the symbols of a language model.

    Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024; Liu et al.,
    arXiv:2502.16982 (the scale).
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, outside: Collection[int] = ()) -> None:
        all_of_them = list(params)
        inside = [p for p in all_of_them if p.dim() == 2 and id(p) not in outside]
        rest = [p for p in all_of_them if not any(p is q for q in inside)]
        super().__init__(all_of_them, {"lr": lr})
        self.parts: list[torch.optim.Optimizer] = []
        if inside:
            self.parts.append(torch.optim.Muon(inside, lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
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
