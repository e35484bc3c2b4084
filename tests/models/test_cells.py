"""The gated and multiplicative networks: their formulas, starts, options and torch's own modules."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import hfopt
from hfopt import structural
from models import GRU, LSTM, MRNN, RNN
from models.recurrent import Recurrent

EXACT = {"rtol": 1e-11, "atol": 1e-12}
F64 = torch.float64
LENGTHS = torch.tensor([7, 1, 3, 6])
Build = Callable[..., Any]

BUILDS: dict[str, Build] = {
    "lstm": LSTM,
    "gru": GRU,
    "mrnn": lambda inputs, hidden, outputs, **options: MRNN(inputs, hidden, 4, outputs, **options),
    "bounded": lambda inputs, hidden, outputs, **options: MRNN(
        inputs, hidden, 4, outputs, bounded_factors=True, **options
    ),
}
NAMES = pytest.mark.parametrize("name", list(BUILDS))
GATED = pytest.mark.parametrize(("name", "kind"), [("lstm", nn.LSTM), ("gru", nn.GRU)])


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def network(name: str, outputs: int | None = 2, **options: Any) -> Any:
    """Three inputs, five hidden units, all parameters random and different from zero."""
    model = BUILDS[name](3, 5, outputs, **({"dtype": F64} | options))
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=i + 1) / 2)
    return model


def by_definition(model: Any, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states (T, B, h) and outputs (T, B, O), step by step."""
    B, n = inputs.shape[1], model.hidden
    h, c = model.h_init.expand(B, -1), getattr(model, "c_init", model.h_init).expand(B, -1)
    b = 0 if model.b_h is None else model.b_h
    hidden = []
    for v in inputs.unbind():
        if isinstance(model, MRNN):
            f = {"tanh": torch.tanh, "relu": torch.relu, "sigmoid": torch.sigmoid}[model.nonlinearity]
            e = v @ model.W_vf if model.b_f is None else torch.tanh(v @ model.W_vf) + model.b_f
            h = f((e * (h @ model.W_hf)) @ model.W_fh + v @ model.W_vh + b)
        elif isinstance(model, LSTM):
            a = v @ model.W_vh + h @ model.W_hh + b
            i, f, g, o = a[:, :n], a[:, n : 2 * n], a[:, 2 * n : 3 * n], a[:, 3 * n :]
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        else:
            a, m = v @ model.W_vh + b, h @ model.W_hh
            r, z = (a + m)[:, :n].sigmoid(), (a + m)[:, n : 2 * n].sigmoid()
            inner = m[:, 2 * n :] if model.b_n is None else m[:, 2 * n :] + model.b_n
            h = (1 - z) * torch.tanh(a[:, 2 * n :] + r * inner) + z * h
        hidden.append(h)
    H = torch.stack(hidden)
    outputs = H @ model.W_ho
    return H, outputs if model.b_o is None else outputs + model.b_o


