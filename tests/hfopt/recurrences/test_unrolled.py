"""A user's own cell as a module: values, derivatives, starts, lengths, structural damping, and wrong steps."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.testing import assert_close

import hfopt
from hfopt import structural
from hfopt.recurrences import Unrolled, lstm_layer, simple_rnn
from tests.hfopt.recurrences.plain import like

EXACT = {"rtol": 1e-11, "atol": 1e-12}
F64 = torch.float64
T, B, V, H = 5, 3, 2, 4
LENGTHS = torch.tensor([3, 5, 1])


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def simple(x: Tensor, h: Tensor, W: Tensor, Wx: Tensor) -> tuple[Tensor, Tensor]:
    h = torch.tanh(h @ W + x @ Wx)
    return h, h


def memory(x: Tensor, state: tuple[Tensor, Tensor], Wih: Tensor, Whh: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    h, c = state
    i, f, g, o = (x @ Wih.t() + h @ Whh.t()).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return h, (h, c)


def simple_net(**options: Any) -> Unrolled:
    return Unrolled(simple, randn(H), [randn(H, H, seed=1) / 2, randn(V, H, seed=2)], **options)


def memory_net(**options: Any) -> Unrolled:
    start = (randn(H), randn(H, seed=1))
    return Unrolled(memory, start, [randn(4 * H, V, seed=2), randn(4 * H, H, seed=3)], **options)


def test_is_the_recurrence_that_its_step_says() -> None:
    net, X = simple_net(), randn(T, B, V, seed=3)
    outputs, final = net(X)
    W, Wx = net.weights
    expected = simple_rnn(X @ Wx, W, net.start_0)
    assert_close((outputs, final), (expected, expected[-1]), **EXACT)
    params = tuple(net.parameters())
    assert [name for name, _ in net.named_parameters()] == ["start_0", "weights.0", "weights.1"]
    mine = torch.autograd.grad(outputs.square().sum(), params)
    assert_close(mine, torch.autograd.grad(expected.square().sum(), params), **EXACT)


@pytest.mark.parametrize("lengths", [None, LENGTHS])
@pytest.mark.parametrize("batch_first", [False, True])
def test_a_state_of_two_parts_with_lengths(lengths: Tensor | None, batch_first: bool) -> None:
    net, X = memory_net(batch_first=batch_first), randn(T, B, V, seed=4)
    outputs, final = net(X.transpose(0, 1) if batch_first else X, lengths=lengths)
    expected, states = lstm_layer(X, *net.weights, h0=net.start_0, c0=net.start_1, lengths=lengths)
    outputs = outputs.transpose(0, 1) if batch_first else outputs
    assert_close((outputs, *final), (expected, *states), **EXACT)
    params = tuple(net.parameters())
    u = like((expected, *states), 1)
    mine = torch.autograd.grad((outputs, *final), params, u)
    assert_close(mine, torch.autograd.grad((expected, *states), params, u), **EXACT)


def test_what_is_beyond_the_end_does_not_matter() -> None:
    X = randn(T, B, V, seed=4)
    spoilt = torch.where(torch.arange(T).unsqueeze(1) < LENGTHS, 0.0, torch.nan).unsqueeze(-1) + X

    def results(inputs: Tensor) -> tuple[Tensor, ...]:
        net = memory_net()
        outputs, final = net(inputs, lengths=LENGTHS)
        return *final, outputs, *torch.autograd.grad(outputs.square().sum() + final[1].sum(), tuple(net.parameters()))

    assert_close(results(spoilt), results(X), rtol=0, atol=0)


def test_given_states() -> None:
    net, X = memory_net(), randn(T, B, V, seed=4)
    halfway = net(X[:2])[1]
    assert_close(net(X[2:], halfway)[0], net(X)[0][2:], **EXACT)
    assert_close(net(X, (net.start_0, net.start_1))[0], net(X)[0], **EXACT)


def test_a_fixed_start_is_a_buffer() -> None:
    net = simple_net(learned=False)
    assert len(list(net.parameters())) == 2
    assert_close(net.state_dict()["start_0"], randn(H), rtol=0, atol=0)
    assert_close(net(randn(T, B, V))[0], simple_net()(randn(T, B, V))[0], rtol=0, atol=0)


class Step(nn.Module):
    """A cell that is a module, for inputs and states that are no vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv1d(2, 3, 3, padding=1, dtype=F64)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        new = torch.tanh(state + self.mix(x))
        return new.sum((1, 2)), new


