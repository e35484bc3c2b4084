"""Polyphonic music: recurrent nets predict each frame of a piano roll from those before it, and write music.

    python -m runs.music                                  generated counterpoint with RNN-NADE; no file is needed
    python -m runs.music jsb                              Bach's chorales, a plain recurrent net
    python -m runs.music jsb-nade                         the same with RNN-NADE
    python -m runs.music nottingham                       folk tunes; piano-midi, musedata: the other collections
    python -m runs.music jsb --optimizer adam             the same with Adam (or sgd, rmsprop, muon)
    python -m runs.music --data songs/ --steps-per-beat 4 a folder of MIDI files
    python -m runs.music jsb --resume                     go on with that run where it was last saved
    python -m runs.music jsb --picture roll.png           a picture of new music, and roll.mid beside it
    python -m runs.music jsb --help                       all settings, those of the preset as defaults

and from Python, with the settings of the counterpoint:

    python -c "import runs.music as m; m.hf.optimize(); m.summary()"

Tests during training are of the validation pieces: the run ends when they no longer improve, and what is reported at
its end, on validation and test pieces, is of the parameters that were best on the former. Losses are nats per frame,
summed over 88 pitches, over all frames with the first ones predicted from the learned start (as in 2012), and without
the first ones (as in 2018).
"""

from __future__ import annotations

import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if find_spec("models") is None:
    sys.exit("runs.music: type python -m runs.music in the folder of the checkout")

from corpora.music import Music, load
from corpora.music.baseline import FirstOrder
from corpora.music.midi import write_midi
from corpora.music.picture import draw_rolls
from corpora.music.rules import mean_share, obedience
from hfopt.experiment.driver import HF
from models import RNNNADE, PianoRoll
from runs.music_presets import PRESETS, RATES, RULES
from runs.settings import hints, parse, run_name, sentences, status
from runs.validated import FIRST_ORDER, callbacks, factory, paced, report, seeded, trained

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from corpora.music.rolls import Roll
    from corpora.sequences import Groups

typed = sys.argv[1:] if __name__ == "__main__" else []
preset = typed[0] if typed and not typed[0].startswith("-") else "counterpoint"
if preset not in PRESETS:
    sys.exit(f"runs.music: there is no preset {preset!r}; choose from {', '.join(PRESETS)}")
settings = parse(PRESETS[preset], typed[typed[:1] == [preset] :], f"runs.music {preset}")

# 0. Seed, and threads, which sums are divided among.
seeded(settings)

# 1. Pieces. First-order optimizers take a minibatch at a step, hf the gradient of all windows.
stochastic = settings.optimizer in FIRST_ORDER
with sentences("runs.music", settings):
    if settings.optimizer not in ("hf", *FIRST_ORDER):
        raise ValueError(f"optimizer {settings.optimizer} has no settings here; choose hf, {', '.join(FIRST_ORDER)}")
    pieces = load(settings.data, settings.folder, steps_per_beat=settings.steps_per_beat, count=settings.pieces)
    music = Music(
        pieces,
        batch_size=settings.minibatch if stochastic else settings.batch_size,
        window=settings.window,
        context=settings.context,
        first=settings.first,
        conditional=settings.nade > 0,
        shuffle_every=None if stochastic else 1,
        seed=settings.seed,
        device=settings.device,
    )

# 2. Model and its initialisation; output biases begin at how often each note sounds.
with sentences("runs.music", settings):
    noise: dict[str, Any] = {name: getattr(settings, name) for name in ("dropout", "input_dropout", "weight_noise")}
    model: RNNNADE | PianoRoll = (
        RNNNADE(settings.cell, settings.hidden, settings.nade, settings.depth, **noise)
        if settings.nade
        else PianoRoll(settings.cell, settings.hidden, settings.depth, **noise)
    )
    frames = np.concatenate(pieces.parts["train"])
    rates = torch.from_numpy((frames.sum(0) + 0.5) / (len(frames) + 1))
    model.sparse_init(settings.seed, settings.connections, settings.scale, settings.input_scale, rates)
    model.to(settings.device)


def forward(model: torch.nn.Module, batch: Groups) -> torch.Tensor:
    """The logits of a minibatch's scored frames."""
    if settings.nade:
        return torch.cat([model(group.inputs, group.targets, group.lengths, group.scored) for group in batch.groups])
    return batch.outputs(model)


# 3. Loss: the pieces bring their own, music.loss(outputs, batch), and their metrics.

