"""A traced cell as a layer: checked arguments, biases, starts, lengths and structural damping."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from hfopt.errors import logger
from hfopt.recurrences.arguments import check_inputs, checked, ended, finished, initial, with_ones
from hfopt.recurrences.definition import Definition
from hfopt.recurrences.generated import generated
from hfopt.recurrences.sequence import run

Maybe = Tensor | None


class Sequences(NamedTuple):
    """What a layer gives.

    Attributes:
        output: (T, B, .), zero beyond a sequence's end: the cell's first output, or its first state if it has none.
        hidden: its first state (T, B, .), likewise.
        final: every state (B, .) after the last step of each sequence.
    """

    output: Tensor
    hidden: Tensor
    final: tuple[Tensor, ...]


def cell_layer(
    cell: Definition,
    inputs: Tensor,
    weight_ih: Tensor,
    weights_hh: Sequence[Tensor],
    bias: Maybe = None,
    *,
    parameters: Sequence[Tensor] = (),
    masks: Sequence[Tensor] = (),
    states: Sequence[Maybe] | None = None,
    lengths: Maybe = None,
) -> Sequences:
    """Run a traced cell over whole sequences.

    One node of the autograd graph: a Jacobian-vector product is one tangent pass, a vector-Jacobian product one adjoint
    pass, and both can be differentiated again. A cell that cannot be traced runs step by step, and the log says so.
    While an optimizer looks for hidden states (structural damping), the first state is marked with D'' = 1: half its
    squared distance.

    Args:
        cell: its definition.
        inputs: x (T, B, V).
        weight_ih: (V, .), the columns `cell.input_columns` beside each other.
        weights_hh: for every product of the cell, (size of the vector, .), the columns `cell.products[j].columns`.
        bias: (.,), one for every column of `weight_ih`, or None.
        parameters: the cell's, in its order, each (units,).
        masks: the cell's, in its order, each (B, units); constants without a derivative.
        states: one for each state, (B, .), or (.,) for the same start of every sequence (one that is learned), or None
            for zeros; None for zeros everywhere.
        lengths: (B,) integers from 1 to T: how many steps of each sequence count, in any order.

    Raises:
        ValueError: a wrong number, shape or length, or an empty sequence; the message names the argument.
        TypeError: an argument that is no floating-point tensor, or has another dtype or device than the first.
    """
    many = {"weights_hh": (weights_hh, cell.products), "parameters": (parameters, cell.parameters)}
    many |= {"masks": (masks, cell.masks)}
    for name, (found, wanted) in many.items():
        if len(found) != len(wanted):
            raise ValueError(f"{name} has {len(found)} tensors; the cell {cell.name} has {len(wanted)}")
    starts = [None] * len(cell.states) if states is None else list(states)
    if len(starts) != len(cell.states):
        raise ValueError(f"states has {len(starts)} tensors; the cell {cell.name} has {', '.join(cell.states)}")
    named = {"inputs": inputs, "weight_ih": weight_ih, "bias": bias}
    named |= {f"weights_hh[{j}]": W for j, W in enumerate(weights_hh)}
    named |= {f"parameters[{j}]": b for j, b in enumerate(parameters)}
    named |= {f"masks[{j}]": m for j, m in enumerate(masks)}
    named |= {f"states[{j}]": s for j, s in enumerate(starts)}
    given = checked("bias", *(f"states[{j}]" for j in range(len(starts))), **named)
    sizes = _check(cell, given)
    X, reached = ended(given["inputs"], lengths)
    first = [
        initial(f"states[{j}]", given.get(f"states[{j}]"), X, sizes[s]) for j, s in enumerate(cell.states.values())
    ]
    K = given["weight_ih"]
    if "bias" in given:
        X, K = with_ones(X), torch.cat((K, given["bias"].unsqueeze(0)))
    roles = [name for name in named if name.partition("[")[0] in many]
    rest = [given[name].detach() if name.startswith("masks") else given[name] for name in roles]
    if cell.untraceable is None:
        results = run(_registered(cell), X, K, *rest, *first)
    else:
        _tell(cell)
        results = generated(cell).plain((X, K, *rest, *first))
    hidden, last = finished(results[0], reached)
    final = [last, *(S[-1] if reached is None else reached.final(S) for S in results[1 : len(cell.states)])]
    if not cell.extra:
        return Sequences(hidden, hidden, tuple(final))
    output = results[len(cell.states)]
    return Sequences(output if reached is None else reached.of(output), hidden, tuple(final))


def _registered(cell: Definition) -> str:
    return generated(cell).name


# A compiler would put off what is registered here. This mark is all that torch.compiler.assume_constant_result makes,
# which would import the compiler, and with it three seconds, into every program that imports this package.
_registered._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _tell(cell: Definition) -> None:
    logger.warning(
        "the cell %s runs step by step through torch's autograd, many times more slowly, since it cannot be traced: %s",
        cell.name,
        cell.untraceable,
    )


def _check(cell: Definition, given: dict[str, Tensor]) -> dict[str, int]:
    """Check all shapes; the numbers of units by the names of sizes.

    Raises:
        ValueError: a shape that does not fit; the message names the argument.
    """
    X = given["inputs"]
    check_inputs(X)
    _, batch, columns = X.shape
    sizes: dict[str, int] = {}

    def fit(name: str, dim: int, parts: Sequence[str], what: str) -> None:
        tensor, own = given[name], [p for p in parts if p not in sizes]
        known = sum(sizes[p] for p in parts if p in sizes)
        left = tensor.shape[dim] - known
        if len(set(own)) == 1 and left > 0 and left % len(own) == 0:
            sizes[own[0]] = left // len(own)
        elif own or left != 0:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; {what}")

    for j, product in enumerate(cell.products):
        name = f"weights_hh[{j}]"
        if given[name].dim() != 2 or given[name].numel() == 0:
            raise ValueError(f"{name} has shape {tuple(given[name].shape)}; it is a matrix")
        fit(name, 0, [product.size], f"its rows are the {product.size} that it multiplies")
        blocks = ", ".join(c.name for c in product.columns)
        fit(name, 1, [c.size for c in product.columns], f"its columns are {blocks}, as wide as the rows say")
    W = given["weight_ih"]
    if W.dim() != 2 or W.shape[0] != columns:
        raise ValueError(f"weight_ih has shape {tuple(W.shape)}; it has a row for each of the {columns} inputs")
    names = ", ".join(c.name for c in cell.input_columns)
    fit("weight_ih", 1, [c.size for c in cell.input_columns], f"its columns are {names}, for weights_hh as they are")
    if "bias" in given and given["bias"].shape != (W.shape[1],):
        raise ValueError(f"bias has shape {tuple(given['bias'].shape)}; weight_ih has {W.shape[1]} columns")
    for j, size in enumerate(cell.parameters.values()):
        if given[f"parameters[{j}]"].shape != (sizes[size],):
            raise ValueError(
                f"parameters[{j}] has shape {tuple(given[f'parameters[{j}]'].shape)}; it is {(sizes[size],)}"
            )
    for j, size in enumerate(cell.masks.values()):
        if given[f"masks[{j}]"].shape != (batch, sizes[size]):
            shape = tuple(given[f"masks[{j}]"].shape)
            raise ValueError(f"masks[{j}] has shape {shape}; it is {batch, sizes[size]}, one row for each sequence")
    width = sizes[next(iter(cell.states.values()))]
    if cell.raw is not None and columns != width:
        raise ValueError(
            f"inputs has {columns} columns; the cell {cell.name} adds them to its {width} units, so that there are as "
            "many: project them first"
        )
    return sizes
