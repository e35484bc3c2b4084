"""Synthetic problems with long time lags, as data objects.

>>> import pathological
>>> problem = pathological.addition(T=30, batch_size=100, seed=1)
>>> batch = problem(0)
>>> tuple(batch.inputs.shape), problem.size(batch)
((33, 100, 2), 100)
"""

from pathological.adding import Addition as addition
from pathological.adding import ExclusiveOr as xor
from pathological.adding import Multiplication as multiplication
from pathological.batch import Batch
from pathological.copying import AddingProblem as adding_problem
from pathological.copying import Copying as copying
from pathological.memorizing import Memorization5Bit as memorization_5bit
from pathological.memorizing import Memorization20Bit as memorization_20bit
from pathological.ordering import TemporalOrder as temporal_order
from pathological.ordering import TemporalOrder3Bit as temporal_order_3bit
from pathological.permuting import RandomPermutation as random_permutation
from pathological.problem import Problem

PROBLEMS: dict[str, type[Problem]] = {
    problem.name: problem
    for problem in (
        addition,
        multiplication,
        xor,
        temporal_order,
        temporal_order_3bit,
        random_permutation,
        memorization_5bit,
        memorization_20bit,
    )
}
"""All problems by name, in the order of the paper."""

__all__ = [
    "PROBLEMS",
    "Batch",
    "Problem",
    "adding_problem",
    "addition",
    "copying",
    "memorization_5bit",
    "memorization_20bit",
    "multiplication",
    "random_permutation",
    "temporal_order",
    "temporal_order_3bit",
    "xor",
]
