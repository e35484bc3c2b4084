"""The empirical-Fisher diagonal is exact: against loops over cases, through every kind of layer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hfopt
from hfopt.preconditioners import EmpiricalFisherDiagonal
from models import GRU, LSTM, MRNN, RHN, RNN, UGRNN, IntersectionRNN
from tests.hfopt.preconditioners.preconditioned import N, Tied, convolutional, gauss_newton, per_case, recurrent
from tests.hfopt.tools import DENSE, SUMS, mlp, randn, relative

Y = randn(N, 2, seed=2)


def conv1d() -> nn.Module:
    torch.manual_seed(2)
    layers = nn.Conv1d(2, 3, 3, padding="same", dilation=2), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(21, 2)
    return nn.Sequential(*layers).double()


LAYERED: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "mlp": (lambda: mlp(3, 5, 2, seed=3), randn(N, 3, seed=1)),
    "conv2d": (convolutional, randn(N, 2, 7, 6, seed=1)),
    "conv1d": (conv1d, randn(N, 2, 7, seed=1)),
    "tied over time": (Tied, randn(N, 4, 3, seed=1)),
}


def expected(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return per_case(
        list(model.parameters()), [F.mse_loss(model(x[n : n + 1]), y[n : n + 1]) for n in range(N)]
    ).square()


@pytest.mark.parametrize("name", LAYERED)
@pytest.mark.parametrize("squares", ["auto", "cases"])
def test_feed_forward(name: str, squares: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfopt.preconditioners.squares.BLOCK", 300)  # several blocks of cases
    build, x = LAYERED[name]
    model = build()
    m = EmpiricalFisherDiagonal(squares=squares)
    m.refresh(gauss_newton(model, lambda net: F.mse_loss(net(x), Y)), 0)
    assert relative(m.diagonal, expected(model, x, Y).mean(0)) < SUMS
    assert set(m.ways) == {"layers" if squares == "auto" else "cases"}


def test_linear_layers_before_the_cases_dimension() -> None:
    """Outputs (T, B, O) with cases along the second dimension."""
    model, x, y = mlp(3, 4, 2, seed=3), randn(5, N, 3, seed=1), randn(5, N, 2, seed=2)
    m = EmpiricalFisherDiagonal(batch_dim=1)
    m.refresh(gauss_newton(model, lambda net: F.mse_loss(net(x), y)), 0)
    losses = [F.mse_loss(model(x[:, n]), y[:, n]) for n in range(N)]
    assert relative(m.diagonal, per_case(list(model.parameters()), losses).square().mean(0)) < SUMS
    assert set(m.ways) == {"layers"}


CELLS: dict[str, Callable[[str], nn.Module]] = {
    "rnn": lambda output: RNN(2, 3, 2, output=output),
    "rnn, read inside": lambda output: RNN(2, 5, 2, output=output),
    "rnn, no readout": lambda output: RNN(2, 3, None, output=output),
    "relu": lambda output: RNN(2, 3, 1, nonlinearity="relu", output=output),
    "lstm": lambda output: LSTM(2, 3, 1, output=output),
    "gru": lambda output: GRU(2, 3, 1, output=output),
    "mrnn": lambda output: MRNN(2, 3, 4, 1, output=output),
    "ugrnn of two layers": lambda output: UGRNN(2, 3, 1, depth=2, output=output),
    "highway network with masks": lambda output: RHN(2, 3, 1, depth=2, hidden_dropout=0.5, output=output).eval(),
    "intersection": lambda output: IntersectionRNN(2, 2, 1, output=output),
}


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("output", ["last", "all"])
@pytest.mark.parametrize("block", [100, 1 << 23])
def test_recurrences(kind: str, output: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their weights, biases and learned starts, however many cases there are, in blocks of one or of all of them."""
    monkeypatch.setattr("hfopt.preconditioners.squares.BLOCK", block)
    torch.manual_seed(1)
    model, x, every = CELLS[kind](output).double(), randn(5, N, 2, seed=1), output == "all"
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_(randn(*p.shape, seed=10 + i), alpha=0.3)
    y = randn(*model(x).shape, seed=2)
    m = EmpiricalFisherDiagonal(batch_dim=1 if every else 0, most_cases=0)
    m.refresh(gauss_newton(model, lambda net: F.mse_loss(net(x), y)), 0)
    losses = [F.mse_loss(model(x[:, [n]]), y[:, [n]] if every else y[[n]]) for n in range(N)]
    assert relative(m.diagonal, per_case(list(model.parameters()), losses).square().mean(0)) < SUMS
    assert set(m.ways) == {"layers"}


@pytest.mark.parametrize("layer", [nn.RNN, nn.LSTM, nn.GRU])
def test_torchs_recurrent_layers_inside_a_step(layer: Any) -> None:
    """Two of them stacked, with both biases, and torch's own readout."""
    torch.manual_seed(3)
    model = nn.ModuleDict({"cell": layer(2, 3, num_layers=2), "out": nn.Linear(3, 1)}).double()
    x, y = randn(9, N, 2, seed=1), randn(N, 1, seed=2)

    def outputs(rows: Tensor) -> Tensor:
        return model["out"](model["cell"](rows)[0][-1])  # type: ignore[no-any-return]

    losses = [F.mse_loss(outputs(x[:, [n]]), y[[n]]) for n in range(N)]
    rows = per_case(list(model.parameters()), losses).square().mean(0)
    m = EmpiricalFisherDiagonal(most_cases=0)
    optimizer = hfopt.HessianFree(model.parameters(), preconditioner=m)
    optimizer.step(lambda: F.mse_loss(outputs(x), y))
    assert set(m.ways) == {"layers"}
    assert relative(m.diagonal, rows) < DENSE


