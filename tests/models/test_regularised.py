"""Dropout and noise act in training alone, and layers go on from states."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from models.regularised import CELLS, Layers, WeightNoise, sparse_linear
from tests.hfopt.tools import randn


@pytest.mark.parametrize("cell", CELLS)
def test_layers_go_on_from_states(cell: str) -> None:
    torch.manual_seed(0)
    layers = Layers(cell, 3, 4, 2).double()
    x = randn(6, 5, 3)
    whole, last = layers(x)
    first, states = layers(x[:2])
    second, final = layers(x[2:], None, states)
    assert_close(torch.cat([first, second]), whole, rtol=1e-12, atol=1e-13)
    for a, b in zip(last, final, strict=True):
        assert_close(a, b, rtol=1e-12, atol=1e-13)
    above = layers.layers[1](layers.layers[0](x))
    assert_close(whole, above, rtol=1e-12, atol=1e-13)


def test_dropout() -> None:
    torch.manual_seed(0)
    layers = Layers("rnn", 50, 40, dropout=0.25, input_dropout=0.5).double()
    x = torch.ones(1, 200, 50, dtype=torch.float64)
    with torch.no_grad():
        layers.layers[0].W_hh.zero_()  # type: ignore[union-attr, operator]
        layers.layers[0].W_vh.zero_()[:40] = torch.eye(40)  # type: ignore[union-attr, operator, index]
        layers.layers[0].b_h.zero_()  # type: ignore[union-attr, operator]
    layers.eval()
    assert torch.equal(layers(x)[0], torch.full((1, 200, 40), 1.0, dtype=torch.float64).tanh())
    layers.train()
    hidden = layers(x)[0]
    one = torch.tensor(1.0, dtype=torch.float64).tanh() / 0.75
    assert ((hidden == 0) | (hidden - one).abs().lt(1e-12)).all()
    # A unit is seen if its note is (1/2) and it is not dropped itself (3/4): 8,000 draws.
    share = float((hidden != 0).double().mean())
    assert abs(share - 0.375) < 5 * (0.375 * 0.625 / 8000) ** 0.5


class Noisy(WeightNoise):
    def __init__(self, sigma: float) -> None:
        super().__init__(sigma)
        self.net = nn.Linear(30, 40, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.noisy(self.net, x)
        assert isinstance(found, torch.Tensor)
        return found


def test_weight_noise() -> None:
    torch.manual_seed(0)
    model, eye = Noisy(0.1), torch.eye(30)
    weight = model.net.weight.detach().clone()
    difference = (model(eye).T - weight).detach()
    assert float(difference.std()) == pytest.approx(0.1, rel=0.1)
    assert not torch.equal(model(eye), model(eye))
    model(eye).sum().backward()
    assert_close(model.net.weight.grad, torch.ones(40, 30))  # noise is added: the gradient passes through
    model.eval()
    assert torch.equal(model(eye).T, weight)
    assert torch.equal(model.net.weight, weight)


def test_sparse_linear() -> None:
    linear = nn.Linear(50, 60)
    sparse_linear(linear, torch.Generator().manual_seed(0), 10, 2.0)
    assert ((linear.weight != 0).sum(1) == 10).all()
    assert float(linear.weight.detach()[linear.weight != 0].std()) == pytest.approx(2 / 10**0.5, rel=0.15)
    assert not linear.bias.any()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"cell": "elman"}, "cell is 'elman'; choose 'rnn', 'lstm', 'gru'"),
        ({"depth": 0}, "depth is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"input_dropout": -0.1}, "input_dropout is -0.1"),
    ],
)
def test_refusals(options: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Layers(**{"cell": "rnn", "inputs": 3, "hidden": 4, **options})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weight_noise is -1"):
        Noisy(-1)
