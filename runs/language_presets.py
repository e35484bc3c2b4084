"""The settings of language models: those for a laptop, and those of papers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from runs.language import LanguageTraining, Settings
from runs.settings import Action


@dataclass(frozen=True)
class Characters(Action, LanguageTraining, Settings):
    """A language model of characters. First word: the preset."""

    alphabet: Literal["text", "2011"] = "text"
    """The characters of the training part, or the 85 of 2011 and one for all others."""
    encoding: str = "utf-8"
    """Encoding of a file of one's own; bytes for a file that is no text."""


@dataclass(frozen=True)
class Words(Action, LanguageTraining, Settings):
    """A language model of words. First word: the preset."""

    regime: Literal["windows", "columns"] = "columns"
    """Training windows at random places, or contiguous columns with the state carried."""
    window: int = 35
    """Steps of a window."""
    batch_size: int = 40
    """Sequences in a batch of hf and lbfgs."""
    minibatch: int = 20
    """Sequences in a step of the stochastic optimizers."""
    embedding: int | None = 100
    """Columns of the symbols' embedding; None: none, a symbol is a row of the first layer's weights."""
    hidden: int = 100
    """Hidden units of every layer, and factors of mrnn."""
    cell: Literal["mrnn", "rnn", "lstm", "gru", "ugrnn"] = "rnn"
    """Kind of the recurrent layers."""
    start: str = "the value of the"
    """What samples go on from."""
    sample: int = 40
    """Symbols of a sample."""
    vocabulary: int | None = None
    """Words of the vocabulary at most; None: all of the training part."""
    encoding: str = "utf-8"
    """Encoding of a file of one's own."""


# What five minutes allow, with one thread: on a busy machine a second one costs more than it gains.
_LAPTOP = Characters(minutes=4.5, max_steps=100_000)
# Sutskever, Martens & Hinton, ICML 2011: 1500 units and factors, 4.9 million parameters; gradient of 48,000 sequences
# of 250 characters, curvature of 2,400, the first 50 steps not scored; at most 150 iterations, 160 steps.
_MRNN_2011 = Characters(
    alphabet="2011",
    window=250,
    warm_up=50,
    batch_size=300,
    gradient_batches=160,
    curvature_batches=8,
    evaluation_batches=8,
    hidden=1500,
    structural=0.1,
    damping=10.0,
    cg_iterations=150,
    max_steps=160,
    test_every=1,
)
# Collins, Sohl-Dickstein & Sussillo, ICLR 2017: windows of 50 characters, of which 13 are not scored.
_TEXT8_2017 = Characters(
    text="text8", window=50, warm_up=13, cell="lstm", optimizer="rmsprop", parameters=1_268_217, depth=4, sparse=False
)
# Kerg et al., NeurIPS 2019: 1.32 million parameters, columns of 150 steps, 128 of them, learning rate halved.
_PTB_2019 = Characters(
    text="ptb",
    regime="columns",
    window=150,
    minibatch=128,
    cell="lstm",
    optimizer="adam",
    parameters=1_320_000,
    sparse=False,
    halve_after=1,
    clip=10.0,
    start="the meaning of life is ",
)

CHARACTERS = {
    "topics": _LAPTOP,
    "ptb": Characters(
        text="ptb", parameters=200_000, valid_symbols=50_000, start="the_meaning_of_life_is_", test_every=10
    ),
    "text8": Characters(text="text8", parameters=500_000, start="the meaning of life is ", valid_symbols=100_000),
    "enwik8": Characters(text="enwik8", parameters=500_000, valid_symbols=100_000),
    "mrnn-2011": _MRNN_2011,
    "text8-2017": _TEXT8_2017,
    "ptb-2019": replace(_PTB_2019, start="the_meaning_of_life_is_"),
}

# Miller & Hardt, ICLR 2019, on the code of pytorch/examples: 35 steps, 20 columns, SGD whose learning rate is lowered.
_WIKITEXT2_2019 = Words(
    text="wikitext2", optimizer="sgd", sparse=False, halve_after=1, window=35, minibatch=20, stop_after=8
)

WORDS = {
    "topics": Words(minutes=4.5, max_steps=100_000, stop_after=20),
    "ptb": Words(text="ptb", stop_after=10),
    "wikitext2": Words(text="wikitext2", stop_after=10),
    "wikitext2-rnn-2019": replace(
        _WIKITEXT2_2019, cell="rnn", hidden=256, embedding=1024, dropout=0.25, lr=2.0, clip=0.25
    ),
    "wikitext2-lstm-2019": replace(
        _WIKITEXT2_2019, cell="lstm", hidden=1024, embedding=512, dropout=0.65, lr=20.0, clip=1.0
    ),
}
