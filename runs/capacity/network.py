"""The network that hyperparameters describe, of a size that a budget allows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from models.sizes import units_for
from models.stacked import Stack
from runs.capacity.cells import architecture, cell_of
from runs.capacity.hyperparameters import checked


def network(
    name: str,
    depth: int,
    inputs: int,
    outputs: int,
    hparams: Mapping[str, Any],
    *,
    max_params: int | None = None,
    units: int | None = None,
    output: str = "all",
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Stack:
    """Make a stack of an architecture, of given units or as large as a budget allows, and initialise it.

    Args:
        name: of the architecture, as published: rnn, irnn, ugrnn, gru, lstm, +rnn.
        depth: number of layers.
        inputs, outputs: V and O.
        hparams: by their published names.
        max_params: budget of parameters, initial states and readout included.
        units: of each layer, in place of a budget.
        output: as of `models.Stack`.
        seed: of the initial weights.
        device, dtype: of the parameters.

    Raises:
        ValueError: hyperparameters that do not fit, a budget that is too small, or neither or both of budget and units.
    """
    given = checked(name, hparams)
    cell = cell_of(name, str(given.get("nonlinearity", "tanh")))
    if (max_params is None) == (units is None):
        raise ValueError("give either max_params, a budget, or units, the size of a layer")
    if units is None:
        assert max_params is not None
        units = units_for(max_params, cell, depth, inputs, outputs)
    model = Stack(cell, depth, inputs, units, outputs, output=output, dtype=dtype)
    initialise(model, name, given, seed)
    return model.to(device)


@torch.no_grad()
def initialise(model: Stack, name: str, hparams: Mapping[str, Any], seed: int) -> None:
    """Draw all weights as hyperparameters say.

    Square matrices, for each gate: identity, which is not scaled; or, times a scale, orthogonal (Haar measure) or
    N(0, 1/n). Rectangular ones, and those between layers: N(0, 1/n_in) times a scale. Biases: 1 ("delta") or N(0, 1)
    times a scale, and the forget bias added: in the gate's sum, a constant and the start of a bias are the same. The
    IRNN has identities and no scales of biases: they are 0. All layers share the hyperparameters.

    What the source leaves open: initial states and the readout's bias start at 0, the readout's weights, and the
    projection of the +RNN's inputs, from N(0, 1/n_in).

    Source: Collins, Sohl-Dickstein & Sussillo, ICLR 2017, appendix A.
    """
    given, arch = checked(name, hparams), architecture(name)
    letter_of = {column: letter for letter, column in arch.gates.items()}
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def square(n: int, letter: str) -> Tensor:
        kind = "identity" if name == "irnn" else given["recurrent_matrix_init_type"]
        if kind == "identity":
            return torch.eye(n, dtype=torch.float64)
        made = _orthogonal(normal(n, n)) if kind == "orthogonal" else normal(n, n) / math.sqrt(n)
        return made * float(given[f"recurrent_matrix_scale_{letter}"])

    def bias(n: int, letter: str) -> Tensor:
        if name == "irnn":
            return torch.zeros(n, dtype=torch.float64)
        made = normal(n) if given["recurrent_bias_init_type"] == "normal" else torch.ones(n, dtype=torch.float64)
        hack = float(given[f"forget_gate_bias_hack{arch.forget[letter]}"]) if letter in arch.forget else 0.0
        return made * float(given[f"recurrent_bias_scale_{letter}"]) + hack

    n, parts = model.hidden, dict(model.named_parameters())
    for k in range(model.depth):
        end = "" if k == 0 else f"_l{k}"
        below = parts[f"W_vh{end}"].shape[0]
        letters = [letter_of[c.name] for c in model.cell.input_columns]
        scaled = [normal(below, n) / math.sqrt(below) * float(given[f"input_scale_{g}"]) for g in letters]
        parts[f"W_vh{end}"].copy_(torch.cat(scaled, 1))
        parts[f"b_h{end}"].copy_(torch.cat([bias(n, g) for g in letters]))
        for j, product in enumerate(model.cell.products):
            own = f"W_hh{end}" if len(model.cell.products) == 1 else f"W_hh_{j + 1}{end}"
            parts[own].copy_(torch.cat([square(n, letter_of[c.name]) for c in product.columns], 1))
    for from_name, bias_name in (("W_ho", "b_o"), ("W_in", "b_in")):
        if from_name in parts:
            parts[from_name].copy_(normal(*parts[from_name].shape) / math.sqrt(parts[from_name].shape[0]))
            parts[bias_name].zero_()
    for key, part in parts.items():
        if "_init" in key:
            part.zero_()


def _orthogonal(gaussian: Tensor) -> Tensor:
    """An orthogonal matrix, uniform with respect to the Haar measure (Mezzadri, 2007)."""
    q, r = torch.linalg.qr(gaussian)
    made: Tensor = q * r.diagonal().sign()
    return made
