"""What the runs on characters and on words share: settings, model, training by validation, samples, and the report."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch.nn import functional as F

from corpora.text import Text, Window
from corpora.text.baselines import BackOff
from hfopt.experiment import report
from hfopt.experiment.carried import Carried
from hfopt.experiment.driver import HF
from hfopt.experiment.hooks import Callback, ClipGradient, Experiment, KeepBest, LowerOnPlateau, StopWithout
from hfopt.experiment.roles import evaluate
from hfopt.experiment.store.reader import read_run
from models.language import LanguageModel, beside_symbols, units_within
from runs.muon import MuonWithAdam
from runs.optimizers import LEARNING_RATES, STOCHASTIC, Factory, optimizer, pace
from runs.settings import Training, main, sentences, status

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = ("score", "data", "minutes", "sample", "sample_every", "start", "temperature", "order")
"""Settings that do not change what is learned, which the name of a run leaves out."""
BEST = "best-test"
"""The checkpoint of the parameters that are best by validation."""


@dataclass(frozen=True)
class Settings:
    """The settings of language models, besides those of every run."""

    text: str = "topics"
    """Name of the text, or the path of a file of one's own."""
    data: Path | None = None
    """Folder of a published text's files; by default the one of its name in the folder HFOPT_DATA."""
    regime: Literal["windows", "columns"] = "windows"
    """Training windows at random places, or contiguous columns with the state carried."""
    window: int = 60
    """Steps of a window."""
    warm_up: int = 10
    """Steps of a random window that are not scored; and at least so many before what is scored in a test."""
    batch_size: int = 50
    """Sequences in a batch of hf and lbfgs."""
    gradient_batches: int = 10
    """Batches of the gradient, drawn again at every step."""
    curvature_batches: int = 1
    """How many of them the curvature products use."""
    evaluation_batches: int = 4
    """How many of them judge the step (backtracking, line search and rho)."""
    minibatch: int = 50
    """Sequences in a step of the stochastic optimizers."""
    valid_symbols: int | None = None
    """Symbols of the validation part that tests during training score; None: all."""

    cell: Literal["mrnn", "rnn", "lstm", "gru", "ugrnn"] = "mrnn"
    """Kind of the recurrent layers."""
    hidden: int = 128
    """Hidden units of every layer, and factors of mrnn."""
    parameters: int | None = None
    """Choose the number of hidden units by this many parameters at most, instead."""
    depth: int = 1
    """Recurrent layers."""
    embedding: int | None = None
    """Columns of the symbols' embedding; None: none, a symbol is a row of the first layer's weights."""
    tied: bool = False
    """Let the readout's matrix be the embedding's."""
    dropout: float = 0.0
    """Share of the inputs of layers and of the readout that are zero in training."""
    sparse: bool = True
    """Start from sparse weights; otherwise uniform within 1/sqrt(hidden)."""
    connections: int = 15
    """Incoming connections of a unit at the start, where that is sparse."""

    structural: float = 0.03
    """Mu, the weight of structural damping relative to lambda."""
    clip: float | None = 1.0
    """Largest norm of the gradient, for optimizers of gradients; None: no limit."""
    halve_after: int | None = None
    """Tests without progress after which the learning rate is halved; None: never."""
    stop_after: int | None = None
    """Tests without progress after which the run ends; None: it goes on."""
    minutes: float | None = None
    """Minutes of training after which the run ends; None: no limit."""
    test_every: int = 5
    """Steps of hf from one test to the next; the stochastic optimizers take 50 times as many."""
    sample_every: int = 4
    """Tests from one sample that is printed to the next; 0: none before the end."""
    start: str = "The meaning of life is "
    """What samples go on from."""
    sample: int = 200
    """Symbols of a sample."""
    temperature: float = 0.8
    """Temperature of samples: 0 for the most probable symbols."""
    order: int = 3
    """Symbols that the count model sees that the result is compared with."""
    score: bool = False
    """Do not train: score the best parameters of the run on all of the validation and test parts."""


@dataclass(frozen=True)
class LanguageTraining(Training):
    """Settings of every run, as language models have them."""

    # Short solves on few sequences: the batches are new at every step, and many steps are worth more than long ones.
    cg_iterations: int = 15
    """Iterations of conjugate gradients at most."""
    threads: int | None = 1
    """Threads of torch on the CPU; None: as torch chooses."""


def roles(settings: Any) -> dict[str, Any]:
    """Which batches the roles of an optimizer's step have, as the driver's arguments."""
    stochastic = settings.optimizer in STOCHASTIC
    gradient = range(1 if stochastic else settings.gradient_batches)
    return {
        "gradient_batches": gradient,
        "curvature_batches": range(min(settings.curvature_batches, len(gradient))),
        "evaluation_batches": range(min(settings.evaluation_batches, len(gradient))),
    }


