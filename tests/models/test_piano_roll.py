"""Piano-roll models: likelihoods by definition, exact curvature of RNN-NADE, and frames that follow the model."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

import hfopt
from models import RNNNADE, PianoRoll
from tests.hfopt.tools import DENSE, dense_gauss_newton, flat, matrix, randn, relative

EXACT = {"rtol": 1e-11, "atol": 1e-12}
PITCHES = 5


def nade(**options: Any) -> RNNNADE:
    torch.manual_seed(0)
    model = RNNNADE("rnn", 4, 3, pitches=PITCHES, **options).double()
    with torch.no_grad():
        for k, parameter in enumerate(model.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=k) / 1.5)
    return model


def frames(steps: int, batch: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(steps, batch, PITCHES, generator=generator) < 0.4).double()


def by_definition(model: RNNNADE, state: Tensor, frame: Tensor) -> Tensor:
    """The logits of one frame's notes, one after the other."""
    net = model.net
    b, c = net.visible(state), net.context(state)
    logits = []
    for i in range(PITCHES):
        hidden = (c + sum((net.notes.weight[:, j] * frame[j] for j in range(i)), torch.zeros_like(c))).sigmoid()
        logits.append(b[i] + net.readout.weight[i] @ hidden)
    return torch.stack(logits)


def test_logits_by_definition() -> None:
    model, v = nade(), frames(6, 3)
    v[2, 1], v[3, 1] = 0, 1  # a silent frame, and one with all notes
    inputs = torch.cat([torch.zeros_like(v[:1]), v[:-1]])
    states = model.net.layers(inputs)[0]
    expected = torch.stack(
        [torch.stack([by_definition(model, states[t, b], v[t, b]) for b in range(3)]) for t in range(6)]
    )
    assert_close(model(inputs, v), expected, **EXACT)
    some = torch.tensor([0, 4, 11])
    assert_close(model(inputs, v, None, some), expected.flatten(0, 1)[some], **EXACT)


def test_the_chances_of_all_frames_sum_to_one() -> None:
    model = nade()
    every = torch.tensor(list(itertools.product((0.0, 1.0), repeat=PITCHES)), dtype=torch.float64)  # (32, 5)
    past = frames(3, 1).expand(3, len(every), PITCHES)
    v = torch.cat([past, every.unsqueeze(0)])
    inputs = torch.cat([torch.zeros_like(v[:1]), v[:-1]])
    logits = model(inputs, v)[-1].detach()
    log_p = -F.binary_cross_entropy_with_logits(logits, every, reduction="none").sum(1)
    assert float(log_p.exp().sum()) == pytest.approx(1, abs=1e-12)
    assert float(log_p.exp().max()) < 0.9  # they are spread out


class Unrolled(RNNNADE):
    """The same in a loop that torch.func can differentiate."""

    def forward(self, inputs: Tensor, v: Tensor, *_: Any) -> Tensor:  # type: ignore[override]
        layer: Any = self.net.layers.layers[0]
        h, logits = layer.h_init.expand(inputs.shape[1], -1), []
        for t in range(len(inputs)):
            h = torch.tanh(h @ layer.W_hh + inputs[t] @ layer.W_vh + layer.b_h)
            logits.append(torch.stack([by_definition(self, h[b], v[t, b]) for b in range(inputs.shape[1])]))
        return torch.stack(logits)


