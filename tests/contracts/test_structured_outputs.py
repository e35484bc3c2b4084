"""Models whose outputs are tuples, dictionaries or packed sequences, and losses of no single output."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

import hfopt
from tests.contracts.against_plain import check
from tests.hfopt.tools import DENSE, dense_hessian, mlp, randn, relative

X, Y = randn(12, 3, seed=1), randn(12, 2, seed=2)
CLASSES = torch.arange(12) % 3


class Heads(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.body, self.kind = mlp(3, 4, 5, seed=3), kind

    def forward(self, x: Tensor) -> Any:
        z = self.body(x)
        parts = z[:, :2], z[:, 2:]
        return {"value": parts[0], "logits": parts[1]} if self.kind == "dict" else parts


@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_several_outputs(kind: str) -> None:
    def outputs(m: Any) -> Tensor:
        found = m(X)
        return torch.cat(list(found.values()) if kind == "dict" else list(found), 1)

    check(Heads(kind), outputs, lambda z: F.mse_loss(z[:, :2], Y) + 0.5 * F.cross_entropy(z[:, 2:], CLASSES))


@pytest.mark.parametrize("cell", [nn.GRU, nn.RNN, nn.LSTM])
def test_packed_sequences(cell: Any) -> None:
    torch.manual_seed(0)
    sequences = pack_sequence([randn(n, 3, seed=n) for n in (5, 3, 2)])
    targets = randn(10, 4, seed=9)

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = cell(3, 4).double()

        def forward(self) -> Any:
            return self.cell(sequences)[0]

    def padded(m: Any) -> Tensor:
        z, lengths = pad_packed_sequence(m())
        return torch.cat([z[:n, i] for i, n in enumerate(lengths.tolist())])

    model = Packed()
    v = randn(sum(p.numel() for p in model.parameters()), seed=4)
    by_data = hfopt.GaussNewton(lambda: F.mse_loss(padded(model), targets), model.parameters())
    declared = hfopt.GaussNewton(
        lambda: (padded(model), targets), model.parameters(), loss=lambda z, y: (z - y).square().mean()
    )
    assert relative(by_data @ v, declared @ v) < DENSE
    optimizer = hfopt.HessianFree(model.parameters())
    for _ in range(5):
        optimizer.step(lambda: F.mse_loss(padded(model), targets))
    assert optimizer.stats[-1].new_loss < 0.9 * optimizer.stats[0].loss


# A policy's gradient and a value's error: no function of one output and one target.
ADVANTAGES = randn(12, seed=5)


def policy_loss(logits: Tensor, value: Tensor) -> Tensor:
    logs = logits.log_softmax(1)
    entropy = -(logs.exp() * logs).sum(1).mean()
    chosen = logs[torch.arange(12), CLASSES]
    return -(chosen * ADVANTAGES).mean() + 0.5 * (value.mean(1) - ADVANTAGES).square().mean() - 0.01 * entropy


@pytest.mark.parametrize("way", ["loss", "outputs", "pair", "hessian"])
def test_losses_of_reinforcement_learning(way: str) -> None:
    model = Heads("dict")

    def total() -> Tensor:
        found = model(X)
        return policy_loss(found["logits"], found["value"])

    options: dict[str, Any] = {}
    closure: Any = total
    if way == "loss":
        options, closure = {"loss": lambda d: policy_loss(d["logits"], d["value"])}, lambda: (model(X),)
    elif way == "outputs":
        options = {"outputs": model}
    elif way == "pair":

        def closure() -> Any:
            found = model(X)
            return found, policy_loss(found["logits"], found["value"])
    else:
        options = {"curvature": "hessian"}
        op = hfopt.Hessian(total, model.parameters())
        dense = dense_hessian(model, lambda m: policy_loss((z := m(X))["logits"], z["value"]))
        v = randn(op.shape[0], seed=6)
        assert relative(op @ v, dense @ v) < DENSE
    optimizer = hfopt.HessianFree(model.parameters(), **options)
    for _ in range(5):
        optimizer.step(closure)
    losses = [s.loss for s in optimizer.stats]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] == pytest.approx(float(policy_loss(*Heads("tuple")(X)[::-1]).detach()))
    assert losses[-1] < losses[0] - 0.05


def test_such_a_loss_without_a_declaration_is_refused_with_the_way_out() -> None:
    model = Heads("dict")
    optimizer = hfopt.HessianFree(model.parameters())
    with pytest.raises(hfopt.ClosureError, match="outputs="):
        optimizer.step(lambda: policy_loss(model(X)["logits"], model(X)["value"]))