@NAMES
@pytest.mark.parametrize("biases", [True, False])
def test_formula_and_gradient(name: str, biases: bool) -> None:
    model, inputs = network(name, biases=biases), randn(7, 4, 3)
    H, outputs = by_definition(model, inputs)
    assert_close(model(inputs), outputs, **EXACT)
    assert_close(model.hidden_states(inputs), H, **EXACT)
    params = tuple(model.parameters())
    mine = torch.autograd.grad(model(inputs).square().sum(), params)
    assert_close(mine, torch.autograd.grad(outputs.square().sum(), params), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("nonlinearity", ["relu", "sigmoid"])
def test_other_nonlinearities(nonlinearity: str) -> None:
    model, inputs = network("mrnn", nonlinearity=nonlinearity), randn(7, 4, 3)
    assert_close(model(inputs), by_definition(model, inputs)[1], **EXACT)


def test_parameters_and_their_shapes() -> None:
    def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
        return {name: tuple(p.shape) for name, p in model.named_parameters()}

    ends = {"W_ho": (5, 2), "b_o": (2,)}
    gated = {"h_init": (5,), "W_vh": (3, 20), "W_hh": (5, 20), "b_h": (20,)}
    assert shapes(network("lstm")) == gated | {"c_init": (5,)} | ends
    assert (
        shapes(network("gru")) == {"h_init": (5,), "W_vh": (3, 15), "W_hh": (5, 15), "b_h": (15,), "b_n": (5,)} | ends
    )
    multiplicative = {"h_init": (5,), "W_vf": (3, 4), "W_hf": (5, 4), "W_fh": (4, 5), "W_vh": (3, 5), "b_h": (5,)}
    assert shapes(network("mrnn")) == multiplicative | ends
    assert shapes(network("bounded")) == multiplicative | ends | {"b_f": (4,)}


@NAMES
def test_last_output_and_lengths(name: str) -> None:
    every, inputs = network(name), randn(7, 4, 3)
    last = copy.deepcopy(every)
    last.output = "last"
    outputs = every(inputs)
    assert_close(last(inputs), outputs[-1], **EXACT)
    chosen = outputs[LENGTHS - 1, torch.arange(4)]
    assert_close(last(inputs, lengths=LENGTHS), chosen, **EXACT)
    mask = torch.arange(7).unsqueeze(1) < LENGTHS
    assert_close(every(inputs, lengths=LENGTHS)[mask], outputs[mask], **EXACT)
    params = tuple(last.parameters())
    mine = torch.autograd.grad(last(inputs, lengths=LENGTHS).square().sum(), params)
    theirs = torch.autograd.grad(every(inputs)[LENGTHS - 1, torch.arange(4)].square().sum(), tuple(every.parameters()))
    assert_close(mine, theirs, rtol=1e-10, atol=1e-11)


@NAMES
def test_padding_changes_nothing_that_counts(name: str) -> None:
    model, inputs = network(name, output="last"), randn(7, 4, 3)
    other = inputs.clone()
    for b, length in enumerate(LENGTHS):
        other[length:, b] = math.nan
    params = tuple(model.parameters())
    results = [model(x, lengths=LENGTHS) for x in (inputs, other)]
    assert torch.equal(*results)
    for g, e in zip(*(torch.autograd.grad(y.sum(), params) for y in results), strict=True):
        assert torch.equal(g, e)


@NAMES
def test_given_start(name: str) -> None:
    model, inputs = network(name), randn(7, 4, 3)
    start = randn(4, 5, seed=3).tanh()
    first = model(inputs)
    assert_close(model(inputs, h0=start)[:, 1], model(inputs, h0=start[1])[:, 1], **EXACT)
    assert not torch.allclose(model(inputs, h0=start), first)
    with torch.no_grad():
        model.h_init.copy_(start[1])
    assert_close(model(inputs, h0=start)[:, 1], model(inputs)[:, 1], **EXACT)
    if name == "lstm":
        assert not torch.allclose(model(inputs, c0=start), model(inputs))
        assert_close(model(inputs, c0=start)[:, 1], model(inputs, c0=start[1])[:, 1], **EXACT)
    else:
        states = model.hidden_states(inputs)
        assert_close(model.hidden_states(inputs[3:], h0=states[2]), states[3:], **EXACT)


@NAMES
def test_batch_first(name: str) -> None:
    model, turned, inputs = network(name), network(name, batch_first=True), randn(7, 4, 3)
    assert_close(turned(inputs.transpose(0, 1)), model(inputs).transpose(0, 1), **EXACT)
    assert_close(turned.hidden_states(inputs.transpose(0, 1)), model.hidden_states(inputs).transpose(0, 1), **EXACT)


@NAMES
def test_without_readout_the_outputs_are_the_hidden_states(name: str) -> None:
    model, inputs = network(name, outputs=None), randn(7, 4, 3)
    assert model.W_ho is None
    assert_close(model(inputs), model.hidden_states(inputs), **EXACT)
    assert not model.hidden_states(inputs).requires_grad


@GATED
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_from_torch(name: str, kind: type[nn.LSTM], bias: bool, batch_first: bool) -> None:
    torch.manual_seed(1)
    recurrent = kind(3, 5, bias=bias, batch_first=batch_first, dtype=F64)
    readout = nn.Linear(5, 2, bias=not bias, dtype=F64)
    build: Any = LSTM if name == "lstm" else GRU
    model, inputs = build.from_torch(recurrent, readout), randn(7, 4, 3)
    assert_close(model(inputs), readout(recurrent(inputs)[0]), **EXACT)
    assert_close(build.from_torch(recurrent)(inputs), recurrent(inputs)[0], **EXACT)
    last = build.from_torch(recurrent, readout, output="last")(inputs)
    assert_close(last, readout(recurrent(inputs)[0]).select(1 if batch_first else 0, -1), **EXACT)
    assert (model.b_h is None, model.b_o is None) == (not bias, bias)


@GATED
@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("outputs", [2, None])
def test_to_torch_and_back(name: str, kind: type[nn.LSTM], biases: bool, outputs: int | None) -> None:
    model, inputs = network(name, outputs, biases=biases), randn(7, 4, 3)
    recurrent, readout, initial = model.to_torch()
    assert type(recurrent) is kind
    starts = initial if isinstance(initial, tuple) else (initial,)
    expanded = tuple(s.expand(1, 4, 5).contiguous() for s in starts)
    states = recurrent(inputs, expanded if name == "lstm" else expanded[0])[0]
    assert_close(states if readout is None else readout(states), model(inputs), **EXACT)
    back = type(model).from_torch(recurrent, readout)
    for label, parameter in model.named_parameters():
        if not label.endswith("_init"):
            assert_close(back.get_parameter(label), parameter, rtol=0, atol=0)
    with torch.no_grad():
        next(recurrent.parameters()).zero_()
    assert model.W_vh.any()


def test_sparse_initialisation() -> None:
    models: list[Any] = [
        LSTM(40, 100, 60, dtype=F64).sparse_init(7, input_scale=0.25),
        GRU(40, 100, 60, dtype=F64).sparse_init(7, input_scale=0.25),
        MRNN(40, 100, 80, 60, dtype=F64).sparse_init(7, input_scale=0.25),
    ]
    for model in models:
        for name, weight in model.named_parameters():
            if name.startswith("W_"):
                assert torch.equal((weight != 0).sum(0), torch.full((weight.shape[1],), 15)), name
                deviation = 0.25 if name.startswith("W_v") else 15**-0.5
                assert weight[weight != 0].std().item() == pytest.approx(deviation, rel=0.1), name
            elif name.startswith("b_"):
                assert not weight.any()
            else:
                assert weight.std().item() == pytest.approx(1, rel=0.3)


def test_sparse_initialisation_of_few_factors_counts_them() -> None:
    many = torch.cat([MRNN(3, 50, 4, 1).sparse_init(seed).W_fh.reshape(-1) for seed in range(20)])
    assert (many != 0).all()
    assert many.std().item() == pytest.approx(1 / 2, rel=0.05)


def test_bounded_factors_start_as_a_simple_recurrence() -> None:
    model = MRNN(3, 5, 4, 2, bounded_factors=True)
    for started in (model, model.sparse_init(0)):
        assert started.b_f is not None
        assert torch.equal(started.b_f, torch.ones(4))


def test_forget_bias() -> None:
    model = LSTM(3, 5, 2).sparse_init(0, forget_bias=1.5)
    assert model.b_h is not None
    assert_close(model.b_h.detach().view(4, 5).sum(1), torch.tensor([0.0, 7.5, 0.0, 0.0]))
    with pytest.raises(ValueError, match=r"forget_bias is 1\.0, but the network has no biases"):
        LSTM(3, 5, 2, biases=False).sparse_init(0, forget_bias=1.0)


@NAMES
def test_sparse_initialisation_depends_on_the_seed_alone(name: str) -> None:
    def weights(seed: int | torch.Generator, dtype: torch.dtype) -> list[Tensor]:
        return [p.detach().clone() for p in BUILDS[name](4, 20, 3, dtype=dtype).sparse_init(seed).parameters()]

    torch.manual_seed(0)
    first = weights(5, F64)
    torch.manual_seed(1)
    for again in (weights(5, F64), weights(torch.Generator().manual_seed(5), F64)):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(a.float(), b) for a, b in zip(first, weights(5, torch.float32), strict=True))
    assert not torch.equal(weights(6, F64)[1], first[1])


