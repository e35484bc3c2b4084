"""Replace torch's recurrent layers by hfopt's recurrences while a closure runs inside a step.

``nn.RNN``, ``nn.LSTM`` and ``nn.GRU`` end in one call of ``torch.rnn_tanh``, ``rnn_relu``, ``lstm`` or ``gru``, which
the ``TorchFunctionMode`` of a closure intercepts. The operators of :mod:`hfopt.recurrences` compute that call on the
same weights: all layers, both directions, packed sequences, dropout between layers. Both are the same function up to
rounding errors, but their derivatives differ: cuDNN has no second derivative, the LSTM of CPUs has no forward mode, and
torch's other layers run many small operations at every time step, while each layer here is one operator. The operators
also mark hidden states for structural damping.

torch still computes calls that are not understood in every detail (projections, other kinds of tensors, wrong shapes),
so that its own error messages appear, and sequences that are too short to gain anything. On CUDA, these run without
cuDNN, whose layers cannot be differentiated twice and round their inputs to TF32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hfopt import structural
from hfopt.closure.patch import Switch
from hfopt.errors import logger
from hfopt.recurrences import gru_layer, lstm_layer, simple_rnn_layer

# Fewer steps than this are no faster as one operator than one by one (measured on a CPU, 4 to 64 units).
SHORTEST = 8

# What a run of the closure is for: products with J and J', derivatives of any kind, or the loss and its gradient.
Purpose = Literal["products", "hessian", "value"]

_enabled: ContextVar[bool] = ContextVar("hfopt_replace_recurrences", default=True)
_told: set[str] = set()


def replaces() -> bool:
    """Return whether torch's recurrent layers are replaced here."""
    return _enabled.get()


@contextmanager
def replacing(enabled: bool) -> Iterator[None]:
    """Set whether torch's recurrent layers are replaced in closures that run inside the block."""
    token = _enabled.set(enabled)
    try:
        yield
    finally:
        _enabled.reset(token)


class Layout(Protocol):
    """The order in time of the rows of data of a call."""

    @property
    def lengths(self) -> Tensor | None:
        """(B,), on the CPU; None where all sequences have one length."""

    @property
    def mask(self) -> Tensor | None:
        """(T, B) bool, False beyond a sequence's end; None where there is no such step."""

    def spread(self, x: Tensor, reverse: bool) -> Tensor:
        """Return data as (T, B, V), each sequence beginning at t = 0; ``reverse``: with its last step."""

    def collect(self, H: Tensor, reverse: bool) -> Tensor:
        """Invert :meth:`spread`, for H (T, B, h)."""

    def last(self, H: Tensor) -> Tensor:
        """Return H (B, h) after the last step of each sequence, for H (T, B, h) from :meth:`spread`."""


class Equal:
    """Sequences of one length: data are (T, B, V)."""

    lengths = mask = None

    def spread(self, x: Tensor, reverse: bool) -> Tensor:
        """Return the data in the order of time, or reversed."""
        return x.flip(0) if reverse else x

    def collect(self, H: Tensor, reverse: bool) -> Tensor:
        """Return the states in the order of time."""
        return H.flip(0) if reverse else H

    def last(self, H: Tensor) -> Tensor:
        """Return the states after the last step."""
        return H[-1]


class Packed:
    """A packed sequence: data are (N, V), those of step 0 first, ``batch_sizes[t]`` sequences having a step t."""

    def __init__(self, batch_sizes: Sequence[int], device: torch.device) -> None:
        """``batch_sizes (T,)`` does not grow, so that sequence 0 is the longest."""
        self.steps, self.batch = len(batch_sizes), batch_sizes[0]
        t, b = np.arange(self.steps)[:, None], np.arange(self.batch)
        mask = b < np.asarray(batch_sizes)[:, None]
        length = mask.sum(0)
        self.lengths = torch.from_numpy(length)
        self._rows = torch.from_numpy((t * self.batch + b)[mask]).to(device)
        self._reverse = torch.from_numpy(((length - 1 - t) * self.batch + b)[mask]).to(device)
        self._last = torch.from_numpy((length - 1) * self.batch + b).to(device)
        self.mask = torch.from_numpy(mask).to(device)

    def spread(self, x: Tensor, reverse: bool) -> Tensor:
        """Return the data with zeros beyond the end of a sequence."""
        everything = x.new_zeros(self.steps * self.batch, x.shape[1])
        return everything.index_copy(0, self._place(reverse), x).view(self.steps, self.batch, -1)

    def collect(self, H: Tensor, reverse: bool) -> Tensor:
        """Return the states without the steps beyond the end of a sequence."""
        return H.flatten(0, 1).index_select(0, self._place(reverse))

    def last(self, H: Tensor) -> Tensor:
        """Return the states at the length of each sequence."""
        return H.flatten(0, 1).index_select(0, self._last)

    def _place(self, reverse: bool) -> Tensor:
        return self._reverse if reverse else self._rows


