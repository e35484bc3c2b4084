"""Sequential images: a recurrent net reads an image row by row or pixel by pixel and says at the end what it is.

    python -m runs.pixels                                 MNIST by rows, with Hessian-free
    python -m runs.pixels pixels                          784 pixels, one at a step
    python -m runs.pixels permuted                        the same in the permutation of Kerg, Goyette et al. (2019)
    python -m runs.pixels digits                          scikit-learn's digits by rows; no files are needed
    python -m runs.pixels --optimizer adam                the same with Adam (or sgd, rmsprop, muon)
    python -m runs.pixels --resume                        go on with that run where it was last saved
    python -m runs.pixels --picture rows.png              test images, in red where they are taken for something else
    python -m runs.pixels permuted --help                 all settings, those of the preset as defaults

MNIST's files are read from HFOPT_DATA/mnist or --folder. Tests during training are of 10,000 of the training images:
the run ends when their error no longer falls, and what is reported at its end is of the parameters that were best on
them.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

if find_spec("models") is None:
    sys.exit("runs.pixels: type python -m runs.pixels in the folder of the checkout")

import hfopt
from corpora.images.pixels import pixels, small_pixels
from hfopt.experiment.driver import HF
from models import GRU, LSTM, RNN
from runs.settings import Action, Training, hints, parse, run_name, sentences, status
from runs.validated import FIRST_ORDER, Validated, callbacks, factory, paced, report, seeded, trained

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Settings:
    """The settings of the runs on sequential images, besides those of every run."""

    data: Literal["mnist", "digits"] = "mnist"
    """The images."""
    folder: Path | None = None
    """Where MNIST's files are; by default HFOPT_DATA/mnist."""
    order: Literal["rows", "pixels", "permuted"] = "rows"
    """What is seen at a step: a row, the next pixel, or the next one in a permutation."""
    permutation: int = 1234
    """Seed of the permutation, numpy's RandomState: 1234 in Kerg, Goyette et al., 92916 in Lezcano-Casado et al."""
    batch_size: int = 500
    """Images in a batch of hf."""
    gradient_batches: int | None = 10
    """How many batches the gradient of hf is of, with other images at every step; None: all."""
    curvature_batches: int = 1
    """How many of them the curvature products use."""
    evaluation_batches: int = 4
    """How many of them judge the step."""
    minibatch: int = 100
    """Images in a step of the first-order optimizers."""

    cell: Literal["rnn", "lstm", "gru"] = "rnn"
    """The recurrent net; rnn has tanh units."""
    hidden: int = 100
    """Hidden units."""
    connections: int = 15
    """Incoming connections of a unit at the start; the other weights are 0."""
    scale: float = 1.0
    """Scale of the recurrent and output weights at the start."""
    input_scale: float = 0.25
    """Scale of the input weights at the start."""
    structural: float = 0.03
    """Mu, the weight of structural damping relative to lambda."""
    threshold: float = 0.0
    """Share of wrong validation images below which the run ends with success; 0 for none."""


@dataclass(frozen=True)
class CommandLine(Action, Training, Validated, Settings):
    """Sequential images. First word: rows (default), pixels, permuted or digits."""

    cg_iterations: int = 30
    """Iterations of conjugate gradients at most."""
    weight_decay: float = 2e-5
    """Coefficient c of the penalty c/2 |theta|^2."""
    max_steps: int | None = None
    """Steps at most; by default 500, for first-order optimizers 50,000."""
    threads: int | None = 1
    """Threads of torch on the CPU; None: as torch chooses."""
    patience: int = 20
    """Validations in a row without progress after which the run ends."""
    validate_every: int | None = None
    """Steps from one validation to the next; by default 1 for hf, and a pass over the data for the others."""


ROWS = CommandLine(validate_every=5)
PRESETS = {
    "rows": ROWS,
    "pixels": replace(ROWS, order="pixels", batch_size=100),
    "permuted": replace(ROWS, order="permuted", batch_size=100),
    "digits": replace(ROWS, data="digits", batch_size=300, gradient_batches=None, hidden=40, validate_every=1),
}
RATES = {"adam": 1e-3, "rmsprop": 1e-3, "sgd": 1e-1, "muon": 2e-3}

