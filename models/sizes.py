"""The size of a recurrent network: the number of units that a budget of parameters allows."""

from __future__ import annotations

from hfopt.recurrences import Definition
from models.stacked import cell_sizes


def parameter_count(
    cell: Definition,
    depth: int,
    inputs: int,
    hidden: int,
    outputs: int | None,
    *,
    biases: bool = True,
    embedding: int | None = None,
    learned_start: bool = True,
    factors: int | None = None,
) -> int:
    """Count the numbers that `models.Stack` with these arguments has, starts and readout included."""
    sizes = cell_sizes(cell, hidden, factors)
    width = sum(sizes[c.size] for c in cell.input_columns)
    own = sum(sizes[p.size] * sum(sizes[c.size] for c in p.columns) for p in cell.products)
    own += width * biases + sum(sizes[s] for s in cell.parameters.values())
    own += sum(sizes[s] for s in cell.states.values()) * learned_start
    projects = embedding is None and cell.raw is not None and inputs != hidden
    below = hidden if projects else embedding or inputs
    total = depth * own + (below + (depth - 1) * hidden) * width
    total += (inputs + biases) * hidden if projects else inputs * (embedding or 0)
    return total + (0 if outputs is None else (hidden + biases) * outputs)


def units_for(
    budget: int,
    cell: Definition,
    depth: int,
    inputs: int,
    outputs: int | None,
    *,
    biases: bool = True,
    embedding: int | None = None,
    learned_start: bool = True,
) -> int:
    """Find the largest number of hidden units, the same in every layer, for which all parameters stay in a budget.

    Starts and readout are counted. A second size of a cell (factors) is as large as the number of units.

    Raises:
        ValueError: one unit is too many already.

    Source: Collins, Sohl-Dickstein & Sussillo, "Capacity and trainability in recurrent neural networks", ICLR 2017,
    section 1.2.
    """

    def fits(hidden: int) -> bool:
        options = {"biases": biases, "learned_start": learned_start}
        return parameter_count(cell, depth, inputs, hidden, outputs, embedding=embedding, **options) <= budget

    if not fits(1):
        raise ValueError(
            f"budget is {budget}; with one unit in each of {depth} layer(s) {cell.name} has more parameters"
        )
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    # A network whose inputs need no projection is smaller than its neighbours.
    return inputs if cell.raw is not None and embedding is None and inputs > low and fits(inputs) else low
