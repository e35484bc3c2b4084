"""Copies of an optimizer, by copy.deepcopy and by pickle, go on by themselves."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

import hfopt
from tests.contracts.training import OPTIONS, model_of, train
from tests.hfopt.tools import theta


@pytest.mark.parametrize("options", OPTIONS[:3], ids=lambda o: "-".join(o) or "default")
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_go_on_by_themselves(way: str, options: dict[str, Any]) -> None:
    model = model_of(10)
    optimizer = hfopt.HessianFree(model.parameters(), **copy.deepcopy(options))
    train(model, optimizer, 3)
    pair = (model, optimizer)
    twin, copied = copy.deepcopy(pair) if way == "deepcopy" else pickle.loads(pickle.dumps(pair))  # noqa: S301
    assert len(copied.stats) == 3
    assert copied.param_groups[0]["params"][0] is next(twin.parameters())
    state, still = torch.get_rng_state(), theta(model)
    record = train(twin, copied, 5)
    assert torch.equal(theta(model), still)
    torch.set_rng_state(state)
    assert train(model, optimizer, 5) == record
    assert torch.equal(theta(twin), theta(model))
    assert repr(copied) == repr(optimizer)
