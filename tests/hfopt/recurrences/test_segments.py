"""Checkpointing over time: the same numbers as with the whole sequence, in memory that grows like its square root."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import hfopt
import models
from benchmarks.memory import allocated
from hfopt import structural
from hfopt.curvature.linearisation import Checkpoint, DoubleBackward
from hfopt.recurrences import gru_layer, lstm_layer, mrnn_layer, simple_rnn, simple_rnn_layer
from hfopt.recurrences.passes import bounds
from hfopt.recurrences.segments import Found, Given, checkpointing, over_time
from tests.hfopt.tools import dense_gauss_newton, matrix, randn, relative

EXACT = {"rtol": 1e-11, "atol": 1e-12}
T, B, V = 11, 3, 2


def weights(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [(0.6 * randn(*shape, seed=i)).requires_grad_() for i, shape in enumerate(shapes)]


def two_states(xs: Given, states: Given, Ws: Given) -> Found:
    """A cell of the test's own, with two states, two outputs and one step at a time."""
    rows, sums = [], []
    h, c = states
    for x in xs[0].unbind():
        c = 0.5 * c + (x @ Ws[0] + h @ Ws[1]).sigmoid()
        h = (c * Ws[2]).tanh()
        rows.append(h)
        sums.append(c.sum(1))
    return (torch.stack(rows), torch.stack(sums)), (h, c)


def simple(xs: Given, states: Given, Ws: Given) -> Found:
    H = simple_rnn(xs[0] @ Ws[0], Ws[1], states[0])
    return (H @ Ws[2],), (H[-1],)


CELLS: dict[str, tuple[Callable[[Given, Given, Given], Found], list[tuple[int, ...]], int]] = {
    "own": (two_states, [(V, 4), (4, 4), (4,)], 2),
    "simple": (simple, [(V, 4), (4, 4), (4, 2)], 1),
}


@pytest.mark.parametrize("steps", [1, 2, 11])
@pytest.mark.parametrize("name", list(CELLS))
def test_products_are_those_of_the_whole_sequence(name: str, steps: int) -> None:
    cell, shapes, states = CELLS[name]
    X, *starts = weights((steps, B, V), *[(B, 4)] * states)
    Ws = weights(*shapes)
    points = [X, *starts, *Ws]

    def run() -> list[Tensor]:
        outputs, after = over_time(cell, (X,), starts, Ws)
        return [*outputs, *after]

    plain = run()
    with checkpointing() as seen:
        mine = run()
    (sequence,) = seen.checkpointed
    assert_close(mine, plain, **EXACT)
    at = [randn(*z.shape, seed=20 + i) for i, z in enumerate(plain)]
    expected, got = DoubleBackward(plain, points, at), Checkpoint(mine, points, at, [sequence])
    assert_close(got.gradient, expected.gradient, **EXACT)
    v = [randn(*p.shape, seed=40 + i) for i, p in enumerate(points)]
    assert_close(got.jvp(v), expected.jvp(v), **EXACT)
    assert_close(got.vjp(at), expected.vjp(at), **EXACT)
    many = [randn(5, *p.shape, seed=60 + i) for i, p in enumerate(points)]
    pushed = expected.jvp(many, batched=True)
    assert_close(got.jvp(many, batched=True), pushed, **EXACT)
    assert_close(got.vjp(pushed, batched=True), expected.vjp(pushed, batched=True), **EXACT)
    assert sum(b - a for a, b in bounds(steps)) == steps


def test_only_borders_are_kept() -> None:
    X, W, h0 = randn(100, B, 4, seed=1), *weights((4, 4)), torch.zeros(B, 4, dtype=torch.float64)
    with checkpointing() as seen:
        H = simple_rnn(X, W, h0)
    (sequence,) = seen.checkpointed
    assert len(sequence.borders) == 10
    for (state,) in sequence.borders:
        assert state.untyped_storage().nbytes() == B * 4 * 8
    assert_close([s[0] for s in sequence.borders[1:]], list(H.detach()[9:-1:10]), **EXACT)


def network(output: str, batch_first: bool = False) -> models.RNN:
    torch.manual_seed(0)
    return models.RNN(V, 4, 2, output=output, batch_first=batch_first, dtype=torch.float64)


