"""Any recurrent cell that can be written as a Python function of one step, as a module over whole sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hfopt import structural
from hfopt.recurrences.arguments import ends, looked_for

State = Tensor | tuple[Tensor, ...]


class Unrolled(nn.Module):
    """A user's cell over a whole sequence: ``(o_t, s_t) = step(x_t, s_{t-1}, *weights)`` for t = 0..T-1.

    The general path: torch's autograd over the steps, so that whatever torch can differentiate works, at the price of
    a node of the graph for every operation of every step. An optimizer with structural damping finds the part of the
    state that `damped` names.

    Args:
        step: a function or module, `step(x_t, state, *weights) -> (output, state)`: x_t (B, ...), the output a tensor
            (B, ...), the state a tensor (B, ...) or a tuple of such. A module's parameters become this one's.
        start: the state before the first step, one for all sequences: a tensor, or a tuple of tensors, without
            the dimension of the sequences.
        weights: tensors that every step is given; they become parameters.
        learned: whether `start` is learned, hence a parameter, or fixed, a buffer.
        batch_first: whether inputs and outputs are (B, T, ...) instead of (T, B, ...).
        damped: the part of the state whose change structural damping limits: an index into the tuple (0 for a single
            tensor), or a function of the state; None for no part.
        curvature: D'', the second derivative of the distance in that part, as a function of it (tensors of one shape);
            None for 1, half the squared distance.

    Raises:
        TypeError: `step` cannot be called, `start` or a weight is no tensor.
        ValueError: `damped` is an index that the state has not.
    """

    def __init__(
        self,
        step: Callable[..., Any],
        start: State,
        weights: Sequence[Tensor] = (),
        *,
        learned: bool = True,
        batch_first: bool = False,
        damped: int | Callable[[Any], Tensor] | None = None,
        curvature: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        if not callable(step):
            raise TypeError(f"step is a {type(step).__name__}; it is a function step(x_t, state, *weights)")
        self.single = isinstance(start, Tensor)
        parts: Any = (start,) if isinstance(start, Tensor) else start
        if not isinstance(parts, tuple) or not parts or not all(isinstance(s, Tensor) for s in parts):
            raise TypeError("start is a tensor, or a tuple of tensors")
        for k, weight in enumerate(weights):
            if not isinstance(weight, Tensor):
                raise TypeError(f"weights[{k}] is a {type(weight).__name__}, not a tensor")
        if isinstance(damped, int) and not 0 <= damped < len(parts):
            raise ValueError(f"damped is {damped}; the state has {len(parts)} part(s), counted from 0")
        self.step, self.batch_first, self.damped, self.curvature = step, batch_first, damped, curvature
        self.weights = nn.ParameterList(weights)
        self.parts = len(parts)
        for k, part in enumerate(parts):
            if learned:
                self.register_parameter(f"start_{k}", nn.Parameter(part.detach().clone()))
            else:
                self.register_buffer(f"start_{k}", part.detach().clone())

    def forward(
        self, inputs: Tensor, state: State | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Outputs (T, B, ...), zero beyond a sequence's end, and the state (B, ...) after its last step.

        Args:
            inputs: x (T, B, ...), or (B, T, ...) if `batch_first`.
            state: to start from instead of `start`, of the same structure; each tensor with the dimension of the
                sequences in front, or without it.
            lengths: (B,) integers from 1 to T: how many steps of each sequence count.

        Raises:
            ValueError: a wrong shape or length, or a step that returns other shapes than it should.
            TypeError: arguments, or what a step returns, of a wrong type, dtype or device.
        """
        if inputs.dim() < 2 or inputs.numel() == 0:
            axes = "(B, T, ...)" if self.batch_first else "(T, B, ...)"
            raise ValueError(f"inputs has shape {tuple(inputs.shape)}; it is {axes}, and no size is 0")
        if self.batch_first:
            inputs = inputs.transpose(0, 1)
        steps, batch = inputs.shape[:2]
        now = self._start(state, batch)
        reached = None if lengths is None else ends(lengths, steps, batch, inputs.device)
        masks = None if reached is None else reached.mask.unbind()
        marking = self.damped is not None and looked_for()
        outputs: list[Tensor] = []
        marked: list[Tensor] = []
        for t, x in enumerate(inputs.unbind()):
            valid = None if masks is None else masks[t]
            # Whatever stands beyond an end must not reach the weights' gradients, not even times zero.
            x = x if valid is None else _where(valid, x, torch.zeros_like(x))
            output, following = self._checked(self.step(x, self._structured(now), *self.weights), now, outputs, t)
            if valid is not None:
                output = _where(valid, output, torch.zeros_like(output))
                following = tuple(_where(valid, new, old) for new, old in zip(following, now, strict=True))
            now = following
            outputs.append(output)
            if marking:
                marked.append(self._part(now))
        if marking:
            self._mark(torch.stack(marked), None if reached is None else reached.mask)
        stacked = torch.stack(outputs, 1 if self.batch_first else 0)
        return stacked, self._structured(now)

    def _start(self, state: State | None, batch: int) -> tuple[Tensor, ...]:
        """The state before the first step, each tensor (B, ...)."""
        given = own = tuple(getattr(self, f"start_{k}") for k in range(self.parts))
        if state is not None:
            given = (state,) if isinstance(state, Tensor) else tuple(state)
            if isinstance(state, Tensor) is not self.single or len(given) != self.parts:
                raise TypeError(f"state is not {self._structure()}, as start is")
        expanded = []
        for k, (part, mine) in enumerate(zip(given, own, strict=True)):
            shape = (batch, *mine.shape)
            if tuple(part.shape) not in (shape, tuple(mine.shape)):
                name = "state" if self.single else f"state[{k}]"
                raise ValueError(f"{name} has shape {tuple(part.shape)}; here it is {shape} or {tuple(mine.shape)}")
            expanded.append(part.expand(shape))
        return tuple(expanded)

    def _structure(self) -> str:
        return "a tensor" if self.single else f"a tuple of {self.parts} tensors"

    def _structured(self, state: tuple[Tensor, ...]) -> State:
        return state[0] if self.single else state

    def _checked(
        self, returned: Any, before: tuple[Tensor, ...], outputs: list[Tensor], t: int
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The output and the state that step t returned, if they are what they should be."""
        if not isinstance(returned, tuple) or len(returned) != 2:
            raise TypeError(f"step returned a {type(returned).__name__} at t = {t}; it returns (output, state)")
        output, state = returned
        batch = before[0].shape[0]
        if not isinstance(output, Tensor):
            raise TypeError(f"step returned a {type(output).__name__} as output at t = {t}, not a tensor")
        if output.dim() == 0 or output.shape[0] != batch:
            raise ValueError(
                f"step returned an output of shape {tuple(output.shape)} at t = {t}; its first dimension is that of "
                f"the {batch} sequences"
            )
        if outputs and output.shape != outputs[0].shape:
            raise ValueError(
                f"step returned an output of shape {tuple(output.shape)} at t = {t}, but {tuple(outputs[0].shape)} "
                "at t = 0; all steps' outputs have one shape"
            )
        parts = (state,) if self.single else tuple(state) if isinstance(state, (tuple, list)) else ()
        if len(parts) != self.parts or not all(isinstance(s, Tensor) for s in parts):
            raise TypeError(f"step returned a state at t = {t} that is not {self._structure()}, as start is")
        mixed = torch.is_autocast_enabled(output.device.type) if output.device.type != "meta" else False
        for k, (new, old) in enumerate(zip(parts, before, strict=True)):
            name = "a state" if self.single else f"a state[{k}]"
            if new.shape != old.shape:
                raise ValueError(
                    f"step returned {name} of shape {tuple(new.shape)} at t = {t}; it was given {tuple(old.shape)}"
                )
            if new.device != old.device or (new.dtype != old.dtype and not mixed):
                raise TypeError(
                    f"step returned {name} of {new.dtype} on {new.device} at t = {t}; it was given {old.dtype} on "
                    f"{old.device}"
                )
        return output, parts

    def _part(self, state: tuple[Tensor, ...]) -> Tensor:
        """The part of the state that is damped, (B, n)."""
        assert self.damped is not None
        part: Any = state[self.damped] if isinstance(self.damped, int) else self.damped(self._structured(state))
        if not isinstance(part, Tensor) or part.dim() == 0 or part.shape[0] != state[0].shape[0]:
            raise TypeError("damped gives no tensor with the sequences as first dimension")
        return part.reshape(len(part), -1)

    def _mark(self, part: Tensor, mask: Tensor | None) -> None:
        curvature = part.new_ones(()).expand(part.shape) if self.curvature is None else self.curvature(part.detach())
        structural.mark(part, curvature, batch_dim=1, mask=mask)

    def extra_repr(self) -> str:
        """The step and the options, for `print`."""
        name = getattr(self.step, "__name__", type(self.step).__name__)
        return f"step={name}, batch_first={self.batch_first}, damped={self.damped}"


def _where(valid: Tensor, x: Tensor, otherwise: Tensor) -> Tensor:
    """Take x (B, ...) for the sequences that are valid (B,), and otherwise the other."""
    return torch.where(valid.view(-1, *(1,) * (x.dim() - 1)), x, otherwise)
