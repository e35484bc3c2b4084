"""The settings of the runs on music: those that suit each collection here, and those published."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import hfopt
from runs.settings import Action, Training
from runs.validated import Validated


@dataclass(frozen=True)
class Settings:
    """The settings of the runs on music, besides those of every run."""

    data: str = "counterpoint"
    """The pieces: counterpoint, jsb, nottingham, piano-midi, musedata, jsb-quarter, jsb-16th, or a file or folder."""
    pieces: int = 240
    """How many pieces of counterpoint there are, a tenth of them each for validation and test."""
    folder: Path | None = None
    """Where the published files are; by default HFOPT_DATA/music."""
    steps_per_beat: int = 2
    """Frames in a quarter note, for MIDI files."""
    first: Literal["predicted", "left out"] = "predicted"
    """Whether the first frame of a piece counts in the training loss."""
    window: int | None = None
    """Frames of a training window that are scored at most; longer pieces are cut. None: pieces are not cut."""
    context: int = 0
    """Frames before them that are seen, but not scored."""
    batch_size: int | None = None
    """Windows in a batch of hf at most; None: all in one."""
    gradient_batches: int | None = None
    """How many batches the gradient of hf is of; None: all."""
    curvature_batches: int = 1
    """How many of them the curvature products use."""
    minibatch: int = 8
    """Windows in a step of the first-order optimizers."""

    cell: Literal["rnn", "lstm", "gru"] = "rnn"
    """The recurrent net; rnn has tanh units."""
    hidden: int = 150
    """Its hidden units."""
    depth: int = 1
    """Its layers."""
    nade: int = 0
    """Hidden units of the NADE of each frame; 0: notes are independent, given the past."""
    connections: int = 15
    """Incoming connections of a unit at the start; the other weights are 0."""
    scale: float = 1.0
    """Scale of the recurrent and output weights at the start."""
    input_scale: float = 0.5
    """Scale of the input weights at the start."""

    dropout: float = 0.0
    """Share of the recurrent net's outputs that are zero in training."""
    input_dropout: float = 0.0
    """Share of the notes that the net does not see in training."""
    weight_noise: float = 0.0
    """Standard deviation of the noise on all weights in training."""
    structural: float = 0.03
    """Mu, the weight of structural damping relative to lambda."""
    least_damping: float | None = None
    """Lambda falls no lower: long solves find what the training pieces alone have in common."""
    lambda_by: Literal["rho", "loss"] = "rho"
    """What lambda follows: the reduction ratio, or the loss."""


@dataclass(frozen=True)
class CommandLine(Action, Training, Validated, Settings):
    """Recurrent nets learn polyphonic music. First word: the preset, a collection or a collection and -nade."""

    cg_iterations: int = 100
    """Iterations of conjugate gradients at most."""
    max_steps: int | None = None
    """Steps at most; by default 500, for first-order optimizers 50,000."""
    threads: int | None = 1
    """Threads of torch on the CPU; None: as torch chooses."""


# Learning rates of Adam and the others. Every comparison should tune its own.
RATES = {"adam": 2e-3, "rmsprop": 1e-3, "sgd": 1e-2, "muon": 5e-3}
RULES: dict[str, Any] = {"rho": hfopt.LevenbergMarquardt, "loss": hfopt.KrylovDamping}

PRESETS = {
    "counterpoint": CommandLine(
        nade=50, hidden=80, batch_size=48, max_steps=30, cg_iterations=30, dropout=0.1, input_dropout=0.1, patience=5
    ),
    # Long solves on all chorales are too good at what these have in common by chance: noise, and a lambda that stays.
    "jsb": CommandLine(
        data="jsb",
        batch_size=60,
        cg_iterations=30,
        minibatch=16,
        dropout=0.3,
        input_dropout=0.2,
        weight_noise=0.02,
        least_damping=0.03,
        patience=12,
    ),
}
PRESETS["jsb-nade"] = replace(PRESETS["jsb"], nade=100, dropout=0.4, input_dropout=0.1)
# Pieces are long: windows of them, and other ones at every step.
LONG = replace(
    PRESETS["jsb"],
    window=100,
    context=20,
    batch_size=100,
    gradient_batches=5,
    dropout=0.1,
    input_dropout=0.05,
    patience=8,
)
PRESETS |= {name: replace(LONG, data=name) for name in ("nottingham", "piano-midi", "musedata")}
PRESETS["piano-midi"] = replace(PRESETS["piano-midi"], dropout=0.3, input_dropout=0.1)
# Bengio, Boulanger-Lewandowski & Pascanu (2012): parts of 100 frames, clipped gradients, 100 to 400 units.
PRESETS["jsb-2012"] = CommandLine(data="jsb", optimizer="sgd", lr=1e-2, hidden=200, window=100, clip=15.0, minibatch=1)
# Miller & Hardt (ICLR 2019), table 2; their rate of 0.05 without momentum is one of 0.005 with momentum 0.9.
PRESETS["jsb-stable"] = CommandLine(
    data="jsb", optimizer="sgd", lr=5e-3, hidden=1024, dropout=0.1, minibatch=1, clip=5.0, first="left out"
)
PRESETS |= {f"{name}-nade": replace(PRESETS[name], nade=100) for name in ("nottingham", "piano-midi", "musedata")}