typed = sys.argv[1:] if __name__ == "__main__" else []
preset = typed[0] if typed and not typed[0].startswith("-") else "digits" if __name__ != "__main__" else "rows"
if preset not in PRESETS:
    sys.exit(f"runs.pixels: there is no preset {preset!r}; choose from {', '.join(PRESETS)}")
settings = parse(PRESETS[preset], typed[typed[:1] == [preset] :], f"runs.pixels {preset}")

# 0. Seed, and threads, which sums are divided among.
seeded(settings)

# 1. Images.
stochastic = settings.optimizer in FIRST_ORDER
options: dict[str, Any] = {
    "order": settings.order,
    "permutation": settings.permutation,
    "batch_size": settings.minibatch if stochastic else settings.batch_size,
    "shuffle_every": None if stochastic else 1,
    "seed": settings.seed,
    "device": settings.device,
}
with sentences("runs.pixels", settings):
    if settings.optimizer not in ("hf", *FIRST_ORDER):
        raise ValueError(f"optimizer {settings.optimizer} has no settings here; choose hf, {', '.join(FIRST_ORDER)}")
    problem = small_pixels(**options) if settings.data == "digits" else pixels(settings.folder, **options)

# 2. Model and its initialisation.
model = {"rnn": RNN, "lstm": LSTM, "gru": GRU}[settings.cell](problem.V, settings.hidden, problem.O, output="last")
model.sparse_init(
    settings.seed, connections=settings.connections, scale=settings.scale, input_scale=settings.input_scale
)
model.to(settings.device)

# 3. Loss: the images bring their own, problem.loss(outputs, batch), and their measure of error, zero_one_loss.

# 4. Optimizer and driver.
name = settings.name or run_name(f"pixels-{preset}", settings, PRESETS[preset])
batches = len(problem.train_batches)
roles: dict[str, Any] = {}
if not stochastic:
    gradient = min(batches, settings.gradient_batches or batches)
    roles["gradient_batches"] = range(gradient)
    roles["curvature_batches"] = range(min(settings.curvature_batches, gradient))
    roles["evaluation_batches"] = range(min(settings.evaluation_batches, gradient))
second_order: dict[str, Any] = {}
if not stochastic:
    second_order = {"rule": hfopt.LevenbergMarquardt, "structural": settings.structural}
hf = HF(
    Path(__file__).parent / "logs" / name,
    model,
    problem,
    optimizer=factory(settings, RATES, **second_order),
    **roles,
    callbacks=callbacks(settings, stochastic=stochastic),
    average=settings.average,
    threshold=settings.threshold,
    keep_checkpoints=1,
    seed=settings.seed,
    settings=settings,
    overwrite=settings.overwrite,
    hints=hints("runs.pixels", typed, "images"),
    **paced(settings, settings, batches),
)


def visualize_batch(count: int = 20) -> Figure:
    """The first test images, with the class that the net gives each, in red where it is another one."""
    from matplotlib import pyplot as plt

    test = problem.evaluated_on("test")
    batch = test(-1)
    with torch.no_grad():
        given = hf.tested(batch.inputs).argmax(1)
    rows, columns = problem.shape
    where = problem.places.argsort() if problem.order == "permuted" else slice(None)
    images = batch.inputs.transpose(0, 1).flatten(1).cpu()[:, where].view(-1, rows, columns).numpy()
    figure, grid = plt.subplots(2, -(-count // 2), figsize=(0.9 * count / 2, 2.4), layout="constrained")
    for axes, image, guess, target in zip(grid.flat, images, given.tolist(), batch.targets.tolist(), strict=False):
        axes.imshow(image, cmap="gray", vmin=0.0, vmax=1.0)
        axes.set_title(str(guess), color="black" if guess == target else "tab:red", fontsize=9)
        axes.set_axis_off()
    figure.suptitle(f"{problem.name} by {problem.order} after {hf.step} steps", fontsize=9)
    return figure


def summary() -> dict[str, dict[str, float]]:
    """Print and return what the best parameters by validation reach."""
    return report(hf, {role: problem.evaluated_on(role) for role in ("valid", "test")})


if __name__ == "__main__":
    outcome = trained("runs.pixels", settings, hf, visualize_batch)
    if outcome == "success":
        summary()
    sys.exit(status(outcome, wanted=settings.threshold > 0))
