"""The tasks on which capacity and trainability of recurrent networks were measured, by their published names.

>>> from pathological import capacity
>>> task = capacity.TASKS["mem_thru"](batch_size=10, seed=1)
>>> batch = task(0)
>>> tuple(batch.inputs.shape), task.size(batch)
((12, 10, 64), 10)

The sixth task, text8, needs a file: `runs.capacity` takes it from :mod:`corpora.text`.

Source: Collins, Sohl-Dickstein & Sussillo, "Capacity and trainability in recurrent neural networks", ICLR 2017,
appendix B.
"""

from __future__ import annotations

from collections.abc import Callable

from pathological.capacity.arithmetic import Arithmetic as arithmetic
from pathological.capacity.functions import RandomContinuousFunction as rcf
from pathological.capacity.memory import MemoryThroughput as mem_thru
from pathological.capacity.parentheses import ParallelParentheses as parens_counting
from pathological.capacity.perceptron import PerceptronCapacity as per_cap
from pathological.capacity.perceptron import mutual_information
from pathological.capacity.task import Cases, Task

TASKS: dict[str, Callable[..., Task | per_cap]] = {
    "per_cap": per_cap,
    "mem_thru": mem_thru,
    "rcf": rcf,
    "parens_counting": parens_counting,
    "arithmetic": arithmetic,
}
"""The tasks that are drawn, by name."""

__all__ = [
    "TASKS",
    "Cases",
    "Task",
    "arithmetic",
    "mem_thru",
    "mutual_information",
    "parens_counting",
    "per_cap",
    "rcf",
]
