"""The copy problem, and the adding problem: networks of long memory, by RMSprop, Adam or Hessian-free optimization.

    python -m runs.copytask                               nnRNN, T = 200, with the published defaults
    python -m runs.copytask --preset exprnn-copy          a row of the published tables; --preset wrong names all
    python -m runs.copytask --net-type RNN --nonlin tanh --rinit xavier --optimizer hf
    python -m runs.copytask --T 1000 --onehot --vari      variants
    python -m runs.copytask --resume                      go on with that run where it was last saved
    python -m runs.copytask --picture spectrum.png        the eigenvalues of the recurrent matrix
    python -m runs.copytask --help                        all settings

Options, defaults and presets are those of the program released with Kerg, Goyette et al., "Non-normal recurrent neural
network (nnRNN)", NeurIPS 2019; docs/long_memory.md says where this one differs.
"""

from __future__ import annotations

import math
import sys
from importlib.util import find_spec
from typing import Any

import torch

if find_spec("models") is None:
    sys.exit("runs.copytask: type python -m runs.copytask in the folder of the checkout")

from models import long_memory
from pathological import adding_problem, copying
from runs.long_memory import batches, check, experiment, parsed, train
from runs.long_memory_presets import COPY as PRESETS
from runs.long_memory_presets import CopyTask
from runs.settings import sentences

typed = sys.argv[1:] if __name__ == "__main__" else []
settings = parsed(CopyTask(), PRESETS, typed, "runs.copytask")

# 0. Seed, and threads, which sums are divided among.
torch.manual_seed(settings.seed)
if settings.threads is not None:
    torch.set_num_threads(settings.threads)

with sentences("runs.copytask", settings):
    check(settings)
    # 1. Problem. It brings its loss and its metric.
    sizes = batches(settings)
    tests = math.ceil(settings.test_sequences / sizes["batch_size"])
    options: dict[str, Any] = {**sizes, "test_batches": tests, "seed": settings.seed, "device": settings.device}
    problem: copying | adding_problem
    if settings.task == "adding":
        problem = adding_problem(settings.c_length, values=settings.values, **options)
    else:
        problem = copying(
            settings.T,
            c_length=settings.c_length,
            labels=settings.labels,
            one_hot=settings.onehot,
            variable=settings.vari,
            form=settings.form,
            **options,
        )

    # 2. Model and its initialisation.
    model = long_memory(
        settings.net_type,
        problem.V,
        settings.nhid,
        problem.O,
        nonlinearity=settings.nonlin,
        rinit=settings.rinit,
        iinit=settings.iinit,
        style=settings.style,
        capacity=settings.capacity,
        seed=settings.seed,
    ).to(settings.device)

    # 3. Optimizer and driver.
    hf = experiment(
        "copytask",
        settings,
        PRESETS.get(settings.preset or "", CopyTask()),
        model,
        problem,
        stem=f"{settings.task}-T{problem.T}",
        known=("task", "T"),
        # What follows a sequence's end is fed to the net, but its hidden units are not held on to there.
        forward=(lambda model, batch: model(batch.inputs, lengths=batch.lengths))
        if settings.vari
        else (lambda model, batch: model(batch.inputs)),
        typed=typed,
    )

if __name__ == "__main__":
    print(f"the loss without memory is {problem.baseline:.4f}")
    sys.exit(train("copytask", settings, hf, {"test": problem}, hf.forward))
