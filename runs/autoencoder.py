"""Deep autoencoders: a feed-forward net squeezes images through a few numbers, trained Hessian-free from the start.

    python -m runs.autoencoder                            scikit-learn's digits, 64-100-50-10 and back
    python -m runs.autoencoder mnist                      MNIST, 784-1000-500-250-30 and back
    python -m runs.autoencoder curves                     generated curves, 784-400-200-100-50-25-6 and back
    python -m runs.autoencoder mnist-2010                 with the settings of 2010: all images in every gradient
    python -m runs.autoencoder mnist --optimizer nag --lr 0.001 --device cuda
    python -m runs.autoencoder --resume                   go on with that run where it was last saved
    python -m runs.autoencoder --picture images.png       look at images and their reconstructions
    python -m runs.autoencoder curves --help              all settings, those of the preset as defaults

and from Python, with the settings of the digits:

    python -c "import runs.autoencoder as a; a.hf.optimize()"
    python -c "import runs.autoencoder as a; a.hf.load(); a.visualize_batch().savefig('images.png')"

What is optimised is the cross-entropy, summed over pixels; what is reported is the squared error, summed over pixels
and averaged over images, as in Hinton & Salakhutdinov (Science 2006), Martens (ICML 2010) and Sutskever, Martens, Dahl
& Hinton (ICML 2013), whose nets mnist and curves are. The last of them lists errors on the training images: with
`--evaluate-on train` the run follows those. The images of curves are not the original ones, so that errors on them
cannot be compared with the published ones. MNIST's files are read from HFOPT_DATA/mnist or --folder.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

if find_spec("models") is None:
    sys.exit("runs.autoencoder: type python -m runs.autoencoder in the folder of the checkout")

import corpora
import hfopt
from corpora.images.picture import draw_images
from hfopt.experiment.driver import HF
from hfopt.experiment.roles import Growth, evaluate
from hfopt.preconditioners import KFAC
from models import FNN
from runs.optimizers import STOCHASTIC, optimizer, pace
from runs.settings import Action, Training, described, hints, main, parse, run_name, sentences, status

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Settings:
    """The settings of the autoencoders, besides those of every run."""

    data: Literal["digits", "mnist", "curves"] = "digits"
    """The images."""
    folder: Path | None = None
    """Where MNIST's files are; by default HFOPT_DATA/mnist."""
    loss: Literal["cross-entropy", "squared-error"] = "cross-entropy"
    """What is optimised."""
    evaluate_on: Literal["test", "train"] = "test"
    """Images whose error is followed: held-out ones, or those that are trained on."""
    batch_size: int = 500
    """Images in a batch of hf and lbfgs."""
    gradient_batches: int | None = None
    """How many batches the gradient of hf and lbfgs is of, with other images at every step; None: all."""
    growth: int | None = None
    """Steps over which the gradient of hf grows from first_batches to as many; None: as many at every step."""
    first_batches: int = 1
    """Batches of the first step's gradient, where it grows."""
    average: float | None = None
    """Share of what was before in the running average of the parameters that hf and lbfgs are tested with."""
    minibatch: int = 100
    """Images in a step of the stochastic optimizers."""
    minibatch_average: float | None = None
    """The same share for the stochastic optimizers, whose steps are smaller."""
    curvature_batches: int | None = 1
    """How many of the gradient's batches the curvature products use; None: all of them."""
    evaluation_batches: int | None = None
    """How many of the gradient's batches judge the step: backtracking, line search and rho; None: all of them."""
    held_out: bool = False
    """Whether as many other batches judge the step, in place of the gradient's."""
    test_every: int = 1
    """Steps of hf and lbfgs from one test to the next; those of stochastic optimizers are five passes apart or more."""

    sizes: tuple[int, ...] = (64, 100, 50, 10)
    """Units from the inputs to the code; the decoder mirrors them."""
    nonlinearity: Literal["logistic", "tanh", "relu"] = "logistic"
    """Nonlinearity of the hidden units; those of the code are linear."""
    connections: int = 15
    """Incoming connections of a unit at the start; the other weights are 0."""
    scale: float = 1.0
    """Scale of the weights at the start."""

    lambda_by: Literal["rho", "average", "loss"] = "rho"
    """What lambda follows: the reduction ratio, its average over steps, or the loss, then best that of all images."""
    least_damping: float | None = None
    """Lambda falls no lower; by default to 1e-10 times that at the start."""
    rising_decay: int | None = None
    """Steps over which the factor of the last solution rises, from 0.3 to cg_decay; None: it is the same throughout."""
    full_steps: bool = False
    """Whether steps of hf are taken as a whole or not at all: a few images cannot judge their length."""
    preconditioner: Literal["none", "auto", "empirical-fisher", "hutchinson", "nystrom", "kfac", "lbfgs"] = "none"
    """Preconditioner of conjugate gradients; empirical-fisher is the diagonal of 2010, to the power 0.75."""
    factor_average: float = 0.0
    """Share of the factors so far in the running average of kfac's factors; 0: those of the step alone."""
    threshold: float = 0.0
    """Squared error below which the run ends with success; 0 for none."""


