"""Tensors as arrays of the same bits, and back. Only what reads or writes them imports this, and with it torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

_INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16}


def is_tensor(value: Any, name: str = "") -> bool:
    """Whether a value is a tensor; TypeError for one that is not dense, under this name."""
    if isinstance(value, torch.Tensor) and value.layout != torch.strided and name:
        raise TypeError(f"{name}: a tensor of layout {value.layout} cannot be saved; make it dense")
    return isinstance(value, torch.Tensor)


def type_of(tensor: torch.Tensor) -> str:
    """The name of a tensor's type, such as "float32"."""
    return str(tensor.dtype).removeprefix("torch.")


def as_array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The numbers as they lie in memory; of types that numpy lacks, the bits."""
    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    try:
        array: np.ndarray[Any, Any] = flat.numpy()
    except TypeError:
        array = flat.view(_INTEGER_OF_SIZE[flat.element_size()]).numpy()
    return array


def as_tensor(array: Any, dtype: str) -> torch.Tensor:
    """The tensor that was written as `array`; TypeError for a type that is none of torch's."""
    wanted = getattr(torch, dtype, None)
    if not isinstance(wanted, torch.dtype):
        raise TypeError(f"torch has no type {dtype!r}")
    # A clone, because torch aligns its own memory and numpy's is aligned less strictly.
    tensor = torch.from_numpy(np.asarray(array)).clone()
    if tensor.dtype == wanted:
        return tensor
    if tensor.dtype != _INTEGER_OF_SIZE.get(wanted.itemsize):
        raise TypeError(f"a tensor of {dtype} is stored as {tensor.dtype}")
    return tensor.view(wanted)
