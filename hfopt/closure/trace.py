"""Trace the closure as a function of the parameters: theta -> outputs z -> loss.

An ordinary LBFGS closure computes outputs, calls a criterion, calls ``backward()`` and returns the loss. While it runs
under a ``TorchFunctionMode``, every call of a criterion is cut twice: the criterion gets a detached copy ``z'`` of the
outputs, and the closure gets a detached copy ``l'`` of the criterion's value. What the closure makes of the values then
is a small graph with leaves ``l'_k`` and theta, from which follow the weights ``c_k = dL/dl_k`` and any regulariser of
the parameters, while the graph from theta to ``z`` stays whole for Gauss-Newton products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.hooks import RemovableHandle

from hfopt import structural
from hfopt.closure import differentiable, recurrent_layers
from hfopt.closure.patch import undone
from hfopt.closure.recurrent_layers import Purpose
from hfopt.errors import ClosureError
from hfopt.linalg import graph
from hfopt.losses import CRITERIA

Closure = Callable[[], Any]

WAYS_OUT = (
    "Ways out: use a criterion of torch.nn.functional; let the closure return (outputs, loss); pass outputs=<the "
    "module whose result is the network's output>; or pass loss=<function> with a closure that returns that "
    "function's arguments"
)

# Where an output stands: the n-th criterion call, module call or result, and the place among its flattened tensors.
Site = tuple[int, int]


@dataclass
class CriterionCall:
    """One criterion seen in the closure: ``value (graph over cut inputs) = function(*args)``."""

    function: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Tensor]  # in the network's graph
    inputs: list[Tensor]  # their cut copies, leaves
    value: Tensor  # computed from ``inputs``
    leaf: Tensor  # cut copy of ``value`` that the closure went on with


@dataclass
class Trace:
    """Result of one run of the closure.

    ``total`` is the loss (the sum of what ``backward()`` was called on, or the returned loss); ``result`` is what
    ``step`` returns; exactly one of ``calls`` (criteria found) or ``outputs`` (declared outputs, with their leaf
    copies in ``inputs`` or, if ``inputs`` is None, uncut) describes the way from outputs to loss.
    """

    total: Tensor
    result: Any
    calls: list[CriterionCall] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    inputs: list[Tensor] | None = None
    hidden: list[structural.HiddenState] = field(default_factory=list)
    differentiates: bool = False  # the closure calls torch.autograd.grad itself
    sites: dict[int, Site] = field(default_factory=dict)  # by identity of the output


def _cut(t: Tensor) -> Tensor:
    return t.detach().requires_grad_()


class TraceMode(TorchFunctionMode):
    """Sees every torch function of the closure; ``backward`` is noted instead of run."""

    def __init__(self, *, cut_criteria: bool, run_backward: bool = False, purpose: Purpose = "value") -> None:
        super().__init__()
        self.purpose = purpose
        self.cut_criteria = cut_criteria
        self.run_backward = run_backward
        self.roots: list[Tensor] = []
        self.calls: list[CriterionCall] = []
        self.sites: dict[int, Site] = {}
        self.criteria_seen = 0
        self.differentiates = False
        self.hidden: list[structural.HiddenState] = []
        self.watch: Callable[[TraceMode], None] | None = None
        self.split = False  # by `watch`, which took over what was found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.backward:
            return self._backward(func, args, kwargs)
        if func is torch.autograd.grad:
            self.differentiates = True
        if func in CRITERIA and self.cut_criteria:
            return self._criterion(func, args, kwargs)
        if func in recurrent_layers.RECURRENT:
            return recurrent_layers.call(func, args, kwargs, self.purpose)
        return differentiable.call(func, args, kwargs)

    def _backward(self, func: Any, args: Any, kwargs: Any) -> None:
        root, gradient = args[0], args[1] if len(args) > 1 else kwargs.get("gradient")
        if gradient is not None:
            root = (root * gradient).sum()
        if root.numel() != 1:
            raise ClosureError(f"backward() was called on a tensor of shape {tuple(root.shape)}; reduce the loss first")
        if self.run_backward:
            func(*args, **kwargs)
            root = root.detach()
        self.roots.append(root.reshape(()) if root.dim() else root)
        if self.watch is not None and self.cut_criteria:
            self.watch(self)

    def _criterion(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        flat, spec = tree_flatten((args, kwargs))
        number, self.criteria_seen = self.criteria_seen, self.criteria_seen + 1
        found = [i for i, a in enumerate(flat) if isinstance(a, Tensor) and a.requires_grad]
        if not found or not torch.is_grad_enabled():
            value: Tensor = func(*args, **kwargs)
            return value
        outputs = [flat[i] for i in found]
        for i in found:
            self.sites.setdefault(id(flat[i]), (number, i))
        inputs = [_cut(z) for z in outputs]
        for i, z in zip(found, inputs, strict=True):
            flat[i] = z
        args, kwargs = tree_unflatten(flat, spec)
        value = func(*args, **kwargs)
        call = CriterionCall(func, args, kwargs, outputs, inputs, value, _cut(value))
        self.calls.append(call)
        return call.leaf.clone()  # a closure may go on in place (loss += ...), which a leaf forbids


@dataclass
class _Cuts:
    """Outputs declared by outputs= or loss=: in the network's graph, their cut copies, and where they stood."""

    cut: bool
    outputs: list[Tensor] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    sites: dict[int, Site] = field(default_factory=dict)
    flat: list[list[Any]] = field(default_factory=list)  # everything that passed, flattened

    def tree(self, tree: Any) -> Any:
        """Record the tensors of ``tree``, and replace them by cut copies if ``cut``."""
        number = len(self.flat)
        flat, spec = tree_flatten(tree)
        self.flat.append(list(flat))
        for i, t in enumerate(flat):
            if self.cut and isinstance(t, Tensor) and t.requires_grad:
                self.sites.setdefault(id(t), (number, i))
                self.outputs.append(t)
                leaf = _cut(t)
                self.inputs.append(leaf)
                flat[i] = leaf.clone()  # the closure may change it in place, which a leaf forbids
        return tree_unflatten(flat, spec)

    @contextmanager
    def at(self, module: nn.Module | None) -> Iterator[None]:
        """Act on the results of ``module`` while the block runs."""
        if module is None:
            yield
            return
        handle = RemovableHandle(module._forward_hooks)
        with undone(handle.remove):
            module._forward_hooks[handle.id] = lambda _module, _args, result: self.tree(result)
            yield


