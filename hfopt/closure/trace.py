"""Trace the closure as a function of the parameters: theta -> outputs z -> loss.

An ordinary LBFGS closure computes outputs, calls a criterion, calls ``backward()`` and returns the loss. It runs under
a ``TorchFunctionMode`` that takes down every call of a criterion, and every square, with its place in the autograd
graph. Nothing is cut, so that a closure may differentiate its criteria, too. What it makes of the values is found from
the graph afterwards (:mod:`hfopt.closure.decompose`): the weights ``c_k = dL/dl_k`` and any regulariser of the
parameters. Only outputs that ``outputs=`` or ``loss=`` declare are cut: the loss is computed from a copy of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.hooks import RemovableHandle

from hfopt import structural
from hfopt.closure.criteria import CriterionCall, Site
from hfopt.closure.modes import ClosureMode, release
from hfopt.closure.patch import undone
from hfopt.closure.recurrent_layers import Purpose
from hfopt.closure.squares import NORMS, Norm, Square, norm_of
from hfopt.errors import ClosureError

Closure = Callable[[], Any]


@dataclass
class Trace:
    """Result of one run of the closure.

    ``total`` is the loss (the sum of what ``backward()`` was called on, or the returned loss); ``result`` is what
    ``step`` returns. ``calls`` and ``squares`` are all that were seen, part of the loss or not. ``outputs`` are the
    declared ones, with their cut copies in ``inputs``, or those that the closure returned, with ``inputs`` None.
    """

    total: Tensor
    result: Any
    calls: list[CriterionCall] = field(default_factory=list)
    squares: list[Square] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    inputs: list[Tensor] | None = None
    hidden: list[structural.HiddenState] = field(default_factory=list)
    differentiates: bool = False  # the closure needs gradients to be enabled even where the loss alone is asked for
    sites: dict[int, Site] = field(default_factory=dict)  # of ``outputs``, by identity


def _cut(t: Tensor) -> Tensor:
    return t.detach().requires_grad_()


class TraceMode(ClosureMode):
    """Takes down criteria, squares and norms that depend on parameters."""

    def __init__(
        self,
        purpose: Purpose,
        *,
        record: bool,
        params: Sequence[Tensor] = (),
        watch: Callable[[TraceMode], None] | None = None,
    ) -> None:
        super().__init__()
        self.purpose = purpose
        self._record, self._params, self.watch = record, {id(p) for p in params}, watch
        self.calls: list[CriterionCall] = []
        self.squares: list[Square] = []
        self.freed: list[Tensor] = []
        self.hidden: list[structural.HiddenState] = []
        self.split = False  # by `watch`, which took over what was found
        self._norms: dict[Node, Norm] = {}

    def _recorded(self) -> bool:
        return self._record and torch.is_grad_enabled() and not self.transformed

    def criterion(self, number: int, func: Any, args: Any, kwargs: Any) -> Any:
        """Call it on views of the outputs."""
        tensors = (a for a in tree_flatten((args, kwargs))[0] if isinstance(a, Tensor))
        if not self._recorded() or not any(t.requires_grad for t in tensors):
            return func(*args, **kwargs)
        call = CriterionCall(func, args, kwargs, number)
        self.calls.append(call)
        return call.value.clone()  # a closure may go on in place (loss += ...)

    def square(self, number: int, r: Tensor, func: Any, args: Any, kwargs: Any) -> Any:
        """Note its place in the graph."""
        value = func(*args, **kwargs)
        if not self._recorded() or not value.requires_grad or not r.is_floating_point():
            return value
        if func in NORMS:
            if (norm := norm_of(r, value, (number, 0))) is not None:
                self._norms[value.grad_fn] = norm
        elif r.grad_fn is not None and (norm := self._norms.get(r.grad_fn)) is not None:
            self.squares.append(Square(norm.argument, value, norm.site, norm))
        else:
            self.squares.append(Square(r, value, (number, 0)))
        return value

    def check_inputs(self, inputs: Sequence[Tensor]) -> None:
        """Only ``backward()`` in all parameters is that of a loss."""
        if not self._params <= {id(t) for t in inputs}:
            raise ClosureError(
                "backward(inputs=...) was called for other tensors than the optimizer's parameters, but inside a step, "
                "backward() marks the loss. Take derivatives that the loss is made of by torch.autograd.grad"
            )

    def after_backward(self, freed: Sequence[Tensor]) -> None:
        """Let ``watch`` look on."""
        self.freed += freed
        if self.watch is not None:
            self.watch(self)

    def let_go(self, calls: Iterable[CriterionCall]) -> None:
        """Keep nothing of what parts of the loss were computed from; the closure's losses lose their graphs, too."""
        gone = {id(c) for c in calls}
        self.calls[:] = [c for c in self.calls if id(c) not in gone]
        self.roots[:] = [r.detach() for r in self.roots]
        release(self.freed)
        for kept in (self.squares, self.freed, self.hidden, self._norms):
            kept.clear()
        self.split = True


class RunMode(ClosureMode):
    """Runs ``backward()`` as it stands."""

    def run_backward(self, run: Callable[[], Any]) -> bool:
        """Yes."""
        run()
        return True


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


