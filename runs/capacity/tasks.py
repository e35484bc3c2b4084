"""The six tasks by their published names, and how the networks are asked and judged."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corpora.text import Text, characters
from hfopt.experiment.roles import evaluate
from pathological.capacity import TASKS as DRAWN

TASKS = ("per_cap", "mem_thru", "rcf", "text8", "parens_counting", "arithmetic")
"""In the order of the source."""


def make_task(name: str, **options: Any) -> Any:
    """A task by its published name.

    For text8: windows of T = 50 steps at random places, the first 13 of them not scored, 27 symbols. The folder of its
    file is `data`, by default the folder text8 in the one that the environment variable HFOPT_DATA names.

    Raises:
        ValueError: there is none of this name, or an option is out of its range.
        FileNotFoundError: the text8 file is missing.
    """
    if name == "text8":
        return characters("text8", **{"window": 50, "warm_up": 13, **options})
    if name not in DRAWN:
        raise ValueError(f"there is no task {name!r}; choose from {', '.join(TASKS)}")
    return DRAWN[name](**options)


def output_of(task: Any) -> str:
    """Whether a task judges the "last" step or "all"."""
    return str(getattr(task, "output", "all"))


def forward(model: nn.Module, batch: Any) -> Tensor:
    """The outputs of a network; symbols that come as numbers (T, B) are shown one-hot."""
    inputs = batch.inputs
    if not inputs.is_floating_point():
        weight = next(p for p in model.parameters() if p.dim() == 2)
        size = int(model.inputs)  # type: ignore[arg-type]
        inputs = F.one_hot(inputs, size).to(weight.dtype)
    outputs: Tensor = model(inputs)
    return outputs


def score(model: nn.Module, task: Any, batches: Any) -> float:
    """What the study's loss columns hold, lower being better; infinite where it is not finite.

    It is the loss; of text8 in bits per character; and of per_cap minus the mutual information in bits, which is what
    the source tunes.
    """
    with torch.no_grad():
        found = evaluate(model, task, batches, forward)
    value = found.loss
    if isinstance(task, Text):
        value /= math.log(2)
    elif task.name == "per_cap":
        value = -found.values["mutual information"]
        # All answers wrong in the same way tell as much as right ones; answers that are not numbers tell nothing.
        value = value if math.isfinite(found.loss) else math.inf
    return value if math.isfinite(value) else math.inf