@dataclass(frozen=True)
class CommandLine(Action, Training, Settings):
    """Deep autoencoders of images. First word: digits (default), mnist, curves, mnist-2010 or curves-2010."""


# Gradient and losses are of so many images that lambda may follow the loss, as it does by default.
BASE = CommandLine(weight_decay=2e-5, lambda_by="loss", preconditioner="kfac", cg_tolerance=None, cg_decay=None)
MNIST: dict[str, Any] = {"data": "mnist", "sizes": (784, 1000, 500, 250, 30), "minibatch": 200}
CURVES: dict[str, Any] = {"data": "curves", "sizes": (784, 400, 200, 100, 50, 25, 6), "minibatch": 200}
# K-FAC leaves so little for CG to do that steps, not solves, are what counts: short solves on many new images.
SHORT = replace(BASE, batch_size=1500, gradient_batches=4, cg_iterations=6, test_every=5)
# What is left to learn late wants momentum, ever more images, and tests without the last step's noise. From the start
# of the deeper net of the curves, such steps lead to where all images look alike.
GROWING = replace(
    BASE,
    batch_size=500,
    gradient_batches=60,
    growth=160,
    first_batches=10,
    curvature_batches=2,
    evaluation_batches=3,
    cg_iterations=3,
    cg_tolerance=0.0,
    cg_decay=0.95,
    rising_decay=60,
    damping=0.02,
    least_damping=0.0018,
    lambda_by="average",
    full_steps=True,
    factor_average=0.9,
    average=0.9,
    minibatch_average=0.995,
    test_every=5,
)
# Martens (ICML 2010): gradients of all images, long solves on a part of them, lambda by rho.
YEAR_2010 = CommandLine(weight_decay=2e-5, preconditioner="empirical-fisher")
PRESETS: dict[str, CommandLine] = {
    "digits": BASE,
    "mnist": replace(GROWING, **MNIST),
    "curves": replace(SHORT, **CURVES),
    "mnist-2010": replace(YEAR_2010, batch_size=7500, **MNIST),
    "curves-2010": replace(YEAR_2010, batch_size=5000, **CURVES),
}

# The losses are sums over pixels, and so are their gradients. Every comparison should tune its own.
RATES = {"adam": 1e-3, "rmsprop": 1e-3, "sgd": 1e-3, "nag": 1e-3}
RULES = {"rho": hfopt.LevenbergMarquardt, "average": hfopt.AverageRatio, "loss": hfopt.KrylovDamping}

typed = sys.argv[1:] if __name__ == "__main__" else []
preset = typed[0] if typed and typed[0] in PRESETS else None
settings = parse(PRESETS[preset or "digits"], typed[preset is not None :], f"runs.autoencoder {preset or ''}".rstrip())

# 0. Seed.
torch.manual_seed(settings.seed)
if settings.threads is not None:
    torch.set_num_threads(settings.threads)

