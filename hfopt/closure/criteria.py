"""A criterion as it was called in a closure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from hfopt.closure.partial import Edge, edge_of

# Where an output stands: the n-th call that is counted, module call or result, and the place among its tensors.
Site = tuple[int, int]


class CriterionCall:
    """One criterion seen in the closure, ``value = function(*args)``.

    Attributes:
        outputs: those of its arguments that depend on parameters, in the network's graph.
        sites: where in the closure they stand.
        edge: where the value stands in the graph.
    """

    outputs: list[Tensor]
    sites: list[Site]
    edge: Edge

    def __init__(self, function: Callable[..., Tensor], args: Any, kwargs: Any, number: int) -> None:
        """Call the criterion; ``number`` is the call's in the closure."""
        self._flat, self._spec = tree_flatten((args, kwargs))
        self._found = [i for i, a in enumerate(self._flat) if isinstance(a, Tensor) and a.requires_grad]
        self.outputs = [self._flat[i] for i in self._found]
        self.sites = [(number, i) for i in self._found]
        self.function = function
        # Views: one output may be computed from another one, and each must be held fixed for the other.
        self._inputs = [z.view_as(z) for z in self.outputs]
        self._args, self._kwargs = self._with(self._inputs)
        self.value = function(*self._args, **self._kwargs)
        self.edge = edge_of(self.value)

    def _with(self, inputs: list[Tensor]) -> tuple[Any, Any]:
        flat = list(self._flat)
        for i, z in zip(self._found, inputs, strict=True):
            flat[i] = z
        args, kwargs = tree_unflatten(flat, self._spec)
        return args, kwargs

    @property
    def name(self) -> str:
        """In messages."""
        return self.function.__name__

    def bound(self) -> tuple[Callable[..., Tensor], tuple[Any, ...], dict[str, Any]]:
        """The call: function, arguments by place and by name."""
        return self.function, self._args, self._kwargs

    def is_input(self, t: Any) -> bool:
        """Whether ``t`` is the only output, as the criterion got it."""
        return len(self._inputs) == 1 and t is self._inputs[0]

    def factor(self, c: Tensor) -> Tensor:
        """The factor of the criterion's values, given ``c = dL/d value``."""
        return c

    def cotangents(self, c: Tensor) -> list[Tensor | None]:
        """``c dl/dz`` for every output; None for one that the value does not depend on."""
        return list(torch.autograd.grad([self.value], self._inputs, [c], retain_graph=True, allow_unused=True))

    def again(self) -> tuple[list[Tensor], Tensor]:
        """Leaves in place of the outputs, and the value in a graph of its own over them."""
        inputs = [z.detach().requires_grad_() for z in self.outputs]
        args, kwargs = self._with(inputs)
        return inputs, self.function(*args, **kwargs)
