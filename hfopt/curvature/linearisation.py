"""Tangents and adjoints of the outputs about a fixed point: ``J v`` and ``J' w``, primal work done once.

Four ways, in the order in which ``"auto"`` tries them (see :mod:`hfopt.curvature.policy`; docs/linearisation.md
compares them):

1. ``"double-backward"``: the graph of ``u -> J'u`` is built once; differentiated in u it gives ``J v``. Widest
   coverage and about 1.3 gradients a product, but it holds 2.6 to 2.9 times the memory of the forward graph. The
   gradient of the loss falls out of building it.
2. ``"linearize"``: ``torch.func.linearize`` for ``J v`` and the cached graph for ``J'w``; for models with an operation
   that cannot be differentiated twice but has a forward mode. Tracing Python loops is slow.
3. ``"checkpoint"``: double backward on a graph in which sequences are single nodes that keep the states at the borders
   of sqrt(T) segments and compute the rest again; for recurrences of hfopt (see
   :mod:`hfopt.recurrences.segments`).
4. ``"recompute"``: forward and backward passes are run again for every product (about 2.4 gradients); nothing but the
   parameters is held, where the loss is a sum of criteria.

``"differences"`` is never taken by itself: :mod:`hfopt.curvature.differences`, for backward passes that cannot be
differentiated.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ParamSpec, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from hfopt.closure.patch import Method, Patch
from hfopt.curvature.memory import available_bytes as available_bytes
from hfopt.errors import NotDifferentiable, logger, size
from hfopt.linalg import graph
from hfopt.recurrences.segments import Segments

# What the forward graph and the traced tangent graph keep, in units of the forward graph (measured: 2.0 to 4.4 on
# recurrent, fully connected and convolutional networks).
LINEARIZE_MEMORY = 4.4

_P = ParamSpec("_P")

POLICIES = ("auto", "double-backward", "linearize", "checkpoint", "recompute", "differences")

# What a closure may ask about a parameter itself: a tensor that stands in for one would answer otherwise.
_OF_PARAMETERS = {getattr(Tensor, name).__get__ for name in ("requires_grad", "is_leaf", "grad")}

# torch counts its tracing and its nested forward modes for the whole process.
_ONE_AT_A_TIME = threading.RLock()

Maybe = list["Tensor | None"]


@dataclass(frozen=True)
class Cost:
    """Measured cost of a linearisation at the time it was chosen.

    Attributes:
        kept: bytes that stay allocated between products (an estimate for "linearize").
        budget: bytes that were there to be used.
        gradient: seconds of the closure's run (at most those of an adjoint pass) and of an adjoint pass.
        setup: seconds of making the linearisation, with the gradient that falls out of it.
        product: seconds of the first tangent and adjoint pass.
    """

    kept: int
    budget: int
    gradient: float
    setup: float
    product: float

    def __str__(self) -> str:
        unit = max(self.gradient, 1e-9)
        return (
            f"keeps {size(self.kept)} of a budget of {size(self.budget)}; set-up {self.setup / unit:.2f} gradients, "
            f"product {self.product / unit:.2f} gradients ({self.product * 1e3:.3g} ms), each measured once"
        )


class Linearisation(Protocol):
    """J about a fixed point, for outputs ``z_1, z_2, ...`` and parameters ``p_1, p_2, ...``.

    ``batched``: k vectors at once, along a new first dimension of each tensor.
    """

    name: str
    cost: Cost | None

    def jvp(self, v: Sequence[Tensor], batched: bool = False) -> Maybe:
        """Return ``J v``: one tensor (or None for zero) per output."""

    def vjp(self, w: Sequence[Tensor | None], batched: bool = False, structural: float = 0.0) -> Maybe:
        """Return ``J' w``: one tensor (or None for zero) per parameter.

        ``structural`` adds that multiple of ``S v`` of the hidden states that the linearisation keeps to itself, for
        the v of the last :meth:`jvp`.
        """

    def column_bytes(self) -> int:
        """Return the approximate memory that one more vector of a batched product needs while it is computed."""

    def kept_bytes(self) -> int:
        """Return the bytes that stay allocated between products."""


def pull_back(
    outputs: Sequence[Tensor], params: Sequence[Tensor], w: Sequence[Tensor | None], batched: bool = False
) -> Maybe:
    """Return ``J' w`` on a graph that is kept; None for a parameter that the outputs do not depend on."""
    live = [(z, t) for z, t in zip(outputs, w, strict=True) if t is not None and z.requires_grad]
    if not live:
        return [None] * len(params)
    return graph.gradients([z for z, _ in live], params, [t for _, t in live], batched)