@NAMES
def test_structural_damping_finds_the_hidden_states(name: str) -> None:
    model, inputs = network(name), randn(7, 4, 3)
    with structural.collecting() as states:
        model(inputs, lengths=LENGTHS)
    (state,) = states
    hidden = model.hidden_states(inputs)
    mask = (torch.arange(7).unsqueeze(1) < LENGTHS).unsqueeze(-1)
    where = mask.expand(7, 4, 5)
    marked = torch.atanh(hidden) if name in ("mrnn", "bounded") else hidden
    assert_close(state.preactivations[where], marked[where], rtol=1e-8, atol=1e-9)
    curvature = 1 - hidden**2 if name in ("mrnn", "bounded") else torch.ones_like(hidden)
    assert_close(state.weight, curvature * mask / 4, rtol=1e-9, atol=1e-12)


@NAMES
def test_trains(name: str) -> None:
    model = BUILDS[name](2, 12, 1, output="last").sparse_init(0)
    inputs = torch.randn(6, 30, 2, generator=torch.Generator().manual_seed(1))
    targets = (inputs[..., 0] * inputs[..., 1]).sum(0).tanh().unsqueeze(1)
    optimizer = hfopt.HessianFree(model.parameters(), structural=0.1)
    losses = [float(optimizer.step(lambda: nn.functional.mse_loss(model(inputs), targets))) for _ in range(6)]
    assert losses[-1] < 0.3 * losses[0]


