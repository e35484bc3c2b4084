"""The passes over the segments of a checkpointed sequence, on plain tensors: forward, tangent and adjoint.

Each works out again what happened inside a segment, from the states that were kept at its border. Structural damping
joins the adjoint pass: a segment's marked pre-activations get the cotangents ``mu D'' R_a``, with the tangents R_a
computed again too, from the tangents of the states at the borders.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hfopt import structural
from hfopt.draws.generators import TORCH, apart, attributed, drawing_from, others, torch_state
from hfopt.linalg import graph

Maybe = Tensor | None
Tensors = tuple[Tensor, ...]
Given = tuple[Any, ...]
Found = tuple[Sequence[Tensor], Sequence[Tensor]]
Part = Callable[[Given, Given, Given], Found]


def bounds(steps: int) -> list[tuple[int, int]]:
    """Ranges [a, b) of about sqrt(T) steps each."""
    length = math.isqrt(max(steps - 1, 0)) + 1
    return [(a, min(a + length, steps)) for a in range(0, steps, length)]


@dataclass(eq=False)
class Segments:
    """One sequence that was cut: how each segment is computed again, and the linear passes over them.

    ``values`` throughout are the sequences, states and parameters, in this order. Attributes: ``borders``, the states
    at the start of every segment; ``outputs``, how many outputs there are; ``marks``, whether hidden states are marked
    for structural damping; ``structural``, the multiple of S that the next adjoint pass adds, at the tangents of the
    last tangent pass.
    """

    function: Part
    counts: tuple[int, int, int]
    bounds: list[tuple[int, int]]
    context: Callable[[], Any]
    devices: list[torch.device]
    borders: list[Tensors] = field(default_factory=list)
    draws: list[list[Tensor]] | None = None
    outputs: int = 0
    marks: bool = False
    structural: float = 0.0
    bytes_of_one: int = 0  # what the graph of the largest segment keeps
    _last: tuple[tuple[Maybe, ...], list[tuple[Maybe, ...]], tuple[Maybe, ...], bool] | None = None

    @classmethod
    def of(cls, function: Part, sequences: Given, states: Tensors, parameters: Given) -> Segments:
        """Check the arguments and cut."""
        lengths = {s.shape[0] if s.dim() else 0 for s in sequences if s is not None}
        if len(lengths) != 1 or 0 in lengths:
            raise ValueError(
                f"sequences have lengths {sorted(lengths)}: give at least one (T, ...), T > 0, all of the same length"
            )
        for i, s in enumerate(states):
            if not s.is_floating_point():
                raise TypeError(f"states[{i}] has dtype {s.dtype}; only floating-point states can be carried over time")
        if not states:
            raise ValueError("states is empty: what has no state is no recurrence; call the function as it is")
        device = states[0].device.type
        enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

        def context() -> Any:
            return torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False)

        counts = len(sequences), len(states), len(parameters)
        devices = [states[0].device] if device == "cuda" else []
        return cls(function, counts, bounds(lengths.pop()), context, devices)

    # -- one segment -----------------------------------------------------------------------------------------------

    def _split(self, values: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
        n, m, _ = self.counts
        return tuple(values[:n]), tuple(values[n : n + m]), tuple(values[n + m :])

    def _arguments(self, i: int, values: Sequence[Maybe]) -> list[Maybe]:
        """Segment i's own sequences, its state, and the parameters."""
        (a, b), (sequences, _, parameters) = self.bounds[i], self._split(values)
        return [*(None if s is None else s[a:b] for s in sequences), *self.borders[i], *parameters]

    def _call(self, i: int, arguments: Sequence[Any], marks: bool = False) -> tuple[Tensors, list[Tensor]]:
        """Outputs and states of segment i, then its marked pre-activations; and the weights of these."""
        with ExitStack() as stack:
            stack.enter_context(self.context())
            if self.draws is not None:
                stack.enter_context(_random(self.draws[i], self.devices))
            marked = stack.enter_context(structural.collecting(marks))
            outputs, states = self.function(*self._split(arguments))
        a, b = self.bounds[i]
        for k, output in enumerate(outputs):
            if output.dim() == 0 or output.shape[0] != b - a:
                raise ValueError(
                    f"outputs[{k}] of the function has shape {tuple(output.shape)} for {b - a} steps; outputs have one "
                    "row per step. Return what concerns the last step alone as a state"
                )
        if len(states) != self.counts[1]:
            raise ValueError(f"the function returned {len(states)} states, but was given {self.counts[1]}")
        self.outputs = len(outputs)
        return (*outputs, *states, *(m.preactivations for m in marked)), [m.weight for m in marked]

    def _push(
        self, i: int, tangents: Sequence[Maybe], values: Sequence[Maybe], batched: bool, marks: bool = False
    ) -> Tensors:
        """Tangents of segment i's outputs and states (and pre-activations) at those of its arguments; None is zero."""
        arguments = self._arguments(i, values)
        live = [j for j, d in enumerate(tangents) if d is not None]

        def at(*given: Tensor) -> Tensors:
            full = list(arguments)
            for j, x in zip(live, given, strict=True):
                full[j] = x
            return self._call(i, full, marks)[0]

        def push(*given: Tensor) -> Tensors:
            primals = tuple(_spread(x.detach()) for j in live if (x := arguments[j]) is not None)
            pushed: Tensors = torch.func.jvp(at, primals, given)[1]
            return pushed

        moved = tuple(d for d in tangents if d is not None)
        return torch.vmap(push, randomness="same")(*moved) if batched else push(*moved)

    # -- passes over all segments ----------------------------------------------------------------------------------

    def forward(self, values: Sequence[Maybe], keep: bool = True) -> Tensors:
        """Outputs and last states; ``keep``: the borders, and where in the random sequence each segment began."""
        states = self._split(values)[1]
        whole: list[Tensor] = []
        draws = []
        with attributed() as mine:
            for i in range(len(self.bounds)):
                draws.append(_random_state(self.devices))
                self.borders.append(states)
                found, weights = self._call(i, self._arguments(i, values), marks=self.marks and i == 0)
                if i == 0:
                    self.marks = bool(weights)
                end = self.outputs + self.counts[1]
                self._gather(whole, found[: self.outputs], i, 0)
                states = tuple(_own(s) for s in found[self.outputs : end])
                if not keep:
                    self.borders[i] = ()
            after = _random_state(self.devices)
        # The generators are rewound later only where the function itself has drawn, and not another thread.
        drew = mine(TORCH) and any(not torch.equal(x, y) for x, y in zip(draws[0], after, strict=True))
        self.draws = draws if keep and drew else None
        given = {id(v) for v in values}
        return (*whole, *(s.clone() if id(s) in given else s for s in states))

    def tangent(self, tangents: Sequence[Maybe], values: Sequence[Maybe], batched: bool = False) -> Tensors:
        """Tangents of outputs and last states; ``batched``: k at once, along a first dimension of each."""
        sequences, states, parameters = self._split(tangents)
        whole: list[Tensor] = []
        kept: list[tuple[Maybe, ...]] = []
        dim = int(batched)
        for i, (a, b) in enumerate(self.bounds):
            if self.marks:
                kept.append(states)
            own = [None if d is None else d.narrow(dim, a, b - a) for d in sequences]
            pushed = self._push(i, [*own, *states, *parameters], values, batched)
            self._gather(whole, pushed[: self.outputs], i, dim)
            states = tuple(_own(d) for d in pushed[self.outputs :])
        self._last = (sequences, kept, parameters, batched) if self.marks else None
        return (*whole, *states)

    def adjoint(
        self, needed: Sequence[bool], cotangents: Sequence[Maybe], values: Sequence[Maybe], batched: bool = False
    ) -> Tensors:
        """Cotangents of those ``values`` that are ``needed``; with S times ``structural`` of the last tangents."""
        n, m, _ = self.counts
        dim = int(batched)
        some = next(c for c in cotangents if c is not None)
        lead = some.shape[:dim]
        pulled = [
            x.new_zeros(*lead, *x.shape) if yes and x is not None and not n <= j < n + m else None
            for j, (x, yes) in enumerate(zip(values, needed, strict=True))
        ]
        states = list(cotangents[self.outputs :])
        for i in reversed(range(len(self.bounds))):
            a, b = self.bounds[i]
            arguments = [None if x is None else x.detach() for x in self._arguments(i, values)]
            own = [None if c is None else c.narrow(dim, a, b - a) for c in cotangents[: self.outputs]]
            at = [j for j in range(len(values)) if needed[j] or n <= j < n + m]
            leaves = [x.requires_grad_() for j in at if (x := arguments[j]) is not None]
            with torch.enable_grad():
                found, weights = self._call(i, arguments, marks=self.structural != 0)
            hidden = self._hidden(i, weights, values, batched)
            pairs = zip(found, [*own, *states, *hidden], strict=True)
            heads = [(z, c) for z, c in pairs if c is not None and z.requires_grad]
            if self.bytes_of_one == 0:
                self._look(found, arguments, leaves)
            grads = graph.gradients([z for z, _ in heads], leaves, [c for _, c in heads], batched)
            states = []
            for j, g in zip(at, grads, strict=True):
                if n <= j < n + m:
                    states.append(g)
                elif g is not None and (whole := pulled[j]) is not None:
                    (whole.narrow(dim, a, b - a) if j < n else whole).add_(g)
        self._last = None
        for j, (state, c) in enumerate(zip(self.borders[0], states, strict=True), start=n):
            pulled[j] = state.new_zeros(*lead, *state.shape) if c is None else c
        return tuple(x for x, yes in zip(pulled, needed, strict=True) if yes and x is not None)

    def _hidden(self, i: int, weights: list[Tensor], values: Sequence[Maybe], batched: bool) -> list[Maybe]:
        """Cotangents of segment i's pre-activations: ``structural D'' R_a``."""
        if not weights:
            return []
        if self._last is None or self._last[3] != batched:
            raise RuntimeError("structural damping of a checkpointed recurrence needs the tangent pass before")
        sequences, states, parameters, _ = self._last
        a, b = self.bounds[i]
        own = [None if d is None else d.narrow(int(batched), a, b - a) for d in sequences]
        pushed = self._push(i, [*own, *states[i], *parameters], values, batched, marks=True)
        moved = pushed[self.outputs + self.counts[1] :]
        return [self.structural * w * r for w, r in zip(weights, moved, strict=True)]

    def _look(self, found: Tensors, arguments: Sequence[Maybe], leaves: Sequence[Tensor]) -> None:
        """Once: what a segment's graph keeps, and whether it leads to anything that is no argument."""
        self.bytes_of_one = max(1, graph.saved_bytes(found, [x for x in arguments if x is not None]))
        foreign = graph.reached_leaves(found) - {id(x) for x in leaves}
        if foreign:
            raise RuntimeError(
                "the function of a recurrence over time uses a tensor that requires a gradient and is none of its "
                "arguments, so that its derivative would be lost: give it among parameters"
            )

    def _gather(self, whole: list[Tensor], parts: Sequence[Tensor], i: int, dim: int) -> None:
        """Put the outputs of segment i where they belong."""
        a, b = self.bounds[i]
        steps = self.bounds[-1][1]
        if i == 0:
            whole.extend(p.new_empty(*p.shape[:dim], steps, *p.shape[dim + 1 :]) for p in parts)
        for w, p in zip(whole, parts, strict=True):
            w.narrow(dim, a, b - a).copy_(p)


def _own(x: Tensor) -> Tensor:
    """``x``, detached, in memory of its own: the last step of a segment must not keep the others."""
    x = x.detach()
    return x.clone() if x.untyped_storage().nbytes() > x.numel() * x.element_size() else x


def _spread(x: Tensor) -> Tensor:
    """``x``, copied if it is expanded: torch makes no dual number of it then."""
    expanded = any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True))
    return x.contiguous() if expanded else x


def _random_state(devices: list[torch.device]) -> list[Tensor]:
    return [torch_state(), *(torch.cuda.get_rng_state(d) for d in devices)]


@contextmanager
def _random(state: list[Tensor], devices: list[torch.device]) -> Iterator[None]:
    """Draw as from ``state``, and leave the generators as they were."""
    if others() or apart():
        with drawing_from(state[0]), torch.random.fork_rng(devices) if devices else ExitStack():
            for device, s in zip(devices, state[1:], strict=True):
                torch.cuda.set_rng_state(s, device)
            yield
        return
    with torch.random.fork_rng(devices):
        torch.set_rng_state(state[0])
        for device, s in zip(devices, state[1:], strict=True):
            torch.cuda.set_rng_state(s, device)
        yield
