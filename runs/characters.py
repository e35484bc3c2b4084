"""Language models of characters: a multiplicative recurrent net learns to write, Hessian-free, or any other net.

    python -m runs.characters                             the text that comes with Python, in five minutes
    python -m runs.characters ptb                         another preset: topics, ptb, text8, enwik8, mrnn-2011, ...
    python -m runs.characters --text book.txt --cell lstm any text, any setting
    python -m runs.characters ptb --optimizer adam        the same with Adam, rmsprop, sgd or muon
    python -m runs.characters ptb --resume                go on with that run where it was last saved
    python -m runs.characters --picture a.png             what each character costs, and the hidden units
    python -m runs.characters ptb --help                  all settings, those of the preset as defaults

and from Python, with the settings of the first preset:

    python -c "import runs.characters as c; c.hf.load('best-test'); print(c.hf.sample('The meaning of life is', 200))"

The text's last parts are for validation and for the test. The parameters that are best by validation are kept, and
their bits per character on the test part are what is reported, beside those of a model that counts.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import torch

if find_spec("models") is None:
    sys.exit("runs.characters: type python -m runs.characters in the folder of the checkout")

from corpora.text import characters
from runs.language import SHOWN, Language, options, train
from runs.language_presets import CHARACTERS as PRESETS
from runs.settings import hints, parse, run_name, sentences

typed = sys.argv[1:] if __name__ == "__main__" else []
preset = typed[0] if typed and not typed[0].startswith("-") else "topics"
if preset not in PRESETS:
    sys.exit(f"runs.characters: there is no preset {preset!r}; choose from {', '.join(PRESETS)}")
settings = parse(PRESETS[preset], typed[typed[:1] == [preset] :], f"runs.characters {preset}")

# 0. Seed, and threads, which sums are divided among.
torch.manual_seed(settings.seed)
if settings.threads is not None:
    torch.set_num_threads(settings.threads)

with sentences("runs.characters", settings):
    # 1. Text. It brings its loss and its metric.
    problem = characters(settings.text, alphabet=settings.alphabet, encoding=settings.encoding, **options(settings))

    # 2. Model, optimizer and driver.
    name = settings.name or run_name(f"characters-{preset}", settings, PRESETS[preset], known=SHOWN)
    hf = Language(
        Path(__file__).parent / "logs" / name,
        settings,
        problem,
        hints=hints("runs.characters", typed, "hidden units"),
    )

if __name__ == "__main__":
    sys.exit(train("runs.characters", settings, hf))
