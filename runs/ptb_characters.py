"""The Penn Treebank's characters: networks of long memory, by RMSprop, Adam or Hessian-free optimization.

    python -m runs.ptb_characters                         nnRNN, 1024 units, with the published defaults
    python -m runs.ptb_characters --preset exprnn-ptb-150 a row of the published tables; --preset wrong names all
    python -m runs.ptb_characters --net-type RNN-orth --nhid 256 --epochs 2
    python -m runs.ptb_characters --text book.txt         any other text
    python -m runs.ptb_characters --resume                go on with that run where it was last saved
    python -m runs.ptb_characters --picture spectrum.png  the eigenvalues of the recurrent matrix
    python -m runs.ptb_characters --help                  all settings

Options, defaults and presets are those of the program released with Kerg, Goyette et al., "Non-normal recurrent neural
network (nnRNN)", NeurIPS 2019; docs/long_memory.md says where this one differs.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

if find_spec("models") is None:
    sys.exit("runs.ptb_characters: type python -m runs.ptb_characters in the folder of the checkout")

from corpora.text import Window, characters
from corpora.text.stream import UNSCORED
from hfopt.experiment.carried import Carried
from hfopt.experiment.hooks import Callback, LowerOnPlateau
from hfopt.experiment.metrics import Metric
from models import LanguageModel, constrain
from models.long_memory import cell_of
from runs.long_memory import batches, check, experiment, parsed, train
from runs.long_memory_presets import PTB as PRESETS
from runs.long_memory_presets import PTBCharacters
from runs.settings import sentences


def forward(model: Any, batch: Window) -> Carried:
    """Outputs of a window, with the states that the next one goes on from."""
    return Carried(*model.with_states(batch.inputs, batch.states))


def hits(outputs: Tensor, batch: Window) -> Tensor:
    """Which scored characters have the largest output, ``(N,)``."""
    found, targets = outputs[batch.warm_up :].flatten(0, 1).argmax(1), batch.targets.flatten()
    there = targets != UNSCORED
    return (found == targets)[there].double()


typed = sys.argv[1:] if __name__ == "__main__" else []
# The file is imported without the Penn Treebank's files, too.
default = PTBCharacters() if __name__ == "__main__" else PTBCharacters(text="topics", nhid=32, batch=16)
settings = parsed(default, PRESETS, typed, "runs.ptb_characters")

# 0. Seed, and threads, which sums are divided among.
torch.manual_seed(settings.seed)
if settings.threads is not None:
    torch.set_num_threads(settings.threads)

with sentences("runs.ptb_characters", settings):
    check(settings)
    # 1. Text. It brings its loss and its metric.
    options: dict[str, Any] = {"regime": "columns", "window": settings.bptt, "warm_up": min(50, settings.bptt - 1)}
    options |= batches(settings)
    problem = characters(
        settings.text,
        data=settings.data,
        seed=settings.seed,
        device=settings.device,
        **options,
    )

    # 2. Model and its initialisation.
    network = LanguageModel(
        cell_of(settings.net_type, settings.nonlin),
        problem.V,
        settings.nhid,
        embedding=settings.emsize,
        tied=settings.tied,
        learned_start=False,
    )
    model = constrain(
        network,
        settings.net_type,
        rinit=settings.rinit,
        iinit=settings.iinit,
        style=settings.style,
        capacity=settings.capacity,
        seed=settings.seed,
    ).to(settings.device)

    # 3. Optimizer and driver. The learning rates are halved whenever the validation is no better than the best so far.
    accuracy = Metric("accuracy", hits, unit="%", better="higher")
    problem.metrics.append(accuracy)
    halving: list[Callback] = [] if settings.optimizer == "hf" else [LowerOnPlateau(1)]
    hf = experiment(
        "ptb_characters",
        settings,
        PRESETS.get(settings.preset or "", PTBCharacters()),
        model,
        problem,
        pass_length=max(1, (problem.lengths["train"] - 1) // settings.batch // settings.bptt),
        stem="tied" if settings.tied else "",
        known=("tied", "data"),
        forward=forward,
        callbacks=halving,
        typed=typed,
    )

if __name__ == "__main__":
    print(problem.describe())
    scored = {part: problem.evaluated_on(part) for part in ("valid", "test")}
    sys.exit(train("ptb_characters", settings, hf, scored, forward))
