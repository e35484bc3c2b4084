"""What recorders see of sequence models: some fixed sequences, hidden states, and the states as nodes of a graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from hfopt.experiment.carried import outputs_of
from hfopt.experiment.hooks import Experiment
from hfopt.experiment.store.recorded import Array

States = Callable[[nn.Module, Any], Tensor]


def first_sequences(batch: Any, count: int, dim: int) -> Any:
    """The first `count` sequences of a batch whose inputs have them along `dim`.

    Batches that are dataclasses or named tuples of tensors are narrowed; others are returned as they are.
    """
    inputs = batch.inputs
    there = inputs.shape[dim]

    def narrowed(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        along = dim if value.dim() > dim and value.shape[dim] == there else 0 if value.shape == (there,) else None
        return value if along is None else value.narrow(along, 0, min(count, there))

    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        fields = [field.name for field in dataclasses.fields(batch) if field.init]
        return dataclasses.replace(batch, **{name: narrowed(getattr(batch, name)) for name in fields})
    if hasattr(batch, "_replace") and hasattr(batch, "_fields"):
        return batch._replace(**{name: narrowed(getattr(batch, name)) for name in batch._fields})
    return batch


def batch_dim(model: nn.Module) -> int:
    """The dimension of the sequences in inputs and outputs: 0 for models with `batch_first`, otherwise 1."""
    if isinstance(getattr(model, "batch_first", None), bool):
        return 0 if model.batch_first else 1
    layer = recurrent_layer(model)
    return 0 if layer is not None and layer.batch_first else 1


def recurrent_layer(model: nn.Module) -> nn.RNNBase | None:
    """The last of the model's recurrent layers of torch, which is next to its outputs; None if it has none."""
    found = [module for module in model.modules() if isinstance(module, nn.RNNBase)]
    return found[-1] if found else None


def has_states(model: nn.Module) -> bool:
    """Whether hidden states can be found without being told how."""
    return callable(getattr(model, "hidden_states", None)) or recurrent_layer(model) is not None


def states_and_outputs(hf: Experiment, batch: Any, states: States | None) -> tuple[Tensor, Tensor]:
    """Hidden states (T, B, h) and the model's outputs on a batch, outside autograd."""
    model = hf.tested
    caught: list[Any] = []
    layer = recurrent_layer(model)
    own = callable(getattr(model, "hidden_states", None))
    with torch.no_grad():
        if states is None and not own and layer is not None:
            handle = layer.register_forward_hook(lambda _module, _given, found: caught.append(found[0]))
            try:
                outputs = outputs_of(hf.forward(model, batch))
            finally:
                handle.remove()
            if not caught:
                raise ValueError("the model's recurrent layer takes no part in its outputs; give states=")
            hidden = caught[-1]
            if isinstance(hidden, PackedSequence):
                return pad_packed_sequence(hidden)[0], outputs
            return hidden.transpose(0, 1) if layer.batch_first else hidden, outputs
        outputs = outputs_of(hf.forward(model, batch))
        if states is not None:
            return states(model, batch), outputs
        found: Tensor = model.hidden_states(batch.inputs)  # type: ignore[operator]
        return (found.transpose(0, 1) if batch_dim(model) == 0 else found), outputs


def predictions(hf: Experiment, outputs: Tensor) -> Tensor:
    """What outputs stand for: the problem's `predictions`, after the output nonlinearity, or the outputs themselves."""
    after = getattr(hf.problem, "predictions", None)
    found: Tensor = outputs if after is None else after(outputs)
    return found


def can_unroll(model: nn.Module) -> bool:
    """Whether the states of a model can be had as nodes of a graph, one step after the other."""
    layer = recurrent_layer(model)
    plain = layer is not None and not layer.bidirectional and not layer.proj_size
    return callable(getattr(model, "unrolled", None)) or plain


def unrolled(hf: Experiment, batch: Any) -> tuple[Tensor, list[Tensor]]:
    """The outputs of a model that takes one step after the other, and its states (B, n) after each, in the graph.

    All that outputs and later steps have of a step goes through its node.
    """
    if callable(getattr(hf.model, "unrolled", None)):
        found: tuple[Tensor, list[Tensor]] = hf.model.unrolled(batch.inputs)  # type: ignore[operator]
        return found
    layer = recurrent_layer(hf.model)
    assert layer is not None
    with _stepwise(layer) as nodes, torch.backends.cudnn.flags(enabled=False):  # whose backward is for training alone
        return outputs_of(hf.forward(hf.model, batch)), nodes


@contextmanager
def _stepwise(layer: nn.RNNBase) -> Iterator[list[Tensor]]:
    """Let a layer of torch take one step after the other; its states after each become nodes in the list."""
    nodes: list[Tensor] = []
    whole = layer.forward

    def forward(inputs: Any, given: Any = None) -> tuple[Tensor, Any]:
        if isinstance(inputs, PackedSequence):
            raise ValueError("gradients by lag of packed sequences cannot be had; feed padded ones, or leave them out")
        steps = inputs.transpose(0, 1) if layer.batch_first else inputs
        state, outputs = given, []
        for x in steps.split(1):
            _, state = whole(x.transpose(0, 1) if layer.batch_first else x, state)
            parts = state if isinstance(state, tuple) else (state,)
            node = torch.stack(parts)  # (parts, layers, B, h)
            nodes.append(node)
            parts = tuple(part.contiguous() for part in node.unbind())
            state = parts if isinstance(state, tuple) else parts[0]
            outputs.append(parts[0][-1])
        return torch.stack(outputs, 0 if not layer.batch_first else 1), state

    layer.forward = forward
    try:
        yield nodes
    finally:
        del layer.forward


def as_array(value: Tensor, dim: int) -> Array:
    """A tensor as an array whose sequences, along `dim`, are the last axis; real numbers in single precision."""
    array: Array = value.detach().movedim(dim if value.dim() > 1 else 0, -1).cpu().numpy()
    return np.ascontiguousarray(array.astype(np.float32) if array.dtype.kind == "f" else array)
