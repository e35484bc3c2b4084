"""Networks whose recurrent matrix keeps long memories: expRNN, nnRNN, EURNN, and what they are compared with."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from hfopt.recurrences import Definition, cells
from models.initialisation import generator_of
from models.parametrisations import INITS, exponential_of_skew, givens, orthogonal, schur, skew_start
from models.parametrisations.exponential import upper_places
from models.recurrent import weight_of
from models.stacked import Stack

Net = Literal["RNN", "RNN-orth", "expRNN", "nnRNN", "EURNN", "LSTM"]
NETS: tuple[str, ...] = get_args(Net)
NONLINEARITIES: dict[str, Definition] = {
    "modrelu": cells.modrelu,
    "tanh": cells.tanh_rnn,
    "relu": cells.relu_rnn,
    "sigmoid": cells.sigmoid_rnn,
    "none": cells.identity_rnn,
}
RECURRENT_INITS = (*INITS, "xavier")
INPUT_INITS = ("xavier", "kaiming")


def cell_of(net: str, nonlinearity: str) -> Definition:
    """The cell of a kind of network.

    Raises:
        ValueError: an unknown network or nonlinearity.
    """
    if net not in NETS:
        raise ValueError(f"net is {net!r}; choose {', '.join(map(repr, NETS))}")
    if nonlinearity not in NONLINEARITIES:
        raise ValueError(f"nonlinearity is {nonlinearity!r}; choose {', '.join(map(repr, NONLINEARITIES))}")
    return cells.lstm if net == "LSTM" else NONLINEARITIES[nonlinearity]


def long_memory(
    net: str,
    inputs: int,
    hidden: int,
    outputs: int | None,
    *,
    nonlinearity: str = "modrelu",
    rinit: str | None = None,
    iinit: str = "xavier",
    style: str = "tunable",
    capacity: int = 2,
    seed: int | torch.Generator = 0,
    **options: Any,
) -> Stack:
    """Build a network h_t = phi(v_t U + h_{t-1} W), with its published start; see `constrain` for W.

    Args:
        net: "RNN", "RNN-orth", "expRNN", "nnRNN", "EURNN" or "LSTM".
        inputs, hidden, outputs: as of `models.Stack`.
        nonlinearity: phi: "modrelu", "tanh", "relu", "sigmoid" or "none"; an LSTM has its own.
        rinit, iinit, style, capacity, seed: as of `constrain`.
        options: others of `models.Stack`: output, batch_first, device, dtype, ...

    Raises:
        ValueError: as of `constrain` and `models.Stack`.
    """
    network = Stack(cell_of(net, nonlinearity), 1, inputs, hidden, outputs, **{"learned_start": False, **options})
    return constrain(network, net, rinit=rinit, iinit=iinit, style=style, capacity=capacity, seed=seed)


@torch.no_grad()
def constrain(
    network: Stack,
    net: str,
    *,
    rinit: str | None = None,
    iinit: str = "xavier",
    style: str = "tunable",
    capacity: int = 2,
    seed: int | torch.Generator = 0,
) -> Stack:
    """Draw the published start of a network of one layer and put the constraint of its kind on W.

    "RNN": W is free, and b_h of the inputs is trained. "RNN-orth": the same, but W starts orthogonal. "expRNN": W =
    exp(A), A skew-symmetric. "nnRNN": W = P (T + Gamma D) P', P = exp(A) (`models.parametrisations.Schur`). "EURNN": W
    is a product of layers of rotations. The last three have no b_h: modReLU has a bias of its own. "LSTM": an LSTM.

    Starts: U Glorot normal or uniform by He et al., of EURNN uniform within 0.01; b_h uniform within 1/sqrt(V); the
    bias of modReLU uniform within 0.01, of EURNN 0.01, which is added to the absolute value in its definition;
    every gate of an LSTM Glorot normal over inputs and hidden units together, its biases uniform within 1/sqrt(V +
    h). The readout is Glorot normal, its bias uniform within 1/sqrt(h). The embedding, if there is one: uniform
    within 0.1, and so is the readout then, its bias 0. States start at 0 unless the network learns them.

    Args:
        network: of one layer, with the cell that `cell_of` gives.
        net: one of `NETS`.
        rinit: start of W: "henaff", "cayley", "random" (orthogonal; of A for nnRNN and expRNN) or, for "RNN" alone,
            "xavier", Glorot normal. By default "xavier" for "RNN" and "henaff" for the others. EURNN and LSTM
            have their own starts.
        iinit: start of U, "xavier" or "kaiming".
        style, capacity: of EURNN, see `models.parametrisations.givens`.
        seed: an int, or a CPU generator that the draws go on from.

    Returns:
        The network.

    Raises:
        ValueError: an unknown name, a start that the kind does not have, a number of units that it cannot have, or
            several layers.

    Source: Kerg, Goyette et al., "Non-normal recurrent neural network (nnRNN)", NeurIPS 2019, and the program released
    with it.
    """
    if net not in NETS:
        raise ValueError(f"net is {net!r}; choose {', '.join(map(repr, NETS))}")
    if network.depth != 1:
        raise ValueError(f"the network has {network.depth} layers; these networks have one")
    rinit = rinit or ("xavier" if net == "RNN" else "henaff")
    for name, value, known in (("rinit", rinit, RECURRENT_INITS), ("iinit", iinit, INPUT_INITS)):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; choose {', '.join(map(repr, known))}")
    if rinit == "xavier" and net in ("RNN-orth", "expRNN", "nnRNN"):
        raise ValueError(f"rinit is 'xavier', which is not orthogonal; {net} starts from {', '.join(map(repr, INITS))}")
    generator, h = generator_of(seed), network.hidden
    _start_inputs(network, net, iinit, generator)
    if net == "expRNN":
        orthogonal(network, "W_hh", rinit, generator)
    elif net == "nnRNN":
        schur(network, "W_hh", rinit, generator)
    elif net == "EURNN":
        givens(network, "W_hh", style, capacity, generator)
    elif net != "LSTM":
        weight_of(network, "W_hh").copy_(_recurrent(h, rinit, generator))
    if net in ("expRNN", "nnRNN", "EURNN"):
        network.register_parameter("b_h", None)
    if network.W_ho is not None:
        shape = network.W_ho.shape
        deviation = math.sqrt(2 / sum(shape))
        drawn = _uniform(shape, 0.1, generator) if network.embedding else _normal(shape, deviation, generator)
        network.W_ho.copy_(drawn)
    if network.b_o is not None:
        bound = 0.0 if network.embedding else 1 / math.sqrt(h)
        network.b_o.copy_(_uniform(network.b_o.shape, bound, generator))
    return network


def _start_inputs(network: Stack, net: str, iinit: str, generator: torch.Generator) -> None:
    """Draw U, its bias, the embedding, and all of an LSTM's own weights."""
    U, W, h = weight_of(network, "W_vh"), weight_of(network, "W_hh"), network.hidden
    V = U.shape[0]
    if net == "LSTM":
        U.copy_(_normal(U.shape, math.sqrt(2 / (V + 2 * h)), generator))
        W.copy_(_normal(W.shape, math.sqrt(2 / (V + 2 * h)), generator))
        bound = 1 / math.sqrt(V + h)
    else:
        if net == "EURNN":
            U.copy_(_uniform(U.shape, 0.01, generator))
        elif iinit == "xavier":
            U.copy_(_normal(U.shape, math.sqrt(2 / (V + h)), generator))
        else:
            U.copy_(_uniform(U.shape, math.sqrt(6 / V), generator))
        bound = 1 / math.sqrt(V)
    biases: Tensor | None = getattr(network, "b_h", None)
    if biases is not None:
        biases.copy_(_uniform(biases.shape, bound, generator))
    if "b" in network.cell.parameters:
        b = weight_of(network, "b")
        b.copy_(torch.full_like(b, 0.01) if net == "EURNN" else _uniform(b.shape, 0.01, generator))
    if network.embedding:
        network.W_in.copy_(_uniform(network.W_in.shape, 0.1, generator))


