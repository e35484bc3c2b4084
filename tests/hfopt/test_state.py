"""Saved and restored optimizers go on to the very same bits."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hfopt
from tests.hfopt.tools import mlp, randn, theta

X, Y = randn(30, 3, seed=1), randn(30, 2, seed=2)


def model_of(seed: int, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(seed)
    return nn.Sequential(
        mlp(3, 5, seed=seed, dtype=dtype), nn.Tanh(), nn.Dropout(0.2), mlp(5, 2, seed=seed, dtype=dtype)
    )


def train(model: nn.Module, optimizer: hfopt.HessianFree, steps: int) -> list[Any]:
    dtype = next(model.parameters()).dtype
    x, y = X.to(dtype), Y.to(dtype)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    return [(s.step, s.loss, s.new_loss, s.rho, s.damping, s.cg_iterations) for s in optimizer.stats[-steps:]]


OPTIONS: list[dict[str, Any]] = [
    {},
    {"preconditioner": "empirical-fisher", "weight_decay": 0.01},
    {"curvature": "fisher"},
    {"curvature": "hessian", "damping": 0.5},
    {"damping": hfopt.FixedDamping(0.2), "lr": 0.7},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "default")
@pytest.mark.parametrize(("before", "dtype"), [(3, torch.float32), (0, torch.float64)])
def test_twenty_further_steps_are_the_same_bits(options: dict[str, Any], before: int, dtype: torch.dtype) -> None:
    """Through torch.save and the safe loader, into objects made anew and used for something else before."""
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


def test_repr_tells_the_groups() -> None:
    text = repr(hfopt.HessianFree(mlp(3, 2).parameters(), lr=0.5, weight_decay=0.1))
    assert "HessianFree" in text
    assert "lr: 0.5" in text
    assert "weight_decay: 0.1" in text


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


def test_a_run_with_fixed_damping_may_go_on_with_an_adaptive_one() -> None:
    model = model_of(12)
    optimizer = hfopt.HessianFree(model.parameters(), damping=hfopt.FixedDamping(0.3))
    train(model, optimizer, 1)
    other = hfopt.HessianFree(model.parameters())
    other.load_state_dict(optimizer.state_dict())
    train(model, other, 3)
    assert other.stats[0].damping == 0.3
    assert other.damping.value != 0.3