def test_a_module_as_step_and_states_of_any_shape() -> None:
    torch.manual_seed(0)
    step, X = Step(), randn(T, B, 2, 6)
    net = Unrolled(step, torch.zeros(3, 6, dtype=F64), damped=0)
    assert {name for name, _ in net.named_parameters()} == {"start_0", "step.mix.weight", "step.mix.bias"}
    with structural.collecting() as states:
        outputs, final = net(X, lengths=LENGTHS)
    assert (outputs.shape, final.shape) == ((T, B), (B, 3, 6))
    assert states[0].preactivations.shape == (T, B, 18)
    mask = torch.arange(T).unsqueeze(1) < LENGTHS
    assert_close(states[0].weight, mask.to(F64).unsqueeze(-1).expand(T, B, 18) / B, rtol=0, atol=0)
    state = net.start_0.expand(B, 3, 6)
    for t in range(T):
        new = torch.tanh(state + step.mix(X[t]))
        state = torch.where((t < LENGTHS).view(-1, 1, 1), new, state)
    assert_close(final, state, **EXACT)


def problem(net: nn.Module) -> tuple[Callable[[], Tensor], Callable[..., tuple[Tensor, Tensor]]]:
    """A closure, and (outputs, hidden states) as a function of the parameters."""
    X, Y = randn(T, B, V, seed=4), randn(T, B, H, seed=5)

    def outputs_of(*values: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(dict(net.named_parameters()), values, strict=True))
        outputs, _ = functional_call(net, named, (X,))
        return outputs, outputs

    return lambda: F.mse_loss(net(X)[0], Y), outputs_of


def flat_jacobian(function: Callable[..., Tensor], params: tuple[Tensor, ...]) -> Tensor:
    rows = jacrev(function, tuple(range(len(params))))(*params)
    count = function(*params).numel()
    return torch.cat([r.reshape(count, -1) for r in rows], 1)


@pytest.mark.parametrize("policy", ["auto", "double-backward", "linearize", "recompute"])
@pytest.mark.parametrize("build", [simple_net, memory_net])
def test_gauss_newton_matrix_with_structural_damping(build: Callable[..., Unrolled], policy: str) -> None:
    net = build(damped=0)
    closure, outputs_of = problem(net)
    params = tuple(net.parameters())
    op = hfopt.GaussNewton(closure, params, structural=True, linearisation=policy)
    values = tuple(p.detach() for p in params)
    J, Jh = (flat_jacobian(lambda *v, k=k: outputs_of(*v)[k], values) for k in (0, 1))
    count = T * B * H
    G, S = 2 / count * J.t() @ J, Jh.t() @ Jh / B
    v = randn(G.shape[0], seed=6)
    assert_close(op.multiply(v), G @ v, rtol=1e-9, atol=1e-11)
    assert_close(op.multiply(v, structural=0.3), G @ v + 0.3 * S @ v, rtol=1e-9, atol=1e-11)


def test_a_function_of_the_state_is_damped_with_its_own_curvature() -> None:
    net = memory_net(damped=lambda state: state[1][:, :2], curvature=lambda c: 1 - c.tanh() ** 2)
    with structural.collecting() as states:
        outputs, _ = net(randn(T, B, V))
    (state,) = states
    _, (_, c) = net(randn(T, B, V)[:3])
    assert_close(state.preactivations[2], c[:, :2], **EXACT)
    assert_close(state.weight, (1 - state.preactivations.tanh() ** 2) / B, **EXACT)
    assert outputs.shape == (T, B, H)


def test_nothing_is_marked_unless_asked_for() -> None:
    with structural.collecting() as states:
        simple_net()(randn(T, B, V))
    assert states == []


@pytest.mark.slow
def test_compiled() -> None:
    net, X = memory_net(), randn(T, B, V, seed=4)
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    assert_close(compiled(X), net(X), **EXACT)


def test_autocast() -> None:
    net, X = simple_net().float(), randn(T, B, V).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs, _ = net(X)
    assert (outputs.float() - net(X)[0]).norm() <= 0.03 * outputs.float().norm()


