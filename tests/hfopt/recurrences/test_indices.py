"""Inputs as indices, which stand for rows of the input weights, against one-hot inputs; and any cell's readout."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from hfopt.recurrences import cell_layer, cell_readout, cells
from tests.hfopt.recurrences.registry import arguments, cell, like

EXACT = {"rtol": 1e-11, "atol": 1e-12}
NAMES = ("tanh", "lstm", "gru", "mrnn", "rhn")
Layer = Callable[..., Tensor]


def product(layer: Layer, weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Outputs, gradient, and a Gauss-Newton product."""
    leaves = tuple(w.clone().requires_grad_() for w in weights)
    y = layer(*leaves)
    u = torch.zeros_like(y, requires_grad=True)
    g = torch.autograd.grad(y, leaves, u, create_graph=True)
    (R,) = torch.autograd.grad(g, u, like(weights, 5), retain_graph=True)
    gradient = torch.autograd.grad(y.sin().sum(), leaves, retain_graph=True)
    return y, *gradient, *torch.autograd.grad(y, leaves, R)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lengths", [None, torch.tensor([6, 2, 4])])
def test_an_index_is_a_row_of_the_weight(name: str, lengths: Tensor | None) -> None:
    c = cell(name)
    p = c.parts(arguments(name, steps=6, batch=3, inputs=5))
    indices = torch.randint(0, 5, (6, 3), generator=torch.Generator().manual_seed(0))
    bias = torch.linspace(-0.5, 0.5, p.Kx.shape[1], dtype=torch.float64)

    def of(inputs: Tensor) -> Layer:
        def layer(weight_ih: Tensor, bias: Tensor, *K: Tensor) -> Tensor:
            more = {"parameters": p.parameters, "masks": p.masks, "states": p.states, "lengths": lengths}
            return cell_layer(c.definition, inputs, weight_ih, K, bias, **more).output

        return layer

    weights = (p.Kx, bias, *p.K)
    assert_close(product(of(indices), weights), product(of(F.one_hot(indices, 5).double()), weights), **EXACT)


def test_indices_that_cannot_be_are_refused() -> None:
    p = cell("tanh").parts(arguments("tanh"))
    with pytest.raises(ValueError, match="inputs runs from 0 to 7; weight_ih has 5 rows"):
        cell_layer(cells.tanh_rnn, torch.tensor([[0, 7]]), p.Kx, p.K)
    q = cell("intersection").parts(arguments("intersection"))
    with pytest.raises(ValueError, match="inputs are indices; the cell intersection adds its inputs"):
        cell_layer(cells.intersection, torch.tensor([[0, 1]]), q.Kx, q.K)


@pytest.mark.parametrize("name", [*NAMES, "intersection"])
def test_a_readout_is_the_layer_and_a_product(name: str) -> None:
    c = cell(name)
    p = c.parts(arguments(name, steps=4, batch=3, inputs=4))
    W_o, b_o = like((torch.empty(4, 3, dtype=torch.float64), torch.empty(3, dtype=torch.float64)), 1)

    def layer(W_o: Tensor, b_o: Tensor, K_x: Tensor, *K: Tensor) -> Tensor:
        found = cell_layer(c.definition, p.X, K_x, K, parameters=p.parameters, masks=p.masks, states=p.states)
        return found.output @ W_o + b_o

    def readout(W_o: Tensor, b_o: Tensor, K_x: Tensor, *K: Tensor) -> Tensor:
        more = {"parameters": p.parameters, "masks": p.masks, "states": p.states}
        return cell_readout(c.definition, p.X, K_x, K, None, W_o, b_o, **more)

    weights = (W_o, b_o, p.Kx, *p.K)
    assert_close(product(readout, weights), product(layer, weights), **EXACT)
