"""Checks that the recurrent layers make of their arguments, and what they all do with lengths and autocast."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from hfopt import structural

Maybe = Tensor | None


def checked(*optional: str, **named: Tensor | None) -> dict[str, Tensor]:
    """The tensors that are there, in one floating-point dtype on one device; under autocast in its dtype.

    Those named in `optional` may be None.

    Raises:
        TypeError: an argument that is no floating-point tensor, or has another dtype or device than the first.
    """
    given: dict[str, Tensor] = {}
    for name, tensor in named.items():
        if tensor is None and name in optional:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}, not a tensor")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} has dtype {tensor.dtype}; give a floating-point tensor")
        given[name] = _autocast(tensor)
    first, leader = next(iter(given.items()))
    for name, tensor in given.items():
        if tensor.dtype != leader.dtype or tensor.device != leader.device:
            raise TypeError(
                f"{name} is {tensor.dtype} on {tensor.device}, but {first} is {leader.dtype} on {leader.device}; "
                "bring them together with .to()"
            )
    return given


def _autocast(tensor: Tensor) -> Tensor:
    device = tensor.device.type
    if tensor.dtype == torch.float32 and device != "meta" and torch.is_autocast_enabled(device):
        return tensor.to(torch.get_autocast_dtype(device))
    return tensor


def check_inputs(inputs: Tensor) -> None:
    """Refuse inputs that are not (T, B, V) with steps, sequences and columns."""
    if inputs.dim() != 3 or inputs.numel() == 0:
        raise ValueError(
            f"inputs has shape {tuple(inputs.shape)}; it is (T, B, V): steps, sequences and inputs, none of them 0"
        )


def check_shapes(named: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], because: str) -> None:
    """Refuse tensors with other shapes than these; `because` says where the sizes come from."""
    for name, shape in shapes.items():
        if name in named and tuple(named[name].shape) != shape:
            raise ValueError(f"{name} has shape {tuple(named[name].shape)}; with {because} it is {shape}")


def initial(name: str, state: Maybe, like: Tensor, hidden: int) -> Tensor:
    """The state before the first step, (B, h): the one given, one (h,) for all sequences, or zeros."""
    batch = like.shape[1]
    if state is None:
        return like.new_zeros(batch, hidden)
    if state.shape not in ((batch, hidden), (hidden,)):
        raise ValueError(f"{name} has shape {tuple(state.shape)}; here it is {batch, hidden} or ({hidden},)")
    return state.expand(batch, hidden)


class Ends(NamedTuple):
    """Which steps count: `mask` (T, B), False beyond a sequence's end, and the index `last` (B,) of its last step."""

    mask: Tensor
    last: Tensor

    def of(self, states: Tensor) -> Tensor:
        """The states (T, B, .) with zeros beyond the ends."""
        return torch.where(self.mask.unsqueeze(-1), states, 0)

    def final(self, states: Tensor) -> Tensor:
        """The states (B, .) of the last steps."""
        return states[self.last, torch.arange(states.shape[1], device=states.device)]


def ends(lengths: Tensor, steps: int, batch: int, device: torch.device) -> Ends:
    """What `lengths` (B,), integers from 1 to T, mean.

    Raises:
        TypeError: `lengths` is no tensor of integers.
        ValueError: another shape, or a length that is not from 1 to T.
    """
    if lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise TypeError("lengths is a tensor of integers, one per sequence")
    if lengths.shape != (batch,):
        raise ValueError(f"lengths has shape {tuple(lengths.shape)}; there are {batch} sequences")
    # A compiler cannot look at values. A tracer can, but not through operations that it records.
    if not torch.compiler.is_compiling() and lengths.device.type != "meta":
        values = lengths.tolist()
        if min(values) < 1 or max(values) > steps:
            raise ValueError(
                f"lengths runs from {min(values)} to {max(values)}; inputs has {steps} steps, so 1 to {steps}"
            )
    last = lengths.to(device) - 1
    return Ends(torch.arange(steps, device=device).unsqueeze(1) <= last, last)


def with_ones(inputs: Tensor) -> Tensor:
    """Inputs (T, B, V + 1) with a last column of ones, which a bias is the weight of."""
    return torch.cat((inputs, inputs.new_ones(*inputs.shape[:2], 1)), -1)


def ended(inputs: Tensor, lengths: Maybe) -> tuple[Tensor, Ends | None]:
    """The inputs with zeros beyond the ends, so that nothing there can spoil a sum, and the ends."""
    if lengths is None:
        return inputs, None
    reached = ends(lengths, inputs.shape[0], inputs.shape[1], inputs.device)
    return reached.of(inputs), reached


def looked_for() -> bool:
    """Whether an optimizer looks for hidden states; none does inside a compiled function."""
    return not torch.compiler.is_compiling() and structural.wanted()


def finished(H: Tensor, reached: Ends | None) -> tuple[Tensor, Tensor]:
    """What a layer gives: H (T, B, h), zero beyond the ends, and the states (B, h) of the last steps."""
    return (H, H[-1]) if reached is None else (reached.of(H), reached.final(H))


def gated(given: Mapping[str, Tensor], count: int) -> int:
    """Check the shapes of torch's weights for `count` gates, (count h, V), (count h, h) and biases; h."""
    inputs, W = given["inputs"], given["weight_hh"]
    check_inputs(inputs)
    if W.dim() != 2 or W.numel() == 0 or W.shape[0] != count * W.shape[1]:
        raise ValueError(f"weight_hh has shape {tuple(W.shape)}; it is ({count} h, h), {count} gates of h units")
    hidden, columns = W.shape[1], inputs.shape[2]
    rows = count * hidden
    wanted = {"weight_ih": (rows, columns), "bias_ih": (rows,), "bias_hh": (rows,)}
    check_shapes(given, wanted, f"{columns} inputs and the {hidden} hidden units of weight_hh")
    return hidden