@dataclass(frozen=True)
class Call:
    """A call of one of torch's recurrent functions, taken apart.

    ``data`` (T, B, V), or (N, V) of a packed sequence with its T ``batch_sizes``; ``states``, each (layers *
    directions, B, h); ``weights`` in torch's order: of layer 0, of its reverse, of layer 1, ..., each being W_ih, W_hh
    and, with biases, b_ih, b_hh.
    """

    name: str
    data: Tensor
    batch_sizes: Sequence[int] | None
    states: tuple[Tensor, ...]
    weights: Sequence[Tensor]
    biases: bool
    layers: int
    dropout: float
    train: bool
    bidirectional: bool
    batch_first: bool

    @property
    def directions(self) -> int:
        """1 or 2."""
        return 2 if self.bidirectional else 1

    @property
    def steps(self) -> int:
        """T."""
        return len(self.batch_sizes) if self.batch_sizes is not None else self.data.shape[1 if self.batch_first else 0]

    def group(self, i: int) -> Sequence[Tensor]:
        """Return the weights of the i-th layer and direction."""
        n = 4 if self.biases else 2
        return self.weights[i * n : (i + 1) * n]


# A layer in one direction: (inputs (T, B, V), its weights, its first states (B, h), where sequences end) -> hidden
# states (T, B, h) and the last states (B, h) of each sequence.
Layer = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor], Layout], tuple[Tensor, tuple[Tensor, ...]]]


@dataclass(frozen=True)
class Replacement:
    """The replacement of one of torch's functions.

    Attributes:
        layer: a layer in one direction.
        states: how many states it has.
        gates: rows of W_ih and W_hh per hidden unit.
        hessian: whether products with a Hessian are faster too (the gated layers' go through a loop of their own).
    """

    layer: Layer
    states: int
    gates: int
    hessian: bool


