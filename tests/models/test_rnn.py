"""The simple recurrent network: its formula, its start, its options and torch's own modules."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from hfopt import structural
from models import RNN
from models.initialisation import sparse_

EXACT = {"rtol": 1e-12, "atol": 1e-13}
F64 = torch.float64


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def network(outputs: int | None = 2, **options: Any) -> RNN:
    """Three inputs, five hidden units, all parameters random and different from zero."""
    model = RNN(3, 5, outputs, dtype=F64, **options)
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=i + 1) / 2)
    return model


def by_definition(model: RNN, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states (T, B, h) and outputs (T, B, O), step by step."""
    f = {"tanh": torch.tanh, "relu": torch.relu, "sigmoid": torch.sigmoid, "identity": lambda a: a}[model.nonlinearity]
    h = model.h_init.expand(inputs.shape[1], -1)
    hidden = []
    for v in inputs.unbind():
        a = h @ model.W_hh + v @ model.W_vh
        h = f(a if model.b_h is None else a + model.b_h)
        hidden.append(h)
    H = torch.stack(hidden)
    assert model.W_ho is not None
    outputs = H @ model.W_ho
    return H, outputs if model.b_o is None else outputs + model.b_o


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu", "sigmoid", "identity"])
@pytest.mark.parametrize("biases", [True, False])
def test_formula_and_gradient(nonlinearity: str, biases: bool) -> None:
    model, inputs = network(nonlinearity=nonlinearity, biases=biases), randn(7, 4, 3)
    H, outputs = by_definition(model, inputs)
    assert_close(model(inputs), outputs, **EXACT)
    assert_close(model.hidden_states(inputs), H, **EXACT)
    names = [name for name, _ in model.named_parameters()]
    assert names == ["h_init", "W_vh", "W_hh", "W_ho", *(["b_h", "b_o"] if biases else [])]
    params = tuple(model.parameters())
    mine = torch.autograd.grad(model(inputs).square().sum(), params)
    assert_close(mine, torch.autograd.grad(outputs.square().sum(), params), rtol=1e-10, atol=1e-11)


def test_last_output_and_lengths() -> None:
    every, inputs = network(), randn(7, 4, 3)
    last = copy.deepcopy(every)
    last.output = "last"
    outputs = every(inputs)
    assert_close(last(inputs), outputs[-1], **EXACT)
    lengths = torch.tensor([7, 1, 3, 6])
    assert_close(last(inputs, lengths=lengths), outputs[lengths - 1, torch.arange(4)], **EXACT)
    params = tuple(last.parameters())
    mine = torch.autograd.grad(last(inputs, lengths=lengths).square().sum(), params)
    theirs = by_definition(last, inputs)[1][lengths - 1, torch.arange(4)]
    assert_close(mine, torch.autograd.grad(theirs.square().sum(), params), rtol=1e-10, atol=1e-11)


def test_padding_changes_nothing_that_counts() -> None:
    model, inputs = network(output="last"), randn(7, 4, 3)
    lengths = torch.tensor([7, 1, 3, 6])
    other = inputs.clone()
    for b, length in enumerate(lengths):
        other[length:, b] = 100.0
    assert torch.equal(model(inputs, lengths=lengths), model(other, lengths=lengths))


def test_given_start() -> None:
    model, inputs, start = network(), randn(7, 4, 3), randn(4, 5, seed=3).tanh()
    first = model(inputs)
    with torch.no_grad():
        model.h_init.copy_(start[1])
    assert_close(model(inputs, h0=start)[:, 1], model(inputs)[:, 1], **EXACT)
    assert_close(model(inputs, h0=start[1]), model(inputs), **EXACT)
    assert not torch.allclose(model(inputs), first)
    assert_close(model.hidden_states(inputs[3:], h0=model.hidden_states(inputs)[2]), model.hidden_states(inputs)[3:])


def test_batch_first() -> None:
    model, inputs = network(), randn(7, 4, 3)
    turned = network(batch_first=True)
    assert_close(turned(inputs.transpose(0, 1)), model(inputs).transpose(0, 1), **EXACT)
    assert_close(turned.hidden_states(inputs.transpose(0, 1)), model.hidden_states(inputs).transpose(0, 1), **EXACT)


