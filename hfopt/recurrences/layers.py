"""A traced cell as a layer: checked arguments, biases, starts, lengths, readouts and structural damping."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from hfopt import structural
from hfopt.errors import logger
from hfopt.recurrences import segments
from hfopt.recurrences.arguments import Ends, check_inputs, checked, ended, finished, initial, looked_for, with_ones
from hfopt.recurrences.definition import Definition
from hfopt.recurrences.generated import generated
from hfopt.recurrences.readout import Read, generated_readout
from hfopt.recurrences.registry import CELLS
from hfopt.recurrences.sequence import results_of

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


def outputs_of(cell: Definition, arguments: Sequence[Tensor], mask: Maybe, K_o: Maybe = None) -> tuple[Tensor, ...]:
    """States and outputs (T, B, .) of a cell, or only the readout [h_t, 1] K_o of what its layer gives, (T, B, O).

    What structural damping limits is marked; `mask` (T, B) bool is False at steps that take no part in it. In segments
    where an optimizer asks for checkpointing.

    Args:
        cell: its definition.
        arguments: X, K_x, K_1, .., parameters, masks, first states: see `Roles`.
        mask: or None where all steps count.
        K_o: (h + 1, O), the biases last, or None for no readout.
    """
    if segments.wanted():
        return _in_segments(cell, tuple(arguments), mask, K_o)
    if cell.untraceable is not None:
        _tell(cell)
        found = generated(cell).plain(arguments)
        if looked_for():
            structural.mark(found[0], found[0].new_ones(()).expand(found[0].shape), batch_dim=1, mask=mask)
        return found if K_o is None else (Read.read(found[cell.output], K_o),)
    damped = looked_for()
    if K_o is not None and damped and cell.distance is None:
        return (Read.read(outputs_of(cell, arguments, mask)[cell.output], K_o),)
    name = _registered(cell, damped, K_o is not None)
    found = results_of(name, *arguments, *([] if K_o is None else [K_o]))
    if damped:
        own, watched = CELLS[name], cell.marked
        all_ = found if K_o is None else own.of_base(found) if isinstance(own, Read) else ()
        limited = all_[watched.damped]
        ones = limited.new_ones(()).expand(limited.shape)
        curvature = ones if cell.distance is None else cell.distance(all_[0].detach())
        structural.mark(limited, curvature, batch_dim=1, mask=mask)
    return found[: len(cell.returned) if K_o is None else 1]


def _in_segments(cell: Definition, arguments: tuple[Tensor, ...], mask: Maybe, K_o: Maybe) -> tuple[Tensor, ...]:
    """The same by `segments.over_time`: the inputs are the sequence, all but the states are parameters."""
    places = generated(cell).places
    rest = [i for i in range(1, len(arguments)) if i not in places]

    def part(xs: segments.Given, states: segments.Given, parameters: segments.Given) -> segments.Found:
        *given, read = parameters
        own = {0: xs[0], **dict(zip(places, states, strict=True)), **dict(zip(rest, given, strict=True))}
        found = outputs_of(cell, [own[i] for i in range(len(arguments))], xs[1])
        shown = found if read is None else (Read.read(found[cell.output], read),)
        return shown, [found[k][-1] for k in places.values()]

    parameters = [*(arguments[i] for i in rest), K_o]
    return segments.over_time(part, (arguments[0], mask), [arguments[i] for i in places], parameters)[0]


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
    While an optimizer looks for hidden states (structural damping), the first state is marked with D'' = 1 (half its
    squared distance), or its pre-activations with the curvature of the cell's own distance.

    Args:
        cell: its definition.
        inputs: x (T, B, V); or (T, B) integers from 0 to V - 1, each of which stands for a row of `weight_ih`, as if
            x had a one in that column and zeros in the others.
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
    arguments, reached = _point(
        cell, inputs, weight_ih, weights_hh, bias, parameters=parameters, masks=masks, states=states, lengths=lengths
    )
    results = outputs_of(cell, arguments, None if reached is None else reached.mask)
    hidden, last = finished(results[0], reached)
    final = [last, *(S[-1] if reached is None else reached.final(S) for S in results[1 : len(cell.states)])]
    if not cell.output:
        return Sequences(hidden, hidden, tuple(final))
    output = results[cell.output]
    return Sequences(output if reached is None else reached.of(output), hidden, tuple(final))


def cell_readout(
    cell: Definition,
    inputs: Tensor,
    weight_ih: Tensor,
    weights_hh: Sequence[Tensor],
    bias: Maybe,
    weight_ho: Tensor,
    bias_o: Maybe = None,
    *,
    parameters: Sequence[Tensor] = (),
    masks: Sequence[Tensor] = (),
    states: Sequence[Maybe] | None = None,
    lengths: Maybe = None,
) -> Tensor:
    """Outputs of a traced cell with a linear readout: `cell_layer(...).output @ weight_ho + bias_o` as one operator.

    In products, what the readout needs of the hidden states does not go through memory on a CPU.

    Args:
        cell, inputs, weight_ih, weights_hh, bias, parameters, masks, states, lengths: as of `cell_layer`.
        weight_ho: W_ho (h, O).
        bias_o: b_o (O,), or None.

    Returns:
        O (T, B, O); beyond a sequence's end it means nothing.

    Raises:
        ValueError, TypeError: as `cell_layer`.
    """
    arguments, reached = _point(
        cell, inputs, weight_ih, weights_hh, bias, parameters=parameters, masks=masks, states=states, lengths=lengths
    )
    K_o = readout_of(weight_ho, bias_o, arguments[-1].shape[-1], arguments[1])
    return outputs_of(cell, arguments, None if reached is None else reached.mask, K_o)[0]


def readout_of(weight_ho: Tensor, bias_o: Maybe, hidden: int, like: Tensor) -> Tensor:
    """K_o (h + 1, O) of a readout's weights, which are checked.

    Raises:
        ValueError: a wrong shape; the message names the argument.
        TypeError: no floating-point tensors, or of another dtype or device than `like`.
    """
    _, W, *b = checked("bias_o", weight_hh=like, weight_ho=weight_ho, bias_o=bias_o).values()
    if W.dim() != 2 or W.shape[0] != hidden:
        raise ValueError(f"weight_ho has shape {tuple(W.shape)}; with {hidden} hidden units it is ({hidden}, O)")
    if b and b[0].shape != (W.shape[1],):
        raise ValueError(f"bias_o has shape {tuple(b[0].shape)}; with weight_ho's outputs it is ({W.shape[1]},)")
    return torch.cat((W, b[0].unsqueeze(0) if b else W.new_zeros(1, W.shape[1])))


def _point(
    cell: Definition,
    inputs: Tensor,
    weight_ih: Tensor,
    weights_hh: Sequence[Tensor],
    bias: Maybe,
    *,
    parameters: Sequence[Tensor],
    masks: Sequence[Tensor],
    states: Sequence[Maybe] | None,
    lengths: Maybe,
) -> tuple[list[Tensor], Ends | None]:
    """The arguments of the cell, checked, and where sequences end."""
    many = {"weights_hh": (weights_hh, cell.products), "parameters": (parameters, cell.parameters)}
    many |= {"masks": (masks, cell.masks)}
    for name, (found, wanted) in many.items():
        if len(found) != len(wanted):
            raise ValueError(f"{name} has {len(found)} tensors; the cell {cell.name} has {len(wanted)}")
    starts = [None] * len(cell.states) if states is None else list(states)
    if len(starts) != len(cell.states):
        raise ValueError(f"states has {len(starts)} tensors; the cell {cell.name} has {', '.join(cell.states)}")
    indices = inputs if is_index(inputs) else None
    named = {"weight_ih": weight_ih, "bias": bias} if indices is not None else {
        "inputs": inputs, "weight_ih": weight_ih, "bias": bias
    }  # fmt: skip
    named |= {f"weights_hh[{j}]": W for j, W in enumerate(weights_hh)}
    named |= {f"parameters[{j}]": b for j, b in enumerate(parameters)}
    named |= {f"masks[{j}]": m for j, m in enumerate(masks)}
    named |= {f"states[{j}]": s for j, s in enumerate(starts)}
    given = checked("bias", *(f"states[{j}]" for j in range(len(starts))), **named)
    K = given["weight_ih"]
    if indices is not None:
        given["inputs"] = projections(cell, indices, K)
    sizes = _check(cell, given, indices is not None)
    X, reached = ended(given["inputs"], lengths)
    first = [
        initial(f"states[{j}]", given.get(f"states[{j}]"), X, sizes[s]) for j, s in enumerate(cell.states.values())
    ]
    if indices is not None:
        X, K = X + given["bias"] if "bias" in given else X, K.new_empty(0, K.shape[1])
    elif "bias" in given:
        X, K = with_ones(X), torch.cat((K, given["bias"].unsqueeze(0)))
    roles = [name for name in named if name.partition("[")[0] in many]
    rest = [given[name].detach() if name.startswith("masks") else given[name] for name in roles]
    return [X, K, *rest, *first], reached


def is_index(inputs: object) -> bool:
    """Whether inputs are (T, B) integers."""
    if not isinstance(inputs, Tensor):
        return False
    return inputs.dim() == 2 and not inputs.is_floating_point() and inputs.dtype != torch.bool


def projections(cell: Definition, indices: Tensor, weight_ih: Tensor) -> Tensor:
    """The rows of the weight (T, B, .) that indices (T, B) stand for.

    Raises:
        ValueError: no steps or sequences, an index that has no row, or a cell that takes the inputs themselves.
    """
    if indices.numel() == 0 or weight_ih.dim() != 2:
        raise ValueError(f"inputs has shape {tuple(indices.shape)}; it is (T, B) with neither of them 0")
    if cell.raw is not None:
        raise ValueError(f"inputs are indices; the cell {cell.name} adds its inputs to its units: embed them first")
    if not torch.compiler.is_compiling() and indices.device.type == "cpu":
        low, high = int(indices.min()), int(indices.max())
        if low < 0 or high >= weight_ih.shape[0]:
            raise ValueError(f"inputs runs from {low} to {high}; weight_ih has {weight_ih.shape[0]} rows")
    return torch.nn.functional.embedding(indices, weight_ih)


def _registered(cell: Definition, damped: bool, read: bool) -> str:
    """The name of the cell, or of the one that structural damping sees, or of its readout."""
    found = cell.marked if damped else cell
    return (generated_readout(found) if read else generated(found)).name


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


def _check(cell: Definition, given: dict[str, Tensor], indexed: bool = False) -> dict[str, int]:
    """Check all shapes; the numbers of units by the names of sizes. `indexed`: the inputs are projections already.

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
    if not indexed and (W.dim() != 2 or W.shape[0] != columns):
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
