"""What is found in a step that is written once: columns, products, what is kept; and steps that cannot be traced."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from hfopt.recurrences import cell, cell_layer, cells
from hfopt.recurrences.definition import Definition
from hfopt.recurrences.expression import Graph, evaluate, sigmoid, tanh


def columns(d: Definition) -> tuple[list[str], list[list[tuple[str, str]]]]:
    return [c.name for c in d.input_columns], [[(c.name, c.kind) for c in p.columns] for p in d.products]


def test_columns_are_shared_where_they_only_enter_as_a_sum() -> None:
    assert columns(cells.lstm) == (list("ifgo"), [[(n, "a") for n in "ifgo"]])
    assert columns(cells.gru) == (["n", "r", "z"], [[("r", "a"), ("z", "a"), ("n", "m")]])
    assert columns(cells.gru2014) == (["r", "u", "c"], [[("r", "a"), ("u", "a")], [("c", "a")]])
    assert columns(cells.mrnn()) == (["f", "h"], [[("f", "m")], [("h", "a")]])
    assert columns(cells.rhn(2)) == (["h1", "t1"], [[("h1", "a"), ("t1", "a")], [("h2", "m"), ("t2", "m")]])


@pytest.mark.parametrize(
    ("definition", "kept"),
    [
        (cells.tanh_rnn, 0),
        (cells.identity_rnn, 0),
        (cells.lstm, 5),
        (cells.gru, 4),
        (cells.ugrnn, 2),
        (cells.gru2014, 3),
    ],
)
def test_as_much_is_kept_as_by_hand(definition: Definition, kept: int) -> None:
    """LSTM: its gates and tanh c; GRU: r, z, n, m + b; a simple recurrence nothing, since h is tanh's value."""
    assert len(definition.kept) == kept


def test_a_micro_step_of_a_highway_network_keeps_no_more_when_there_are_more() -> None:
    kept = [len(cells.rhn(depth).kept) for depth in (2, 3, 4, 5, 6)]
    assert all(b - a <= 3 for a, b in itertools.pairwise(kept))


def test_torchs_own_functions_are_traced_too() -> None:
    def by_torch(x: Any, h: Any, W: Any) -> Any:
        m = W(h)
        g, c = torch.sigmoid(torch.add(x.g, m.g)), (x.c + m.c).tanh()
        return torch.mul(g, h) + (1 - g) * c

    d = Definition(by_torch, states="h", gates="g c")
    assert d.untraceable is None
    assert columns(d) == columns(cells.ugrnn)
    assert len(d.kept) == len(cells.ugrnn.kept)


def test_arithmetic_leaves_out_zeros_and_ones_and_finds_equal_nodes() -> None:
    g = Graph()
    a, b = g.leaf("state", "a"), g.leaf("state", "b")
    assert a * 1 is a
    assert a + 0 is a
    assert (a * 0).number == 0
    assert a * b is a * b
    assert -a + b is b - a
    assert (a / 4).args[1].number == 0.25
    assert evaluate(a / b - 2, {a: 3.0, b: 4.0}) == -1.25


def test_names_that_do_not_fit_are_refused() -> None:
    def step(x: Any, h: Any, W: Any) -> Any:
        return tanh(x.a + W.a(h))

    with pytest.raises(ValueError, match=r"the step uses x\.a, but gates has no 'a'"):
        Definition(step, states="h", gates="b")
    with pytest.raises(ValueError, match=r"returns 1 values; states and outputs are 2"):
        Definition(step, states="h", gates="a", outputs="y")
    with pytest.raises(ValueError, match=r"W\.a multiplies two vectors"):
        Definition(lambda x, h, W: tanh(x.a + W.a(tanh(W.a(h)))), states="h", gates="a", name="twice")
    with pytest.raises(ValueError, match="'h' in 'h h'"):
        Definition(step, states="h h", gates="a")
    with pytest.raises(ValueError, match="sizes"):
        Definition(lambda x, h, W: tanh(x.a + W.f(h)), states="h", gates="a f:factors", name="mixed")


