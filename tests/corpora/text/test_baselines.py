"""The count model against its definition, worked out symbol by symbol."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from corpora.text.baselines import BackOff


def by_definition(train: str, text: str, k: int, alphabet: str) -> list[float]:
    """Interpolated Witten-Bell probabilities in plain Python."""

    def p(c: str, context: str) -> float:
        lower = p(c, context[1:]) if context else 1 / len(alphabet)
        follows = Counter(
            train[i + len(context)] for i in range(len(train) - len(context)) if train.startswith(context, i)
        )
        n, t = sum(follows.values()), len(follows)
        return (follows[c] + t * lower) / (n + t) if n else lower

    return [p(c, text[max(0, i - k) : i]) for i, c in enumerate(text)]


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_probabilities_follow_the_definition(order: int) -> None:
    alphabet = "abcd"
    generator = np.random.default_rng(0)
    train, text = ("".join(generator.choice(list("abc"), n)) + extra for n, extra in ((60, ""), (20, "dad")))
    codes = [np.array([alphabet.index(c) for c in s], np.uint8) for s in (train, text)]
    model = BackOff(codes[0], 4, order)
    expected = by_definition(train, text, order, alphabet)
    np.testing.assert_allclose(model.probabilities(codes[1]), expected, rtol=1e-12)
    assert model.bits(codes[1], 5) == pytest.approx(-np.log2(expected[-5:]).mean(), rel=1e-12)


def test_probabilities_of_all_symbols_sum_to_one() -> None:
    generator = np.random.default_rng(1)
    model = BackOff(generator.integers(0, 5, 200).astype(np.uint8), 5, 3)
    for context in ([0, 1, 2], [4, 4, 4], [3, 0, 3]):
        total = sum(model.probabilities(np.array([*context, c], np.uint8), 1)[0] for c in range(5))
        assert total == pytest.approx(1, rel=1e-12)


def test_a_text_that_repeats_itself_is_predicted() -> None:
    period = np.tile(np.array([0, 0, 1, 2], np.uint8), 200)
    assert BackOff(period, 3, 1).bits(period[:100]) > 0.4
    assert BackOff(period, 3, 3).bits(period[:100], 90) < 0.01


def test_an_order_that_no_integer_holds_is_refused() -> None:
    with pytest.raises(ValueError, match="order is 9; with 103 symbols it is from 0 to 8"):
        BackOff(np.zeros(5, np.uint8), 103, 9)
