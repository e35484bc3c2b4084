"""Nested Python state to HDF5 groups and back, to the bit and without pickle: the form of format 1.

A state is a tree of dicts (string or integer keys), lists, tuples, tensors, numpy arrays, strings, numbers,
booleans and None: what `state_dict()` of modules and optimizers returns. In the file

* a dict, list or tuple is a group (items of a list are named 0, 1, ...),
* a list or tuple of integers alone or of floats alone is a dataset, and so is
* a tensor or array, with its torch dtype as an attribute (bfloat16 and the 8-bit floats are kept as
  integers of the same bits),
* everything else is an attribute of the group that holds it.

Attributes that begin with `hfopt:` say what a group was and in which order its items stood.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import h5py
import numpy as np

from hfopt.experiment.store import sealed

if TYPE_CHECKING:
    import torch

_KIND = "hfopt:kind"
_ORDER = "hfopt:order"
_DTYPE = "hfopt:dtype"
_EMPTY_NAME = "%00"
# HDF5 keeps attributes of up to 64 kB beside the object; longer strings and longer lists of names go
# elsewhere.
_LONGEST_ATTRIBUTE = 60_000


def write_tree(group: Any, tree: Mapping[Any, Any] | list[Any] | tuple[Any, ...]) -> None:
    """Write the nested state `tree` into the empty HDF5 group `group`.

    Raises TypeError for a value that has no place in HDF5, naming where in the tree it stands, and
    ValueError for keys that are neither all strings nor all integers.
    """
    if isinstance(tree, Mapping):
        keys = list(tree)
        integers = bool(keys) and all(type(key) is int for key in keys)
        if not integers and not all(isinstance(key, str) for key in keys):
            raise ValueError(f"{group.name}: keys must be all strings or all integers, got {keys[:5]}")
        group.attrs[_KIND] = "dict of int" if integers else "dict"
        names = [link_name(str(key)) for key in keys]
        order = json.dumps(names)
        if len(order) < _LONGEST_ATTRIBUTE:
            group.attrs[_ORDER] = order
        values = list(tree.values())
    else:
        group.attrs[_KIND] = "tuple" if isinstance(tree, tuple) else "list"
        names = [str(i) for i in range(len(tree))]
        values = list(tree)
    for name, value in zip(names, values, strict=True):
        _write_item(group, name, value)


def read_tree(group: Any) -> Any:
    """The nested state that `write_tree` wrote into `group`; tensors come back on the CPU."""
    kind = group.attrs.get(_KIND, "dict")
    order = group.attrs.get(_ORDER)
    found = set(group) | {name for name in group.attrs if not name.startswith("hfopt:")}
    if kind in ("list", "tuple"):
        items = [_read_item(group, name) for name in sorted(found, key=int)]
        return tuple(items) if kind == "tuple" else items
    names = json.loads(order) if order is not None else sorted(found)
    if kind == "dict of int":
        return {int(name): _read_item(group, name) for name in names}
    return {_unlink(name): _read_item(group, name) for name in names}


def _write_item(group: Any, name: str, value: Any) -> None:
    if isinstance(value, np.generic):
        value = value.item()
    if _is_tensor(value, f"{group.name}/{name}"):
        _write_tensor(group, name, value)
    elif isinstance(value, np.ndarray):
        if value.dtype.hasobject:
            raise TypeError(f"{group.name}/{name}: an array of Python objects cannot be saved")
        group.create_dataset(name, data=value)
    elif isinstance(value, (list, tuple)) and (numbers := _numbers(value)) is not None:
        group.create_dataset(name, data=numbers).attrs[_KIND] = "tuple" if isinstance(value, tuple) else "list"
    elif isinstance(value, (Mapping, list, tuple)):
        write_tree(group.create_group(name), value)
    elif value is None:
        group.attrs[name] = h5py.Empty("f4")
    elif isinstance(value, (bool, float)):
        group.attrs[name] = value
    elif isinstance(value, int):
        if not -(2**63) <= value < 2**64:
            raise TypeError(f"{group.name}/{name}: the integer {value} does not fit 64 bits")
        group.attrs[name] = np.int64(value) if value < 2**63 else np.uint64(value)
    elif isinstance(value, str):
        if len(value.encode()) < _LONGEST_ATTRIBUTE:
            group.attrs[name] = str(value)  # h5py knows no subclasses of str
        else:
            group.create_dataset(name, data=str(value))
    else:
        raise TypeError(
            f"{group.name}/{name}: a {type(value).__name__} cannot be saved; "
            "state may hold dicts, lists, tensors, arrays, strings, numbers, booleans and None"
        )


def _numbers(values: list[Any] | tuple[Any, ...]) -> np.ndarray[Any, Any] | None:
    """`values` as an array if they are integers of 64 bits alone, or floats alone."""
    if values and all(type(value) is float for value in values):
        return np.array(values, dtype=np.float64)
    if values and all(type(value) is int and -(2**63) <= value < 2**63 for value in values):
        return np.array(values, dtype=np.int64)
    return None


def _is_tensor(value: Any, name: str) -> bool:
    from hfopt.experiment.store.tensors import is_tensor

    return is_tensor(value, name)


def _write_tensor(group: Any, name: str, value: torch.Tensor) -> None:
    from hfopt.experiment.store import tensors

    dataset = group.create_dataset(name, data=tensors.as_array(value))
    dataset.attrs[_DTYPE] = tensors.type_of(value)


def _read_item(group: Any, name: str) -> Any:
    if name in group.attrs:
        value = group.attrs[name]
        if isinstance(value, h5py.Empty):
            return None
        return value if isinstance(value, str) else value.item()
    item = sealed.item(group, name)
    if isinstance(item, h5py.Group):
        return read_tree(item)
    if h5py.check_string_dtype(item.dtype):
        if item.shape != ():
            raise ValueError(f"{item.name} has shape {item.shape}")
        return item.asstr()[()]
    array = sealed.array(item, "biufcV")
    if (kind := item.attrs.get(_KIND)) is not None:
        return tuple(array.tolist()) if kind == "tuple" else array.tolist()
    dtype = item.attrs.get(_DTYPE)
    if dtype is None:
        return array
    from hfopt.experiment.store.tensors import as_tensor

    return as_tensor(array, str(dtype))


def link_name(key: str) -> str:
    """`key` as the name of an HDF5 link: `/` separates groups there, and `.` alone is the group itself."""
    name = key.replace("%", "%25").replace("/", "%2F")
    if name.startswith("hfopt:"):
        name = "%68" + name[1:]
    return {"": _EMPTY_NAME, ".": "%2E"}.get(name, name)


def _unlink(name: str) -> str:
    return "" if name == _EMPTY_NAME else unquote(name)