@pytest.mark.parametrize("kind", ["branch", "other operation", "power"])
def test_a_step_that_cannot_be_traced_runs_and_the_log_says_so(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    def squashed(v: Any) -> Any:
        if kind == "branch":
            return v.tanh() if v.sum() > -1e9 else v
        return torch.atan(v) if kind == "other operation" else (v + v**3).tanh()

    @cell(states="h", gates="a b", name=kind.replace(" ", "_"))
    def odd(x: Any, h: Any, W: Any) -> Any:
        return squashed(x.a + W.a(h)) * sigmoid(x.b + W.b(0.5 * h))

    assert odd.untraceable is not None
    assert columns(odd) == (["a", "b"], [[("a", "m")], [("b", "m")]])
    X, Kx, Wa, Wb, h = (
        torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((4, 2, 3), (3, 10), (5, 5), (5, 5), (2, 5))
    )
    with caplog.at_level(logging.WARNING, "hfopt"):
        found = cell_layer(odd, X, Kx, [Wa, Wb], states=[h])
    assert "cannot be traced" in caplog.text
    assert odd.untraceable in caplog.text

    def plainly(state: Tensor) -> Tensor:
        states = []
        for x in X.unbind():
            state = squashed(x @ Kx[:, :5] + state @ Wa) * torch.sigmoid(x @ Kx[:, 5:] + 0.5 * state @ Wb)
            states.append(state)
        return torch.stack(states)

    wanted = plainly(h)
    assert_close(found.output, wanted, rtol=1e-12, atol=1e-13)
    at = (X, Kx, Wa, Wb, h)
    u = torch.randn_like(wanted)
    assert_close(torch.autograd.grad(found.output, at, u), torch.autograd.grad(wanted, at, u), rtol=1e-11, atol=1e-12)


def test_two_cells_of_one_name_are_kept_apart() -> None:
    def one(x: Any, h: Any, W: Any) -> Any:
        return tanh(x.a + W.a(h))

    def two(x: Any, h: Any, W: Any) -> Any:
        return sigmoid(x.a + W.a(h))

    given = torch.randn(3, 2, 4), torch.randn(4, 5), [torch.randn(5, 5)]
    first, second = (cell_layer(Definition(f, states="h", gates="a", name="same"), *given).output for f in (one, two))
    assert (second > 0).all()
    assert not (first > 0).all()


def test_arguments_of_a_layer_are_checked_by_name() -> None:
    X, Kx, K = torch.randn(3, 2, 4), torch.randn(4, 10), torch.randn(5, 10)
    good = cell_layer(cells.ugrnn, X, Kx, [K]).output
    assert good.shape == (3, 2, 5)
    for told, given in {
        "weights_hh has 2 tensors": (X, Kx, [K, K]),
        r"weights_hh\[0\] has shape \(5, 9\)": (X, Kx, [K[:, :9]]),
        r"weight_ih has shape \(4, 9\)": (X, Kx[:, :9], [K]),
        r"weight_ih has shape \(3, 10\); it has a row for each of the 4 inputs": (X, Kx[:3], [K]),
        r"bias has shape \(9,\)": (X, Kx, [K], torch.zeros(9)),
        r"inputs has shape \(3, 2\)": (X[..., 0], Kx, [K]),
    }.items():
        with pytest.raises(ValueError, match=told):
            cell_layer(cells.ugrnn, *given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"states\[0\] has shape \(4,\)"):
        cell_layer(cells.ugrnn, X, Kx, [K], states=[torch.zeros(4)])
    with pytest.raises(ValueError, match="project them first"):
        cell_layer(cells.intersection, X, torch.randn(4, 20), [torch.randn(5, 20)])
    with pytest.raises(TypeError, match=r"weights_hh\[0\] is torch.float64"):
        cell_layer(cells.ugrnn, X, Kx, [K.double()])
