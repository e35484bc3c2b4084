"""Networks that are built from cells' definitions: outputs by the formulas, sizes, starts, dropout, training."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import hfopt
import models
from hfopt.recurrences import cells
from models.stacked import Stack

KINDS: dict[str, Any] = {
    "UGRNN": lambda **o: models.UGRNN(3, 5, 2, **o),
    "GRU2014": lambda **o: models.GRU2014(3, 5, 2, **o),
    "IntersectionRNN": lambda **o: models.IntersectionRNN(3, 5, 2, **o),
    "RHN": lambda **o: models.RHN(3, 5, 2, **{"depth": 3, "layers": o.pop("depth", 1), **o}),
    "MRNN": lambda **o: Stack(cells.mrnn(), o.pop("depth", 1), 3, 5, 2, **o),
    "LSTM": lambda **o: Stack(cells.lstm, o.pop("depth", 1), 3, 5, 2, **o),
}


def sizes_of(network: Stack) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("depth", "biases", "learned_start"), [(1, True, True), (3, True, False), (2, False, True)])
def test_parameters_are_counted(name: str, depth: int, biases: bool, learned_start: bool) -> None:
    network = KINDS[name](depth=depth, biases=biases, learned_start=learned_start)
    options = {"biases": biases, "learned_start": learned_start}
    assert sizes_of(network) == models.parameter_count(network.cell, depth, 3, 5, 2, **options)


def test_the_published_network_of_text8_has_its_size() -> None:
    """Collins et al. 2017: the best LSTM of four layers has 1,268,217 parameters, of 1,280,000 that are allowed."""
    assert models.units_for(1_280_000, cells.lstm, 4, 27, 27) == 210
    assert models.parameter_count(cells.lstm, 4, 27, 210, 27) == 1_268_217
    assert models.parameter_count(cells.lstm, 4, 27, 211, 27) == 1_280_164


@pytest.mark.parametrize("definition", [cells.tanh_rnn, cells.ugrnn, cells.gru2014, cells.intersection, cells.rhn(2)])
@pytest.mark.parametrize("depth", [1, 3])
def test_units_for_a_budget_are_the_most_that_fit(definition: Any, depth: int) -> None:
    for budget in (500, 5_000):
        n = models.units_for(budget, definition, depth, 7, 4)
        assert models.parameter_count(definition, depth, 7, n, 4) <= budget
        larger = [models.parameter_count(definition, depth, 7, k, 4) for k in range(n + 1, n + 40)]
        assert min(larger) > budget
    with pytest.raises(ValueError, match="budget is 3"):
        models.units_for(3, definition, depth, 7, 4)


def sigma(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def ugrnn(n: Any, x: Tensor, h: Tensor, k: str) -> tuple[Tensor, Tensor]:
    a = x @ getattr(n, "W_vh" + k) + h @ getattr(n, "W_hh" + k) + getattr(n, "b_h" + k)
    g, c = sigma(a[:, :5]), torch.tanh(a[:, 5:])
    h = g * h + (1 - g) * c
    return h, h


def intersection(n: Any, x: Tensor, h: Tensor, k: str) -> tuple[Tensor, Tensor]:
    a = x @ getattr(n, "W_vh" + k) + h @ getattr(n, "W_hh" + k) + getattr(n, "b_h" + k)
    y_in, h_in, g_y, g_h = a[:, :5].clamp(min=0), torch.tanh(a[:, 5:10]), sigma(a[:, 10:15]), sigma(a[:, 15:])
    return g_h * h + (1 - g_h) * h_in, g_y * x + (1 - g_y) * y_in


def gru2014(n: Any, x: Tensor, h: Tensor, k: str) -> tuple[Tensor, Tensor]:
    a = x @ getattr(n, "W_vh" + k) + getattr(n, "b_h" + k)
    m = h @ getattr(n, "W_hh_1" + k)
    r, u = sigma(a[:, :5] + m[:, :5]), sigma(a[:, 5:10] + m[:, 5:])
    h = u * h + (1 - u) * torch.tanh(a[:, 10:] + (r * h) @ getattr(n, "W_hh_2" + k))
    return h, h


def rhn(n: Any, x: Tensor, h: Tensor, k: str) -> tuple[Tensor, Tensor]:
    for l in (1, 2, 3):
        a = h @ getattr(n, f"W_hh_{l}{k}")
        own = x @ getattr(n, "W_vh" + k) + getattr(n, "b_h" + k) if l == 1 else None
        a = a + (torch.cat([getattr(n, f"b_h{l}{k}"), getattr(n, f"b_t{l}{k}")]) if own is None else own)
        t = sigma(a[:, 5:])
        h = torch.tanh(a[:, :5]) * t + h * (1 - t)
    return h, h


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(
    ("name", "step"), [("UGRNN", ugrnn), ("IntersectionRNN", intersection), ("GRU2014", gru2014), ("RHN", rhn)]
)
def test_outputs_are_those_of_the_formulas(name: str, step: Any, depth: int) -> None:
    torch.manual_seed(0)
    network = KINDS[name](depth=depth, dtype=torch.float64)
    with torch.no_grad():
        for start in network._starts():
            start.normal_()
    inputs = torch.randn(6, 4, 3, dtype=torch.float64)
    x = inputs @ network.W_in + network.b_in if network.projects else inputs
    for k in range(depth):
        h, outputs = network._starts()[k].expand(4, 5), []
        for x_t in x.unbind():
            h, y = step(network, x_t, h, "_l1" if k else "")
            outputs.append(y)
        x = torch.stack(outputs)
    wanted = x @ network.W_ho + network.b_o
    assert_close(network(inputs), wanted, rtol=1e-11, atol=1e-12)
    last = copy.deepcopy(network)
    last.output = "last"
    lengths = torch.tensor([6, 2, 3, 6])
    assert_close(last(inputs), wanted[-1], rtol=1e-11, atol=1e-12)
    found = wanted[lengths - 1, torch.arange(4)]
    assert_close(last(inputs, lengths=lengths), found, rtol=1e-11, atol=1e-12)
    turned = copy.deepcopy(network)
    turned.batch_first = True
    assert_close(turned(inputs.transpose(0, 1)).transpose(0, 1), wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", KINDS)
def test_a_sequence_in_two_parts_goes_on_from_the_states(name: str) -> None:
    network = KINDS[name](depth=2, dtype=torch.float64)
    inputs = torch.randn(7, 3, 3, dtype=torch.float64)
    whole = network(inputs)
    first, states = network.with_states(inputs[:3])
    second, _ = network.with_states(inputs[3:], states)
    assert_close(torch.cat((first, second)), whole, rtol=1e-12, atol=1e-13)


def test_starts_are_learned_or_zero() -> None:
    inputs = torch.randn(4, 2, 3)
    learned, zero = models.UGRNN(3, 5, 2, depth=2), models.UGRNN(3, 5, 2, depth=2, learned_start=False)
    assert {n for n, _ in learned.named_parameters()} - {n for n, _ in zero.named_parameters()} == {
        "h_init",
        "h_init_l1",
    }
    zero.load_state_dict({n: p for n, p in learned.state_dict().items() if not n.startswith("h_init")})
    assert_close(learned(inputs), zero(inputs))
    learned(inputs).sum().backward()
    assert learned.h_init.grad is not None
    assert zero.sparse_init(0).h_init.count_nonzero() == 0
    assert learned.sparse_init(0).h_init.count_nonzero() == 5


def test_gates_start_from_their_bias() -> None:
    torch.manual_seed(0)
    plain = models.UGRNN(3, 5, 2, forget_bias=0.0)
    torch.manual_seed(0)
    biased = models.UGRNN(3, 5, 2, forget_bias=1.5)
    assert plain.b_h is not None and biased.b_h is not None  # noqa: PT018
    assert_close(biased.b_h - plain.b_h, torch.tensor([1.5] * 5 + [0.0] * 5))
    highway = models.RHN(3, 5, 2, depth=3, transform_bias=-4.0).sparse_init(0)
    assert_close(highway.b_h, torch.tensor([0.0] * 5 + [-4.0] * 5))
    assert_close(highway.b_t3, torch.full((5,), -4.0))
    with pytest.raises(ValueError, match="gate_bias names q; gates are c, g"):
        Stack(cells.ugrnn, 1, 3, 5, 2, gate_bias={"q": 1.0})


def test_variational_dropout_keeps_one_mask_over_time_and_none_in_evaluation() -> None:
    torch.manual_seed(0)
    network = models.RHN(3, 40, None, depth=2, hidden_dropout=0.5, dtype=torch.float64)
    inputs = torch.randn(5, 3, 3, dtype=torch.float64)
    plain = models.RHN(3, 40, None, depth=2, dtype=torch.float64)
    plain.load_state_dict(network.state_dict())
    assert_close(network.eval()(inputs), plain(inputs), rtol=1e-12, atol=1e-13)
    network.train()
    first, second = network(inputs), network(inputs)
    assert not torch.equal(first, second)
    network.masks = network.draw_masks(3)
    ((mask,),) = network.masks
    assert set(mask.unique().tolist()) == {0.0, 2.0}
    held = network(inputs)
    assert torch.equal(network.eval()(inputs), held)
    h = torch.zeros(3, 40, dtype=torch.float64)
    for x in inputs.unbind():  # the mask is inside the products, not on the carry
        for l in (1, 2):
            a = (h * mask) @ getattr(network, f"W_hh_{l}")
            b = x @ network.W_vh + network.b_h if l == 1 else torch.cat([network.b_h2, network.b_t2])
            t = sigma((a + b)[:, 40:])
            h = torch.tanh((a + b)[:, :40]) * t + h * (1 - t)
    assert_close(held[-1], h, rtol=1e-11, atol=1e-12)
    with pytest.raises(ValueError, match="has no masks"):
        Stack(cells.ugrnn, 1, 3, 5, 2, hidden_dropout=0.1)


def test_dropout_between_layers_is_off_in_evaluation() -> None:
    torch.manual_seed(0)
    network = models.UGRNN(3, 30, 2, depth=3, dropout=0.5)
    inputs = torch.randn(4, 2, 3)
    assert not torch.equal(network(inputs), network(inputs))
    network.eval()
    assert torch.equal(network(inputs), network(inputs))


@pytest.mark.parametrize("name", KINDS)
def test_hessian_free_steps_lower_the_loss(name: str) -> None:
    torch.manual_seed(0)
    network = KINDS[name](depth=2, dtype=torch.float64)
    inputs, targets = torch.randn(8, 20, 3, dtype=torch.float64), torch.randn(8, 20, 2, dtype=torch.float64)
    optimizer = hfopt.HessianFree(network.parameters(), structural=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(network(inputs), targets)
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure)) for _ in range(3)]
    assert all(b < a for a, b in itertools.pairwise(losses))


@pytest.mark.parametrize("name", ["UGRNN", "RHN"])
def test_the_linearisation_by_segments_gives_the_same_products(name: str) -> None:
    torch.manual_seed(0)
    network = KINDS[name](depth=2, dtype=torch.float64)
    inputs, targets = torch.randn(9, 4, 3, dtype=torch.float64), torch.randn(9, 4, 2, dtype=torch.float64)

    def closure() -> Tensor:
        return torch.nn.functional.mse_loss(network(inputs), targets)

    v = [torch.randn_like(p) for p in network.parameters()]
    flat = torch.cat([x.flatten() for x in v])
    kinds = ("checkpoint", "double-backward")
    found = [hfopt.GaussNewton(closure, network.parameters(), linearisation=kind) @ flat for kind in kinds]
    assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", KINDS)
def test_a_network_is_copied_and_pickled(name: str) -> None:
    network = KINDS[name](depth=2)
    inputs = torch.randn(4, 2, 3)
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):  # noqa: S301
        assert other.cell is network.cell
        assert torch.equal(other(inputs), network(inputs))


@pytest.mark.parametrize("batch_first", [False, True])
def test_indices_are_rows_of_the_embedding(batch_first: bool) -> None:
    torch.manual_seed(0)
    network = models.UGRNN(11, 5, 2, depth=2, embedding=4, batch_first=batch_first, dtype=torch.float64)
    assert sizes_of(network) == models.parameter_count(cells.ugrnn, 2, 11, 5, 2, embedding=4)
    plain = models.UGRNN(4, 5, 2, depth=2, batch_first=batch_first, dtype=torch.float64)
    plain.load_state_dict({n: p for n, p in network.state_dict().items() if n != "W_in"})
    indices = torch.randint(11, (6, 3))
    wanted = plain(torch.nn.functional.one_hot(indices, 11).double() @ network.W_in)
    assert_close(network(indices), wanted, rtol=1e-12, atol=1e-13)
    at = [network.W_in, network.W_vh]
    found, expected = network(indices).sin().sum(), wanted.sin().sum()
    grads = torch.autograd.grad(expected, [network.W_in, plain.W_vh])
    assert_close(torch.autograd.grad(found, at), grads, rtol=1e-11, atol=1e-12)
    v = torch.randn(sizes_of(network), dtype=torch.float64)
    targets = torch.randn_like(wanted)

    def closure() -> Tensor:
        return torch.nn.functional.mse_loss(network(indices), targets)

    kinds = ("checkpoint", "double-backward")
    products = [hfopt.GaussNewton(closure, network.parameters(), linearisation=kind) @ v for kind in kinds]
    assert_close(products[0], products[1], rtol=1e-10, atol=1e-12)
    with pytest.raises(TypeError, match="they are indices"):
        network(torch.randn(6, 3))
    with pytest.raises(ValueError, match=r"inputs has shape \(6, 3, 1\)"):
        network(indices.unsqueeze(-1))
    with pytest.raises(ValueError, match="adds its inputs to its 5 units"):
        models.IntersectionRNN(11, 5, 2, embedding=4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["UGRNN", "RHN"])
def test_a_compiled_network_is_one_graph(name: str) -> None:
    network = KINDS[name](depth=2)
    inputs = torch.randn(4, 2, 3)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    outputs = compiled(inputs)
    assert_close(outputs, network(inputs))
    grads = [torch.autograd.grad(y.sum(), list(network.parameters())) for y in (outputs, network(inputs))]
    assert_close(grads[0], grads[1])