@pytest.mark.quick(where=lambda output, lengths, damping: (output == "all") == (lengths is None) == (damping == 0.0))
@pytest.mark.parametrize("lengths", [None, torch.tensor([4, 11, 7])])
@pytest.mark.parametrize("output", ["all", "last"])
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_the_network_has_the_dense_matrix(output: str, lengths: Tensor | None, damping: float) -> None:
    model, inputs = network(output), randn(T, B, V, seed=3)
    targets = randn(*model(inputs, lengths=lengths).shape, seed=4)

    def closure() -> Tensor:
        return F.mse_loss(model(inputs, lengths=lengths), targets)

    mine = hfopt.GaussNewton(closure, model.parameters(), structural=damping > 0, linearisation="checkpoint")
    assert mine.linearisation.name == "checkpoint"
    dense = dense_gauss_newton(model, lambda m: m(inputs, lengths=lengths), lambda z: F.mse_loss(z, targets))
    assert relative(matrix(mine), dense) < 1e-10
    assert relative(mine.to_dense(), dense) < 1e-10
    if damping:
        plain = hfopt.GaussNewton(closure, model.parameters(), structural=True, linearisation="double-backward")
        expected = matrix(plain.damped(0.5, damping))
        assert relative(expected, dense) > 1e-3
        assert relative(matrix(mine.damped(0.5, damping)), expected) < 1e-10
        assert relative(mine.damped(0.5, damping).to_dense(), expected) < 1e-10
        v = randn(mine.shape[0], seed=5)
        assert relative(mine.structural_product(v), plain.structural_product(v)) < 1e-10
        assert mine.structural_quadratic(v) == pytest.approx(plain.structural_quadratic(v), rel=1e-10)
    with torch.no_grad(), checkpointing():
        assert_close(model(inputs, lengths=lengths), mine.space.outputs[0].detach(), **EXACT)


def test_two_layers_are_damped_in_one_pass() -> None:
    Ws, inputs, targets = weights((V, 4), (4, 4), (4,), (4, 3), (3, 3), (3,)), randn(T, B, V), randn(T, B, 3, seed=9)

    def closure() -> Tensor:
        return F.mse_loss(simple_rnn_layer(simple_rnn_layer(inputs, *Ws[:3]), *Ws[3:]), targets)

    mine, plain = (
        hfopt.GaussNewton(closure, Ws, structural=True, linearisation=p) for p in ("checkpoint", "double-backward")
    )
    assert relative(matrix(mine.damped(0.5, 0.7)), matrix(plain.damped(0.5, 0.7))) < 1e-10


def layers() -> dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]]:
    def lstm(x: Tensor, *Ws: Tensor) -> Tensor:
        H, (h, c) = lstm_layer(x, *Ws)
        return torch.cat((H, h.unsqueeze(0), c.unsqueeze(0)))

    def gru(x: Tensor, *Ws: Tensor) -> Tensor:
        return gru_layer(x, *Ws, lengths=torch.tensor([4, 11, 7]))[0]

    def mrnn(x: Tensor, *Ws: Tensor) -> Tensor:
        return mrnn_layer(x, *Ws)[0]

    gates: list[tuple[int, ...]] = [(12, V), (12, 4), (12,), (12,), (4,)]
    return {
        "lstm": (lstm, [(16, V), (16, 4), (16,), (16,), (4,), (4,)]),
        "gru": (gru, gates),
        "mrnn": (mrnn, [(V, 5), (4, 5), (5, 4), (V, 4), (4,), (4,)]),
    }


@pytest.mark.quick(where=lambda name: name == "lstm")
@pytest.mark.parametrize("name", ["lstm", "gru", "mrnn"])
def test_gated_layers(name: str) -> None:
    layer, shapes = layers()[name]
    Ws, inputs = weights(*shapes), randn(T, B, V, seed=3)
    targets = randn(*layer(inputs, *Ws).shape, seed=4)
    ops = [
        hfopt.GaussNewton(lambda: F.mse_loss(layer(inputs, *Ws), targets), Ws, structural=True, linearisation=p)
        for p in ("checkpoint", "double-backward")
    ]
    assert ops[0].linearisation.name == "checkpoint"
    mine, plain = (matrix(op.damped(0.3, 0.5)) for op in ops)
    assert relative(mine, plain) < 1e-10
    assert relative(ops[0].damped(0.3, 0.5).to_dense(), plain) < 1e-10


def test_an_optimizer_steps_alike() -> None:
    one, other = network("last", batch_first=True), network("last", batch_first=True)
    inputs, targets = randn(B, T, V, seed=6), randn(B, 2, seed=7)
    cg = hfopt.CG(max_iterations=5)
    optimizers = [
        hfopt.HessianFree(m.parameters(), linearisation=p, structural=0.1, cg=cg)
        for m, p in ((one, "checkpoint"), (other, "double-backward"))
    ]
    for _ in range(3):
        for model, optimizer in zip((one, other), optimizers, strict=True):
            optimizer.step(lambda m=model: F.mse_loss(m(inputs), targets))  # type: ignore[misc]
    assert_close(list(one.parameters()), list(other.parameters()), rtol=1e-6, atol=1e-8)
    assert {s.linearisation for s in optimizers[0].stats} == {"checkpoint"}


