"""Networks that take one step after the other: the outputs of the whole pass, and states that lead to them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import models


@pytest.mark.parametrize("output", ["all", "last"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (models.RNN, {}),
        (models.MRNN, {}),
        (models.LSTM, {}),
        (models.GRU, {}),
        (models.UGRNN, {"depth": 2}),
        (models.RHN, {}),
    ],
)
def test_outputs_and_gradients(kind: Any, options: dict[str, Any], batch_first: bool, output: str) -> None:
    torch.manual_seed(0)
    sizes = (3, 4, 5, 2) if kind is models.MRNN else (3, 4, 2)
    model = kind(*sizes, batch_first=batch_first, output=output, dtype=torch.float64, **options)
    model.sparse_init(1)
    inputs = torch.randn(5, 6, 3, dtype=torch.float64)
    given = inputs.transpose(0, 1) if batch_first else inputs
    outputs, nodes = model.unrolled(given)
    expected = model(given)
    torch.testing.assert_close(outputs, expected)
    assert len(nodes) == 5
    one = torch.autograd.grad(expected.square().sum(), list(model.parameters()), retain_graph=True, allow_unused=True)
    other = torch.autograd.grad(outputs.square().sum(), list(model.parameters()), retain_graph=True, allow_unused=True)
    for a, b in zip(one, other, strict=True):
        if a is not None and b is not None:
            torch.testing.assert_close(a, b)
    # All of the loss goes through each node: a step along its gradient changes the outputs as that of h_t would.
    (gradient,) = torch.autograd.grad(outputs.square().sum(), nodes[2])
    assert gradient.shape == nodes[2].shape
    assert float(gradient.abs().sum()) > 0


def test_a_cell_whose_output_is_no_state() -> None:
    model = models.IntersectionRNN(3, 3, 2)
    with pytest.raises(NotImplementedError, match=r"the output of the cell .* is none of its states"):
        model.unrolled(torch.zeros(4, 2, 3))