def test_gauss_newton_of_rnn_nade() -> None:
    model, v = nade(), frames(4, 3, seed=1)
    inputs = torch.cat([torch.zeros_like(v[:1]), v[:-1]])
    plain = Unrolled("rnn", 4, 3, pitches=PITCHES).double()
    plain.load_state_dict(model.state_dict())
    scored = torch.arange(1, 12)

    def criterion(z: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(z, v.flatten(0, 1)[scored]) * PITCHES

    op = hfopt.GaussNewton(lambda: criterion(model(inputs, v, None, scored)), model.parameters())
    dense = dense_gauss_newton(plain, lambda m: m(inputs, v).flatten(0, 1)[scored], criterion)
    assert relative(matrix(op), dense) < DENSE
    gradient = torch.autograd.grad(criterion(plain(inputs, v).flatten(0, 1)[scored]), list(plain.parameters()))
    assert relative(op.gradient, flat(gradient)) < DENSE
    # Every parameter matters, but for the weights from the highest note, which no note comes after, and those from
    # notes that the net never sees.
    silent = int((inputs.sum((0, 1)) == 0).sum())
    assert int((dense.diagonal() == 0).sum()) == 3 + 4 * silent
    assert silent < PITCHES - 1


@pytest.mark.parametrize("noise", [{"dropout": 0.3}, {"input_dropout": 0.3}, {"weight_noise": 0.1}])
@pytest.mark.parametrize("kind", ["roll", "nade"])
def test_hessian_free_steps_with_noise_descend(kind: str, noise: dict[str, float]) -> None:
    v = frames(8, 20, seed=2)
    inputs = torch.cat([torch.zeros_like(v[:1]), v[:-1]])
    torch.manual_seed(0)
    model: Any = nade(**noise) if kind == "nade" else PianoRoll("rnn", 6, pitches=PITCHES, **noise).double()
    optimizer = hfopt.HessianFree(model.parameters(), structural=0.03, cg=hfopt.CG(max_iterations=10))

    def loss() -> Tensor:
        logits = model(inputs, v) if kind == "nade" else model(inputs)
        return F.binary_cross_entropy_with_logits(logits, v)

    for _ in range(6):
        optimizer.step(loss)
        assert optimizer.stats[-1].accepted
    assert optimizer.stats[-1].loss < optimizer.stats[0].loss


def test_piano_roll_reads_out_its_layers_and_starts_at_the_rates() -> None:
    model = PianoRoll("gru", 6, 2, pitches=PITCHES).double()
    rates = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5], dtype=torch.float64)
    model.sparse_init(0, connections=2, rates=rates)
    v = frames(5, 3)
    hidden = model.net.layers(v)[0]
    assert_close(model(v), hidden @ model.net.readout.weight.T + model.net.readout.bias, **EXACT)
    assert_close(model.net.readout.bias.sigmoid(), rates, **EXACT)
    assert ((model.net.readout.weight != 0).sum(1) == 2).all()


@pytest.mark.parametrize("kind", ["roll", "nade"])
def test_samples_follow_the_model(kind: str) -> None:
    """Frames drawn after a fixed past have the chances that the model gives them."""
    model: Any = nade() if kind == "nade" else PianoRoll("rnn", 4, pitches=PITCHES).double()
    past = frames(2, 1)[:, 0]
    generator = torch.Generator().manual_seed(0)
    drawn = model.sample(1, generator, past, 2000)[:, 0]
    every = torch.tensor(list(itertools.product((0.0, 1.0), repeat=PITCHES)), dtype=torch.float64)
    v = torch.cat([past.unsqueeze(1).expand(2, 32, PITCHES), every.unsqueeze(0)])
    inputs = torch.cat([torch.zeros_like(v[:1]), v[:-1]])
    logits = (model(inputs, v) if kind == "nade" else model(inputs))[-1]
    p = (-F.binary_cross_entropy_with_logits(logits, every, reduction="none").sum(1)).exp().detach()
    found = torch.stack([(drawn == frame).all(1).double().mean() for frame in every])
    # Chi-squared with 31 degrees of freedom: below 62 but once in a thousand times, and the seed is fixed.
    assert float((2000 * (found - p).square() / p).sum()) < 62
    song = model.sample(7, generator)
    assert song.shape == (1, 7, PITCHES)
    assert set(song.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(
        model.sample(7, torch.Generator().manual_seed(1)), model.sample(7, torch.Generator().manual_seed(1))
    )
    with pytest.raises(ValueError, match="units is 0"):
        RNNNADE("rnn", 4, 0)