# 4. Optimizer and driver.
name = settings.name or run_name(f"music-{preset}", settings, PRESETS[preset])
batches = len(music.train_batches)
roles: dict[str, Any] = {}
if not stochastic:
    roles = {"curvature_batches": range(min(settings.curvature_batches, batches))}
    if settings.gradient_batches is not None:
        roles["gradient_batches"] = range(min(settings.gradient_batches, batches))
second_order: dict[str, Any] = {}
if not stochastic:
    rule = partial(RULES[settings.lambda_by], minimum=settings.least_damping)
    second_order = {"rule": rule, "structural": settings.structural}
hf = HF(
    Path(__file__).parent / "logs" / name,
    model,
    music,
    forward=forward,
    optimizer=factory(settings, RATES, **second_order),
    **roles,
    callbacks=callbacks(settings, stochastic=stochastic),
    average=settings.average,
    threshold=0,
    keep_checkpoints=1,
    seed=settings.seed,
    settings=settings,
    overwrite=settings.overwrite,
    hints=hints("runs.music", typed, "new music"),
    **paced(settings, settings, batches),
)


def samples(count: int, steps: int = 64, seed: int = 0) -> list[Roll]:
    """Rolls (steps, 88) drawn from the model as it is."""
    player = hf.tested
    assert isinstance(player, (PianoRoll, RNNNADE))
    player.eval()
    drawn = player.sample(steps, torch.Generator(settings.device).manual_seed(seed), count=count)
    return list(drawn.cpu().numpy().astype(np.uint8))


def visualize_batch(steps: int = 64) -> Figure:
    """New music of the model, of a first-order model of the notes, and a piece of the validation part."""
    first_order = FirstOrder(pieces).sample(steps, np.random.default_rng(settings.seed))
    rolls = {
        f"{type(model).__name__} after {hf.step} steps": samples(1, steps, settings.seed)[0],
        "each note by itself, a chain of first order": first_order,
        f"a piece of {pieces.name}": pieces.parts["valid"][0][:steps],
    }
    return draw_rolls(rolls, steps_per_beat=pieces.steps_per_beat, title=f"{pieces.name}: drawn and given")


def rules(count: int = 16, steps: int = 64) -> dict[str, dict[str, float]]:
    """Shares in which the rules of counterpoint are obeyed, by new pieces of the model and of a first-order model."""
    generator = np.random.default_rng(settings.seed)
    first_order = FirstOrder(pieces)
    made = {
        "model": samples(count, steps, settings.seed),
        "first order": [first_order.sample(steps, generator) for _ in range(count)],
        "test pieces": pieces.parts["test"],
    }
    found = {}
    for who, rolls in made.items():
        counts = obedience(rolls)
        found[who] = {"mean": mean_share(counts), **{rule: c.share for rule, c in counts.items()}}
    return found


def beside() -> dict[str, Any]:
    """What a first-order model of each note reaches on the test pieces, and how often rules are obeyed."""
    nats = FirstOrder(pieces).nats(pieces.parts["test"])
    found: dict[str, Any] = {"first order": {"nats_per_frame": nats[0], "nats_per_later_frame": nats[1]}}
    print(f"a first-order model of each note: nats/frame {nats[0]:.4g}, from 2nd {nats[1]:.4g} (test)")
    if pieces.name == "counterpoint":
        found["rules"] = rules()
        for who, shares in found["rules"].items():
            print(f"rules obeyed by {who}: {', '.join(f'{rule} {100 * share:.1f}%' for rule, share in shares.items())}")
    return found


def summary() -> dict[str, Any]:
    """Print, keep and return what the best parameters by validation reach, beside a first-order model of each note."""
    return dict(report(hf, {role: music.evaluated_on(role) for role in ("valid", "test")}, forward, beside))


def write_music(picture: Path) -> None:
    """Write new music as a MIDI file beside a picture."""
    midi = picture.with_suffix(".mid")
    try:
        write_midi(midi, samples(1, 128, settings.seed)[0], pieces.steps_per_beat)
    except ModuleNotFoundError as error:
        print(f"runs.music: no {midi.name}: {error}", file=sys.stderr)
    else:
        print(midi)


def draw_new() -> Figure:
    """Write new music as a MIDI file beside the picture, and return the picture."""
    assert settings.picture is not None
    write_music(settings.picture)
    return visualize_batch()


if __name__ == "__main__":
    outcome = trained("runs.music", settings, hf, draw_new)
    if outcome == "success":
        summary()
        picture = hf.path / "sample.png"
        visualize_batch().savefig(picture, dpi=130)
        print(picture)
        write_music(picture)
    sys.exit(status(outcome, wanted=False))