def test_a_recurrence_that_runs_twice() -> None:
    """Forwards and backwards over the same sequences with the same weights: the gradients of a case are summed."""
    torch.manual_seed(4)
    model, x, y = LSTM(2, 3, 1, output="last").double(), randn(5, N, 2, seed=1), randn(N, 1, seed=2)
    m = EmpiricalFisherDiagonal(most_cases=0)

    def outputs(rows: Tensor) -> Tensor:
        return model(rows) - 0.5 * model(rows.flip(0))  # type: ignore[no-any-return]

    m.refresh(hfopt.GaussNewton(lambda: F.mse_loss(outputs(x), y), model.parameters()), 0)
    losses = [F.mse_loss(outputs(x[:, [n]]), y[[n]]) for n in range(N)]
    assert relative(m.diagonal, per_case(list(model.parameters()), losses).square().mean(0)) < SUMS
    assert set(m.ways) == {"layers"}


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # many vectors through weight_norm
def test_weights_that_are_computed() -> None:
    """Transposed, normalised, and as the right side of a product."""
    torch.manual_seed(5)
    layers = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)
    model, x = nn.Sequential(*layers).double(), randn(N, 3, seed=1)
    model.register_parameter("more", nn.Parameter(randn(3, 2, seed=6)))

    def outputs(rows: Tensor) -> Tensor:
        return model(rows) + rows @ model.more  # type: ignore[operator,no-any-return]

    m = EmpiricalFisherDiagonal(most_cases=0)
    m.refresh(hfopt.GaussNewton(lambda: F.mse_loss(outputs(x), Y), model.parameters()), 0)
    losses = [F.mse_loss(outputs(x[[n]]), Y[[n]]) for n in range(N)]
    assert relative(m.diagonal, per_case(list(model.parameters()), losses).square().mean(0)) < SUMS
    assert set(m.ways) == {"layers"}


def test_coupled_cases_are_noticed() -> None:
    """Batch normalisation carries one case's gradient into the others' rows: only the last layer can be told."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = randn(N, 3, seed=1)
    op = gauss_newton(model, lambda net: F.mse_loss(net(x), Y))
    m = EmpiricalFisherDiagonal()
    m.refresh(op, 0)
    z = model(x)
    rows = per_case(list(model.parameters()), [F.mse_loss(z[n], Y[n]) for n in range(N)])
    assert relative(m.diagonal, rows.square().mean(0)) < DENSE
    assert m.ways == ["cases"] * 4 + ["layers"] * 2


def test_a_weight_that_is_used_elsewhere_is_noticed() -> None:
    model, x = mlp(2, 2, seed=4), randn(N, 2, seed=1)

    def outputs(net: nn.Module) -> Tensor:
        return net(x) + torch.einsum("ni,ij->nj", x, net[0].weight)  # type: ignore[index,no-any-return]

    m = EmpiricalFisherDiagonal()
    m.refresh(gauss_newton(model, lambda net: F.mse_loss(outputs(net), Y)), 0)
    z = outputs(model)
    rows = per_case(list(model.parameters()), [F.mse_loss(z[n], Y[n]) for n in range(N)])
    assert relative(m.diagonal, rows.square().mean(0)) < SUMS
    assert m.ways == ["cases", "layers"]


def test_many_cases_are_estimated_where_layers_do_not_tell_and_the_log_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = randn(N, 3, seed=1)
    m = EmpiricalFisherDiagonal(most_cases=N - 1)
    with caplog.at_level(logging.INFO, "hfopt"):
        m.refresh(gauss_newton(model, lambda net: F.mse_loss(net(x), Y)), 0)
        m.refresh(gauss_newton(model, lambda net: F.mse_loss(net(x), Y)), 1)
    assert m.ways == ["signs"] * 4 + ["layers"] * 2
    assert sum("random signs" in r.message and "most_cases=5" in r.message for r in caplog.records) == 1
    layers = EmpiricalFisherDiagonal(squares="layers")
    with pytest.raises(ValueError, match="squares is 'layers'"):
        layers.refresh(gauss_newton(model, lambda net: F.mse_loss(net(x), Y)), 0)


def test_several_outputs_and_batches_are_cases_of_their_own() -> None:
    model, x, y = mlp(3, 4, 2, seed=6), randn(N, 3, seed=1), Y

    def closure() -> None:
        for rows in (slice(0, 2), slice(2, N)):
            (F.mse_loss(model(x[rows]), y[rows], reduction="sum") / (2 * N)).backward()

    m = EmpiricalFisherDiagonal()
    m.refresh(hfopt.GaussNewton(closure, model.parameters()), 0)
    rows = per_case(list(model.parameters()), [F.mse_loss(model(x[n]), y[n]) / N for n in range(N)]).square()
    assert relative(m.diagonal, 2 * rows[:2].sum(0) + (N - 2) * rows[2:].sum(0)) < SUMS
    assert set(m.ways) == {"cases"}


@pytest.mark.parametrize("linearisation", ["linearize", "recompute"])
def test_every_linearisation(linearisation: str) -> None:
    model, x, y = recurrent("rnn"), randn(5, N, 2, seed=1), randn(N, 1, seed=2)
    m = EmpiricalFisherDiagonal(squares="cases")
    m.refresh(gauss_newton(model, lambda net: F.mse_loss(net(x), y), linearisation=linearisation), 0)
    losses = [F.mse_loss(model(x[:, n : n + 1]), y[n : n + 1]) for n in range(N)]
    assert relative(m.diagonal, per_case(list(model.parameters()), losses).square().mean(0)) < SUMS


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="squares"):
        EmpiricalFisherDiagonal(squares="exact")
    with pytest.raises(ValueError, match="most_cases"):
        EmpiricalFisherDiagonal(most_cases=-1)