@NAMES
def test_autocast(name: str) -> None:
    model, inputs = network(name).float(), randn(7, 4, 3).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(inputs)
    assert outputs.dtype == torch.bfloat16
    outputs.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    assert (outputs.float() - model(inputs)).norm() <= 0.03 * model(inputs).norm()


@pytest.mark.slow
@pytest.mark.parametrize("name", [*BUILDS, "rnn"])
@pytest.mark.parametrize("output", ["all", "last"])
def test_compiled(name: str, output: str) -> None:
    model: Any = RNN(3, 5, 2, output=output, dtype=F64) if name == "rnn" else network(name, output=output)
    inputs = randn(7, 4, 3)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(inputs), model(inputs), **EXACT)
    params = tuple(model.parameters())
    mine = torch.autograd.grad(compiled(inputs).square().sum(), params)
    assert_close(mine, torch.autograd.grad(model(inputs).square().sum(), params), **EXACT)


@NAMES
def test_state_dict_goes_round(name: str) -> None:
    model, other, inputs = network(name), BUILDS[name](3, 5, 2, dtype=F64), randn(7, 4, 3)
    assert isinstance(model, Recurrent)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(inputs), model(inputs))
    assert "batch_first=False" in repr(model)


@NAMES
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inputs": 0}, "inputs is 0"),
        ({"hidden": -1}, "hidden is -1"),
        ({"outputs": 0}, "outputs is 0"),
        ({"output": "first"}, "output is 'first'"),
    ],
)
def test_bad_options(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BUILDS[name](**({"inputs": 3, "hidden": 5, "outputs": 2} | arguments))


@NAMES
@pytest.mark.parametrize(
    ("given", "options", "error", "message"),
    [
        (torch.zeros(7, 3), {}, ValueError, r"inputs has shape \(7, 3\); it is \(T, B, V\) with V = 3"),
        (torch.zeros(7, 4, 2), {}, ValueError, "inputs has shape"),
        (torch.zeros(7, 4, 3, dtype=torch.long), {}, TypeError, "inputs has dtype torch.int64"),
        (torch.zeros(7, 4, 3), {}, TypeError, "inputs has dtype torch.float32"),
        (randn(7, 4, 3), {"h0": randn(3, 5)}, ValueError, r"h0 has shape \(3, 5\); here it is \(4, 5\)"),
        (randn(7, 4, 3), {"lengths": torch.tensor([7, 1])}, ValueError, r"lengths has shape \(2,\)"),
        (randn(7, 4, 3), {"lengths": torch.tensor([7, 0, 1, 2])}, ValueError, "lengths runs from 0 to 7"),
        (randn(7, 4, 3), {"lengths": torch.ones(4)}, TypeError, "lengths is a tensor of integers"),
    ],
)
def test_bad_inputs(name: str, given: Tensor, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        network(name)(given, **options)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: LSTM.from_torch(nn.GRU(3, 5)), TypeError, "recurrent is a GRU; only torch.nn.LSTM"),  # type: ignore[arg-type]
        (lambda: GRU.from_torch(nn.RNN(3, 5)), TypeError, "recurrent is a RNN; only torch.nn.GRU"),  # type: ignore[arg-type]
        (lambda: LSTM.from_torch(nn.LSTM(3, 5, 2)), ValueError, "2 layer"),
        (lambda: GRU.from_torch(nn.GRU(3, 5, bidirectional=True)), ValueError, "bidirectional=True"),
        (lambda: LSTM.from_torch(nn.LSTM(3, 5, proj_size=2)), ValueError, "proj_size 2"),
        (lambda: GRU.from_torch(nn.GRU(3, 5), nn.Linear(4, 1)), ValueError, "readout takes 4 .*5 hidden"),
        (lambda: MRNN(3, 5, 0, 2), ValueError, "factors is 0"),
        (lambda: MRNN(3, 5, 4, 2, nonlinearity="identity"), ValueError, "nonlinearity is 'identity'"),
        (lambda: MRNN(3, 5, 4, 2).sparse_init(0, connections=0), ValueError, "connections is 0"),
        (lambda: LSTM(3, 5, 2).sparse_init(0, scale=-1.0), ValueError, "scale"),
    ],
)
def test_bad_conversions_and_starts(build: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()
