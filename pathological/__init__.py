"""Synthetic problems with long time lags, as data objects.

>>> import pathological
>>> problem = pathological.addition(T=30, batch_size=100, seed=1)
>>> batch = problem(0)
>>> tuple(batch.inputs.shape), problem.size(batch)
((33, 100, 2), 100)
"""

from pathological.adding import Addition as addition
from pathological.adding import Multiplication as multiplication
from pathological.batch import Batch
from pathological.problem import Problem

PROBLEMS = {problem.name: problem for problem in (addition, multiplication)}
"""All problems by name."""

__all__ = ["PROBLEMS", "Batch", "Problem", "addition", "multiplication"]
