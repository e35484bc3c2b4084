"""Language models: rows of weights for symbols, dropout, tied weights, samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

import models
from hfopt.recurrences import cells
from models.language import KINDS, LanguageModel, beside_symbols, units_within
from models.stacked import Stack

V, T, B = 7, 6, 3
NUMBERS = torch.randint(0, V, (T, B), generator=torch.Generator().manual_seed(1))


def model(cell: str = "mrnn", hidden: int = 5, **options: Any) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(cell, V, hidden, dtype=torch.float64, **options)


@pytest.mark.parametrize("cell", KINDS)
@pytest.mark.parametrize("depth", [1, 2])
def test_numbers_are_what_one_hot_vectors_would_be(cell: str, depth: int) -> None:
    found = model(cell, depth=depth)
    plain = Stack(KINDS[cell][0], depth, V, 5, V, dtype=torch.float64)
    plain.load_state_dict(found.state_dict())
    one_hot = torch.nn.functional.one_hot(NUMBERS, V).double()
    assert_close(found(NUMBERS), plain(one_hot), rtol=1e-12, atol=1e-14)
    assert_close(found.hidden_states(NUMBERS), plain.hidden_states(one_hot), rtol=1e-12, atol=1e-14)


def test_the_multiplicative_cell_by_its_formula() -> None:
    found = model("mrnn", factors=4)
    W_vh, W_hf, W_fh = found.W_vh, found.W_hh_1, found.W_hh_2
    h = found.h_init.expand(B, 5)
    for t in range(T):
        row = W_vh[NUMBERS[t]] + found.b_h
        e, x = row[:, :4], row[:, 4:]
        h = torch.tanh((e * (h @ W_hf)) @ W_fh + x)
        assert_close(found(NUMBERS)[t], h @ found.W_ho + found.b_o, rtol=1e-12, atol=1e-12)


def test_states_go_on_where_they_ended() -> None:
    found = model("lstm", depth=2)
    first, states = found.with_states(NUMBERS[:2])
    second, _ = found.with_states(NUMBERS[2:], states)
    assert_close(torch.cat((first, second)), found(NUMBERS), rtol=1e-12, atol=1e-12)


def test_tied_weights_are_the_embedding() -> None:
    found = model("gru", embedding=5, tied=True)
    assert "W_ho" not in dict(found.named_parameters())
    hidden = found.hidden_states(NUMBERS)
    assert_close(found(NUMBERS), hidden @ found.W_in.T + found.b_o, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="tied needs an embedding of as many columns as hidden units, 5; it has 4"):
        model("gru", embedding=4, tied=True)


def test_dropout_leaves_recurrent_connections_and_evaluation_alone() -> None:
    found = model("rnn", 400, embedding=50, dropout=0.5)
    torch.manual_seed(0)
    assert not torch.equal(found(NUMBERS), found(NUMBERS))
    hidden = torch.ones(T, B, 400, dtype=torch.float64)
    with torch.no_grad():
        found.W_ho.copy_(torch.eye(400, V))  # type: ignore[union-attr]
        found.b_o.zero_()  # type: ignore[union-attr]
    read = found._read_out(hidden)
    assert set(read.unique().tolist()) == {0.0, 2.0}
    inputs = found._input(NUMBERS)
    share = float((inputs == 0).double().mean())
    assert 0.4 < share < 0.6
    found.eval()
    assert_close(found(NUMBERS), found(NUMBERS), rtol=0, atol=0)
    assert_close(found._input(NUMBERS), found.W_in[NUMBERS], rtol=0, atol=0)


def test_a_sample_is_drawn_from_the_softmax_of_what_is_seen_so_far() -> None:
    found = model("gru")
    start = NUMBERS[:4, :1]
    generator = torch.Generator().manual_seed(5)
    drawn = found.sample(start, 5, temperature=0.7, generator=generator)
    generator = torch.Generator().manual_seed(5)
    so_far = start
    for _ in range(5):
        p = torch.softmax(found(so_far)[-1].detach() / 0.7, -1)
        so_far = torch.cat((so_far, torch.multinomial(p, 1, generator=generator).T))
    assert drawn.tolist() == so_far[4:].tolist()


def test_temperature_zero_takes_the_most_probable_and_never_is_never() -> None:
    found = model("rnn")
    drawn = found.sample(NUMBERS[:1], 20, temperature=0)
    assert_close(drawn[0], found(NUMBERS[:1])[-1].argmax(-1))
    top = int(drawn[0, 0])
    again = found.sample(NUMBERS[:1, :1].expand(1, 50), 20, never=[top])
    assert top not in again
    assert found.sample(NUMBERS, 0).shape == (0, B)


def test_sampling_leaves_mode_and_generators_alone() -> None:
    found = model("rnn", dropout=0.5)
    found.train()
    before = torch.get_rng_state()
    found.sample(NUMBERS, 3, generator=torch.Generator().manual_seed(0))
    assert found.training
    assert torch.equal(torch.get_rng_state(), before)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="cell is 'lst'; choose 'rnn', 'mrnn'"):
        model("lst")
    with pytest.raises(TypeError, match=r"inputs has dtype torch\.float32"):
        model()(torch.zeros(T, B))
    with pytest.raises(ValueError, match=r"start has shape \(0, 1\)"):
        model().sample(NUMBERS[:0, :1], 3)
    with pytest.raises(ValueError, match="temperature -1"):
        model().sample(NUMBERS, 3, temperature=-1)


@pytest.mark.parametrize("cell", KINDS)
def test_units_within_a_budget(cell: str) -> None:
    for embedding in (None, 6):
        hidden = units_within(5000, cell, V, embedding=embedding)
        sizes = [sum(p.numel() for p in model(cell, hidden + k, embedding=embedding).parameters()) for k in (0, 1)]
        assert sizes[0] <= 5000 < sizes[1]


def test_what_is_next_to_the_symbols() -> None:
    for options, names in (({}, {"W_vh", "W_ho"}), ({"embedding": 4}, {"W_in", "W_ho"})):
        found = model("gru", depth=2, **options)
        assert {name for name, p in found.named_parameters() if id(p) in beside_symbols(found)} == names


def test_gates_that_keep_the_state_are_open_at_first() -> None:
    widths = dict(
        zip((c.name for c in cells.lstm.input_columns), torch.split(model("lstm", 100).b_h.detach(), 100), strict=True)
    )
    assert float(widths["f"].mean()) == pytest.approx(1, abs=0.1)
    assert float(widths["i"].mean()) == pytest.approx(0, abs=0.1)
    assert models.LanguageModel is LanguageModel
