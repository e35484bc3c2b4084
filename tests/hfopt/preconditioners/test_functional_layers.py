"""K-FAC for layers that are written as products: every way to write ``y = x W' + b`` has the same factors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import hfopt
from hfopt.preconditioners import KFAC
from tests.hfopt.tools import randn

Layer = Callable[[Tensor, Tensor, Tensor], Tensor]

# Of x, the parameter and a bias; the parameter is (o, k) or (k, o).
UPRIGHT: dict[str, Layer] = {
    "linear": F.linear,
    "T": lambda x, w, b: x @ w.T + b,
    "t": lambda x, w, b: torch.mm(x, w.t()) + b,
    "mT": lambda x, w, b: torch.matmul(x, w.mT) + b,
    "transpose": lambda x, w, b: x @ w.transpose(0, 1) + b,
    "permute": lambda x, w, b: x @ w.permute(1, 0) + b,
    "addmm": lambda x, w, b: torch.addmm(b, x, w.t()),
}
TURNED: dict[str, Layer] = {
    "product": lambda x, w, b: x @ w + b,
    "addmm": lambda x, w, b: torch.addmm(b, x, w),
    "linear of the transpose": lambda x, w, b: F.linear(x, w.T, b),
}
X, Y = randn(30, 5, seed=1), randn(30, 3, seed=2)
R = randn(7 * 5 + 3 * 7, seed=5)


def applied(layer: Layer, turned: bool, biases: bool) -> Tensor:
    """``M^-1 r`` for a network of two layers, as weights (7, 5) and (3, 7) whatever their layout."""
    weights = [randn(7, 5, seed=3), randn(3, 7, seed=4)]
    given = [(w.t().contiguous() if turned else w).requires_grad_() for w in weights]
    b = [torch.zeros(7, dtype=X.dtype, requires_grad=biases), torch.zeros(3, dtype=X.dtype, requires_grad=biases)]
    op = hfopt.GaussNewton(
        lambda: F.mse_loss(layer(torch.tanh(layer(X, given[0], b[0])), given[1], b[1]), Y),
        [*given, *(b if biases else ())],
    )
    m = KFAC()
    m.refresh(op, 0)
    assert len(m.factors) == 2
    m.damp(0.1, 0.0)
    parts = [r.view(w.shape) for r, w in zip(R.split([35, 21]), weights, strict=True)]
    r = torch.cat([(p.t() if turned else p).reshape(-1) for p in parts] + [torch.ones(10, dtype=X.dtype)] * biases)
    found = m.apply(r)[:56].split([35, 21])
    back = [f.view(w.t().shape).t() if turned else f for f, w in zip(found, weights, strict=True)]
    return torch.cat([p.reshape(-1) for p in back])


@pytest.mark.parametrize(
    ("layer", "turned"), [*((f, False) for f in UPRIGHT.values()), *((f, True) for f in TURNED.values())],
    ids=[*UPRIGHT, *TURNED],
)  # fmt: skip
def test_every_way_to_write_a_layer_has_the_same_factors(layer: Layer, turned: bool) -> None:
    expected = applied(lambda x, w, _: F.linear(x, w), False, False)
    assert torch.allclose(applied(layer, turned, False), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("layer", [TURNED["addmm"], TURNED["linear of the transpose"]])
def test_biases_of_turned_weights_are_part_of_their_block(layer: Layer) -> None:
    assert torch.allclose(applied(layer, True, True), applied(F.linear, False, True), rtol=1e-10, atol=1e-12)