def _recurrent(h: int, rinit: str, generator: torch.Generator) -> Tensor:
    """W (h, h): Glorot normal, or orthogonal."""
    if rinit == "xavier":
        return _normal(torch.Size((h, h)), math.sqrt(1 / h), generator)
    return exponential_of_skew(skew_start(h, rinit, generator), h, upper_places(h))


def _normal(shape: torch.Size, deviation: float, generator: torch.Generator) -> Tensor:
    return deviation * torch.randn(shape, generator=generator, dtype=torch.float64)


def _uniform(shape: torch.Size, bound: float, generator: torch.Generator) -> Tensor:
    return bound * (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1)


def units_of_equal_size(
    net: str, parameters: int, inputs: int, outputs: int, *, embedding: int | None = None, capacity: int = 2
) -> int:
    """Find the most hidden units with which a network has at most so many parameters, by the authors' equations.

    With n = V + O: RNN h^2 + n h + O; RNN-orth and nnRNN h^2 + (n - 1/2) h + O; expRNN h^2 / 2 + n h + O; LSTM 4 h^2 +
    4 n h + O; EURNN, with h/2 angles in a layer of rotations, (n + capacity / 2) h + O. With an embedding of E columns:
    E in place of V in n, and O + V E in place of O. They count neither the bias of modReLU nor that of U. The number is
    even for nnRNN and EURNN.

    Args:
        net: one of `NETS`.
        parameters: the budget N.
        inputs, outputs: V and O.
        embedding: E, or None.
        capacity: of EURNN, its layers of rotations.

    Raises:
        ValueError: another net, or so small a budget that no unit is left.

    Source: the program released with Kerg, Goyette et al., NeurIPS 2019; that of EURNN follows from its definition.
    """
    quadratic = {"RNN": 1.0, "RNN-orth": 1.0, "nnRNN": 1.0, "expRNN": 0.5, "LSTM": 4.0, "EURNN": 0.0}
    if net not in quadratic:
        raise ValueError(f"net is {net!r}; choose {', '.join(map(repr, NETS))}")
    a = quadratic[net]
    n = (embedding or inputs) + outputs
    b = {"RNN-orth": n - 0.5, "nnRNN": n - 0.5, "LSTM": 4.0 * n, "EURNN": n + capacity / 2}.get(net, float(n))
    left = max(0, parameters - outputs - (inputs * embedding if embedding else 0))
    h = left / b if a == 0 else (-b + math.sqrt(b * b + 4 * a * left)) / (2 * a)
    step = 2 if net in ("nnRNN", "EURNN") else 1
    units = step * int(h / step)
    if units < step:
        raise ValueError(f"parameters is {parameters}; {net} with {step} unit(s) has more")
    return units