class DoubleBackward:
    """Cached graph of ``u -> J'u``, linear in ``u``."""

    name = "double-backward"
    cost: Cost | None = None

    def __init__(self, outputs: Sequence[Tensor], params: Sequence[Tensor], at: Sequence[Tensor]) -> None:
        """Build the graph at ``u = at`` (one tensor per output); ``self.gradient`` is ``J' at``."""
        self.outputs, self.params = list(outputs), list(params)
        self._u = [u.detach().clone().requires_grad_() for u in at]
        with graph.unhooked(self.params):
            pulled: Sequence[Tensor | None] = torch.autograd.grad(
                self.outputs, self.params, self._u, create_graph=True, allow_unused=True
            )
        self._pulled = [(i, g) for i, g in enumerate(pulled) if g is not None and g.requires_grad]
        graph.refuse_once_differentiable(g for _, g in self._pulled)
        # J'u depends on u unless it is zero: a backward pass that computes outside of autograd has lost J v.
        lost = [g for g in pulled if g is not None and not g.requires_grad]
        if self._u and any(bool((g if g.layout == torch.strided else g.to_dense()).any()) for g in lost):
            raise RuntimeError(
                "the backward pass of a function of the model hides its arithmetic from autograd (no_grad, numpy, "
                ".data), so that it cannot be differentiated"
            )
        self.gradient: Maybe = [None if g is None else g.detach() for g in pulled]

    def jvp(self, v: Sequence[Tensor], batched: bool = False) -> Maybe:
        """Return ``J v = d<J'u, v>/du``; ``batched``: k tangents at once, along a new first dimension."""
        return graph.gradients([g for _, g in self._pulled], self._u, [v[i] for i, _ in self._pulled], batched)

    def vjp(self, w: Sequence[Tensor | None], batched: bool = False, structural: float = 0.0) -> Maybe:
        """Return ``J' w`` on the forward graph; ``batched`` as for :meth:`jvp`."""
        return pull_back(self.outputs, self.params, w, batched)

    def column_bytes(self) -> int:
        """Return the bytes of a tangent and a cotangent of everything that the forward graph keeps."""
        return 2 * graph.saved_bytes(self.outputs, self.params)

    def kept_bytes(self) -> int:
        """Return the bytes of the tensors that both graphs keep."""
        return graph.saved_bytes([*self.outputs, *(g for _, g in self._pulled)], self.params)


