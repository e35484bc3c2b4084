"""A text as a data object: what is drawn, what is scored, how often, and what a run goes on with."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import hfopt
from corpora.text.alphabet import Alphabet
from corpora.text.stream import UNSCORED, Text, Window
from hfopt.experiment.carried import Carried
from hfopt.experiment.roles import evaluate
from models import LanguageModel

V = 5
CODES = np.random.default_rng(3).integers(0, V, 1000).astype(np.uint8)


def text(**options: Any) -> Text:
    return Text("t", CODES, (700, 850), Alphabet("abcde"), **{"window": 12, "warm_up": 4, "batch_size": 3, **options})


def forward(model: Any, batch: Window) -> Carried:
    return Carried(*model.with_states(batch.inputs, batch.states))


def network(**options: Any) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel("gru", V, 6, dtype=torch.float64, **options)


def test_random_windows_are_pieces_of_the_training_part() -> None:
    problem = text(batch_size=200)
    problem.forget()
    batch = problem(0)
    assert batch.inputs.shape == (12, 200)
    assert batch.targets.shape == (8, 200)
    assert problem.size(batch) == 1600
    whole = bytes(CODES[:700])
    for b in range(200):
        piece = bytes([*batch.inputs[:, b].tolist(), int(batch.targets[-1, b])])
        assert piece in whole
    torch.testing.assert_close(batch.inputs[5:], batch.targets[:-1], rtol=0, atol=0)
    problem.forget()
    assert not torch.equal(problem(0).inputs, batch.inputs)


def test_draws_depend_on_seed_index_and_epoch_alone() -> None:
    first, second = text(train_batches=2), text(train_batches=2)
    for _ in range(3):
        first.forget()
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(first(1).inputs, second(1).inputs, rtol=0, atol=0)
    assert not torch.equal(first(0).inputs, first(1).inputs)
    with pytest.raises(ValueError, match="the state has window = 12, but Text has 13"):
        text(train_batches=2, window=13).load_state_dict(first.state_dict())
    other = Text("t", CODES[::-1].copy(), (700, 850), Alphabet("abcde"), window=12, warm_up=4, batch_size=3)
    with pytest.raises(ValueError, match="the state has text_hash"):
        other.load_state_dict(text().state_dict())


@pytest.mark.parametrize("regime", ["windows", "columns"])
@pytest.mark.parametrize("part", ["train", "valid", "test"])
def test_a_test_scores_every_symbol_of_its_part_once(regime: str, part: str) -> None:
    problem = text(regime=regime, evaluate_on=part)
    found = torch.cat([problem(i).targets.flatten() for i in problem.test_batches])
    found = found[found != UNSCORED]
    begin, end = problem.bounds[part]
    expected = CODES[max(begin, 1) : end]
    assert len(found) == problem.scored_symbols == len(expected)
    assert np.bincount(found, minlength=V).tolist() == np.bincount(expected, minlength=V).tolist()


def long_way(model: LanguageModel, begin: int, end: int) -> Tensor:
    """Nats of the symbols from begin to end, by one sequence from the beginning of the stream."""
    numbers = torch.from_numpy(CODES.astype(np.int64)).unsqueeze(1)
    logits = model(numbers[:-1]).detach()[begin - 1 : end - 1, 0]
    return torch.nn.functional.cross_entropy(logits, numbers[begin:end, 0], reduction="none")


def test_columns_run_through_have_the_score_of_one_long_sequence() -> None:
    model = network(learned_start=False)
    # One column whose warm-up reaches the beginning of the stream: nothing is left out of its past.
    problem = text(regime="columns", batch_size=1, window=100, warm_up=99, evaluate_on="train")
    found = evaluate(model, problem, problem.test_batches, forward)  # type: ignore[arg-type]
    expected = float(long_way(model, 1, 700).mean())
    assert found.loss == pytest.approx(expected, rel=1e-12)
    assert found.values["bits per character"] == pytest.approx(expected / math.log(2), rel=1e-12)
    whole = problem.evaluated_on("valid")
    again = evaluate(model, whole, whole.test_batches, forward).loss  # type: ignore[arg-type]
    # 99 steps of a network that forgets are as good as the whole past.
    assert again == pytest.approx(float(long_way(model, 700, 850).mean()), rel=1e-4)


def test_overlapping_windows_have_nearly_that_score_too() -> None:
    model = network(learned_start=False)
    problem = text(window=60, warm_up=40, evaluate_on="test")
    found = evaluate(model, problem, problem.test_batches)
    assert found.loss == pytest.approx(float(long_way(model, 850, 1000).mean()), rel=1e-3)


def test_columns_go_on_window_by_window() -> None:
    problem = text(regime="columns", batch_size=2, train_batches=2)
    length = 699 // 4
    for k in range(length // 12 + 2):
        problem.forget()
        at = k % (length // 12) * 12
        for i in range(2):
            batch = problem(i)
            for b in range(2):
                start = (2 * i + b) * length + at
                assert batch.inputs[:, b].tolist() == CODES[start : start + 12].tolist()
                assert batch.targets[:, b].tolist() == CODES[start + 1 : start + 13].tolist()
            assert (batch.states is None) == (at == 0)
            problem.carry(i, [torch.full((2, 6), float(k))])
        if at:
            assert batch.states is not None
            assert float(batch.states[0][0, 0]) == k - 1


def test_the_loss_is_the_mean_over_scored_symbols() -> None:
    problem = text()
    batch = problem(-1)
    logits = torch.randn(*batch.inputs.shape, V, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p = torch.log_softmax(logits, -1)[batch.warm_up :]
    scores = [
        -float(p[t, b, batch.targets[t, b]])
        for t in range(len(batch.targets))
        for b in range(batch.targets.shape[1])
        if batch.targets[t, b] != UNSCORED
    ]
    assert problem.size(batch) == len(scores) > 0
    assert float(problem.loss(logits, batch)) == pytest.approx(np.mean(scores), rel=1e-12)
    total, count = problem.metrics[0].parts(logits, batch)
    assert (total, count) == (pytest.approx(sum(scores), rel=1e-12), len(scores))
    with pytest.raises(ValueError, match=r"outputs have shape \(1, 2, 3\)"):
        problem.loss(torch.zeros(1, 2, 3), batch)
    assert problem.metrics[0].parts(logits * math.nan, batch)[0] == math.inf


def test_perplexity_is_that_of_words() -> None:
    problem = text(words=True)
    found = evaluate(network(), problem, problem.test_batches)
    assert found.values["perplexity"] == pytest.approx(math.exp(found.loss), rel=1e-12)


@pytest.mark.parametrize("cell", ["mrnn", "gru"])
@pytest.mark.parametrize("regime", ["windows", "columns"])
def test_hessian_free_takes_the_losses(regime: str, cell: str) -> None:
    problem = text(regime=regime, window=20, batch_size=8)
    torch.manual_seed(0)
    model = LanguageModel(cell, V, 6)
    optimizer = hfopt.HessianFree(model.parameters(), structural=0.1, damping=1.0, cg=hfopt.CG(max_iterations=5))
    problem.forget()
    losses = []
    for _ in range(4):
        batch = problem(0)
        losses.append(float(optimizer.step(lambda batch=batch: problem.loss(model(batch.inputs), batch)).detach()))
    assert losses[-1] < losses[0]


def test_bad_arguments_are_named() -> None:
    for options, message in {
        ("regime", "rows"): "regime is 'rows'",
        ("evaluate_on", "dev"): "evaluate_on is 'dev'",
        ("warm_up", 12): "warm_up is 12, but a window has 12 steps",
        ("window", 700): "a window of 700 steps takes 701 symbols, but the text's part has 700",
        ("batch_size", 0): "batch_size is 0",
        ("test_symbols", 0): "test_symbols is 0",
    }.items():
        with pytest.raises(ValueError, match=message):
            text(**{options[0]: options[1]})
    with pytest.raises(ValueError, match="100 columns of 700 symbols have 6 steps each, less than a window of 12"):
        text(regime="columns", batch_size=100)
    with pytest.raises(ValueError, match="t has no symbols for its part 'test'"):
        Text("t", CODES, (700, 1000), Alphabet("abcde"), window=12, warm_up=4)
    with pytest.raises(ValueError, match="part is 'dev'"):
        text().evaluated_on("dev")


def test_drawing_a_batch_of_a_long_text_is_quick() -> None:
    codes = np.zeros(20_000_000, np.uint8)
    problem = Text("long", codes, (18_000_000, 19_000_000), Alphabet("ab"), test_symbols=1000)
    seconds = []
    for _ in range(15):
        problem.forget()
        started = time.perf_counter()
        problem(0)
        seconds.append(time.perf_counter() - started)
    # 3 ms on a core of one's own; the quickest of many on a busy machine.
    assert min(seconds) < 0.003
