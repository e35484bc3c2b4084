"""Slot filling on ATIS: a recurrent net tags the words of an utterance, and is scored by the F1 of whole slots.

    python -m runs.slots                                  embeddings, a context window and a tanh net
    python -m runs.slots bidirectional                    two nets, one in each direction
    python -m runs.slots lstm                             an LSTM in place of the tanh net
    python -m runs.slots stable                           the sizes of Miller & Hardt (ICLR 2019)
    python -m runs.slots --optimizer adam                 the same with Adam (or sgd, rmsprop, muon)
    python -m runs.slots --resume                         go on with that run where it was last saved
    python -m runs.slots --picture tags.png               tagged test utterances
    python -m runs.slots lstm --help                      all settings, those of the preset as defaults

The files are read from HFOPT_DATA/atis or --folder, and downloaded if they are missing. Tests during training are of
validation utterances, a fifth of the training ones: the run ends when their F1 no longer improves, and what is
reported at its end is of the parameters that were best on them.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

if find_spec("models") is None:
    sys.exit("runs.slots: type python -m runs.slots in the folder of the checkout")

import hfopt
from corpora.slots import atis
from hfopt.experiment.driver import HF
from models import Tagger
from runs.settings import Action, Training, hints, parse, run_name, sentences, status
from runs.validated import FIRST_ORDER, Validated, callbacks, factory, paced, report, seeded, trained

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from corpora.sequences import Groups


@dataclass(frozen=True)
class Settings:
    """The settings of the runs on slots, besides those of every run."""

    folder: Path | None = None
    """Where the files of ATIS are; by default HFOPT_DATA/atis."""
    valid_share: float = 0.2
    """Share of the training utterances that validation takes."""
    batch_size: int = 1000
    """Utterances in a batch of hf."""
    curvature_batches: int = 1
    """How many of them the curvature products use."""
    minibatch: int = 32
    """Utterances in a step of the first-order optimizers."""

    cell: Literal["rnn", "lstm", "gru"] = "rnn"
    """The recurrent net; rnn has tanh units."""
    embedding: int = 64
    """Numbers that stand for a word."""
    hidden: int = 128
    """Hidden units of each direction."""
    window: int = 3
    """Words that are seen at a step."""
    bidirectional: bool = False
    """Whether there is a second net that runs backwards."""
    connections: int = 15
    """Incoming connections of a unit at the start; the other weights are 0."""
    scale: float = 1.0
    """Scale of recurrent and output weights at the start."""
    input_scale: float = 1.0
    """Scale of the input weights at the start."""

    dropout: float = 0.3
    """Share of embeddings and hidden units that are zero in training."""
    word_dropout: float = 0.05
    """Share of words that are taken for unknown in training."""
    weight_noise: float = 0.0
    """Standard deviation of the noise on all weights in training."""
    structural: float = 0.03
    """Mu, the weight of structural damping relative to lambda."""


@dataclass(frozen=True)
class CommandLine(Action, Training, Validated, Settings):
    """Slot filling. First word: window (default), bidirectional, lstm or stable."""

    cg_iterations: int = 50
    """Iterations of conjugate gradients at most."""
    max_steps: int | None = None
    """Steps at most; by default 500, for first-order optimizers 50,000."""
    threads: int | None = 1
    """Threads of torch on the CPU; None: as torch chooses."""


PRESETS = {
    "window": CommandLine(),
    "bidirectional": CommandLine(bidirectional=True),
    "lstm": CommandLine(cell="lstm"),
    # Miller & Hardt (ICLR 2019), table 2; they train by SGD at a learning rate of 10.
    "stable": CommandLine(window=1, dropout=0.5, word_dropout=0.0, weight_decay=1e-4, minibatch=128, clip=1.0),
}
RATES = {"adam": 2e-3, "rmsprop": 1e-3, "sgd": 0.1, "muon": 5e-3}

typed = sys.argv[1:] if __name__ == "__main__" else []
preset = typed[0] if typed and not typed[0].startswith("-") else "window"
if preset not in PRESETS:
    sys.exit(f"runs.slots: there is no preset {preset!r}; choose from {', '.join(PRESETS)}")
settings = parse(PRESETS[preset], typed[typed[:1] == [preset] :], f"runs.slots {preset}")

# 0. Seed, and threads, which sums are divided among.
seeded(settings)

# 1. Utterances.
stochastic = settings.optimizer in FIRST_ORDER
with sentences("runs.slots", settings):
    if settings.optimizer not in ("hf", *FIRST_ORDER):
        raise ValueError(f"optimizer {settings.optimizer} has no settings here; choose hf, {', '.join(FIRST_ORDER)}")
    slots = atis(
        settings.folder,
        valid_share=settings.valid_share,
        batch_size=settings.minibatch if stochastic else settings.batch_size,
        shuffle_every=None if stochastic else 1,
        seed=settings.seed,
        device=settings.device,
    )

# 2. Model and its initialisation.
with sentences("runs.slots", settings):
    model = Tagger(
        slots.V,
        slots.O,
        embedding=settings.embedding,
        hidden=settings.hidden,
        cell=settings.cell,
        window=settings.window,
        bidirectional=settings.bidirectional,
        dropout=settings.dropout,
        word_dropout=settings.word_dropout,
        weight_noise=settings.weight_noise,
    )
    model.sparse_init(settings.seed, settings.connections, settings.scale, settings.input_scale)
    model.to(settings.device)


def forward(model: torch.nn.Module, batch: Groups) -> torch.Tensor:
    """The logits of a minibatch's words."""
    return batch.outputs(model)