def loss_of_result(result: Any) -> tuple[Any, Tensor | None]:
    """Split a closure's result into declared outputs (None if there are none) and a scalar loss tensor."""
    if isinstance(result, Tensor):
        return None, result
    if isinstance(result, (tuple, list)) and len(result) == 2:
        outputs, loss = result
        if isinstance(loss, Tensor) and loss.numel() == 1:
            return outputs, loss
    return None, None


def _total(roots: Sequence[Tensor], result: Any) -> Tensor:
    if roots:
        total = roots[0]
        for root in roots[1:]:
            total = total + root
        return total
    _, loss = loss_of_result(result)
    if loss is None or loss.numel() != 1:
        what = (
            f"a tensor of shape {tuple(result.shape)}" if isinstance(result, Tensor) else f"a {type(result).__name__}"
        )
        raise ClosureError(
            f"the closure called no backward() and returned {what}; it must return the loss as a scalar tensor, or "
            "(outputs, loss)"
        )
    return loss.reshape(()) if loss.dim() else loss


def _called_loss(loss: Callable[..., Any], arguments: Any) -> Tensor:
    value = loss(*arguments) if isinstance(arguments, (tuple, list)) else loss(arguments)
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise ClosureError(f"loss= must return a scalar tensor, but returned {type(value).__name__}")
    return value


def _called(closure: Closure, mode: TraceMode) -> Any:
    """The closure's result; what fails because ``backward()`` is put off is explained."""
    try:
        return closure()
    except (AttributeError, TypeError) as error:
        if mode.roots and "NoneType" in str(error):
            raise ClosureError(
                f"the closure failed after backward() ({error}): inside a step, backward() is only noted, and p.grad "
                "is set when the step is done. Take what reads or changes p.grad out of the closure"
            ) from error
        raise
    except RuntimeError as error:
        if not mode.roots and ("not require grad" in str(error) or "differentiated Tensor" in str(error)):
            raise ClosureError(
                f"the closure differentiates the loss itself ({error}), which is cut from the network inside a step. "
                "Call loss.backward() instead, or only return the loss"
            ) from error
        raise


def trace(
    closure: Closure,
    *,
    loss: Callable[..., Tensor] | None = None,
    outputs: nn.Module | None = None,
    hidden: bool = False,
    cut: bool = True,
    watch: Callable[[TraceMode], None] | None = None,
) -> Trace:
    """Run the closure once, with gradients enabled, and note outputs, criteria, weights and the loss.

    Args:
        closure: see the module's docstring; it may call ``backward()`` several times, the loss is their sum.
        loss: a function of what the closure returns, in place of a recognised criterion.
        outputs: the module whose results are the outputs, everything after it being the loss.
        hidden: whether hidden states are collected for structural damping.
        cut: False leaves the graph whole (for the Hessian of the loss).
        watch: looks on at every ``backward()`` of a closure with criteria (see :mod:`hfopt.curvature.parts`).

    Raises:
        ClosureError: what was found and which keyword solves it.
    """
    declared = loss is not None or outputs is not None
    mode = TraceMode(cut_criteria=cut and not declared, purpose="products" if cut else "hessian")
    mode.watch = watch
    cuts = _Cuts(cut=True)
    with (
        torch.enable_grad(),
        structural.collecting(hidden) as mode.hidden,
        cuts.at(outputs if cut else None),
        mode,
    ):
        result = _called(closure, mode)
        if loss is not None:
            result = _called_loss(loss, cuts.tree(result) if cut else result)
        total = _total(mode.roots, result)
    if mode.split:
        return Trace(total, _public(result, total), differentiates=mode.differentiates)
    if not total.requires_grad:
        raise ClosureError(
            "the closure's loss does not depend on any parameter that requires a gradient (found a loss without a "
            "graph); check that the model runs inside the closure and that the loss is not detached"
        )
    found = Trace(total, _public(result, total), hidden=mode.hidden, differentiates=mode.differentiates)
    if not cut:
        return found
    if declared:
        found.outputs, found.inputs, found.sites = cuts.outputs, cuts.inputs, cuts.sites
        if not found.outputs:
            what = "outputs= was not called in the closure" if outputs is not None else "the closure's result"
            raise ClosureError(
                f"no output depends on the parameters: {what} (or gave no tensor that requires a gradient)"
            )
        return found
    reached = graph.reached_leaves([total]) | {id(total)}
    # Criteria that the loss does not use are somebody's metrics.
    found.calls = [call for call in mode.calls if id(call.leaf) in reached]
    if found.calls:
        found.sites = mode.sites
    else:
        shown, _ = loss_of_result(result)
        flat = tree_flatten(shown)[0]
        found.outputs = [t for t in flat if isinstance(t, Tensor) and t.requires_grad]
        found.sites = {id(t): (0, i) for i, t in enumerate(flat)}
        if not found.outputs:
            node = total.grad_fn.name() if total.grad_fn is not None else "a leaf tensor"
            what = (
                "the loss does not use the value of any criterion called in the closure"
                if mode.calls
                else "no known criterion was called in the closure"
            )
            raise ClosureError(f"{what}; the loss was found to end in {node}. {WAYS_OUT}")
    return found


