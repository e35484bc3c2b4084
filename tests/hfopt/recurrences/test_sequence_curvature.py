"""Curvature through the layers: matrices by another route for every policy, with lengths and structural damping."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev
from torch.testing import assert_close

import hfopt
from hfopt import structural
from hfopt.recurrences import gru_layer, lstm_layer, mrnn_layer
from tests.hfopt.recurrences import cells
from tests.hfopt.recurrences.plain import Calls

F64 = torch.float64
T, B, V, H = 4, 3, 2, 3
LENGTHS = torch.tensor([2, 4, 1])
KINDS = ("lstm", "gru", "mrnn")
POLICIES = ("auto", "double-backward", "linearize", "checkpoint", "recompute")


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


X, TARGETS = randn(T, B, V, seed=0), randn(T, B, 2, seed=1)
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "lstm": {"Wx": (4 * H, V), "W": (4 * H, H), "b": (4 * H,), "c": (4 * H,), "h0": (H,), "c0": (H,)},
    "gru": {"Wx": (3 * H, V), "W": (3 * H, H), "b": (3 * H,), "c": (3 * H,), "h0": (H,)},
    "mrnn": {"Wxf": (V, 2), "Whf": (H, 2), "Wfh": (2, H), "Wxh": (V, H), "h0": (H,), "b": (H,)},
}


class Net(nn.Module):
    """A layer and a linear readout: the operators if `fused`, otherwise the loop by definition."""

    def __init__(self, kind: str, lengths: Tensor | None = None) -> None:
        super().__init__()
        self.kind, self.lengths, self.fused = kind, lengths, True
        for k, (name, shape) in enumerate({**SHAPES[kind], "Wo": (H, 2)}.items()):
            self.register_parameter(name, nn.Parameter(randn(*shape, seed=k + 2) / 1.5))

    def hidden(self) -> Tensor:
        """(T, B, h), the pre-activations if the net is multiplicative and not fused."""
        *p, _ = (getattr(self, name) for name in (*SHAPES[self.kind], "Wo"))
        if self.fused:
            layer = {"lstm": lstm_layer, "gru": gru_layer, "mrnn": mrnn_layer}[self.kind]
            states: Tensor = layer(X, *p, lengths=self.lengths)[0]
            return states
        ones = torch.cat((X, torch.ones(T, B, 1, dtype=F64)), -1)
        if self.kind == "lstm":
            K = torch.cat((p[1].t(), p[0].t(), (p[2] + p[3]).unsqueeze(0)))
            return cells.lstm(ones, K, p[4].expand(B, H), p[5].expand(B, H))[0]
        if self.kind == "gru":
            Kx = torch.cat((p[0].t(), (p[2] + torch.cat((p[3][: 2 * H], 0 * p[3][2 * H :]))).unsqueeze(0)))
            return cells.gru(ones, p[1].t(), Kx, p[3][2 * H :], p[4].expand(B, H))[0]
        Wxf, K = torch.cat((p[0], 0 * p[0][:1])), torch.cat((p[2], p[3], p[5].unsqueeze(0)))
        return cells.mrnn(torch.tanh, True)(ones, Wxf, p[1], K, p[4].expand(B, H))[1]

    def forward(self) -> Tensor:
        """Outputs (T, B, 2), or of the steps that count alone (n, 2)."""
        states = self.hidden()
        if not self.fused and self.kind == "mrnn":
            states = states.tanh()
        outputs: Tensor = states @ self.Wo
        return outputs if self.lengths is None else outputs[self.valid()]

    def valid(self) -> Tensor:
        lengths = torch.full((B,), T) if self.lengths is None else self.lengths
        return torch.arange(T).unsqueeze(1) < lengths

    def targets(self) -> Tensor:
        return TARGETS if self.lengths is None else TARGETS[self.valid()]

    def damped(self) -> Tensor:
        """What structural damping acts on."""
        return self.hidden()


def dense(net: Net, function: Callable[[Net], Tensor]) -> Tensor:
    """The Jacobian (values, P) of `function` of the net by its plain loop."""
    names, values = zip(*((n, p.detach()) for n, p in net.named_parameters()), strict=True)

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self) -> Tensor:
            return function(self.net)

    def of(*x: Tensor) -> Tensor:
        named = {f"net.{n}": v for n, v in zip(names, x, strict=True)}
        return functional_call(Wrapped(), named, ()).reshape(-1)

    net.fused = False
    rows = jacrev(of, tuple(range(len(names))))(*values)
    count = of(*values).numel()
    net.fused = True
    return torch.cat([r.reshape(count, -1) for r in rows], 1)


def closure(net: Net) -> Tensor:
    return F.mse_loss(net(), net.targets(), reduction="sum")


@pytest.mark.quick(where=lambda kind, policy, lengths: (lengths is None) == (policy == "recompute"))
@pytest.mark.parametrize("lengths", [None, LENGTHS])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", KINDS)
def test_gauss_newton_matrix(kind: str, policy: str, lengths: Tensor | None) -> None:
    net = Net(kind, lengths)
    op = hfopt.GaussNewton(lambda: closure(net), net.parameters(), linearisation=policy)
    J = dense(net, Net.__call__)
    expected = 2 * J.t() @ J
    assert_close(op.to_dense(), expected, rtol=1e-9, atol=1e-10)
    v = randn(J.shape[1], seed=50)
    assert_close(op @ v, expected @ v, rtol=1e-9, atol=1e-10)
    assert policy in ("auto", op.linearisation.name)


@pytest.mark.quick(where=lambda kind, policy, lengths: (lengths is None) == (policy != "recompute"))
@pytest.mark.parametrize("lengths", [None, LENGTHS])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", KINDS)
def test_structural_damping(kind: str, policy: str, lengths: Tensor | None) -> None:
    net = Net(kind, lengths)
    op = hfopt.GaussNewton(lambda: closure(net), net.parameters(), structural=True, linearisation=policy)
    J, Jh = dense(net, Net.__call__), dense(net, Net.damped)
    with torch.no_grad():
        curvature = (1 - net.hidden() ** 2) if kind == "mrnn" else torch.ones(T, B, H, dtype=F64)
    weight = (curvature * net.valid().unsqueeze(-1) / B).reshape(-1, 1)
    S = Jh.t() @ (weight * Jh)
    v = randn(J.shape[1], seed=51)
    assert_close(op.structural_product(v), S @ v, rtol=1e-9, atol=1e-10)
    damped = op.damped(0.4, 0.25)
    expected = 2 * J.t() @ (J @ v) + 0.4 * v + 0.4 * 0.25 * S @ v
    assert_close(damped @ v, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_a_damped_product_is_one_tangent_and_one_adjoint(kind: str) -> None:
    net = Net(kind)
    op = hfopt.GaussNewton(
        lambda: closure(net), net.parameters(), structural=True, linearisation="double-backward"
    ).damped(0.4, 0.25)
    v = randn(op.shape[0], seed=52)
    with Calls() as calls:
        op @ v
    assert calls.recurrent == {"hfopt::sequence_tangent": 1, "hfopt::sequence_adjoint": 1}


@pytest.mark.parametrize("kind", KINDS)
def test_hessian(kind: str) -> None:
    net = Net(kind, LENGTHS)
    names, values = zip(*((n, p.detach()) for n, p in net.named_parameters()), strict=True)

    def loss(*x: Tensor) -> Tensor:
        outputs = functional_call(net, dict(zip(names, x, strict=True)), ())
        return F.mse_loss(outputs, net.targets(), reduction="sum")

    op = hfopt.Hessian(lambda: closure(net), net.parameters())
    net.fused = False
    blocks = hessian(loss, tuple(range(len(names))))(*values)
    net.fused = True
    sizes = [v.numel() for v in values]
    expected = torch.cat(
        [
            torch.cat([b.reshape(m, n) for b, n in zip(row, sizes, strict=True)], 1)
            for row, m in zip(blocks, sizes, strict=True)
        ]
    )
    assert_close(op.to_dense(), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_marked_or_worked_out_when_nobody_looks(kind: str) -> None:
    with structural.collecting(enabled=False) as states, Calls() as calls:
        Net(kind).hidden()
    assert states == []
    assert calls.recurrent == {"hfopt::sequence_forward": 1}


@pytest.mark.parametrize("kind", KINDS)
def test_an_optimizer_step_decreases_the_loss(kind: str) -> None:
    net = Net(kind, LENGTHS)
    before = closure(net).item()
    optimizer = hfopt.HessianFree(net.parameters(), structural=0.1)
    for _ in range(3):
        optimizer.step(lambda: closure(net))
    assert closure(net).item() < 0.7 * before
