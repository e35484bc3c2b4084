"""The weights that a closure gives its cases: its criteria, their reductions and their factors in the loss."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from hfopt.closure import differentiable, recurrent_layers
from hfopt.closure.trace import Closure, loss_of_result
from hfopt.linalg import graph
from hfopt.losses import CRITERIA, Call

BY_CLASS = (F.cross_entropy, F.nll_loss)


@dataclass
class Criterion:
    """One call of a criterion.

    Attributes:
        name: of its function.
        reduction: "mean", "sum", "none" or "batchmean".
        shape: of its input.
        terms: how many values the reduction was made of.
        backward: number of the ``backward()`` call that it went into.
        factor: what multiplies a single term in the loss, for "mean" all of them together; their sum for "none".
        like: what its input was computed by.
    """

    name: str
    reduction: str
    shape: tuple[int, ...]
    terms: int
    by_class: bool
    like: Counter[str]
    backward: int = 0
    factor: float = 0.0
    same: bool = True  # all terms have one factor

    @property
    def weight(self) -> float:
        """The sum of the factors of all terms: one for a mean."""
        return self.factor * self.terms if self.reduction == "sum" else self.factor

    @property
    def summed(self) -> bool:
        """Whether every term counts once, however many there are."""
        single = self.factor / self.terms if self.reduction == "none" and self.terms else self.factor
        return self.reduction in ("sum", "none") and self.same and self.terms > 1 and abs(single - 1) < 1e-6


class ReductionTrace(TorchFunctionMode):
    """Runs a closure for its criteria, and for the lowest precision that it computes in.

    No graph of a network outlives its criterion.
    """

    def __init__(self) -> None:
        super().__init__()
        self.criteria: list[Criterion] = []
        self.eps = 0.0
        self.backwards = 0
        self._open: list[tuple[Criterion, Tensor]] = []

    def run(self, closure: Closure) -> None:
        """Look at one run of the closure."""
        with torch.enable_grad(), self:
            result = closure()
        _, loss = loss_of_result(result)
        if not self.backwards and loss is not None:
            self._close(loss)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.backward:
            gradient = args[1] if len(args) > 1 else kwargs.get("gradient")
            self._close(args[0] if gradient is None else (args[0] * gradient).sum())
            return None
        if func in CRITERIA:
            return self._criterion(func, args, kwargs)
        result = (
            recurrent_layers.call(func, args, kwargs, "value")
            if func in recurrent_layers.RECURRENT
            else differentiable.call(func, args, kwargs)
        )
        for t in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(t, Tensor) and t.requires_grad:
                self.eps = max(self.eps, torch.finfo(t.dtype).eps)
        return result

    def _criterion(self, func: Any, args: Any, kwargs: Any) -> Any:
        flat, spec = tree_flatten((args, kwargs))
        like = Counter(n.name() for n in graph.nodes(t for t in flat if isinstance(t, Tensor)))
        if not any(isinstance(t, Tensor) and t.requires_grad for t in flat):
            return func(*args, **kwargs)
        args, kwargs = tree_unflatten([t.detach() if isinstance(t, Tensor) else t for t in flat], spec)
        value = func(*args, **kwargs)
        a = Call.bind(func, args, kwargs, value).arguments
        terms, by_class = _terms(func, a), func in BY_CLASS
        seen = Criterion(func.__name__, str(a["reduction"]), tuple(a["input"].shape), terms, by_class, like)
        leaf = value.requires_grad_()
        self._open.append((seen, leaf))
        return leaf.clone()

    def _close(self, root: Tensor) -> None:
        """``root`` is (a part of) the loss: find the factors of the criteria in it."""
        number, self.backwards = self.backwards, self.backwards + 1
        if not root.requires_grad or not self._open:
            return
        leaves = [leaf for _, leaf in self._open]
        found: Sequence[Tensor | None] = torch.autograd.grad(root.sum(), leaves, retain_graph=True, allow_unused=True)
        left = []
        for (seen, leaf), c in zip(self._open, found, strict=True):
            if c is None:
                left.append((seen, leaf))
                continue
            seen.backward, seen.factor = number, float(c.sum())
            seen.same = bool((c == c.reshape(-1)[:1]).all())
            self.criteria.append(seen)
        self._open = left


def _terms(func: Any, a: dict[str, Any]) -> int:
    if func in BY_CLASS and not a["target"].is_floating_point():
        return int((a["target"] != a["ignore_index"]).sum())
    each = {k: v for k, v in a.items() if k not in ("size_average", "reduce")}
    known = inspect.signature(func).parameters
    return int(func(**{k: v for k, v in each.items() if k in known} | {"reduction": "none"}).numel())


def unequal_batches(criteria: Sequence[Criterion], batch_dim: int) -> str | None:
    """Describe the mistake in a mean over batches of which the last one is smaller; None if there is none.

    Several terms of a loss may well have other numbers of cases, and weights of their own. So it is asked that each
    has a ``backward()`` of its own, that all were computed by the same operations and have the same factor ``1/K``.
    """
    first = criteria[0] if criteria else None
    if first is None or len(criteria) < 2 or len({c.backward for c in criteria}) < len(criteria):
        return None
    alike = all(
        (c.name, c.reduction, len(c.shape), c.like) == (first.name, "mean", len(first.shape), first.like)
        and abs(c.factor * len(criteria) - 1) < 1e-4
        for c in criteria
    )
    if not alike or not first.shape:
        return None
    sizes = [c.shape[batch_dim % len(c.shape)] for c in criteria]
    if len(set(sizes[:-1])) > 1 or not 0 < sizes[-1] < sizes[0]:
        return None
    return (
        f"the closure's loss is the plain mean of {len(sizes)} batch means, over {sizes[0]} cases each but {sizes[-1]} "
        f"in the last one, whose cases count {sizes[0] / sizes[-1]:.3g} times as much. Weigh each batch's mean by its "
        "share of the cases, loss * len(batch) / number_of_cases, or leave the last batch out"
    )
