"""Muon with Adam: which parameters each of them has, their steps, and their states."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.testing import assert_close

from runs.muon import MuonWithAdam, orthogonal


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


X = torch.randn(10, 4, generator=torch.Generator().manual_seed(1))


def loss(model: nn.Module) -> Tensor:
    found: Tensor = model(X).square().sum()
    return found


def test_each_takes_its_own_parameters_with_its_own_steps() -> None:
    model, apart = network(), network()
    outside = model[2].weight
    optimizer = MuonWithAdam(model.parameters(), 0.01, {id(outside)})
    muon = torch.optim.Muon([apart[0].weight], 0.01, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.Adam([apart[0].bias, apart[2].weight, apart[2].bias], 0.01)
    for _ in range(3):
        optimizer.zero_grad()

        def closure() -> Tensor:
            value = loss(model)
            value.backward()
            return value

        found = optimizer.step(closure)
        apart.zero_grad()
        expected = loss(apart)
        expected.backward()
        muon.step()
        adam.step()
        assert_close(found, expected, rtol=1e-3, atol=0)
    # torch's iteration has the 8 bits of bfloat16; three updates of 0.01 * 0.2 * sqrt(6) at most.
    torch.testing.assert_close(model[0].weight, apart[0].weight, rtol=0, atol=3 * 0.01 * 0.2 * 6**0.5 * 2**-6)
    moved = (apart[0].weight - network()[0].weight).abs().max()
    assert moved > 0.01 * 0.2
    for name in ("0.bias", "2.weight", "2.bias"):
        assert_close(model.get_parameter(name), apart.get_parameter(name), rtol=1e-3, atol=1e-4)


def test_the_iteration_keeps_singular_vectors_and_evens_values() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((5, 9), (9, 5)):
        G = torch.randn(shape, generator=generator, dtype=torch.float64)
        O = orthogonal(G)
        U, _, Vh = torch.linalg.svd(G, full_matrices=False)
        inner = U.T @ O @ Vh.T
        assert_close(inner, torch.diag(inner.diagonal()), rtol=0, atol=1e-12)
        assert ((inner.diagonal() > 0.65) & (inner.diagonal() < 1.25)).all()


def test_a_state_goes_on_to_the_same_bits_and_rates_can_be_changed() -> None:
    first, second = network(), network()
    one, two = (MuonWithAdam(m.parameters(), 0.01) for m in (first, second))

    def step(model: nn.Module, optimizer: MuonWithAdam) -> None:
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()

    step(first, one)
    second.load_state_dict(first.state_dict())
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    for optimizer in (one, two):
        for group in optimizer.param_groups:
            group["lr"] *= 0.5
    step(first, one)
    step(second, two)
    assert all(p.equal(q) for p, q in zip(first.parameters(), second.parameters(), strict=True))
    before = [p.detach().clone() for p in first.parameters()]
    for group in one.param_groups:
        group["lr"] = 0.0
    step(first, one)
    assert all(p.equal(q) for p, q in zip(first.parameters(), before, strict=True))


def test_vectors_alone_need_no_muon() -> None:
    model = nn.Linear(2, 1)
    optimizer = MuonWithAdam([model.bias], 0.1)
    model(torch.ones(1, 2)).sum().backward()
    before = model.bias.detach().clone()
    optimizer.step()
    assert not model.bias.equal(before)
    assert [type(part).__name__ for part in optimizer.parts] == ["Adam"]
