"""Saved and restored optimizers go on to the very same bits."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hfopt
from tests.contracts.training import OPTIONS, X, Y, model_of, train
from tests.hfopt.tools import mlp, randn, theta


@pytest.mark.quick(where=lambda options, before, dtype: before > 0)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "default")
@pytest.mark.parametrize(("before", "dtype"), [(3, torch.float32), (0, torch.float64)])
def test_twenty_further_steps_are_the_same_bits(options: dict[str, Any], before: int, dtype: torch.dtype) -> None:
    """Through torch.save and the safe loader, into new objects and used for something else before."""
    model = model_of(3, dtype)
    optimizer = hfopt.HessianFree(model.parameters(), **copy.deepcopy(options))
    train(model, optimizer, before) if before else None
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    state = torch.get_rng_state()
    record = train(model, optimizer, 20)

    other = model_of(4, dtype)
    resumed = hfopt.HessianFree(other.parameters(), **copy.deepcopy(options))
    train(other, resumed, 2)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    torch.set_rng_state(state)
    assert train(other, resumed, 20) == record
    assert torch.equal(theta(other), theta(model))


def test_parameters_of_several_precisions() -> None:
    """CG's start has the precision of the flat vector, not the parameter's; it must come back whole."""

    def build() -> tuple[nn.Parameter, nn.Parameter, hfopt.HessianFree]:
        weight, bias = nn.Parameter(randn(2, 3, seed=5)), nn.Parameter(randn(2, seed=6).float())
        return weight, bias, hfopt.HessianFree([weight, bias])

    def step(weight: Tensor, bias: Tensor, optimizer: hfopt.HessianFree) -> None:
        optimizer.step(lambda: F.mse_loss((X @ weight.T + bias.double()).tanh(), Y))

    weight, bias, optimizer = build()
    step(weight, bias, optimizer)
    w, b, resumed = build()
    with torch.no_grad():
        w.copy_(weight)
        b.copy_(bias)
    resumed.load_state_dict(optimizer.state_dict())
    for p, q in ((weight, w), (bias, b)):
        assert resumed.state[q]["cg_start"].dtype == optimizer.state[p]["cg_start"].dtype
        assert torch.equal(resumed.state[q]["cg_start"], optimizer.state[p]["cg_start"])
    for _ in range(5):
        step(weight, bias, optimizer)
        step(w, b, resumed)
    assert torch.equal(weight, w)
    assert torch.equal(bias, b)


def test_the_state_is_plain() -> None:
    """Numbers, strings, lists, dictionaries and tensors only, independent of the live optimizer."""
    model = model_of(7)
    optimizer = hfopt.HessianFree(model.parameters())
    train(model, optimizer, 2)
    state = optimizer.state_dict()

    def plain(value: Any) -> bool:
        if isinstance(value, dict):
            return all(isinstance(k, (str, int)) and plain(v) for k, v in value.items())
        if isinstance(value, (list, tuple)):
            return all(plain(v) for v in value)
        return value is None or isinstance(value, (bool, int, float, str, Tensor))

    assert plain(state)
    kept = copy.deepcopy(state)
    train(model, optimizer, 2)
    assert state["hessian_free"] == kept["hessian_free"]


def test_states_that_do_not_fit_are_refused() -> None:
    model = model_of(8)
    optimizer = hfopt.HessianFree(model.parameters())
    train(model, optimizer, 1)
    with pytest.raises(ValueError, match="hessian_free"):
        optimizer.load_state_dict(torch.optim.LBFGS(model.parameters()).state_dict())
    turned = nn.Sequential(mlp(2, 5, seed=9), mlp(5, 3, seed=9))
    other = hfopt.HessianFree(turned.parameters())
    with pytest.raises(ValueError, match="shape"):
        other.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="group"):
        hfopt.HessianFree(list(model.parameters())[:2]).load_state_dict(optimizer.state_dict())


def test_a_run_with_fixed_damping_may_go_on_with_an_adaptive_one() -> None:
    model = model_of(12)
    optimizer = hfopt.HessianFree(model.parameters(), damping=hfopt.FixedDamping(0.3))
    train(model, optimizer, 1)
    other = hfopt.HessianFree(model.parameters())
    other.load_state_dict(optimizer.state_dict())
    train(model, other, 3)
    assert other.stats[0].damping == 0.3
    assert other.damping.value != 0.3


@pytest.mark.parametrize("broken", ["shape", "damping", "chosen", "groups", "preconditioner", "steps"])
def test_a_state_that_is_refused_changes_nothing(broken: str) -> None:
    """The optimizer goes on as if nothing had been tried."""
    model, twin = model_of(13), model_of(13)
    optimizer, other = hfopt.HessianFree(model.parameters()), hfopt.HessianFree(twin.parameters(), lr=0.5)
    random = torch.get_rng_state()
    train(model, optimizer, 2)
    torch.set_rng_state(random)
    train(twin, other, 3)
    state = copy.deepcopy(other.state_dict())
    if broken == "shape":
        state["state"][3]["cg_start"] = torch.zeros(7)
    elif broken == "damping":
        state["hessian_free"]["damping"] = {}
    elif broken == "chosen":
        state["hessian_free"]["chosen"] = ["double-backward"]
    elif broken == "preconditioner":
        state["hessian_free"]["preconditioner"] = 3.0  # after lambda, which has been loaded by then
    elif broken == "steps":
        del state["hessian_free"]["steps"]
    else:
        state["param_groups"][0]["params"] = [0, 1]
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="state_dict"):
        optimizer.load_state_dict(state)
    after = optimizer.state_dict()
    assert after["hessian_free"] == before["hessian_free"]
    assert after["param_groups"] == before["param_groups"]
    for i, entry in before["state"].items():
        assert torch.equal(after["state"][i]["cg_start"], entry["cg_start"])