def _called(closure: Closure, mode: ClosureMode, cuts: _Cuts | None = None) -> Any:
    """The closure's result; what fails because ``backward()`` is put off, or outputs are cut, is explained."""
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
        cut = cuts is not None and bool(cuts.inputs)
        if cut and ("not require grad" in str(error) or "differentiated Tensor" in str(error)):
            raise ClosureError(
                f"the closure differentiates what is computed from the result of outputs= ({error}), which is cut from "
                "the network inside a step. Let the closure return (outputs, loss) instead of giving outputs=, or pass "
                "curvature='hessian', which takes any loss"
            ) from error
        raise


def trace(
    closure: Closure,
    *,
    loss: Callable[..., Tensor] | None = None,
    outputs: nn.Module | None = None,
    params: Sequence[Tensor] = (),
    hidden: bool = False,
    cut: bool = True,
    watch: Callable[[TraceMode], None] | None = None,
) -> Trace:
    """Run the closure once, with gradients enabled, and note outputs, criteria, squares and the loss.

    Args:
        closure: see the module's docstring; it may call ``backward()`` several times, the loss is their sum.
        loss: a function of what the closure returns, in place of a recognised criterion.
        outputs: the module whose results are the outputs, everything after it being the loss.
        params: the optimizer's; the closure must not change them.
        hidden: whether hidden states are collected for structural damping.
        cut: False looks for no outputs (for the Hessian of the loss).
        watch: looks on at every ``backward()`` of a closure with criteria (see :mod:`hfopt.curvature.parts`).

    Raises:
        ClosureError: what was found and which keyword solves it.
    """
    declared = loss is not None or outputs is not None
    mode = TraceMode(
        "products" if cut else "hessian", record=cut and not declared, params=params, watch=None if declared else watch
    )
    cuts = _Cuts(cut=True)
    versions = [p._version for p in params]
    with (
        torch.enable_grad(),
        structural.collecting(hidden) as mode.hidden,
        cuts.at(outputs if cut else None),
        mode,
    ):
        result = _called(closure, mode, cuts)
        _refuse_changes(params, versions)
        if loss is not None:
            result = _called_loss(loss, cuts.tree(result) if cut else result)
        total = _total(mode.roots, result)
    # "if loss.requires_grad: loss.backward()" and no result: without gradients there is no loss to be seen.
    differentiates = mode.differentiates or (mode.asked and _loss_of(result) is None)
    found = Trace(total, _public(result, total), differentiates=differentiates)
    if mode.split:
        return found
    if not total.requires_grad:
        raise ClosureError(
            "the closure's loss does not depend on any parameter that requires a gradient (found a loss without a "
            "graph); check that the model runs inside the closure and that the loss is not detached"
        )
    found.hidden = mode.hidden
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
    found.calls, found.squares = mode.calls, mode.squares
    flat = tree_flatten(loss_of_result(result)[0])[0]
    found.outputs = [t for t in flat if isinstance(t, Tensor) and t.requires_grad]
    found.sites = {id(t): (0, i) for i, t in enumerate(flat)}
    return found


def _refuse_changes(params: Sequence[Tensor], versions: Sequence[int]) -> None:
    """A closure that moves the parameters is another function at every call."""
    shapes = [tuple(p.shape) for p, v in zip(params, versions, strict=True) if p._version != v]
    if shapes:
        raise ClosureError(
            f"the closure changes parameters in place, of shapes {shapes} (by an operation under torch.no_grad() such "
            "as clamp_, or nn.Embedding(max_norm=...)), so that every call computes another function. Change them after"
            " step(), or bound what is computed from them: image.clamp(0, 1), or a torch.nn.utils.parametrize module"
        )


def _loss_of(result: Any) -> Tensor | None:
    return loss_of_result(result)[1]


class OutputCollector(ClosureMode):
    """Takes down the inputs of the criteria and squares whose numbers are ``wanted``."""

    purpose = "products"

    def __init__(self, wanted: Collection[int] = ()) -> None:
        super().__init__()
        self._wanted = frozenset(wanted)
        self.flat: dict[int, list[Any]] = {}

    def criterion(self, number: int, func: Any, args: Any, kwargs: Any) -> Any:
        """Note the arguments."""
        if number in self._wanted:
            self.flat[number] = tree_flatten((args, kwargs))[0]
        return func(*args, **kwargs)

    def square(self, number: int, r: Tensor, func: Any, args: Any, kwargs: Any) -> Any:
        """Note what is squared."""
        if number in self._wanted:
            self.flat[number] = [r]
        return func(*args, **kwargs)


def outputs_again(
    closure: Closure,
    kind: str,
    sites: Sequence[Site],
    *,
    module: nn.Module | None = None,
    hidden: bool = False,
) -> list[Tensor]:
    """Run the closure again for the outputs that :func:`trace` found at ``sites``, and the hidden states after them.

    ``kind``: ``"criteria"`` (arguments of criteria and squares), ``"module"`` (results of ``module``), ``"loss"`` (the
    closure's result) or ``"result"`` (the first part of the closure's ``(outputs, loss)``).
    """
    mode, cuts = OutputCollector([n for n, _ in sites] if kind == "criteria" else ()), _Cuts(cut=False)
    with structural.collecting(hidden) as states, cuts.at(module if kind == "module" else None), mode:
        result = closure()
    places: Any
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
    mode = ClosureMode()
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
    mode = RunMode()
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


def refuse_independence(params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    """Refuse a gradient that is undefined everywhere: the loss uses the parameters of another model, often a copy."""
    if params and all(g is None for g in grads):
        raise ClosureError(
            "the closure's loss does not depend on any of the parameters given: check that they are those of the model "
            "that the closure calls (not of a copy, and not replaced since)"
        )