class Dropped(nn.Module):
    """A recurrence with noise inside its segments."""

    def __init__(self) -> None:
        super().__init__()
        self.W, self.K = nn.Parameter(0.5 * randn(V, 4, seed=1)), nn.Parameter(0.5 * randn(4, 4, seed=2))

    def part(self, xs: Given, states: Given, Ws: Given) -> Found:
        H = simple_rnn(xs[0] @ Ws[0], Ws[1], states[0])
        return (F.dropout(H, 0.5),), (H[-1],)

    def forward(self, x: Tensor) -> Tensor:
        (H,), _ = over_time(self.part, (x,), (x.new_zeros(x.shape[1], 4),), (self.W, self.K))
        return H


def test_random_draws_are_those_of_the_forward_pass() -> None:
    model, inputs, targets = Dropped(), randn(T, B, V), randn(T, B, 4, seed=3)
    op = hfopt.GaussNewton(lambda: F.mse_loss(model(inputs), targets), model.parameters(), linearisation="checkpoint")
    kept = op.space.outputs[0] != 0
    assert 0.2 < float(kept.double().mean()) < 0.8
    state = torch.get_rng_state()
    got = matrix(op)
    assert torch.equal(torch.get_rng_state(), state)

    def outputs(m: nn.Module) -> Tensor:
        H = simple_rnn(inputs @ m.W, m.K, torch.zeros(B, 4, dtype=torch.float64))  # type: ignore[operator]
        return 2 * H * kept

    dense = dense_gauss_newton(model, outputs, lambda z: F.mse_loss(z, targets))
    assert relative(got, dense) < 1e-10
    assert relative(op.to_dense(), dense) < 1e-10