# 3. Loss: the utterances bring their own, slots.loss(outputs, batch), and their metrics.

# 4. Optimizer and driver.
name = settings.name or run_name(f"slots-{preset}", settings, PRESETS[preset])
batches = len(slots.train_batches)
second_order: dict[str, Any] = {}
if not stochastic:
    second_order = {"rule": hfopt.LevenbergMarquardt, "structural": settings.structural}
hf = HF(
    Path(__file__).parent / "logs" / name,
    model,
    slots,
    forward=forward,
    optimizer=factory(settings, RATES, **second_order),
    curvature_batches=None if stochastic else range(min(settings.curvature_batches, batches)),
    callbacks=callbacks(settings, stochastic=stochastic),
    average=settings.average,
    threshold=0,
    keep_checkpoints=1,
    seed=settings.seed,
    settings=settings,
    overwrite=settings.overwrite,
    hints=hints("runs.slots", typed, "tagged utterances"),
    **paced(settings, settings, batches),
)


def tagged(count: int = 8) -> list[list[tuple[str, str, str]]]:
    """The first test utterances: each word with its tag and the predicted one."""
    test = slots.evaluated_on("test")
    batch = test.take("test", slice(0, count))
    hf.tested.eval()
    with torch.no_grad():
        predicted = test.predictions(forward(hf.tested, batch), batch)
    order = [k for group in batch.members for k in group]
    found = dict(zip(order, predicted, strict=True))
    utterances = test.parts["test"][:count]
    return [list(zip(u.words, u.tags, found[k], strict=True)) for k, u in enumerate(utterances)]


def visualize_batch(count: int = 8) -> Figure:
    """The first test utterances with their predicted tags, in green where they are right."""
    from matplotlib import pyplot as plt

    utterances = tagged(count)
    longest = max(map(len, utterances))
    figure, axes = plt.subplots(figsize=(1.15 * longest + 0.4, 0.75 * count + 0.5), layout="constrained")
    for row, utterance in enumerate(utterances):
        for t, (word, tag, guess) in enumerate(utterance):
            axes.text(t, -row, word, ha="center", va="bottom", fontsize=9)
            if tag != "O" or guess != "O":
                shown = guess if guess == tag else f"{guess} ({tag})"
                color = "tab:green" if guess == tag else "tab:red"
                axes.text(t, -row - 0.05, shown, ha="center", va="top", fontsize=5, color=color)
    axes.set_xlim(-0.6, longest - 0.4)
    axes.set_ylim(-count + 0.3, 0.6)
    axes.set_axis_off()
    figure.suptitle(f"{slots.name}, test utterances after {hf.step} steps; in red: predicted (true)")
    return figure


def summary() -> dict[str, dict[str, float]]:
    """Print and return what the best parameters by validation reach."""
    return report(hf, {role: slots.evaluated_on(role) for role in ("valid", "test")}, forward)


if __name__ == "__main__":
    outcome = trained("runs.slots", settings, hf, visualize_batch)
    if outcome == "success":
        summary()
    sys.exit(status(outcome, wanted=False))
