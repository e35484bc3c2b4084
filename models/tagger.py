"""A recurrent net that tags every word of an utterance."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.initialisation import generator_of
from models.regularised import Layers, WeightNoise, sparse_linear


class Tagger(WeightNoise):
    """Logits of each word's tag, from the words before it, those in a window around it, and those behind it.

    `x_t = [E w_{t-k}, .., E w_{t+k}]`, `o_t = [h_t, g_t] W + b`, h running forwards over x and g, if there is one,
    backwards from each utterance's own last word.

    Args:
        words: V, number of word indices; 0 stands for no word, around utterances.
        tags: O.
        embedding: E, numbers that stand for a word.
        hidden: h, hidden units of each direction.
        cell: "rnn" (tanh), "lstm" or "gru".
        window: words of the window, an odd number.
        bidirectional: whether there is a second net that runs backwards.
        dropout: share of the embeddings and of the hidden units that are zero in training, the rest scaled up.
        word_dropout: share of the words that are taken for `unknown` in training.
        unknown: the index of unknown words.
        weight_noise: standard deviation of the noise on all weights in training.

    Raises:
        ValueError: an argument out of its range.

    Source: Mesnil, He, Deng & Bengio, "Investigation of recurrent-neural-network architectures and learning methods
    for spoken language understanding", Interspeech 2013.
    """

    def __init__(
        self,
        words: int,
        tags: int,
        *,
        embedding: int = 64,
        hidden: int = 128,
        cell: str = "rnn",
        window: int = 3,
        bidirectional: bool = False,
        dropout: float = 0.0,
        word_dropout: float = 0.0,
        unknown: int = 1,
        weight_noise: float = 0.0,
    ) -> None:
        super().__init__(weight_noise)
        if window < 1 or window % 2 == 0:
            raise ValueError(f"window is {window}; it is an odd number of words, at least 1")
        for name, size in {"words": words, "tags": tags, "embedding": embedding}.items():
            if size < 1:
                raise ValueError(f"{name} is {size}; it is at least 1")
        if not 0 <= word_dropout < 1:
            raise ValueError(f"word_dropout is {word_dropout}; it is a share, at least 0 and less than 1")
        self.window, self.bidirectional, self.word_dropout, self.unknown = window, bidirectional, word_dropout, unknown
        self.net = _Tagger(words, tags, embedding, hidden, cell, window, bidirectional, dropout)

    def sparse_init(self, seed: int, connections: int = 15, scale: float = 1.0, input_scale: float = 1.0) -> Tagger:
        """Embeddings N(0, 1), sparse weights elsewhere, see `RNN.sparse_init`."""
        generator = generator_of(seed)
        with torch.no_grad():
            drawn = torch.randn(self.net.embedding.weight.shape, generator=generator, dtype=torch.float64)
            self.net.embedding.weight.copy_(drawn)
        for layers in (self.net.forwards, *([self.net.backwards] if self.net.backwards else [])):
            layers.sparse_init(generator, connections, scale, input_scale / connections**0.5)
        sparse_linear(self.net.readout, generator, connections, scale)
        return self

    def forward(self, inputs: Tensor, lengths: Tensor) -> Tensor:
        """Logits `(T, B, O)` of word indices `(T, B)`; those after the lengths `(B,)` mean nothing."""
        if self.training and self.word_dropout:
            hidden = torch.rand(inputs.shape, device=inputs.device) < self.word_dropout
            inputs = torch.where(hidden & (inputs != 0), self.unknown, inputs)
        outputs = self.noisy(self.net, inputs, lengths)
        assert isinstance(outputs, Tensor)
        return outputs


class _Tagger(nn.Module):
    """The part with weights."""

    def __init__(
        self,
        words: int,
        tags: int,
        embedding: int,
        hidden: int,
        cell: str,
        window: int,
        bidirectional: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        self.window, self.dropout = window, dropout
        self.embedding = nn.Embedding(words, embedding)
        self.forwards = Layers(cell, embedding * window, hidden, dropout=dropout)
        self.backwards = Layers(cell, embedding * window, hidden, dropout=dropout) if bidirectional else None
        self.readout = nn.Linear(hidden * (1 + bidirectional), tags)

    def forward(self, inputs: Tensor, lengths: Tensor) -> Tensor:
        aside = self.window // 2
        around = F.pad(inputs, (0, 0, aside, aside)) if aside else inputs
        steps = len(inputs)
        seen = torch.stack([around[k : k + steps] for k in range(self.window)], 2)  # (T, B, window)
        x = F.dropout(self.embedding(seen).flatten(2), self.dropout, self.training)
        hidden = self.forwards(x, lengths)[0]
        if self.backwards is not None:
            # From each utterance's own end; what lies after it stays where it is.
            t = torch.arange(steps, device=inputs.device).unsqueeze(1)
            turned = torch.where(t < lengths, lengths - 1 - t, t).unsqueeze(2)
            back = self.backwards(x.gather(0, turned.expand(-1, -1, x.shape[2])), lengths)[0]
            hidden = torch.cat([hidden, back.gather(0, turned.expand(-1, -1, back.shape[2]))], 2)
        logits: Tensor = self.readout(hidden)
        return logits