def options(settings: Any) -> dict[str, Any]:
    """The arguments of `corpora.text.characters` and `words` that settings tell."""
    return {
        "data": settings.data,
        "regime": settings.regime,
        "window": settings.window,
        "warm_up": settings.warm_up,
        "batch_size": settings.minibatch if settings.optimizer in STOCHASTIC else settings.batch_size,
        "train_batches": len(roles(settings)["gradient_batches"]),
        "test_symbols": settings.valid_symbols,
        "seed": settings.seed,
        "device": settings.device,
    }


def build(settings: Any, symbols: int) -> LanguageModel:
    """The model, with its initial weights."""
    hidden = settings.hidden
    if settings.parameters is not None:
        given = {"depth": settings.depth, "embedding": settings.embedding}
        hidden = units_within(settings.parameters, settings.cell, symbols, **given)
    model = LanguageModel(
        settings.cell,
        symbols,
        hidden,
        depth=settings.depth,
        embedding=settings.embedding,
        tied=settings.tied,
        dropout=settings.dropout,
    )
    if settings.sparse:
        model.sparse_init(settings.seed, connections=settings.connections)
    return model.to(settings.device)


def _optimizer(settings: Any, model: LanguageModel) -> Factory:
    """The optimizer that the settings ask for; muon leaves what is next to the symbols to Adam."""
    if settings.optimizer == "muon":
        lr = LEARNING_RATES["muon"] if settings.lr is None else settings.lr
        return lambda parameters: MuonWithAdam(parameters, lr, beside_symbols(model))
    return optimizer(settings, structural=settings.structural)


def forward(model: Any, batch: Window) -> Any:
    """Outputs of a window, with the states that the next one goes on from."""
    return Carried(*model.with_states(batch.inputs, batch.states))


class OutOfTime(Callback):
    """End the run after so many seconds of steps and tests."""

    def __init__(self, minutes: float) -> None:
        self._minutes = minutes  # not a setting: more time may be given to a run that is resumed

    def before_update(self, hf: Experiment) -> None:
        """Look at the clock."""
        if isinstance(hf, HF) and hf.totals["seconds"] >= 60 * self._minutes:
            hf.stop(f"{self._minutes:g} minutes are over")


class Samples(Callback):
    """Print a sample after every so many tests."""

    def __init__(self, every: int) -> None:
        self._every, self._tests = every, 0

    def after_test(self, hf: Experiment, row: Mapping[str, Any]) -> None:
        """Print one."""
        self._tests += 1
        if self._tests % self._every == 0:
            self._say(hf)

    def _say(self, hf: Any) -> None:
        if not hf.quiet:
            report.say(f"\n{hf.sample()}\n")

    def state_dict(self) -> dict[str, Any]:
        """How many tests there were."""
        return {"tests": self._tests}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._tests = state["tests"]