class Checkpoint(DoubleBackward):
    """The same on a graph whose sequences keep the states at the borders of their segments alone."""

    name = "checkpoint"

    def __init__(
        self,
        outputs: Sequence[Tensor],
        params: Sequence[Tensor],
        at: Sequence[Tensor],
        sequences: Sequence[Segments],
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """``sequences``: those that were checkpointed in the run that gave ``outputs``.

        ``around`` is the context of a pass, since a segment that is computed again may write to the model's buffers.
        """
        self._sequences, self._around = list(sequences), around
        with around():
            super().__init__(outputs, params, at)

    def jvp(self, v: Sequence[Tensor], batched: bool = False) -> Maybe:
        """Return ``J v``, segment by segment."""
        with self._around():
            return super().jvp(v, batched)

    def vjp(self, w: Sequence[Tensor | None], batched: bool = False, structural: float = 0.0) -> Maybe:
        """Return ``J' w``, and the structural damping of the checkpointed hidden states in the same pass."""
        try:
            for s in self._sequences:
                s.structural = structural
            with self._around():
                return super().vjp(w, batched)
        finally:
            for s in self._sequences:
                s.structural = 0.0

    def column_bytes(self) -> int:
        """Return the bytes for the graph as a whole and for the largest segment."""
        return super().column_bytes() + 2 * max(s.bytes_of_one for s in self._sequences)

    def kept_bytes(self) -> int:
        """Return the bytes of the graphs and the segment boundaries."""
        borders = {id(x): x for s in self._sequences for states in s.borders for x in states}
        return super().kept_bytes() + sum(x.numel() * x.element_size() for x in borders.values())


class _Swap(TorchFunctionMode):
    """Replaces parameters by other tensors in every torch function that is called; see :func:`_swapped`."""

    def __init__(self, replacement: dict[int, Tensor]) -> None:
        super().__init__()
        self.replacement = replacement

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _OF_PARAMETERS:
            args, kwargs = self.replaced((args, kwargs))
        return func(*args, **kwargs)

    def replaced(self, arguments: Any) -> Any:
        """``arguments`` with other tensors for the parameters in it."""
        return tree_map_only(Tensor, lambda t: self.replacement.get(id(t), t), arguments)


_swap: ContextVar[_Swap | None] = ContextVar("hfopt_swap", default=None)


def _with_swapped_arguments(plain: Method) -> Method:
    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        swap = _swap.get()
        if swap is not None:
            args, kwargs = swap.replaced((args, kwargs))
        return plain(cls, *args, **kwargs)

    return apply


# It is no torch function that a mode would see: a parameter given straight to one would be a constant there, and its
# tangent silently lost.
_apply = Patch(torch.autograd.Function, "apply", _with_swapped_arguments)


@contextmanager
def _swapped(replacement: dict[int, Tensor]) -> Iterator[None]:
    """The block in which this thread computes with other tensors in place of parameters, by their identity."""
    mode = _Swap(replacement)
    token = _swap.set(mode)
    try:
        with _ONE_AT_A_TIME, _apply.block(), mode:
            yield
    finally:
        _swap.reset(token)


class Linearize:
    """``torch.func.linearize`` for the tangents, the forward graph for the adjoints."""

    name = "linearize"
    cost: Cost | None = None

    def __init__(
        self,
        outputs: Sequence[Tensor],
        params: Sequence[Tensor],
        run: Callable[[], Sequence[Tensor]],
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
        draws: bool = False,
    ) -> None:
        """``run`` computes the outputs again; the parameters in it are swapped for torch.func's.

        ``around`` is the context of a product, since the traced graph writes to the model's buffers each time. A model
        that ``draws`` random numbers would draw others each time, so it is not traced but run in forward mode for
        every product. So is one whose traced graph writes to its own constants: its second product would be another
        than its first.
        """
        self.outputs, self.params = list(outputs), list(params)
        self._around, own = around, self.params  # `function` must not hold this object, which holds it

        def function(*values: Tensor) -> tuple[Tensor, ...]:
            swapped = {id(p): t for p, t in zip(own, values, strict=True)}
            with _swapped(swapped):
                # An output that is a parameter itself has passed no function that could swap it.
                return tuple(swapped.get(id(z), z) for z in run())

        primals = tuple(p.detach() for p in self.params)

        def forward(*v: Tensor) -> tuple[Tensor, ...]:
            found: tuple[Tensor, ...] = torch.func.jvp(function, primals, v)[1]
            return found

        if draws:
            self._jvp: Callable[..., tuple[Tensor, ...]] = forward
            self.jvp([torch.zeros_like(p) for p in primals])  # raises where there is no forward mode
            return
        with _ONE_AT_A_TIME, warnings.catch_warnings():
            # torch's own constant folding warns about its internals, which a user can do nothing about.
            warnings.simplefilter("ignore", UserWarning)
            _, traced = torch.func.linearize(function, *primals)
        self._jvp = torch.no_grad()(traced)
        if not self._repeats():
            logger.info("products run the model in forward mode, since its traced graph changes its own constants")
            self._jvp = forward

    def _repeats(self) -> bool:
        """Return whether two products with the same vector are equal."""
        v = [torch.linspace(0.5, 1.5, p.numel(), dtype=p.dtype, device=p.device).view(p.shape) for p in self.params]
        first = [t.clone() for t in self.jvp(v) if t is not None]
        return all(torch.equal(a, b) for a, b in zip(first, self.jvp(v), strict=True) if b is not None)

    def jvp(self, v: Sequence[Tensor], batched: bool = False) -> Maybe:
        """Return ``J v`` by the traced tangent graph."""
        with self._around():
            return list((torch.vmap(self._jvp, randomness="same") if batched else self._jvp)(*v))

    def vjp(self, w: Sequence[Tensor | None], batched: bool = False, structural: float = 0.0) -> Maybe:
        """Return ``J' w`` on the forward graph."""
        return pull_back(self.outputs, self.params, w, batched)

    def column_bytes(self) -> int:
        """Return the bytes of a tangent and a cotangent of everything that the forward graph keeps."""
        return 2 * graph.saved_bytes(self.outputs, self.params)

    def kept_bytes(self) -> int:
        """Return about the bytes of both graphs; constants of the tangent graph are folded in the first product."""
        return int(LINEARIZE_MEMORY * graph.saved_bytes(self.outputs, self.params))


class Recompute:
    """Runs the model again for every product and keeps nothing."""

    name = "recompute"
    cost: Cost | None = None

    def __init__(self, params: Sequence[Tensor], run: Callable[[], Sequence[Tensor]]) -> None:
        """``run`` computes the outputs, with their graph, always in the same order."""
        self.params, self._run = list(params), run
        self._fresh: DoubleBackward | None = None
        self._column = 0

    def jvp(self, v: Sequence[Tensor], batched: bool = False) -> Maybe:
        """Return ``J v`` on a fresh graph, which the next :meth:`vjp` uses up."""
        outputs = self._run()
        self._fresh = DoubleBackward(outputs, self.params, [torch.zeros_like(z) for z in outputs])
        return self._fresh.jvp(v, batched)

    def vjp(self, w: Sequence[Tensor | None], batched: bool = False, structural: float = 0.0) -> Maybe:
        """Return ``J' w`` on the graph of the preceding :meth:`jvp`, or on one of its own."""
        fresh, self._fresh = self._fresh, None
        outputs = fresh.outputs if fresh is not None else self._run()
        return pull_back(outputs, self.params, w, batched)

    def column_bytes(self) -> int:
        """Return the same as with a cached graph, from one run of the model."""
        if self._column == 0:
            self._column = 2 * graph.saved_bytes(self._run(), self.params)
        return self._column

    def kept_bytes(self) -> int:
        """Return zero."""
        return 0


def not_differentiable(attempts: dict[str, Exception]) -> NotDifferentiable:
    """Return the error for a model that no policy could linearise."""
    told = "; ".join(f"{name}: {str(e).strip().splitlines()[0][:200]}" for name, e in attempts.items())
    return NotDifferentiable(
        f"the model could not be linearised ({told}). Replace the operation that is named by one with a second "
        "derivative or a forward mode, freeze the part of the model that uses it, or pass linearisation='differences'"
    )


def eager(product: Callable[_P, Tensor]) -> Callable[_P, Tensor]:
    """Wrap a product so that compiled code calls it as a whole, as it is written.

    What it differentiates is a graph from outside, and what it runs again is seen call by call: the compiler can do
    neither.
    """
    # The public torch._dynamo.disable would import the compiler, which takes seconds.
    outside: Callable[_P, Tensor] = torch._compile._disable_dynamo(product)

    @functools.wraps(product)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> Tensor:
        return outside(*args, **kwargs) if torch.compiler.is_compiling() else product(*args, **kwargs)

    return wrapped


def explained(product: Callable[_P, Tensor]) -> Callable[_P, Tensor]:
    """Wrap a product so that it names the operation without a derivative, if only the product reveals it."""

    @functools.wraps(product)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> Tensor:
        try:
            return product(*args, **kwargs)
        except NotImplementedError as error:  # what torch raises where an operation has no derivative formula
            raise not_differentiable({"the product": error}) from error

    return wrapped
