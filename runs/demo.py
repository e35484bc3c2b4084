"""The demo: a recurrent net learns to multiply two marked numbers of a long sequence, Hessian-free.

    python -m runs.demo                                   train from the start
    python -m runs.demo --resume                          go on with that run where it was last saved
    python -m runs.demo --picture hidden.png              look at what the net does with a sequence
    python -m runs.demo --problem addition --T 100 --device cuda --seed 3
    python -m runs.demo --optimizer adam                  the same with Adam
    python -m runs.demo --help                            all settings

and from Python, with the settings as they stand here:

    python -c "import runs.demo as d; d.hf.optimize()"
    python -c "import runs.demo as d; d.hf.load(); d.visualize_batch().savefig('hidden.png')"

A new run under the name of an earlier one moves the earlier one aside. The file reads from top to bottom; to
make an experiment of your own, copy it and change a line.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

if find_spec("models") is None:
    sys.exit("runs.demo: type python -m runs.demo in the folder of the checkout")

from hfopt.experiment.driver import HF
from hfopt.experiment.visualize import draw_sequence
from models import RNN
from pathological import PROBLEMS
from runs.optimizers import optimizer, pace
from runs.recording import recorders
from runs.settings import Action, Training, described, hints, main, parse, run_name, sentences, status

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Settings:
    """The settings of the demo, besides those of every run."""

    problem: str = "multiplication"
    """Name of the problem, one of those in `pathological`."""
    T: int = 30
    """Length of the sequences; the two numbers stand in their first half, the answer is due at their end."""
    form: Literal["paper", "release"] = "paper"
    """Definition of the problem: that of the papers, or that of the program released in 2011."""
    batch_size: int = 1000
    """Sequences in a batch."""
    gradient_batches: int = 1
    """Batches of the gradient, drawn again at every step."""
    curvature_batches: int | None = None
    """How many of them the curvature products use; by default all."""
    evaluation_batches: int | None = None
    """How many of them judge the step (backtracking, line search and rho); by default all."""
    test_batches: int = 10
    """Batches of the test, the same throughout."""

    hidden: int = 100
    """Hidden units."""
    nonlinearity: Literal["tanh", "relu", "sigmoid"] = "tanh"
    """Nonlinearity of the hidden units."""
    connections: int = 15
    """Incoming connections of a unit at the start; the other weights are 0."""
    scale: float = 1.0
    """Scale of the recurrent weights at the start."""
    input_scale: float = 1.0
    """Scale of the input weights at the start."""

    structural: float = 1 / 30
    """Mu, the weight of structural damping relative to lambda."""
    threshold: float = 0.01
    """Share of wrong test sequences below which the run ends with success."""
    record_every: int = 1
    """Keep hidden states, gradients by lag and eigenvalues before every so many updates of hf; 0: never."""


@dataclass(frozen=True)
class CommandLine(Action, Training, Settings):
    """The demo: a recurrent net learns long lags by Hessian-free optimization."""

    # Short solves: the batches are new at every step, so what CG finds late is mostly particular to this one.
    cg_iterations: int = 30
    """Iterations of conjugate gradients at most."""
    weight_decay: float = 2e-5
    """Coefficient c of the penalty c/2 |theta|^2, for hf."""
    # A second thread gains a third on products of these sizes, and costs many times that beside another busy process.
    threads: int | None = 1
    """Threads of torch on the CPU; None: as torch chooses."""


typed = sys.argv[1:] if __name__ == "__main__" else []
settings = parse(CommandLine(), typed, "runs.demo")
if settings.problem not in PROBLEMS:
    sys.exit(f"runs.demo: there is no problem {settings.problem!r}; choose from {', '.join(PROBLEMS)}")

# 0. Seed, and threads, which sums are divided among.
torch.manual_seed(settings.seed)
if settings.threads is not None:
    torch.set_num_threads(settings.threads)

# 1. Problem.
with sentences("runs.demo", settings):
    problem = PROBLEMS[settings.problem](
        settings.T,
        form=settings.form,
        batch_size=settings.batch_size,
        train_batches=settings.gradient_batches,
        test_batches=settings.test_batches,
        seed=settings.seed,
        device=settings.device,
    )

# 2. Model and its initialisation.
model = RNN(problem.V, settings.hidden, problem.O, nonlinearity=settings.nonlinearity)
model.sparse_init(
    settings.seed, connections=settings.connections, scale=settings.scale, input_scale=settings.input_scale
)
model.to(settings.device)

# 3. Loss: the problem brings its own, problem.loss(outputs, batch), and its measure of error, zero_one_loss.

# 4. Optimizer and driver.
stem = f"{settings.problem}-T{settings.T}"
name = settings.name or run_name(stem, settings, CommandLine(), known=("problem", "T"))
hf = HF(
    Path(__file__).parent / "logs" / name,
    model,
    problem,
    optimizer=optimizer(settings, structural=settings.structural),
    curvature_batches=range(settings.curvature_batches or settings.gradient_batches),
    evaluation_batches=range(settings.evaluation_batches or settings.gradient_batches),
    record=recorders(settings.record_every, settings.optimizer),
    threshold=settings.threshold,
    seed=settings.seed,
    settings=described(settings, "runs.demo"),
    overwrite=settings.overwrite,
    hints=hints("runs.demo", typed, "hidden units"),
    **pace(settings.optimizer, settings.max_steps),
)


def visualize_batch(batch: Any = None, b: int = 0) -> Figure:
    """Inputs, hidden units, predictions and targets of sequence `b` in one picture.

    `batch` is a batch of the problem, by default its first test batch. Returns the matplotlib figure; raises
    IndexError if the batch has no sequence `b`.
    """
    batch = problem(problem.test_batches[0]) if batch is None else batch
    with torch.no_grad():
        predictions = problem.predictions(model(batch.inputs))
        hidden = model.hidden_states(batch.inputs)
    return draw_sequence(
        inputs=batch.inputs[:, b],
        hidden=hidden[:, b],
        predictions=predictions[:, b],
        targets=batch.targets[:, b],
        scored=batch.mask[:, b],
        length=int(batch.lengths[b]),
        title=f"{problem.name}, T = {problem.T}: sequence {b}, after {hf.step} steps",
    )


if __name__ == "__main__":
    sys.exit(status(main("runs.demo", settings, hf, visualize_batch)))
