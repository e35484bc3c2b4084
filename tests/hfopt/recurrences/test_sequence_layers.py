"""The layers with torch's weights: torch's numbers, lengths, starts, autocast, compilers, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.testing import assert_close

from hfopt.recurrences import gru_layer, lstm_layer, mrnn_layer
from tests.hfopt.recurrences.plain import FUNCTIONS, Calls, like

EXACT = {"rtol": 1e-11, "atol": 1e-12}
T, B, V, H = 6, 4, 3, 5
F64 = torch.float64
LENGTHS = torch.tensor([3, 6, 1, 5])


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def module(kind: type[nn.LSTM | nn.GRU], bias: bool = True, dtype: torch.dtype = F64) -> nn.LSTM | nn.GRU:
    torch.manual_seed(3)
    return kind(V, H, bias=bias, dtype=dtype)


def weights(recurrent: nn.Module) -> tuple[Tensor, ...]:
    """(weight_ih, weight_hh) and the biases, if there are any."""
    return tuple(recurrent.parameters())


def mine(recurrent: nn.Module, X: Tensor, starts: tuple[Tensor, ...], **options: Any) -> tuple[Tensor, ...]:
    """Outputs and final states of the layer with these weights."""
    W = weights(recurrent)
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    named = dict(zip(names, W, strict=False)) | dict(zip(("h0", "c0"), starts, strict=False)) | options
    if isinstance(recurrent, nn.LSTM):
        outputs, (h, c) = lstm_layer(X, **named)
        return outputs, h, c
    return gru_layer(X, **named)


def theirs(recurrent: nn.Module, X: Any, starts: tuple[Tensor, ...]) -> tuple[Any, ...]:
    states = tuple(s.unsqueeze(0) for s in starts)
    if isinstance(recurrent, nn.LSTM):
        outputs, (h, c) = recurrent(X, states or None)
        return outputs, h[0], c[0]
    outputs, h = recurrent(X, *states)
    return outputs, h[0]


def starts_of(recurrent: nn.Module) -> tuple[Tensor, ...]:
    return tuple(randn(B, H, seed=k) for k in range(2 if isinstance(recurrent, nn.LSTM) else 1))


KINDS = pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])


@KINDS
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("started", [True, False])
def test_torchs_numbers_and_gradients(kind: type[nn.LSTM], bias: bool, started: bool) -> None:
    recurrent, X = module(kind, bias), randn(T, B, V).requires_grad_()
    starts = tuple(s.requires_grad_() for s in starts_of(recurrent)) if started else ()
    ours, expected = mine(recurrent, X, starts), theirs(recurrent, X, starts)
    assert_close(ours, expected, **EXACT)
    at = (X, *starts, *weights(recurrent))
    u = like(expected, 5)
    assert_close(torch.autograd.grad(ours, at, u), torch.autograd.grad(expected, at, u), **EXACT)


@KINDS
def test_lengths_are_those_of_packed_sequences(kind: type[nn.LSTM]) -> None:
    recurrent, X = module(kind), randn(T, B, V).requires_grad_()
    starts = tuple(s.requires_grad_() for s in starts_of(recurrent))
    ours = mine(recurrent, X, starts, lengths=LENGTHS)
    packed, *states = theirs(recurrent, pack_padded_sequence(X, LENGTHS, enforce_sorted=False), starts)
    expected = (pad_packed_sequence(packed)[0], *states)
    assert_close(ours, expected, **EXACT)
    at = (X, *starts, *weights(recurrent))
    u = like(expected, 5)
    assert_close(torch.autograd.grad(ours, at, u), torch.autograd.grad(expected, at, u), **EXACT)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, None])
def test_what_is_beyond_the_end_does_not_matter(kind: type[nn.LSTM] | None) -> None:
    X = randn(T, B, V)
    spoilt = torch.where(torch.arange(T).unsqueeze(1) < LENGTHS, 0.0, torch.nan).unsqueeze(-1) + X

    def results(inputs: Tensor) -> tuple[Tensor, ...]:
        if kind is None:
            at = tuple(w.clone().requires_grad_() for w in multiplicative()[1:])
            outputs: tuple[Tensor, ...] = mrnn_layer(inputs, *at, lengths=LENGTHS)
        else:
            recurrent = module(kind)
            at, outputs = weights(recurrent), mine(recurrent, inputs, starts_of(recurrent), lengths=LENGTHS)
        return *outputs, *torch.autograd.grad(sum(y.square().sum() for y in outputs), at)

    assert_close(results(spoilt), results(X), rtol=0, atol=0)


@KINDS
def test_one_start_that_is_learned(kind: type[nn.LSTM]) -> None:
    recurrent, X = module(kind), randn(T, B, V)
    one = tuple(s[0].clone().requires_grad_() for s in starts_of(recurrent))
    ours, expected = mine(recurrent, X, one), theirs(recurrent, X, tuple(s.expand(B, H).contiguous() for s in one))
    assert_close(ours, expected, **EXACT)
    u = like(expected, 5)
    assert_close(torch.autograd.grad(ours, one, u), torch.autograd.grad(expected, one, u), **EXACT)


@pytest.mark.parametrize("names", [("bias_ih",), ("bias_hh",)])
@KINDS
def test_one_bias_alone(kind: type[nn.LSTM], names: tuple[str, ...]) -> None:
    recurrent, X = module(kind), randn(T, B, V)
    absent = {"bias_ih", "bias_hh"} - set(names)
    ours = mine(recurrent, X, (), **dict.fromkeys(absent))
    with torch.no_grad():
        for name in absent:
            getattr(recurrent, f"{name}_l0").zero_()
    assert_close(ours, theirs(recurrent, X, ()), **EXACT)


def multiplicative() -> tuple[Tensor, ...]:
    """(inputs, W_xf, W_hf, W_fh, W_xh, h0, bias)."""
    F = 4
    return randn(T, B, V), randn(V, F), randn(H, F), randn(F, H), randn(V, H), randn(B, H), randn(H)


@pytest.mark.parametrize("f", ["tanh", "relu", "sigmoid"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_multiplicative_layer(f: str, bias: bool, lengths: Tensor | None) -> None:
    at = tuple((x / 2).requires_grad_() for x in multiplicative())
    at = at if bias else at[:-1]
    X, Wxf, Whf, Wfh, Wxh, h0, *b = at
    outputs, final = mrnn_layer(*at[:6], *b, nonlinearity=f, lengths=lengths)
    projected = X @ Wxh + (b[0] if b else 0)
    states, h = [], h0
    for x, p in zip(X.unbind(), projected.unbind(), strict=True):
        h = FUNCTIONS[f](((x @ Wxf) * (h @ Whf)) @ Wfh + p)
        states.append(h)
    expected = torch.stack(states)
    last = expected[-1]
    if lengths is not None:
        last = expected[lengths - 1, torch.arange(B)]
        expected = expected * (torch.arange(T).unsqueeze(1) < lengths).unsqueeze(-1)
    assert_close((outputs, final), (expected, last), **EXACT)
    u = like((expected, last), 5)
    ours = torch.autograd.grad((outputs, final), at, u)
    assert_close(ours, torch.autograd.grad((expected, last), at, u), **EXACT)


def calls_of(layer: str, dtype: torch.dtype) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    """A function of the weights, and weights."""
    if layer == "mrnn":
        X, *at = (x.to(dtype) / 2 for x in multiplicative())
        return lambda *w: mrnn_layer(X, *w)[0], tuple(w.requires_grad_() for w in at)
    recurrent, X = module(nn.LSTM if layer == "lstm" else nn.GRU, dtype=dtype), randn(T, B, V).to(dtype)
    function = lstm_layer if layer == "lstm" else gru_layer
    return lambda *w: function(X, *w)[0], weights(recurrent)


LAYERS = pytest.mark.parametrize("layer", ["lstm", "gru", "mrnn"])


@LAYERS
def test_autocast(layer: str) -> None:
    function, at = calls_of(layer, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = function(*at)
    assert outputs.dtype == torch.bfloat16
    expected = function(*at)
    assert (outputs.float() - expected).norm() <= 0.03 * expected.norm()
    gradients = torch.autograd.grad(outputs.float().sum(), at)
    assert all(g.dtype == torch.float32 for g in gradients)
    for g, e in zip(gradients, torch.autograd.grad(expected.sum(), at), strict=True):
        assert (g - e).norm() <= 0.06 * e.norm()


@pytest.mark.slow
@LAYERS
def test_compiled(layer: str) -> None:
    function, at = calls_of(layer, F64)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *w: function(*w).sin(), fullgraph=True, backend="aot_eager")
    value = compiled(*at)
    assert_close(value, function(*at).sin(), **EXACT)
    with Calls() as calls:
        gradients = torch.autograd.grad(value.sum(), at)
    assert calls.recurrent == {"hfopt::sequence_adjoint": 1}
    assert_close(gradients, torch.autograd.grad(function(*at).sin().sum(), at), **EXACT)


@LAYERS
def test_compiled_with_lengths(layer: str) -> None:
    X, *at = multiplicative()
    gated = weights(module(nn.LSTM if layer == "lstm" else nn.GRU))

    def function(x: Tensor, lengths: Tensor) -> Tensor:
        if layer == "mrnn":
            return mrnn_layer(x, *at, lengths=lengths)[0]
        return (lstm_layer if layer == "lstm" else gru_layer)(x, *gated, lengths=lengths)[0]

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_close(compiled(X, LENGTHS), function(X, LENGTHS), **EXACT)


@LAYERS
def test_shapes_on_the_meta_device(layer: str) -> None:
    function: Callable[..., Any] = {"lstm": lstm_layer, "gru": gru_layer, "mrnn": mrnn_layer}[layer]
    at = (
        multiplicative()
        if layer == "mrnn"
        else (randn(T, B, V), *weights(module(nn.LSTM if layer == "lstm" else nn.GRU)))
    )
    outputs, state = function(*(x.to("meta") for x in at), lengths=LENGTHS.to("meta"))
    states = state if isinstance(state, tuple) else (state,)
    assert outputs.device.type == "meta"
    assert outputs.shape == (T, B, H)
    assert all(s.shape == (B, H) for s in states)


X, STATE = torch.zeros(T, B, V), torch.zeros(B, H)
LSTM = {"weight_ih": torch.zeros(4 * H, V), "weight_hh": torch.zeros(4 * H, H), "bias_ih": torch.zeros(4 * H)}
GRU = {"weight_ih": torch.zeros(3 * H, V), "weight_hh": torch.zeros(3 * H, H), "bias_hh": torch.zeros(3 * H)}
MRNN = {
    "weight_xf": torch.zeros(V, 2),
    "weight_hf": torch.zeros(H, 2),
    "weight_fh": torch.zeros(2, H),
    "weight_xh": torch.zeros(V, H),
}
EACH = [(lstm_layer, LSTM), (gru_layer, GRU), (mrnn_layer, MRNN)]
REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"inputs": X[0]}, ValueError, r"inputs has shape \(4, 3\); it is \(T, B, V\)"),
    ({"inputs": X[:0]}, ValueError, "inputs has shape .*none of them 0"),
    ({"inputs": X[..., :2]}, ValueError, r"weight_(ih|xf) has shape .* with 2 inputs"),
    ({"inputs": X.long()}, TypeError, "inputs has dtype torch.int64"),
    ({"inputs": X.tolist()}, TypeError, "inputs is a list, not a tensor"),
    ({"inputs": X.double()}, TypeError, r"weight_\w+ is torch.float32 .*inputs is torch.float64"),
    ({"inputs": X.to("meta")}, TypeError, r"weight_\w+ is torch.float32 on cpu, but inputs is torch.float32 on meta"),
    ({"h0": STATE[:2]}, ValueError, r"h0 has shape \(2, 5\); here it is \(4, 5\) or \(5,\)"),
    ({"h0": STATE.unsqueeze(0)}, ValueError, r"h0 has shape \(1, 4, 5\)"),
    ({"h0": STATE.double()}, TypeError, "h0 is torch.float64"),
    ({"h0": STATE.to("meta")}, TypeError, "h0 is torch.float32 on meta"),
    ({"lengths": torch.ones(B)}, TypeError, "lengths is a tensor of integers"),
    ({"lengths": torch.ones(3, dtype=torch.long)}, ValueError, r"lengths has shape \(3,\); there are 4 sequences"),
    ({"lengths": torch.tensor([0, 1, 2, 3])}, ValueError, "lengths runs from 0 to 3.*1 to 6"),
    ({"lengths": torch.tensor([7, 1, 2, 3])}, ValueError, "lengths runs from 1 to 7"),
]


@pytest.mark.parametrize(("layer", "right"), EACH)
@pytest.mark.parametrize(("wrong", "error", "message"), REFUSED)
def test_errors_name_the_argument(
    layer: Callable[..., Any], right: dict[str, Tensor], wrong: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        layer(**({"inputs": X} | right | wrong))


@pytest.mark.parametrize(("layer", "right"), EACH)
def test_every_weight_of_another_shape_is_named(layer: Callable[..., Any], right: dict[str, Tensor]) -> None:
    for name, weight in right.items():
        for wrong in (weight[:-1], weight.unsqueeze(0), weight[:0]):
            with pytest.raises(ValueError, match=rf"weight_hf|{name} has shape"):
                layer(**({"inputs": X} | right | {name: wrong}))
        with pytest.raises(TypeError, match=f"{name} is torch.float64"):
            layer(**({"inputs": X} | right | {name: weight.double()}))


@pytest.mark.parametrize(
    ("layer", "right", "wrong", "message"),
    [
        (lstm_layer, LSTM, {"c0": STATE[:, :2]}, r"c0 has shape \(4, 2\)"),
        (lstm_layer, LSTM, {"weight_hh": GRU["weight_hh"]}, r"weight_hh has shape \(15, 5\); it is \(4 h, h\)"),
        (gru_layer, GRU, {"bias_ih": torch.zeros(5)}, r"bias_ih has shape \(5,\).*\(15,\)"),
        (mrnn_layer, MRNN, {"nonlinearity": "identity"}, "nonlinearity is 'identity'.*'tanh', 'relu', 'sigmoid'"),
        (mrnn_layer, MRNN, {"bias": torch.zeros(4)}, r"bias has shape \(4,\)"),
        (mrnn_layer, MRNN, {"weight_hf": torch.zeros(5)}, r"weight_hf has shape \(5,\); it is a matrix"),
    ],
)
def test_more_errors(layer: Callable[..., Any], right: dict[str, Tensor], wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer(**({"inputs": X} | right | wrong))


@pytest.mark.parametrize("layer", [lstm_layer, gru_layer])
@pytest.mark.parametrize("missing", ["inputs", "weight_ih", "weight_hh"])
def test_a_missing_argument_is_named(layer: Callable[..., object], missing: str) -> None:
    gates = 4 if layer is lstm_layer else 3
    given: dict[str, torch.Tensor | None] = {
        "inputs": torch.zeros(2, 3, 1),
        "weight_ih": torch.zeros(gates * 2, 1),
        "weight_hh": torch.zeros(gates * 2, 2),
    }
    layer(**given)
    given[missing] = None
    with pytest.raises(TypeError, match=f"{missing} is a NoneType"):
        layer(**given)
