"""The tagger: its window, both directions with each utterance's own end, and words hidden in training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from models import Tagger
from tests.contracts.against_plain import check

EXACT = {"rtol": 1e-11, "atol": 1e-12}
WORDS = torch.tensor([[3, 1, 2], [4, 2, 0], [1, 5, 0], [2, 0, 0]])  # (T, B), lengths 4, 3, 1
LENGTHS = torch.tensor([4, 3, 1])


def tagger(**options: Any) -> Tagger:
    torch.manual_seed(0)
    return Tagger(6, 3, embedding=2, hidden=4, **options).double()


def by_definition(model: Tagger, words: list[int]) -> Tensor:
    """Logits (T, O) of one utterance, step by step."""
    net, aside = model.net, model.window // 2
    around = [0] * aside + words + [0] * aside
    x = [torch.cat([net.embedding.weight[w] for w in around[t : t + model.window]]) for t in range(len(words))]

    def run(layers: Any, xs: list[Tensor]) -> list[Tensor]:
        layer, found = layers.layers[0], []
        h = layer.h_init
        for v in xs:
            h = torch.tanh(h @ layer.W_hh + v @ layer.W_vh + layer.b_h)
            found.append(h)
        return found

    hidden = run(net.forwards, x)
    if net.backwards is not None:
        back = run(net.backwards, x[::-1])[::-1]
        hidden = [torch.cat(both) for both in zip(hidden, back, strict=True)]
    return torch.stack([net.readout(h) for h in hidden])


@pytest.mark.parametrize("window", [1, 3, 5])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_by_definition(window: int, bidirectional: bool) -> None:
    model = tagger(window=window, bidirectional=bidirectional)
    found = model(WORDS, LENGTHS)
    for b, length in enumerate(LENGTHS.tolist()):
        expected = by_definition(model, WORDS[:length, b].tolist())
        assert_close(found[:length, b], expected, **EXACT)


def test_curvature() -> None:
    """Of both directions and the embedding, against a reference that is differentiated another way."""
    model = tagger(bidirectional=True)
    targets = torch.tensor([0, 1, 2, 1, 2, 0, 1, 0])

    def outputs(net: Any) -> Tensor:
        z = net(WORDS, LENGTHS)
        return torch.cat([z[:n, b] for b, n in enumerate(LENGTHS.tolist())])

    class Plain(Tagger):
        def forward(self, inputs: Tensor, lengths: Tensor) -> Tensor:
            columns = [by_definition(self, inputs[:n, b].tolist()) for b, n in enumerate(lengths.tolist())]
            return torch.stack([F.pad(c, (0, 0, 0, len(inputs) - len(c))) for c in columns], 1)

    plain = Plain(6, 3, embedding=2, hidden=4, bidirectional=True).double()
    plain.load_state_dict(model.state_dict())
    check(model, outputs, lambda z: F.cross_entropy(z, targets), reference=plain)


def test_words_are_hidden_in_training_alone() -> None:
    model = tagger(window=1, word_dropout=0.9)
    assert not torch.equal(model(WORDS, LENGTHS), model(WORDS, LENGTHS))
    model.eval()
    plain = tagger(window=1)
    assert torch.equal(model(WORDS, LENGTHS), plain(WORDS, LENGTHS))


def test_sparse_init_and_refusals() -> None:
    model = tagger(window=3).sparse_init(0, connections=2)
    assert model.net.embedding.weight.std() > 0.5
    assert ((model.net.readout.weight != 0).sum(1) == 2).all()
    assert torch.equal(model.net.readout.weight, tagger(window=3).sparse_init(0, connections=2).net.readout.weight)
    for options, said in (({"window": 2}, "odd"), ({"word_dropout": 1.0}, "word_dropout"), ({"cell": "x"}, "cell")):
        with pytest.raises(ValueError, match=said):
            tagger(**options)