class Language(HF):
    """An experiment with a language model, from which samples can be drawn: ``hf.sample("The meaning of life is")``."""

    model: LanguageModel
    problem: Text

    def __init__(self, path: Path, settings: Any, problem: Text, **given: Any) -> None:
        self.chosen = settings
        model = build(settings, problem.V)
        driven = pace(settings.optimizer, settings.max_steps)
        stochastic = settings.optimizer in STOCHASTIC
        driven["test_freq"] = settings.test_every * (50 if stochastic else 1)
        driven["save_freq"] = driven["test_freq"] * (2 if stochastic else 1)
        callbacks: list[Callback] = [KeepBest(name=BEST)]
        if settings.stop_after is not None:
            callbacks.append(StopWithout(settings.stop_after))
        if settings.halve_after is not None:
            callbacks.append(LowerOnPlateau(settings.halve_after))
        if settings.clip is not None and stochastic:
            callbacks.append(ClipGradient(settings.clip))
        if settings.minutes is not None:
            callbacks.append(OutOfTime(settings.minutes))
        if settings.sample_every:
            callbacks.append(Samples(settings.sample_every))
        super().__init__(
            path,
            model,
            problem,
            forward=forward if problem.regime == "columns" else (lambda model, batch: model(batch.inputs)),
            optimizer=_optimizer(settings, model),
            callbacks=callbacks,
            threshold=0,
            seed=settings.seed,
            settings=settings,
            overwrite=settings.overwrite,
            **roles(settings),
            **driven,
            **given,
        )

    def sample(
        self, start: str | None = None, length: int | None = None, *, temperature: float | None = None, seed: int = 0
    ) -> str:
        """Go on from a text with drawn symbols; what is not given is as in the settings.

        Args:
            start: the text to go on from.
            length: how many symbols are drawn.
            temperature: 0 for the most probable symbol at each step, a completion.
            seed: to draw from; the generators of the run are left alone.

        Raises:
            ValueError: a negative length or temperature.
        """
        alphabet, s = self.problem.alphabet, self.chosen
        start = s.start if start is None else start
        known = [
            symbol for symbol in alphabet.split(start) if alphabet.unknown is not None or symbol in alphabet.numbers
        ]
        codes = alphabet.encode(known).astype(np.int64) if known else np.zeros(1, np.int64)
        never = [] if alphabet.unknown is None else [alphabet.numbers[alphabet.unknown]]
        found = self.model.sample(
            torch.from_numpy(codes).unsqueeze(1),
            s.sample if length is None else length,
            temperature=s.temperature if temperature is None else temperature,
            generator=torch.Generator().manual_seed(seed),
            never=never,
        )
        return start + alphabet.between + alphabet.decode(found[:, 0].tolist())

    def best(self) -> dict[str, float]:
        """Take over the parameters that are best by validation, score all of both parts with them, and write that down.

        Returns:
            Name of a number -> number: the metric of both parts, that of the count model on them, the step.

        Raises:
            FileNotFoundError, RunError: there is no such run.
        """
        run = read_run(self.path)
        self.model.load_state_dict(run.parameters(BEST))
        scores: dict[str, float] = {
            "step": run.find(BEST).step,
            "parameters": sum(p.numel() for p in self.model.parameters()),
        }
        for part in ("valid", "test"):
            whole = self.problem.evaluated_on(part)
            scores[part] = evaluate(self.model, whole, whole.test_batches, self.forward).error
        if not self.problem.alphabet.between:
            model = BackOff(self.problem.codes("train"), self.problem.V, self.chosen.order)
            for part in ("valid", "test"):
                scores[f"count model {part}"] = model.bits(*self.problem.with_past(part))
        _write(self.path / "scores.json", {"scores": scores, "text": self.problem.identity()})
        return scores

    def tell(self, scores: Mapping[str, float]) -> None:
        """Print what came of the run."""
        metric = self.problem.metrics[0]
        lines = [
            "",
            self.problem.describe(),
            f"best by validation is step {scores['step']:,.0f} of {scores['parameters']:,.0f} parameters",
            f"{metric.name} of all symbols: {scores['valid']:.3f} on validation, {scores['test']:.3f} on the test part",
        ]
        if "count model test" in scores:
            lines.append(
                f"a count model of order {self.chosen.order} with back-off: {scores['count model valid']:.3f} on "
                f"validation, {scores['count model test']:.3f} on the test part"
            )
        for temperature in dict.fromkeys((self.chosen.temperature, 0.0)):
            lines += ["", f"a sample at temperature {temperature:g}:", self.sample(temperature=temperature)]
        report.say("\n".join(lines))


def train(module: str, settings: Any, hf: Language) -> int:
    """Do what was asked for, say what came of it, and return the exit status."""
    report.say(hf.problem.describe())
    outcome = "max_steps" if settings.score else main(module, settings, hf, lambda: draw(hf))
    if outcome in (None, "interrupted", "diverged"):
        return status(outcome)
    try:
        with sentences(module, settings):
            hf.tell(hf.best())
    except KeyError:
        sys.exit(f"{module}: the run in {report.short(hf.path)} has not been tested yet; go on with --resume")
    except KeyboardInterrupt:
        sys.exit(f"\n{module}: the run is complete, but its best parameters were not scored; --score does that")
    return 0


def _write(path: Path, content: Any) -> None:
    """Replace a file as a whole, so that it is never half there."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(new, path)


@torch.no_grad()
def draw(hf: Language, steps: int = 100) -> Figure:
    """Hidden units on the first symbols of the validation part, and how many bits each symbol costs the model."""
    from matplotlib import pyplot as plt

    codes, scored = hf.problem.with_past("valid")
    first = len(codes) - scored
    codes = codes[max(0, first - 50) : first + steps].astype(np.int64)
    numbers = torch.from_numpy(codes).unsqueeze(1).to(next(hf.model.parameters()).device)
    hf.model.eval()
    logits = hf.model(numbers[:-1]).double().cpu()[-steps:, 0]
    hidden = hf.model.hidden_states(numbers[:-1]).float().cpu()[-steps:, 0]
    bits = (F.cross_entropy(logits, numbers[-steps:, 0].cpu(), reduction="none") / np.log(2)).numpy()
    names = [hf.problem.alphabet.symbols[k].replace("\n", "\u21b5").replace(" ", "\u2423") for k in codes[-steps:]]
    figure, (top, below) = plt.subplots(2, 1, figsize=(14, 6), sharex=True, layout="constrained", height_ratios=(1, 2))
    top.bar(np.arange(steps), bits, color="C0")
    top.set(
        ylabel="bits",
        title=f"{hf.problem.name}: what each symbol costs, after {hf.step} steps ({bits.mean():.2f} bits)",
    )
    image = below.imshow(hidden.T.numpy(), aspect="auto", cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    below.set(ylabel="hidden unit of the last layer")
    turned = 90 if hf.problem.alphabet.between else 0
    below.set_xticks(np.arange(steps), names, fontsize=8, rotation=turned, family="monospace")
    figure.colorbar(image, ax=below, label="value")
    return figure


__all__ = ["BEST", "SHOWN", "Language", "LanguageTraining", "Settings", "draw", "options", "train"]