class OutputCollector(TorchFunctionMode):
    """Takes down the inputs of every criterion, cutting nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.flat: list[list[Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.backward:
            return None
        if func in CRITERIA:
            self.flat.append(tree_flatten((args, kwargs))[0])
        if func in recurrent_layers.RECURRENT:
            return recurrent_layers.call(func, args, kwargs, "products")
        return differentiable.call(func, args, kwargs)


def outputs_again(
    closure: Closure,
    kind: str,
    sites: Sequence[Site],
    *,
    module: nn.Module | None = None,
    hidden: bool = False,
) -> list[Tensor]:
    """Run the closure again for the outputs that :func:`trace` found at ``sites``, and the hidden states after them.

    ``kind``: ``"criteria"`` (inputs of criteria), ``"module"`` (results of ``module``), ``"loss"`` (the closure's
    result) or ``"result"`` (the first part of the closure's ``(outputs, loss)``).
    """
    mode, cuts = OutputCollector(), _Cuts(cut=False)
    with structural.collecting(hidden) as states, cuts.at(module if kind == "module" else None), mode:
        result = closure()
    if kind == "criteria":
        places = mode.flat
    elif kind == "module":
        places = cuts.flat
    else:
        places = [tree_flatten(result if kind == "loss" else loss_of_result(result)[0])[0]]
    return [places[n][i] for n, i in sites] + [s.preactivations for s in states]


def _public(result: Any, total: Tensor) -> Any:
    """Return the result of ``step`` for a closure's result: the loss, detached if it is a tensor."""
    _, loss = loss_of_result(result)
    if loss is not None:
        return loss.detach()
    return total.detach() if result is None else result


def evaluate(closure: Closure, *, loss: Callable[..., Tensor] | None = None, differentiates: bool = False) -> Tensor:
    """Return only the loss, as a detached 0-dim tensor, without a graph; ``backward()`` calls are ignored.

    ``differentiates`` keeps gradients enabled for closures that call ``torch.autograd.grad`` on their own.
    """
    mode = TraceMode(cut_criteria=False)
    try:
        with torch.set_grad_enabled(differentiates), structural.collecting(False), mode:
            result = _called(closure, mode)
            if loss is not None:
                result = _called_loss(loss, result)
    except (ClosureError, RuntimeError):
        if differentiates or not mode.differentiates:
            raise
        return evaluate(closure, loss=loss, differentiates=True)
    if not mode.roots and result is None and not differentiates:
        # "if loss.requires_grad: loss.backward()" and no result: only with gradients is there anything to see.
        return evaluate(closure, loss=loss, differentiates=True)
    if not mode.roots and isinstance(result, float):
        # "if loss.requires_grad: loss.backward()" and "return loss.item()": there is no graph here to show the loss.
        return torch.tensor(result, dtype=torch.float64)
    return _total(mode.roots, result).detach()


def differentiate(
    closure: Closure, params: Sequence[Tensor], *, loss: Callable[..., Tensor] | None = None
) -> tuple[Tensor, Any]:
    """Return loss and gradient by ordinary backward passes; no graph outlives its ``backward()``.

    Leaves the gradient in ``p.grad`` and returns (loss as a detached 0-dim tensor, what ``step`` returns).
    """
    for p in params:
        p.grad = None
    mode = TraceMode(cut_criteria=False, run_backward=True)
    with torch.enable_grad(), structural.collecting(False), mode:
        result = closure()
        if loss is not None:
            result = _called_loss(loss, result)
        total = _total(mode.roots, result)
    if not mode.roots:
        if not total.requires_grad:
            raise ClosureError("the closure's loss does not depend on any parameter that requires a gradient")
        total.backward()  # type: ignore[no-untyped-call]
    return total.detach(), _public(result, total)
