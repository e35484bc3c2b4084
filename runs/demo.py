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

import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import tyro
from torch import nn

import hfopt
from hfopt import report
from hfopt.hf import HF
from hfopt.pictures import draw_sequence
from models import RNN
from pathological import PROBLEMS
from runs.optimizers import first_order, lbfgs, pace

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Settings:
    """All settings of the demo."""

    problem: str = "multiplication"
    """Name of the problem, one of those in `pathological`."""
    T: int = 30
    """Length of the sequences; the two numbers stand in their first half, the answer is due at their end."""
    form: Literal["paper", "release"] = "paper"
    """Definition of the problem: that of the papers, or that of the program released in 2011."""
    batch_size: int = 1000
    """Sequences in a batch."""
    gradient_batches: int = 10
    """Batches of the gradient, drawn anew at every step."""
    curvature_batches: int = 1
    """How many of them the curvature products use."""
    evaluation_batches: int = 1
    """How many of them judge the step: backtracking, line search and rho."""
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
    input_scale: float = 0.25
    """Scale of the input weights at the start."""

    optimizer: Literal["hf", "adam", "rmsprop", "sgd", "lbfgs"] = "hf"
    """Hessian-free, or another to compare it with."""
    lr: float | None = None
    """Learning rate of the others; by default a usual one."""
    damping: float | None = None
    """Lambda at the start; by default found at the first step."""
    structural: float = 0.0
    """Mu, the weight of structural damping relative to lambda."""
    weight_decay: float = 0.0
    """Coefficient c of the penalty c/2 |theta|^2."""
    cg_iterations: int = 250
    """Iterations of conjugate gradients at most."""
    cg_tolerance: float = 5e-4
    """Relative progress per iteration below which conjugate gradients stop."""
    cg_decay: float = 0.95
    """Factor of the last solution that conjugate gradients start from."""

    threshold: float = 0.01
    """Share of wrong test sequences below which the run ends with success."""
    max_steps: int | None = None
    """Steps at most; by default 500, for stochastic optimizers 50,000."""
    seed: int = 0
    """Seed of the initial parameters and of all data."""
    device: str = "cpu"
    """Where to compute: cpu, cuda, cuda:1, ..."""
    name: str | None = None
    """Name of the run, or an absolute path for its folder; by default made of problem, T, optimizer and seed."""


@dataclass(frozen=True)
class CommandLine(Settings):
    """The demo: a recurrent net learns long lags by Hessian-free optimization."""

    resume: bool = False
    """Go on with the run of this name where it was last saved."""
    overwrite: bool = False
    """Delete an earlier run of this name instead of moving it aside."""
    picture: Path | None = None
    """Do not train: load the run and draw one test sequence into this file."""


typed = sys.argv[1:] if __name__ == "__main__" else []
settings = tyro.cli(CommandLine, args=typed, prog="python -m runs.demo", config=(tyro.conf.FlagCreatePairsOff,))
if settings.problem not in PROBLEMS:
    sys.exit(f"runs.demo: there is no problem {settings.problem!r}; choose from {', '.join(PROBLEMS)}")

# 0. Seed.
torch.manual_seed(settings.seed)

# 1. Problem.
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
def optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that the settings ask for."""
    if settings.optimizer == "hf":
        return hfopt.HessianFree(
            parameters,
            damping=settings.damping,
            structural=settings.structural,
            weight_decay=settings.weight_decay,
            cg=hfopt.CG(
                max_iterations=settings.cg_iterations,
                tolerance=settings.cg_tolerance,
                decay=settings.cg_decay,
            ),
        )
    if settings.optimizer == "lbfgs":
        return lbfgs(settings.lr, iterations=20)(parameters)
    return first_order(settings.optimizer, settings.lr)(parameters)


name = settings.name or f"{settings.problem}-T{settings.T}-{settings.optimizer}-seed{settings.seed}"
command = shlex.join(
    [report.command("python"), "-m", "runs.demo", *(a for a in typed if a not in ("--resume", "--overwrite"))]
)
hf = HF(
    Path(__file__).parent / "logs" / name,
    model,
    problem,
    optimizer=optimizer,
    curvature_batches=range(settings.curvature_batches),
    evaluation_batches=range(settings.evaluation_batches),
    threshold=settings.threshold,
    seed=settings.seed,
    settings=settings,
    overwrite=settings.overwrite,
    hints={"hidden units": f"{command} --picture hidden.png", "to go on": f"{command} --resume"},
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
    try:
        if settings.resume or settings.picture:
            hf.load()
        if settings.picture:
            visualize_batch().savefig(settings.picture, dpi=130)
            print(settings.picture)
        else:
            sys.exit({"success": 0, "interrupted": 130}.get(hf.optimize(), 1))
    except (hfopt.HfoptError, FileNotFoundError) as error:
        sys.exit(f"runs.demo: {error}")
