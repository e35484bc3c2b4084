"""torch's recurrent layers: products exact and steps right, although cuDNN has no second derivatives."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import hfopt
from tests.hfopt.tools import DENSE, randn, relative, theta

X, Y = randn(10, 6, 3, seed=1), randn(6, 2, seed=2)
LENGTHS = torch.tensor([10, 4, 7, 1, 10, 2])
LAYERS = pytest.mark.parametrize("layer", [nn.RNN, nn.LSTM, nn.GRU])
CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="cuDNN needs a CUDA device"))


class Net(nn.Module):
    """Two layers in both directions, read at the end of each sequence."""

    def __init__(self, layer: Any, packed: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.cell = layer(3, 4, num_layers=2, bidirectional=True)
        self.out, self.packed = nn.Linear(8, 2), packed
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        given: Any = pack_padded_sequence(x, LENGTHS, enforce_sorted=False) if self.packed else x
        h = self.cell(given)[0]
        if isinstance(h, PackedSequence):
            h = pad_packed_sequence(h)[0]
        z: Tensor = self.out(h.sum(0))
        return z


@pytest.mark.quick(where=lambda layer, packed, device: device == "cuda" or packed == (layer is not nn.GRU))
@LAYERS
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_steps_are_those_of_a_loop_over_time(layer: Any, packed: bool, device: str) -> None:
    """Against torch's own layer on a CPU, left to torch, through double backward."""
    model = Net(layer, packed)
    twin = copy.deepcopy(model)
    model.to(device)
    x, y = X.to(device), Y.to(device)
    cg = hfopt.CG(max_iterations=5, decay=0.0)  # solves that do not amplify the roundings of earlier ones
    ours = hfopt.HessianFree(model.parameters(), cg=cg)
    plain = hfopt.HessianFree(twin.parameters(), cg=cg, replace_recurrences=False)
    for _ in range(2):
        ours.step(lambda: F.mse_loss(model(x), y))
        plain.step(lambda: F.mse_loss(twin(X), Y))
    assert torch.allclose(theta(model).cpu(), theta(twin), rtol=1e-6, atol=1e-8)
    assert plain.stats[-1].new_loss < 0.95 * plain.stats[0].loss


@LAYERS
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_products_by_hand_on_a_device(layer: Any, device: str) -> None:
    model = Net(layer, packed=False)
    by_hand = hfopt.GaussNewton(lambda: F.mse_loss(model(X), Y), model.parameters())
    expected = by_hand @ randn(by_hand.shape[0], seed=5)
    on = copy.deepcopy(model).to(device)
    x, y = X.to(device), Y.to(device)
    seen: list[Tensor] = []

    class Look(hfopt.preconditioners.Diagonal):
        """Takes a product with the step's own operator."""

        def refresh(self, op: Any, step: int) -> None:
            v = randn(op.shape[0], seed=5).to(op.device)
            seen.append((op @ v).cpu())
            self._diagonal = torch.ones_like(v)

    optimizer = hfopt.HessianFree(on.parameters(), preconditioner=Look(0.5))
    optimizer.step(lambda: F.mse_loss(on(x), y))
    assert relative(seen[0], expected) < DENSE