def returning(change: Callable[[Tensor, Tensor], Any]) -> Unrolled:
    """A net whose step returns what `change` makes of an output (B, H) and a state (B, H)."""
    return Unrolled(lambda x, h: change(x[:, :1] + h, h), torch.zeros(H))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda o, h: o, TypeError, r"step returned a Tensor at t = 0; it returns \(output, state\)"),
        (lambda o, h: (o, h, h), TypeError, "step returned a tuple at t = 0"),
        (lambda o, h: (None, h), TypeError, "step returned a NoneType as output"),
        (lambda o, h: (o[:2], h), ValueError, r"output of shape \(2, 4\) at t = 0.*3 sequences"),
        (lambda o, h: (o.sum(), h), ValueError, r"output of shape \(\) at t = 0"),
        (lambda o, h: (o, h[:, :2]), ValueError, r"a state of shape \(3, 2\) at t = 0; it was given \(3, 4\)"),
        (lambda o, h: (o, h.sum(0)), ValueError, r"a state of shape \(4,\)"),
        (lambda o, h: (o, (h, h)), TypeError, "a state at t = 0 that is not a tensor"),
        (lambda o, h: (o, h.double()), TypeError, "a state of torch.float64 .* it was given torch.float32"),
        (lambda o, h: (o, h.to("meta")), TypeError, "on meta at t = 0"),
        (
            lambda o, h: (o if h.sum() == 0 else o[:, :1], h + 1),
            ValueError,
            r"\(3, 1\) at t = 1, but \(3, 4\) at t = 0",
        ),
    ],
)
def test_wrong_steps(change: Callable[[Tensor, Tensor], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        returning(change)(torch.zeros(T, B, V))


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (lambda: simple_net()(torch.zeros(T, dtype=F64)), ValueError, r"inputs has shape \(5,\); it is \(T, B, ...\)"),
        (lambda: simple_net()(torch.zeros(0, B, V)), ValueError, "inputs has shape .*no size is 0"),
        (
            lambda: simple_net()(randn(T, B, V), randn(2, H)),
            ValueError,
            r"state has shape \(2, 4\); here it is \(3, 4\)",
        ),
        (lambda: simple_net()(randn(T, B, V), (randn(H),)), TypeError, "state is not a tensor"),
        (lambda: memory_net()(randn(T, B, V), randn(H)), TypeError, "state is not a tuple of 2 tensors"),
        (lambda: memory_net()(randn(T, B, V), (randn(H), randn(3))), ValueError, r"state\[1\] has shape \(3,\)"),
        (lambda: memory_net()(randn(T, B, V), lengths=torch.ones(B)), TypeError, "lengths is a tensor of integers"),
        (lambda: memory_net()(randn(T, B, V), lengths=torch.tensor([1, 2, 6])), ValueError, "lengths runs from 1 to 6"),
        (lambda: Unrolled(None, randn(H)), TypeError, "step is a NoneType"),  # type: ignore[arg-type]
        (lambda: Unrolled(simple, [randn(H)]), TypeError, "start is a tensor, or a tuple"),  # type: ignore[arg-type]
        (lambda: Unrolled(simple, randn(H), [1.0]), TypeError, r"weights\[0\] is a float"),  # type: ignore[list-item]
        (lambda: simple_net(damped=1), ValueError, r"damped is 1; the state has 1 part"),
    ],
)
def test_errors_name_the_argument(run: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run()


def test_a_damped_part_without_sequences_is_refused() -> None:
    net = simple_net(damped=lambda h: h.sum())
    with structural.collecting(), pytest.raises(TypeError, match="damped gives no tensor"):
        net(randn(T, B, V))


def test_the_guides_examples_run() -> None:
    guide = (Path(__file__).resolve().parents[3] / "docs" / "recurrences.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    torch.manual_seed(0)
    layers, sized, defined, own = ({} for _ in examples)
    exec(examples[0], layers)
    expected = layers["lstm"](layers["inputs"])[0]
    assert_close(layers["H"][:, 0], expected[:, 0], rtol=1e-5, atol=1e-6)
    exec(examples[1], sized)
    assert sized["n"] == 210
    exec(examples[2], defined)
    assert defined["minimal"].untraceable is None
    assert len(defined["minimal"].products) == 2
    assert defined["found"].output.shape == (50, 8, 20)
    exec(examples[3], own)
    assert own["outputs"].shape == (50, 8, 20)
