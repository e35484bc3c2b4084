"""Groups that are added in the course of training."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hfopt
from tests.contracts.training import model_of, train
from tests.hfopt.tools import mlp, theta


def test_a_group_added_later_starts_from_zero() -> None:
    model = model_of(11)
    optimizer = hfopt.HessianFree(model[0].parameters())
    train(model, optimizer, 3)
    optimizer.add_param_group({"params": model[3].parameters(), "weight_decay": 0.1})
    before = theta(model[3])
    train(model, optimizer, 3)
    assert not torch.equal(theta(model[3]), before)
    with pytest.raises(ValueError, match="lr"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1, dtype=torch.float64))], "lr": -1.0})
    assert len(optimizer.param_groups) == 2
    train(model, optimizer, 1)


def test_the_added_group_is_as_if_it_had_been_frozen_until_then() -> None:
    model, twin = model_of(14), model_of(14)
    late = hfopt.HessianFree(model[0].parameters())
    model[3].requires_grad_(False)
    twin[3].requires_grad_(False)
    frozen = hfopt.HessianFree([{"params": twin[0].parameters()}, {"params": twin[3].parameters()}])
    random = torch.get_rng_state()
    records = []
    for net, optimizer in ((model, late), (twin, frozen)):
        torch.set_rng_state(random)
        first = train(net, optimizer, 2)
        net[3].requires_grad_(True)
        if optimizer is late:
            optimizer.add_param_group({"params": net[3].parameters()})
        records.append(first + train(net, optimizer, 3))
    assert records[0] == records[1]
    assert torch.equal(theta(model), theta(twin))


def test_parameters_that_cannot_be_optimized_are_refused() -> None:
    optimizer = hfopt.HessianFree(mlp(3, 2).parameters())
    with pytest.raises(TypeError, match="view_as_real"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2, dtype=torch.complex128))]})
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": optimizer.param_groups[0]["params"][:1]})
    assert len(optimizer.param_groups) == 1
