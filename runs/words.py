"""Language models of words: contiguous columns with the state carried, and the perplexity of every word once.

    python -m runs.words                                  the words of the text that comes with Python
    python -m runs.words ptb                              another preset: topics, ptb, wikitext2, ...
    python -m runs.words ptb --optimizer sgd --lr 2       the same with SGD, or adam, rmsprop, muon
    python -m runs.words ptb --resume                     go on with that run where it was last saved
    python -m runs.words ptb --help                       all settings, those of the preset as defaults

and from Python, with the settings of the first preset:

    python -c "import runs.words as w; w.hf.load('best-test'); print(w.hf.sample('the meaning of', 50))"
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import torch

if find_spec("models") is None:
    sys.exit("runs.words: type python -m runs.words in the folder of the checkout")

from corpora.text import words
from runs.language import SHOWN, Language, options, train
from runs.language_presets import WORDS as PRESETS
from runs.settings import hints, parse, run_name, sentences

typed = sys.argv[1:] if __name__ == "__main__" else []
preset = typed[0] if typed and not typed[0].startswith("-") else "topics"
if preset not in PRESETS:
    sys.exit(f"runs.words: there is no preset {preset!r}; choose from {', '.join(PRESETS)}")
settings = parse(PRESETS[preset], typed[typed[:1] == [preset] :], f"runs.words {preset}")

# 0. Seed, and threads, which sums are divided among.
torch.manual_seed(settings.seed)
if settings.threads is not None:
    torch.set_num_threads(settings.threads)

with sentences("runs.words", settings):
    # 1. Text. It brings its loss and its metric.
    problem = words(settings.text, vocabulary=settings.vocabulary, encoding=settings.encoding, **options(settings))

    # 2. Model, optimizer and driver.
    name = settings.name or run_name(f"words-{preset}", settings, PRESETS[preset], known=SHOWN)
    hf = Language(
        Path(__file__).parent / "logs" / name,
        settings,
        problem,
        hints=hints("runs.words", typed, "hidden units"),
    )

if __name__ == "__main__":
    sys.exit(train("runs.words", settings, hf))
