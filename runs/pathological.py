"""The pathological problems: recurrent nets learn what has to be remembered for hundreds of steps, Hessian-free.

    python -m runs.pathological addition                  one of the eight problems, with the settings that suit it
    python -m runs.pathological xor --T 50 --seed 3       every setting can be typed
    python -m runs.pathological multiplication-2011       with the batches and constants published in 2011
    python -m runs.pathological addition --optimizer adam the same with Adam
    python -m runs.pathological addition --resume         go on with that run where it was last saved
    python -m runs.pathological addition --picture a.png  look at what the net does with a sequence
    python -m runs.pathological xor --help                all settings, those of the problem as defaults

and from Python, with the settings of the multiplication problem:

    python -c "import runs.pathological as p; p.hf.optimize()"
    python -c "import runs.pathological as p; p.hf.load(); p.visualize_batch().savefig('hidden.png')"

Each role has its own data, new at every step: the gradient is that of many sequences, the curvature products use a few
of them, and the step is judged on others. A step that is judged on what it was computed from looks better than it is;
on problems that only chance solves at first, lambda then falls until nothing is learned any more.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if find_spec("models") is None:
    sys.exit("runs.pathological: type python -m runs.pathological in the folder of the checkout")

from hfopt.experiment.driver import HF
from hfopt.experiment.visualize import draw_sequence
from models import RNN
from pathological import PROBLEMS
from runs.optimizers import STOCHASTIC, optimizer, pace
from runs.presets import PATHOLOGICAL as PRESETS
from runs.recording import recorders
from runs.settings import described, hints, main, parse, run_name, sentences, status

if TYPE_CHECKING:
    from matplotlib.figure import Figure

typed = sys.argv[1:] if __name__ == "__main__" else []
preset = typed[0] if typed and not typed[0].startswith("-") else "multiplication"
if preset not in PRESETS:
    sys.exit(f"runs.pathological: there is no problem {preset!r}; choose from {', '.join(PRESETS)}")
settings = parse(PRESETS[preset], typed[typed[:1] == [preset] :], f"runs.pathological {preset}")

# 0. Seed, and threads, which sums are divided among.
torch.manual_seed(settings.seed)
if settings.threads is not None:
    torch.set_num_threads(settings.threads)

# 1. Problem. Stochastic optimizers have one role, and take a fresh batch of it at every step.
stochastic = settings.optimizer in STOCHASTIC
batch_size = settings.minibatch if stochastic else settings.batch_size
gradient = range(1 if stochastic else settings.gradient_batches)
curvature = range(min(settings.curvature_batches, len(gradient)))
evaluation = range(min(settings.evaluation_batches, len(gradient)))
if settings.fresh_evaluation:
    evaluation = range(len(gradient), len(gradient) + settings.evaluation_batches)
others = max(len(gradient), evaluation.stop)
debias = range(others, others + (0 if stochastic else settings.debias_batches))
options: dict[str, Any] = {"only_memory_bits": True} if settings.only_memory_bits else {}
with sentences("runs.pathological", settings):
    problem = PROBLEMS[settings.problem](
        settings.T,
        form=settings.form,
        batch_size=batch_size,
        train_batches=debias.stop,
        test_batches=-(-settings.test_sequences // batch_size),
        seed=settings.seed,
        device=settings.device,
        **options,
    )

# 2. Model and its initialisation.
model = RNN(problem.V, settings.hidden, problem.O, nonlinearity=settings.nonlinearity)
model.sparse_init(
    settings.seed, connections=settings.connections, scale=settings.scale, input_scale=settings.input_scale
)
model.to(settings.device)

# 3. Loss: the problem brings its own, problem.loss(outputs, batch), and its measure of error, zero_one_loss.

# 4. Optimizer and driver.
stem = f"pathological-{preset}-T{settings.T}"
name = settings.name or run_name(stem, settings, PRESETS[preset], known=("T",))
driven = pace(settings.optimizer, settings.max_steps)
if settings.optimizer == "hf":
    driven["test_freq"] = settings.test_every
hf = HF(
    Path(__file__).parent / "logs" / name,
    model,
    problem,
    # What follows a sequence's end is fed to the net, but its hidden units are not held on to there.
    forward=lambda model, batch: model(batch.inputs, lengths=batch.lengths),
    optimizer=optimizer(settings, structural=settings.structural),
    gradient_batches=gradient,
    curvature_batches=curvature,
    evaluation_batches=evaluation,
    debias_batches=debias or None,
    record=recorders(settings.record_every, settings.optimizer),
    threshold=settings.threshold,
    seed=settings.seed,
    settings=described(settings, "runs.pathological"),
    overwrite=settings.overwrite,
    hints=hints("runs.pathological", typed, "hidden units"),
    **driven,
)


def visualize_batch(batch: Any = None, b: int = 0) -> Figure:
    """Inputs, hidden units, predictions and targets of sequence `b` of a batch, by default of the first test batch."""
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
    sys.exit(status(main("runs.pathological", settings, hf, visualize_batch)))
