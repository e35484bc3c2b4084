"""Watch a closure while it runs: criteria, squares, ``backward()``, and derivatives that it takes itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hfopt.closure import differentiable, recurrent_layers
from hfopt.closure.frozen import Frozen
from hfopt.closure.recurrent_layers import Purpose
from hfopt.closure.squares import LOOKED_AT, argument
from hfopt.errors import ClosureError
from hfopt.losses import CRITERIA

_REQUIRES_GRAD, _GRAD = (getattr(Tensor, name).__get__ for name in ("requires_grad", "grad"))


def _level() -> int:
    """Return the number of transforms of torch.func that are active."""
    level: int | None = torch._C._functorch.maybe_current_level()
    return 0 if level is None else level


class ClosureMode(TorchFunctionMode):
    """Runs a closure; ``backward()`` is noted instead of run.

    Criteria and squares are counted as they are called, so that any run of a closure finds the same call under the same
    number.

    Attributes:
        roots: what ``backward()`` was called on.
        differentiates: the closure calls ``torch.autograd.grad`` itself.
        asked: the closure asked whether a tensor requires a gradient.
    """

    purpose: Purpose = "value"

    def __init__(self) -> None:
        super().__init__()
        self.roots: list[Tensor] = []
        self.differentiates = self.asked = False
        self._calls = 0
        self._outer = _level()
        self._creates = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in CRITERIA:
            return self.criterion(self._number(), func, args, kwargs)
        if func in LOOKED_AT:
            r = argument(func, args, kwargs)
            return func(*args, **kwargs) if r is None else self.square(self._number(), r, func, args, kwargs)
        if func in recurrent_layers.RECURRENT:
            return recurrent_layers.call(func, args, kwargs, self.purpose)
        if func is Tensor.backward or func is torch.autograd.backward:
            return self._backward(func, args, kwargs)
        if func is torch.autograd.grad:
            self.differentiates = True
            args, kwargs = _keeping(args, kwargs)
        elif func == _REQUIRES_GRAD:
            self.asked = True
        elif self._creates and func == _GRAD:
            raise ClosureError(
                "the closure uses p.grad after backward(create_graph=True), but inside a step, backward() is only "
                "noted: take the gradient by torch.autograd.grad(loss, params, create_graph=True)"
            )
        return differentiable.call(func, args, kwargs)

    def repeated(self) -> Callable[[], AbstractContextManager[None]]:
        """Return the context of a piece that is computed again: the same replacements, no effect on buffers."""
        purpose, replaces = self.purpose, recurrent_layers.replaces()

        @contextmanager
        def again() -> Iterator[None]:
            mode = ClosureMode()
            mode.purpose = purpose
            with Frozen(torch.device("cpu")).unchanged(), recurrent_layers.replacing(replaces), mode:
                yield

        return again

    def _number(self) -> int:
        number, self._calls = self._calls, self._calls + 1
        return number

    @property
    def transformed(self) -> bool:
        """Whether the closure is inside a transform of torch.func that it has begun itself."""
        return _level() > self._outer

    def criterion(self, number: int, func: Any, args: Any, kwargs: Any) -> Any:
        """A criterion is called."""
        return func(*args, **kwargs)

    def square(self, number: int, r: Tensor, func: Any, args: Any, kwargs: Any) -> Any:
        """The square of ``r``, or its norm, is computed."""
        return func(*args, **kwargs)

    def run_backward(self, run: Callable[[], Any]) -> bool:
        """Run ``backward()``, if that is wanted: whether it was."""
        return False

    def after_backward(self, freed: Sequence[Tensor]) -> None:
        """``backward()`` was called; ``freed`` are the closure's tensors whose graph it would have freed."""

    def check_inputs(self, inputs: Sequence[Tensor]) -> None:
        """``backward()`` is to set the gradients of ``inputs`` alone."""

    def _backward(self, func: Any, args: Any, kwargs: Any) -> None:
        named = dict(zip(("tensors", "gradient", "retain_graph", "create_graph"), args, strict=False))
        weights = kwargs.get("grad_tensors", kwargs.get("gradient", named.get("gradient")))
        tensors = named.get("tensors", kwargs.get("tensors"))
        handed = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        given = [weights] * len(handed) if weights is None or isinstance(weights, Tensor) else list(weights)
        if (inputs := kwargs.get("inputs")) is not None:
            self.check_inputs([inputs] if isinstance(inputs, Tensor) else list(inputs))
        creates = bool(kwargs.get("create_graph", named.get("create_graph", False)))
        retains = bool(kwargs.get("retain_graph", named.get("retain_graph")) or creates)
        self._creates |= creates
        parts = [_scalar(t, w) for t, w in zip(handed, given, strict=True)]
        root = parts[0] if len(parts) == 1 else torch.stack(parts).sum()
        self.roots.append(root.detach() if self.run_backward(lambda: func(*args, **kwargs)) else root)
        self.after_backward([] if retains else handed)


def release(freed: Sequence[Tensor]) -> None:
    """Take the graphs from losses that a closure holds after ``backward()``, which would have freed them."""
    for t in freed:
        if t.grad_fn is not None and not t._is_view():
            t.detach_()


def _scalar(root: Tensor, weight: Tensor | None) -> Tensor:
    """Return the scalar that ``backward()`` differentiates."""
    if weight is not None:
        root = (root * weight).sum()
    if root.numel() != 1:
        raise ClosureError(f"backward() was called on a tensor of shape {tuple(root.shape)}; reduce the loss first")
    return root.reshape(()) if root.dim() else root


def _keeping(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The arguments of ``torch.autograd.grad`` with ``retain_graph=True``: the graph is used again."""
    if len(args) > 3:
        return (*args[:3], True, *args[4:]), kwargs
    return args, {**kwargs, "retain_graph": True}