class Counting(nn.Module):
    """A recurrence whose segments write to a buffer, as normalisation layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.K = nn.Parameter(0.5 * randn(4, 4, seed=2))
        self.steps = nn.Buffer(torch.zeros(()))

    def part(self, xs: Given, states: Given, Ws: Given) -> Found:
        self.steps = self.steps + len(xs[0])
        H = simple_rnn(xs[0], Ws[0], states[0])
        return (H,), (H[-1],)

    def forward(self, x: Tensor) -> Tensor:
        (H,), _ = over_time(self.part, (x,), (x.new_zeros(B, 4),), (self.K,))
        return H


def test_buffers_are_written_once_a_step() -> None:
    model, inputs, targets = Counting(), randn(T, B, 4), randn(T, B, 4, seed=3)
    optimizer = hfopt.HessianFree(model.parameters(), linearisation="checkpoint")
    optimizer.step(lambda: F.mse_loss(model(inputs), targets))
    assert optimizer.stats[-1].products > 3
    assert model.steps.item() == T


def test_autocast_is_that_of_the_forward_pass() -> None:
    model = models.RNN(V, 16, 2)
    inputs, targets = torch.randn(T, B, V), torch.randn(T, B, 2)

    def closure() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.mse_loss(model(inputs).float(), targets)

    ops = [hfopt.GaussNewton(closure, model.parameters(), linearisation=p) for p in ("checkpoint", "double-backward")]
    v = torch.randn(ops[0].shape[0])
    mine, plain = (op @ v for op in ops)
    assert relative(mine, plain) < 0.05


# -- memory --------------------------------------------------------------------------------------------------------


def peak(steps: int, policy: str, *, damping: float = 0.0, columns: int = 0) -> tuple[int, int]:
    """Bytes at most in a product, and kept by the operator, of a network whose output is at the last step."""
    model = models.RNN(1, 32, 1, output="last")
    inputs, targets = torch.randn(steps, 16, 1), torch.randn(16, 1)

    def build() -> hfopt.GaussNewton:
        return hfopt.GaussNewton(
            lambda: F.mse_loss(model(inputs), targets),
            model.parameters(),
            structural=damping > 0,
            linearisation=policy,
        )

    first, kept = allocated(build, torch.device("cpu"))
    op = build().damped(1.0, damping)
    v = torch.randn(op.shape[0], columns) if columns else torch.randn(op.shape[0])
    most, _ = allocated(lambda: op @ v, torch.device("cpu"))
    return max(most, first), kept


@pytest.mark.slow
@pytest.mark.parametrize(("damping", "columns"), [(0.0, 0), (0.1, 0), (0.0, 3)])
def test_memory_grows_like_the_square_root(damping: float, columns: int) -> None:
    """Sixteen times the steps: four times the memory, where a whole sequence takes sixteen times as much."""
    short, long = (peak(steps, "checkpoint", damping=damping, columns=columns) for steps in (256, 4096))
    assert long[0] < 5.0 * short[0]
    assert long[1] < 5.0 * short[1]
    if not columns:
        plain = peak(4096, "double-backward", damping=damping)
        assert long[0] < plain[0] / 8
        assert long[1] < plain[1] / 8


@pytest.mark.slow
def test_evaluations_take_no_more() -> None:
    model = models.RNN(1, 32, 1, output="last")

    def run(steps: int) -> int:
        inputs = torch.randn(steps, 16, 1)
        with torch.no_grad(), checkpointing():
            return allocated(lambda: model(inputs), torch.device("cpu"))[0]

    assert run(1024) < 5.0 * run(64)


@pytest.mark.slow
def test_the_documented_recurrence() -> None:
    """The example of docs/linearisation.md: an LSTM with its readout."""
    text = (Path(__file__).parents[3] / "docs" / "linearisation.md").read_text(encoding="utf-8")
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "over_time(" in block)
    w_ih, w_hh, readout = Ws = weights((20, V), (20, 5), (5, 2))
    inputs, targets = randn(T, 8, V, seed=5), randn(T, 8, 2, seed=6)
    layers = {
        "lstm": SimpleNamespace(weight_ih_l0=w_ih, weight_hh_l0=w_hh),
        "readout": SimpleNamespace(weight=readout.t()),
    }
    double = SimpleNamespace(zeros=lambda *shape: torch.zeros(*shape, dtype=torch.float64))

    def closure() -> Tensor:
        names: dict[str, Any] = {"torch": double, "inputs": inputs, **layers}
        exec(code, names)
        return F.mse_loss(names["outputs"], targets)

    mine, plain = (hfopt.GaussNewton(closure, Ws, linearisation=p) for p in ("checkpoint", "double-backward"))
    assert mine.linearisation.name == "checkpoint"
    assert relative(matrix(mine), matrix(plain)) < 1e-10


# -- refusals ------------------------------------------------------------------------------------------------------


def test_what_cannot_be_cut_is_refused() -> None:
    X, (W,), h0 = randn(T, B, 4), weights((4, 4)), torch.zeros(B, 4, dtype=torch.float64)

    def cell(xs: Given, states: Given, Ws: Given) -> Found:
        H = simple_rnn(xs[0], Ws[0], states[0])
        return (H,), (H[-1],)

    with checkpointing():
        with pytest.raises(ValueError, match=r"sequences have lengths \[10, 11\]"):
            over_time(cell, (X, X[1:]), (h0,), (W,))
        with pytest.raises(ValueError, match="sequences have lengths"):
            over_time(cell, (), (h0,), (W,))
        with pytest.raises(ValueError, match="states is empty"):
            over_time(cell, (X,), (), (W,))
        with pytest.raises(TypeError, match=r"states\[0\] has dtype torch.int64"):
            over_time(cell, (X,), (h0.long(),), (W,))
        with pytest.raises(ValueError, match=r"outputs\[0\] of the function has shape \(3, 4\) for 4 steps"):
            over_time(lambda *a: (cell(*a)[1], cell(*a)[1]), (X,), (h0,), (W,))
        with pytest.raises(ValueError, match="returned 0 states, but was given 1"):
            over_time(lambda *a: (cell(*a)[0], ()), (X,), (h0,), (W,))


def test_a_hidden_argument_is_refused() -> None:
    X, (W, K), h0 = randn(T, B, 4), weights((4, 4), (4, 4)), torch.zeros(B, 4, dtype=torch.float64)

    def cell(xs: Given, states: Given, Ws: Given) -> Found:
        H = simple_rnn(xs[0] @ K, Ws[0], states[0])
        return (H,), (H[-1],)

    with checkpointing():
        (H,), _ = over_time(cell, (X,), (h0,), (W,))
    with pytest.raises(RuntimeError, match=r"none of its arguments.*give it among parameters"):
        torch.autograd.grad(H.sum(), W)


def test_a_second_derivative_is_refused() -> None:
    (W,) = weights((4, 4))
    with checkpointing():
        H = simple_rnn(randn(T, B, 4), W, torch.zeros(B, 4, dtype=torch.float64))
    (g,) = torch.autograd.grad(H.square().sum(), W, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(g.sum(), W)


def test_marks_of_another_shape_are_left_to_their_own_model() -> None:
    """Outside an optimizer's search for hidden states nothing is marked, and nothing costs more."""
    X, (W,), h0 = randn(T, B, 4), weights((4, 4)), torch.zeros(B, 4, dtype=torch.float64)
    with structural.collecting(False), checkpointing() as seen:
        simple_rnn(X, W, h0)
    assert not seen.checkpointed[0].marks