# 1. Images.
stochastic = settings.optimizer in STOCHASTIC
options: dict[str, Any] = {
    "batch_size": settings.minibatch if stochastic else settings.batch_size,
    "shuffle_every": None if stochastic else 1,
    "loss": settings.loss,
    "evaluate_on": settings.evaluate_on,
    "seed": settings.seed,
    "device": settings.device,
}
with sentences("runs.autoencoder", settings):
    if settings.data == "mnist":
        problem = corpora.mnist(settings.folder, **options)
    else:
        problem = {"digits": corpora.digits, "curves": corpora.curves}[settings.data](**options)

# 2. Model and its initialisation.
model = FNN.autoencoder(settings.sizes, nonlinearity=settings.nonlinearity)
model.sparse_init(settings.seed, connections=settings.connections, scale=settings.scale)
model.to(settings.device)

# 3. Loss: the images bring their own, problem.loss(outputs, batch), and their measure of error, problem.errors.

# 4. Optimizer and driver.
name = settings.name or run_name(f"autoencoder-{preset or 'digits'}", settings, PRESETS[preset or "digits"])
driven = pace(settings.optimizer, settings.max_steps)
roles: dict[str, Any] = {}
if not stochastic:
    gradient = len(problem.train_batches) if settings.gradient_batches is None else settings.gradient_batches
    curvature = gradient if settings.curvature_batches is None else settings.curvature_batches
    roles = {"gradient_batches": range(gradient), "curvature_batches": range(curvature)}
    if settings.evaluation_batches is not None or settings.held_out:
        count = gradient if settings.evaluation_batches is None else settings.evaluation_batches
        roles["evaluation_batches"] = range(gradient, gradient + count) if settings.held_out else range(count)
    if settings.growth is not None:
        roles["batches_per_step"] = Growth(settings.first_batches, gradient, settings.growth)
# A test costs about a third of a pass where it looks at the training images.
often = 5 * len(problem.train_batches)
driven["test_freq"] = max(driven["test_freq"], often) if stochastic else settings.test_every
by_layers = settings.preconditioner == "kfac"
schedule = None
if settings.cg_decay is not None and settings.rising_decay is not None:
    schedule = hfopt.RisingDecay(0.3, settings.cg_decay, settings.rising_decay)
hf = HF(
    Path(__file__).parent / "logs" / name,
    model,
    problem,
    optimizer=optimizer(
        settings,
        RATES,
        preconditioner=KFAC(average=settings.factor_average) if by_layers else settings.preconditioner,
        rule=partial(RULES[settings.lambda_by], minimum=settings.least_damping),
        decay=schedule,
        **({"line_search": hfopt.FullStep(), "backtracking": "none"} if settings.full_steps else {}),
    ),
    **roles,
    average=settings.minibatch_average if stochastic else settings.average,
    threshold=settings.threshold,
    seed=settings.seed,
    settings=described(settings, "runs.autoencoder"),
    overwrite=settings.overwrite,
    hints=hints("runs.autoencoder", typed, "images"),
    **driven,
)


def visualize_batch(batch: Any = None, count: int = 12) -> Figure:
    """Images above their reconstructions, the first `count` of a batch, by default of the first test batch."""
    batch = problem(problem.test_batches[0]) if batch is None else batch
    with torch.no_grad():
        outputs = hf.tested(batch.inputs)
    error = float(problem.errors(outputs, batch).mean())
    rows = {"input": batch.inputs[:count], "reconstruction": problem.predictions(outputs)[:count]}
    title = f"{problem.name}, code of {settings.sizes[-1]}, after {hf.step} steps: squared error {error:.4g}"
    return draw_images(rows, problem.shape, title=title)


def errors() -> dict[str, float]:
    """The squared errors now, summed over pixels, averaged over all training and all test images."""
    both = {role: problem.evaluated_on(role) for role in ("train", "test")}
    return {role: evaluate(hf.tested, images, images.test_batches).error for role, images in both.items()}


if __name__ == "__main__":
    outcome = main("runs.autoencoder", settings, hf, visualize_batch)
    if outcome is not None:
        print("squared error: " + ", ".join(f"{value:.4g} on {role} images" for role, value in errors().items()))
    sys.exit(status(outcome, wanted=settings.threshold > 0))
