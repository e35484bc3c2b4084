"""Nested state survives HDF5 to the bit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hfopt.experiment.store.tree import read_tree, write_tree


def around(tmp_path: Path, tree: Any) -> Any:
    with h5py.File(tmp_path / "tree.h5", "w") as file:
        write_tree(file.create_group("tree"), tree)
    with h5py.File(tmp_path / "tree.h5", "r") as file:
        return read_tree(file["tree"])


def same(a: Any, b: Any) -> bool:
    """Equal in type, order and every bit; nan equals nan."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float):
        return a.hex() == b.hex() if not math.isnan(a) else math.isnan(b)
    return bool(a == b)


def test_every_kind_of_value(tmp_path: Path) -> None:
    tree = {
        "numbers": [1, -(2**63), 3],
        "floats": (0.1, math.nan, math.inf, -math.inf, -0.0, 5e-324),
        "mixed": [1, 2.0, True, None, "x", "", [], (), {}],
        "large": 2**64 - 1,
        "booleans": [True, False],
        "none": None,
        "text": "λ, μ\nand ρ",
        "long text": "x" * 100_000,
        "a/b": {".": 1, "": 2, "%2F": 3, "hfopt:kind": 4, "%": 5},
        "tensors": [torch.tensor([math.nan, -0.0, 1e-45]), torch.zeros(0, 3), torch.tensor(7), torch.tensor(True)],
        "array": np.arange(6, dtype=np.int16).reshape(2, 3),
        "zebra": 1,
        "apple": 2,
    }
    assert same(around(tmp_path, tree), tree)


@pytest.mark.parametrize(
    "dtype",
    ["float16", "bfloat16", "float32", "float64", "int8", "uint8", "int64", "bool", "complex64", "float8_e4m3fn"],
)
def test_every_dtype_keeps_its_bits(tmp_path: Path, dtype: str) -> None:
    bits = torch.randint(0, 256, (64,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    if dtype == "bool":
        bits = bits % 2
    tensor = bits.view(getattr(torch, dtype)).reshape(2, -1)
    back = around(tmp_path, {"t": tensor})["t"]
    assert back.dtype == tensor.dtype
    assert torch.equal(back.contiguous().view(torch.uint8), tensor.view(torch.uint8))


def test_views_and_parameters_become_plain_tensors(tmp_path: Path) -> None:
    square = torch.arange(6.0).reshape(2, 3)
    tree = {"view": square.t(), "parameter": torch.nn.Parameter(square)}
    back = around(tmp_path, tree)
    assert torch.equal(back["view"], square.t())
    assert type(back["parameter"]) is torch.Tensor
    assert torch.equal(back["parameter"], square)


@pytest.mark.parametrize("name", ["Adam", "LBFGS", "SGD", "RMSprop"])
def test_optimizers_states(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    options = {"momentum": 0.9} if name == "SGD" else {}
    optimizer = getattr(torch.optim, name)(model.parameters(), **options)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(4, 3)).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    state = optimizer.state_dict()
    back = around(tmp_path, state)
    assert same(back, state)
    optimizer.load_state_dict(back)


def test_long_lists_of_names(tmp_path: Path) -> None:
    tree = {f"a long name of a parameter, number {i}": i for i in range(3000)}
    assert around(tmp_path, tree) == tree


@pytest.mark.parametrize("value", [object(), torch.eye(2).to_sparse(), 2**64, {1, 2}, np.array([object()])])
def test_what_has_no_place_is_named(tmp_path: Path, value: Any) -> None:
    with pytest.raises(TypeError, match="/tree/outer/inner"):
        around(tmp_path, {"outer": {"inner": value}})


def test_mixed_keys_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keys"):
        around(tmp_path, {1: 2, "a": 3})


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text("aλ/.%: é", max_size=8)
)
trees = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(st.text("aλ/.%: é", max_size=5), inner, max_size=4),
        st.dictionaries(st.integers(-5, 5), inner, max_size=4),
    ),
    max_leaves=12,
)


@given(tree=st.dictionaries(st.text("ab/.", max_size=3), trees, max_size=4))
def test_any_tree(tmp_path_factory: pytest.TempPathFactory, tree: Any) -> None:
    assert same(around(tmp_path_factory.getbasetemp(), tree), tree)
