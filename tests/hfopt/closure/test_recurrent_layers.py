"""torch's recurrent layers replaced during a step: the same function, the same gradients, exact products."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.overrides import TorchFunctionMode

import hfopt
from hfopt.closure import recurrent_layers
from hfopt.closure.trace import differentiate, evaluate, trace
from tests.hfopt.tools import DENSE, SUMS, dense_hessian, flat, hessian, matrix, randn, relative, rounding, theta

F64 = torch.float64
KINDS: dict[str, Callable[..., nn.RNNBase]] = {
    "rnn_tanh": nn.RNN,
    "rnn_relu": lambda *sizes, **options: nn.RNN(*sizes, nonlinearity="relu", **options),
    "lstm": nn.LSTM,
    "gru": nn.GRU,
}
SMOOTH = [kind for kind in KINDS if kind != "rnn_relu"]


class Replacing(TorchFunctionMode):
    """Computes every recurrent call by hfopt's recurrences, or fails."""

    calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in recurrent_layers.RECURRENT:
            found = recurrent_layers.understood(recurrent_layers.RECURRENT[func], args, kwargs or {})
            assert found is not None
            self.calls += 1
            return recurrent_layers.compute(found)
        return func(*args, **(kwargs or {}))


def layer(kind: str, *sizes: int, seed: int = 0, **options: Any) -> nn.RNNBase:
    torch.manual_seed(seed)
    return KINDS[kind](*sizes, dtype=F64, **options)


def tensors(result: Any) -> list[Tensor]:
    """All floating-point tensors of a layer's result, packed or not."""
    found: list[Tensor] = []
    for part in result if isinstance(result, tuple) else (result,):
        if isinstance(part, Tensor):
            found += [part] if part.is_floating_point() else []
        elif part is not None:
            found += tensors(tuple(part))
    return found


def compare(module: nn.RNNBase, make: Callable[[], tuple[Any, list[Tensor]]], seed: int = 0) -> None:
    """Results and gradients of all parameters and inputs are those of torch; ``make`` gives (arguments, leaves)."""

    def run(mode: bool) -> tuple[Any, list[Tensor], Tensor]:
        torch.manual_seed(seed)
        arguments, leaves = make()
        if mode:
            with Replacing() as replacing:
                result = module(*arguments)
            assert replacing.calls == 1
        else:
            result = module(*arguments)
        outputs = tensors(result)
        weighted = sum(
            ((o * randn(*o.shape, seed=i + 5)).sum() for i, o in enumerate(outputs)), torch.zeros((), dtype=F64)
        )
        grads = torch.autograd.grad(weighted, [*module.parameters(), *leaves])
        return result, [*outputs, *grads], torch.get_rng_state()

    theirs, expected, their_draws = run(False)
    ours, found, our_draws = run(True)
    assert type(ours) is type(theirs)
    assert type(ours[0]) is type(theirs[0])
    if isinstance(theirs[0], PackedSequence):
        for a, b in zip(ours[0][1:], theirs[0][1:], strict=True):
            assert (a is None and b is None) or torch.equal(a, b)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
    assert torch.equal(our_draws, their_draws)


OPTIONS = st.fixed_dictionaries(
    {
        "num_layers": st.integers(1, 3),
        "bias": st.booleans(),
        "bidirectional": st.booleans(),
        "batch_first": st.booleans(),
        "dropout": st.sampled_from([0.0, 0.4, 1.0]),
    }
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:dropout option adds dropout:UserWarning")
@settings(max_examples=25, deadline=None)
@given(
    options=OPTIONS,
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(1, 5)),
    form=st.sampled_from(["batched", "unbatched", "packed", "packed, unsorted"]),
    start=st.booleans(),
    train=st.booleans(),
    data=st.data(),
)
def test_every_option_means_what_it_means_to_torch(
    kind: str,
    options: dict[str, Any],
    sizes: tuple[int, int, int, int],
    form: str,
    start: bool,
    train: bool,
    data: st.DataObject,
) -> None:
    T, B, V, h = sizes
    module = layer(kind, V, h, **options).train(train)
    parts = options["num_layers"] * (2 if options["bidirectional"] else 1)
    lengths = data.draw(st.lists(st.integers(1, T), min_size=B, max_size=B).map(lambda x: [T, *x[1:]]))
    if form == "packed":
        lengths.sort(reverse=True)

    def make() -> tuple[Any, list[Tensor]]:
        shape = (T, V) if form == "unbatched" else (B, T, V) if options["batch_first"] else (T, B, V)
        x = randn(*shape, seed=1).requires_grad_()
        inputs: Any = x
        if form.startswith("packed"):
            inputs = pack_padded_sequence(x, lengths, options["batch_first"], enforce_sorted=form == "packed")
        if not start:
            return (inputs,), [x]
        states = [randn(parts, *(() if form == "unbatched" else (B,)), h, seed=i).requires_grad_() for i in (2, 3)]
        if kind == "lstm":
            return (inputs, tuple(states)), [x, *states]
        return (inputs, states[0]), [x, states[0]]

    compare(module, make)