def _simple(nonlinearity: str) -> Layer:
    def layer(
        x: Tensor, weights: Sequence[Tensor], start: Sequence[Tensor], layout: Layout
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        W_ih, W_hh, *b = weights
        bias = b[0] + b[1] if b else None
        H = simple_rnn_layer(x, W_ih.t(), W_hh.t(), start[0], bias, nonlinearity, layout.mask)
        return H, (layout.last(H),)

    return layer


def _lstm(
    x: Tensor, weights: Sequence[Tensor], start: Sequence[Tensor], layout: Layout
) -> tuple[Tensor, tuple[Tensor, ...]]:
    h0, c0 = start
    return lstm_layer(x, *_all_four(weights), h0, c0, layout.lengths)


def _gru(
    x: Tensor, weights: Sequence[Tensor], start: Sequence[Tensor], layout: Layout
) -> tuple[Tensor, tuple[Tensor, ...]]:
    H, last = gru_layer(x, *_all_four(weights), start[0], layout.lengths)
    return H, (last,)


def _all_four(weights: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Weights and biases; None where there are no biases."""
    W_ih, W_hh, *b = weights
    return (W_ih, W_hh, b[0], b[1]) if b else (W_ih, W_hh, None, None)


REPLACEMENTS = {
    "rnn_tanh": Replacement(_simple("tanh"), states=1, gates=1, hessian=True),
    "rnn_relu": Replacement(_simple("relu"), states=1, gates=1, hessian=True),
    "lstm": Replacement(_lstm, states=2, gates=4, hessian=False),
    "gru": Replacement(_gru, states=1, gates=3, hessian=False),
}

RECURRENT = {getattr(torch._C._VariableFunctions, name): name for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")}

_without_cudnn = Switch(torch._C._get_cudnn_enabled, torch._C._set_cudnn_enabled, False)


def call(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], purpose: Purpose) -> Any:
    """Return ``func(*args, **kwargs)`` for one of :data:`RECURRENT`, with derivatives fit for ``purpose``."""
    if _enabled.get():
        found = understood(RECURRENT[func], args, kwargs)
        if found is not None and worthwhile(found, purpose):
            _tell(found)
            return compute(found)
    if not any(isinstance(a, Tensor) and a.is_cuda for a in args):
        return func(*args, **kwargs)
    with _without_cudnn.block():
        return func(*args, **kwargs)


def worthwhile(c: Call, purpose: Purpose) -> bool:
    """Return whether hfopt's recurrences serve ``purpose`` better than torch's layer (without cuDNN, on CUDA)."""
    differentiated = torch.is_grad_enabled()
    if differentiated and structural.wanted():
        return True  # torch's layers mark no hidden states
    if c.steps < SHORTEST or (purpose == "hessian" and not REPLACEMENTS[c.name].hessian):
        return False
    return c.data.is_cuda or (differentiated and purpose != "value")


def understood(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    """Return the parts of the call, or None for one that :func:`compute` would not compute exactly as torch does."""
    if name not in REPLACEMENTS or kwargs or len(args) != 9:
        return None
    if isinstance(args[3], bool):
        data, hx, weights, biases, layers, dropout, train, bidirectional, batch_first = args
        batch_sizes = None
    else:
        data, sizes, hx, weights, biases, layers, dropout, train, bidirectional = args
        if sizes.dim() != 1 or sizes.is_floating_point() or sizes.device.type != "cpu":
            return None
        # By way of numpy: a graph that is being traced must not take these numbers for variables.
        batch_sizes, batch_first = sizes.numpy().tolist(), False
    states = (hx,) if isinstance(hx, Tensor) else tuple(hx)
    tensors = (data, *states, *weights)
    if not all(_plain(t) for t in tensors):
        return None
    found = Call(name, data, batch_sizes, states, weights, biases, layers, dropout, train, bidirectional, batch_first)
    if len(states) != REPLACEMENTS[name].states or len(weights) != layers * found.directions * (4 if biases else 2):
        return None  # a projection has one weight more
    return found if _shapes_fit(found) and _types_fit(name, tensors) else None


def _plain(t: Tensor) -> bool:
    return type(t) in (Tensor, torch.nn.Parameter) and not t.is_nested and t.layout is torch.strided


def _types_fit(name: str, tensors: Sequence[Tensor]) -> bool:
    """Whether all are of one floating type on one device. Under autocast torch computes the gated layers partly in one
    type and partly in another, which ours do not.
    """
    one = tensors[0]
    if any(t.device != one.device or not t.is_floating_point() for t in tensors):
        return False
    if torch.is_autocast_enabled(one.device.type):
        return REPLACEMENTS[name].gates == 1
    return one.dtype in (torch.float32, torch.float64) and all(t.dtype == one.dtype for t in tensors)


def _shapes_fit(c: Call) -> bool:
    if c.data.dim() != (3 if c.batch_sizes is None else 2) or c.data.numel() == 0:
        return False
    if c.batch_sizes is None:
        batch = c.data.shape[0 if c.batch_first else 1]
    else:
        batch, sizes = c.batch_sizes[0], [*c.batch_sizes, 1]
        if sum(c.batch_sizes) != len(c.data) or any(n < later for n, later in pairwise(sizes)):
            return False
    hidden, parts, gates = c.group(0)[1].shape[-1], c.layers * c.directions, REPLACEMENTS[c.name].gates
    if hidden == 0 or any(s.shape != (parts, batch, hidden) for s in c.states):
        return False
    for i in range(parts):
        inputs = c.data.shape[-1] if i < c.directions else hidden * c.directions
        W_ih, W_hh, *b = c.group(i)
        if W_ih.shape != (gates * hidden, inputs) or W_hh.shape != (gates * hidden, hidden):
            return False
        if any(x.shape != (gates * hidden,) for x in b):
            return False
    return True


def compute(c: Call) -> tuple[Tensor, ...]:
    """Return outputs and final states like torch: (T, B, h) or packed (N, h), and (layers * directions, B, h)."""
    own = REPLACEMENTS[c.name]
    layout: Layout = Equal() if c.batch_sizes is None else Packed(c.batch_sizes, c.data.device)
    x = c.data.transpose(0, 1) if c.batch_first else c.data
    final: list[list[Tensor]] = [[] for _ in range(own.states)]
    for n in range(c.layers):
        outputs = []
        for reverse in range(c.directions):
            i = n * c.directions + reverse
            start = tuple(s[i] for s in c.states)
            H, last = own.layer(layout.spread(x, bool(reverse)), c.group(i), start, layout)
            outputs.append(layout.collect(H, bool(reverse)))
            for kept, state in zip(final, last, strict=True):
                kept.append(state)
        x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        if n < c.layers - 1 and c.dropout > 0 and c.train:
            x = F.dropout(x, c.dropout)
    return (x.transpose(0, 1) if c.batch_first else x, *(torch.stack(kept) for kept in final))


def _tell(c: Call) -> None:
    """Log, once for each kind of layer, that it is replaced."""
    if c.name not in _told:
        _told.add(c.name)
        logger.info(
            "torch.%s is computed by hfopt's recurrences inside a step, which have the derivatives that are needed; "
            "HessianFree(..., replace_recurrences=False) leaves it to torch",
            c.name,
        )