def test_without_readout_the_outputs_are_the_hidden_states() -> None:
    model, inputs = network(outputs=None), randn(7, 4, 3)
    assert model.W_ho is None
    assert_close(model(inputs), model.hidden_states(inputs), **EXACT)
    assert not model.hidden_states(inputs).requires_grad


def test_state_dict_goes_round() -> None:
    model, other, inputs = network(), RNN(3, 5, 2, dtype=F64), randn(7, 4, 3)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(inputs), model(inputs))


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_from_torch(nonlinearity: str, bias: bool, batch_first: bool) -> None:
    torch.manual_seed(1)
    recurrent = nn.RNN(3, 5, nonlinearity=nonlinearity, bias=bias, batch_first=batch_first, dtype=F64)
    readout = nn.Linear(5, 2, bias=not bias, dtype=F64)
    model, inputs = RNN.from_torch(recurrent, readout), randn(7, 4, 3)
    assert_close(model(inputs), readout(recurrent(inputs)[0]), **EXACT)
    assert_close(RNN.from_torch(recurrent)(inputs), recurrent(inputs)[0], **EXACT)
    batch_dim = 0 if batch_first else 1
    last = RNN.from_torch(recurrent, readout, output="last")(inputs)
    assert_close(last, readout(recurrent(inputs)[0]).select(1 - batch_dim, -1), **EXACT)
    assert (model.b_h is None, model.b_o is None) == (not bias, bias)


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("outputs", [2, None])
def test_to_torch_and_back(nonlinearity: str, biases: bool, outputs: int | None) -> None:
    model, inputs = network(outputs, nonlinearity=nonlinearity, biases=biases), randn(7, 4, 3)
    recurrent, readout, initial = model.to_torch()
    states = recurrent(inputs, initial.expand(1, 4, 5).contiguous())[0]
    assert_close(states if readout is None else readout(states), model(inputs), **EXACT)
    back = RNN.from_torch(recurrent, readout)
    for name, parameter in model.named_parameters():
        if name != "h_init":
            assert_close(back.get_parameter(name), parameter, rtol=0, atol=0)
    with torch.no_grad():
        next(recurrent.parameters()).zero_()
    assert not torch.equal(model.W_vh, torch.zeros_like(model.W_vh))


def test_sparse_initialisation() -> None:
    model = RNN(40, 100, 60, dtype=F64).sparse_init(7, input_scale=0.25)
    for weight, deviation in ((model.W_hh, 15**-0.5), (model.W_ho, 15**-0.5), (model.W_vh, 0.25)):
        assert weight is not None
        assert torch.equal((weight != 0).sum(0), torch.full((weight.shape[1],), 15))
        entries = weight[weight != 0]
        assert entries.std().item() == pytest.approx(deviation, rel=0.1)
        assert abs(entries.mean().item()) < 5 * deviation / math.sqrt(entries.numel())
        # Every row is drawn: none is left out by more than chance.
        assert ((weight != 0).sum(1) > 0).all()
    assert model.b_h is not None
    assert model.b_o is not None
    assert not model.b_h.any()
    assert not model.b_o.any()
    assert model.h_init.std().item() == pytest.approx(1, rel=0.3)


def test_spectral_radius_of_the_sparse_start() -> None:
    radii = [
        torch.linalg.eigvals(RNN(2, 100, 1, dtype=F64).sparse_init(seed).W_hh).abs().max().item() for seed in range(10)
    ]
    assert sum(radii) / len(radii) == pytest.approx(1.06, abs=0.05)


def test_sparse_initialisation_of_small_networks_is_full() -> None:
    model = RNN(2, 8, 1, dtype=F64).sparse_init(0, scale=2.0)
    assert (model.W_vh != 0).all()
    assert (model.W_hh != 0).all()
    many = torch.cat([RNN(2, 8, 1).sparse_init(seed, scale=2.0).W_hh.reshape(-1) for seed in range(100)])
    assert many.std().item() == pytest.approx(2 / math.sqrt(8), rel=0.05)


def test_sparse_initialisation_depends_on_the_seed_alone() -> None:
    def weights(seed: int | torch.Generator, dtype: torch.dtype) -> list[Tensor]:
        return [p.detach().clone() for p in RNN(4, 20, 3, dtype=dtype).sparse_init(seed).parameters()]

    torch.manual_seed(0)
    first = weights(5, F64)
    torch.manual_seed(1)
    for again in (weights(5, F64), weights(torch.Generator().manual_seed(5), F64)):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    single = weights(5, torch.float32)
    assert all(torch.equal(a.float(), b) for a, b in zip(first, single, strict=True))
    assert not torch.equal(weights(6, F64)[2], first[2])
    going_on = torch.Generator().manual_seed(5)
    assert not torch.equal(weights(going_on, F64)[2], weights(going_on, F64)[2])