class Net(nn.Module):
    """A recurrent layer with a readout of every step and of the final states."""

    def __init__(self, kind: str, *sizes: int, **options: Any) -> None:
        super().__init__()
        self.recurrent = layer(kind, *sizes, **options)
        h = sizes[1] * (2 if options.get("bidirectional") else 1)
        self.readout = nn.Linear(h, 2, dtype=F64)

    def forward(self, x: Any) -> Tensor:
        H, states = self.recurrent(x)
        if isinstance(H, PackedSequence):
            H, _ = pad_packed_sequence(H)
        final = states[1] if isinstance(states, tuple) else states
        return cast(Tensor, self.readout(H)) + final.sum((0, 2)).unsqueeze(-1)


def closure(net: nn.Module, x: Any, y: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        net.zero_grad()
        loss = F.mse_loss(net(x), y)
        if torch.is_grad_enabled():
            loss.backward()  # type: ignore[no-untyped-call]
        return loss

    return run


def calls(monkeypatch: pytest.MonkeyPatch) -> list[recurrent_layers.Call]:
    """Every call that is replaced from now on."""
    seen: list[recurrent_layers.Call] = []
    compute = recurrent_layers.compute

    def noted(c: recurrent_layers.Call) -> tuple[Tensor, ...]:
        seen.append(c)
        return compute(c)

    monkeypatch.setattr(recurrent_layers, "compute", noted)
    return seen


def dense(net: nn.Module, outputs: Callable[[nn.Module], Tensor], loss: Callable[[Tensor], Tensor]) -> Tensor:
    """``J' H_L J`` (P, P) of torch's own layer, one row of J at a time: packed sequences have no batched backward."""
    z, params = outputs(net), list(net.parameters())
    grads = [torch.autograd.grad(e, params, retain_graph=True, allow_unused=True) for e in z.reshape(-1)]
    rows = [[torch.zeros_like(p) if g is None else g for g, p in zip(gs, params, strict=True)] for gs in grads]
    J = torch.stack([flat(row) for row in rows])
    return J.T @ hessian(loss, z) @ J


STACKED = {"num_layers": 2, "bidirectional": True}


@pytest.mark.quick(
    where=lambda kind, policy, packed: kind == "lstm" or (policy == "recompute" and packed == (kind == "gru"))
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("policy", "packed"),
    # torch.func.linearize cannot trace what torch does with packed sequences.
    [
        ("double-backward", False),
        ("linearize", False),
        ("recompute", False),
        ("double-backward", True),
        ("recompute", True),
    ],
)
def test_products_are_exact(kind: str, policy: str, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net(kind, 2, 2, **STACKED)
    x: Any = randn(12, 3, 2, seed=1)
    y = randn(12, 3, 2, seed=2)
    if packed:
        x = pack_padded_sequence(x, [12, 9, 4])
    seen = calls(monkeypatch)
    op = hfopt.GaussNewton(closure(net, x, y), net.parameters(), linearisation=policy)
    assert seen
    expected = dense(net, lambda m: m(x), lambda z: F.mse_loss(z.view(12, 3, 2), y))
    vectors = randn(op.shape[0], 5, seed=3)
    for v in vectors.unbind(1):
        assert relative(op @ v, expected @ v) < SUMS
    assert relative(op @ vectors, expected @ vectors) < SUMS
    grads = torch.autograd.grad(F.mse_loss(net(x), y), list(net.parameters()))
    assert relative(op.gradient, flat(grads)) < SUMS


@pytest.mark.parametrize("kind", KINDS)
def test_hessians_are_exact(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net(kind, 2, 2)
    x, y = randn(12, 2, 2, seed=1), randn(12, 2, 2, seed=2)
    seen = calls(monkeypatch)
    op = hfopt.Hessian(closure(net, x, y), net.parameters())
    assert bool(seen) == recurrent_layers.REPLACEMENTS[kind].hessian
    assert relative(matrix(op), dense_hessian(net, lambda m: F.mse_loss(m(x), y))) < DENSE


@pytest.mark.quick(where=lambda kind, curvature: kind == "lstm" or curvature == "gauss-newton")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("curvature", ["gauss-newton", "fisher", "hessian"])
def test_steps_are_those_without_replacement(kind: str, curvature: str, monkeypatch: pytest.MonkeyPatch) -> None:
    T = recurrent_layers.SHORTEST
    x, y = randn(T, 6, 2, seed=1), randn(T, 6, 2, seed=2)
    found = []
    seen = calls(monkeypatch)
    for replace in (True, False):
        net = Net(kind, 2, 4, num_layers=2, dropout=0.3)
        torch.manual_seed(3)
        cg = hfopt.CG(max_iterations=5)
        optimizer = hfopt.HessianFree(net.parameters(), curvature=curvature, cg=cg, replace_recurrences=replace)
        for _ in range(2):
            optimizer.step(closure(net, x, y))
        found.append((theta(net), [s.new_loss for s in optimizer.stats]))
        assert bool(seen) == (replace and (curvature != "hessian" or recurrent_layers.REPLACEMENTS[kind].hessian))
        seen.clear()
    # Conjugate gradients multiply errors of rounding by ten or so in each of five iterations.
    bound = rounding(T, 10**5)
    assert found[0][1] == pytest.approx(found[1][1], rel=bound)
    assert relative(found[0][0], found[1][0]) < bound


@pytest.mark.parametrize("kind", SMOOTH)
@pytest.mark.parametrize("steps", [3, 12])
def test_structural_damping_finds_the_hidden_states_of_torchs_layers(kind: str, steps: int) -> None:
    net = Net(kind, 2, 3)
    lengths = [steps, 2]
    x = pack_padded_sequence(randn(steps, 2, 2, seed=1), lengths)
    y = randn(steps, 2, 2, seed=2)
    op = hfopt.GaussNewton(closure(net, x, y), net.parameters(), structural=True)

    def hidden(m: nn.Module) -> Tensor:
        states, _ = pad_packed_sequence(m.recurrent(x)[0])  # type: ignore[operator, union-attr]
        # tanh units: D'' = 1 - h^2 in a and da = dh / (1 - h^2); LSTM and GRU: squared distance of h.
        return cast(Tensor, states)

    H = hidden(net).detach()
    weight = 1 / (1 - H**2) if kind == "rnn_tanh" else torch.ones_like(H)
    valid = torch.arange(steps).unsqueeze(1) < torch.tensor(lengths)
    weight = (weight * valid.unsqueeze(-1) / 2).reshape(-1)
    expected = dense(net, hidden, lambda z: 0.5 * (weight * z.reshape(-1) ** 2).sum())
    for v in randn(5, op.shape[0], seed=3):
        assert relative(op.structural_product(v), expected @ v) < SUMS


@pytest.mark.parametrize("kind", SMOOTH)
def test_structural_damping_of_stacked_layers_trains(kind: str) -> None:
    x, y = randn(12, 6, 2, seed=1), randn(12, 6, 2, seed=2)
    net = Net(kind, 2, 4, num_layers=2)
    optimizer = hfopt.HessianFree(net.parameters(), structural=0.1)
    for _ in range(3):
        optimizer.step(closure(net, x, y))
    assert optimizer.stats[-1].new_loss < optimizer.stats[0].loss
    plain = hfopt.HessianFree(net.parameters(), structural=0.1, replace_recurrences=False)
    with pytest.raises(hfopt.ClosureError, match="no hidden state was marked"):
        plain.step(closure(net, x, y))


def test_dropout_between_layers_is_one_function_within_a_step() -> None:
    """All runs of a step see the mask that torch itself would have drawn."""
    net = Net("rnn_tanh", 2, 4, num_layers=2, dropout=0.5)
    x, y = randn(12, 6, 2, seed=1), randn(12, 6, 2, seed=2)
    run = closure(net, x, y)
    torch.manual_seed(5)
    with torch.no_grad():
        expected = run()
    torch.manual_seed(5)
    with torch.random.fork_rng():
        seen = trace(run)
    assert float(seen.total.detach()) == pytest.approx(float(expected), rel=SUMS)
    torch.manual_seed(5)
    assert float(evaluate(run)) == pytest.approx(float(expected), rel=SUMS)


def test_only_products_and_structural_damping_replace_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net("rnn_tanh", 2, 4)
    run = closure(net, randn(12, 6, 2, seed=1), randn(12, 6, 2, seed=2))
    seen = calls(monkeypatch)
    evaluate(run)
    differentiate(run, list(net.parameters()))
    assert seen == []
    with recurrent_layers.replacing(False):
        trace(run)
    assert seen == []
    trace(run)
    assert len(seen) == 1
    trace(closure(net, randn(3, 6, 2, seed=1), randn(3, 6, 2, seed=2)))
    assert len(seen) == 1


def cell_with_projection() -> tuple[nn.Module, Any]:
    return nn.LSTM(2, 5, proj_size=3, dtype=F64), (randn(12, 3, 2),)


def half() -> tuple[nn.Module, Any]:
    return nn.RNN(2, 5, dtype=torch.bfloat16), (randn(12, 3, 2).bfloat16(),)


@pytest.mark.parametrize("make", [cell_with_projection, half])
def test_what_is_not_understood_stays_with_torch(
    make: Callable[[], tuple[nn.Module, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    module, arguments = make()
    seen = calls(monkeypatch)
    trace(
        lambda: F.mse_loss(module(*arguments)[0], torch.zeros(12, 3, module(*arguments)[0].shape[2]).to(arguments[0]))
    )
    assert seen == []


@pytest.mark.parametrize(
    ("inputs", "start", "message"),
    [
        (randn(12, 3, 4), None, "input.size"),
        (randn(12, 3, 2), randn(1, 2, 5), "hidden size"),
        (randn(12, 3, 2, dtype=torch.float32), None, "dtype|type"),
    ],
)
def test_wrong_arguments_meet_torchs_own_messages(inputs: Tensor, start: Tensor | None, message: str) -> None:
    module = nn.RNN(2, 5, dtype=F64)
    with pytest.raises((RuntimeError, ValueError), match=message):
        trace(lambda: module(inputs, start)[0].square().sum())


def test_functions_called_by_hand_with_keywords_stay_with_torch() -> None:
    module = nn.RNN(2, 5, dtype=F64)
    x, h = randn(12, 3, 2), torch.zeros(1, 3, 5, dtype=F64)
    weights = list(module.parameters())
    assert (
        recurrent_layers.understood("rnn_tanh", (x, h, weights, True, 1, 0.0, True, False), {"batch_first": False})
        is None
    )
    assert recurrent_layers.understood("rnn_tanh", (x, h, weights, True, 1, 0.0, True, False, False), {}) is not None
    growing = (x[:, 0], torch.tensor([5, 7]), h, weights, True, 1, 0.0, True, False)
    assert recurrent_layers.understood("rnn_tanh", growing, {}) is None


@pytest.mark.parametrize("kind", ["rnn_tanh", "rnn_relu"])
def test_under_autocast_results_have_torchs_type(kind: str) -> None:
    torch.manual_seed(0)
    module = KINDS[kind](2, 5)
    x = randn(12, 3, 2, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = tensors(module(x))
        with Replacing():
            ours = tensors(module(x))
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)


def test_under_autocast_gated_layers_stay_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module = nn.GRU(2, 5)
    x = randn(12, 3, 2, dtype=torch.float32)
    seen = calls(monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        trace(lambda: F.mse_loss(module(x)[0].float(), torch.zeros(12, 3, 5)))
    assert seen == []


def test_the_replacement_is_logged_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recurrent_layers, "_told", set())
    monkeypatch.setattr(recurrent_layers.logger, "disabled", False)  # as tools that configure logging leave it
    net = Net("rnn_tanh", 2, 4)
    run = closure(net, randn(12, 6, 2, seed=1), randn(12, 6, 2, seed=2))
    with caplog.at_level(logging.INFO, "hfopt"):
        trace(run)
        trace(run)
    told = [r.message for r in caplog.records if "rnn_tanh" in r.message]
    assert len(told) == 1
    assert "replace_recurrences=False" in told[0]


def test_the_option_survives_a_copy() -> None:
    net = Net("rnn_tanh", 2, 4)
    assert not copy.deepcopy(hfopt.HessianFree(net.parameters(), replace_recurrences=False)).replace_recurrences
    assert hfopt.HessianFree(net.parameters()).replace_recurrences


@pytest.mark.filterwarnings("ignore:Using `torch.compile:UserWarning")
def test_a_compiled_model_is_left_to_the_compiler() -> None:
    net = Net("rnn_tanh", 2, 4)
    run = closure(net, randn(12, 6, 2, seed=1), randn(12, 6, 2, seed=2))
    compiled = closure(torch.compile(net, backend="eager"), randn(12, 6, 2, seed=1), randn(12, 6, 2, seed=2))  # type: ignore[arg-type]
    a, b = (hfopt.GaussNewton(c, net.parameters()) for c in (run, compiled))
    v = randn(a.shape[0], seed=3)
    assert relative(a @ v, b @ v) < SUMS
