"""MNIST pixel by pixel: networks of long memory, by RMSprop, Adam or Hessian-free optimization.

    python -m runs.smnist --permute                       nnRNN, 512 units, with the published defaults
    python -m runs.smnist --preset exprnn-psmnist         a row of the published tables; --preset wrong names all
    python -m runs.smnist --permute --nhid 128 --epochs 3 --net-type expRNN
    python -m runs.smnist --data digits --nhid 32 --epochs 5
    python -m runs.smnist --permute --resume              go on with that run where it was last saved
    python -m runs.smnist --permute --picture a.png       the eigenvalues of the recurrent matrix
    python -m runs.smnist --help                          all settings

Options, defaults and presets are those of the program released with Kerg, Goyette et al., "Non-normal recurrent neural
network (nnRNN)", NeurIPS 2019; docs/long_memory.md says where this one differs.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Any

import torch

if find_spec("models") is None:
    sys.exit("runs.smnist: type python -m runs.smnist in the folder of the checkout")

from corpora.images.pixels import pixels, small_pixels
from models import long_memory
from runs.long_memory import batches, check, experiment, parsed, train
from runs.long_memory_presets import PSMNIST as PRESETS
from runs.long_memory_presets import SMNIST
from runs.settings import sentences

typed = sys.argv[1:] if __name__ == "__main__" else []
# The file is imported without MNIST's files, too.
settings = parsed(SMNIST(data="mnist" if __name__ == "__main__" else "digits"), PRESETS, typed, "runs.smnist")

# 0. Seed, and threads, which sums are divided among.
torch.manual_seed(settings.seed)
if settings.threads is not None:
    torch.set_num_threads(settings.threads)

with sentences("runs.smnist", settings):
    check(settings)
    # 1. Images. They bring their loss and their measure of error.
    options: dict[str, Any] = {
        "order": "permuted" if settings.permute else "pixels",
        "batch_size": batches(settings)["batch_size"],
        "shuffled": settings.shuffle or settings.optimizer == "hf",
        "shuffle_every": 1 if settings.optimizer == "hf" else None,
        "seed": settings.seed,
        "device": settings.device,
    }
    problem = small_pixels(**options) if settings.data == "digits" else pixels(settings.folder, **options)

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
        output="last",
    ).to(settings.device)

    # 3. Optimizer and driver.
    hf = experiment(
        "smnist",
        settings,
        PRESETS.get(settings.preset or "", SMNIST()),
        model,
        problem,
        pass_length=len(problem.train_batches),
        stem="permuted" if settings.permute else "in-order",
        known=("permute", "folder"),
        typed=typed,
    )

if __name__ == "__main__":
    sys.exit(train("smnist", settings, hf, {role: problem.evaluated_on(role) for role in ("valid", "test")}))