def test_structural_damping_finds_the_hidden_units() -> None:
    model, inputs = network(), randn(7, 4, 3)
    lengths = torch.tensor([7, 1, 3, 6])
    with structural.collecting() as states:
        model(inputs, lengths=lengths)
    (state,) = states
    hidden = model.hidden_states(inputs)
    mask = (torch.arange(7).unsqueeze(1) < lengths).unsqueeze(-1)
    assert_close(state.preactivations, torch.atanh(hidden), rtol=1e-9, atol=1e-10)
    assert_close(state.weight, (1 - hidden**2) * mask / 4, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inputs": 0}, "inputs is 0"),
        ({"hidden": -1}, "hidden is -1"),
        ({"outputs": 0}, "outputs is 0"),
        ({"nonlinearity": "gelu"}, "nonlinearity is 'gelu'"),
        ({"output": "first"}, "output is 'first'"),
    ],
)
def test_bad_options(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RNN(**({"inputs": 3, "hidden": 5, "outputs": 2} | arguments))


@pytest.mark.parametrize(
    ("given", "lengths", "error", "message"),
    [
        (torch.zeros(7, 3), None, ValueError, r"inputs has shape \(7, 3\); it is \(T, B, V\) with V = 3"),
        (torch.zeros(7, 4, 2), None, ValueError, "inputs has shape"),
        (torch.zeros(0, 4, 3), None, ValueError, "inputs has shape .*neither T nor B is 0"),
        (torch.zeros(7, 4, 3, dtype=torch.long), None, TypeError, "inputs has dtype torch.int64"),
        (torch.zeros(7, 4, 3), None, TypeError, "inputs has dtype torch.float32"),
        (torch.zeros(7, 4, 3, dtype=F64), torch.tensor([7, 1]), ValueError, r"lengths has shape \(2,\)"),
        (torch.zeros(7, 4, 3, dtype=F64), torch.tensor([7, 0, 1, 2]), ValueError, "lengths runs from 0 to 7"),
        (torch.zeros(7, 4, 3, dtype=F64), torch.tensor([8, 1, 1, 2]), ValueError, "lengths runs from 1 to 8.*1 to 7"),
        (torch.zeros(7, 4, 3, dtype=F64), torch.ones(4), TypeError, "lengths is a tensor of integers"),
    ],
)
def test_bad_inputs(given: Tensor, lengths: Tensor | None, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        network()(given, lengths=lengths)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: RNN.from_torch(nn.LSTM(3, 5)), TypeError, "recurrent is a LSTM"),  # type: ignore[arg-type]
        (lambda: RNN.from_torch(nn.RNN(3, 5, 2)), ValueError, "2 layer"),
        (lambda: RNN.from_torch(nn.RNN(3, 5, bidirectional=True)), ValueError, "bidirectional=True"),
        (lambda: RNN.from_torch(nn.RNN(3, 5), nn.Linear(4, 1)), ValueError, "readout takes 4 .*5 hidden"),
        (lambda: RNN.from_torch(nn.RNN(3, 5), nn.Tanh()), TypeError, "readout is a Tanh"),  # type: ignore[arg-type]
        (lambda: network(nonlinearity="sigmoid").to_torch(), ValueError, "nonlinearity is 'sigmoid'"),
        (lambda: network().sparse_init(0, connections=0), ValueError, "connections is 0"),
        (lambda: network().sparse_init(0, scale=-1.0), ValueError, "scale"),
        (lambda: network().sparse_init(0, input_scale=math.inf), ValueError, "scale"),
        (lambda: sparse_(torch.zeros(2, 2), 1, math.nan, torch.Generator()), ValueError, "deviation nan"),
    ],
)
def test_bad_conversions_and_starts(build: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


def test_autocast() -> None:
    model, inputs = network().float(), randn(7, 4, 3).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(inputs)
    assert outputs.dtype == torch.bfloat16
    outputs.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    assert (outputs.float() - model(inputs)).norm() <= 0.03 * model(inputs).norm()
