"""The simple recurrence with its readout inside, against the two one after the other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hfopt import structural
from hfopt.recurrences import NONLINEARITIES, simple_rnn_layer, simple_rnn_readout

T, B, V, H, O = 4, 3, 2, 5, 2


def weights(seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = {
        "inputs": (T, B, V),
        "weight_vh": (V, H),
        "weight_hh": (H, H),
        "h0": (B, H),
        "bias": (H,),
        "weight_ho": (H, O),
        "bias_o": (O,),
    }
    return {
        name: (0.6 * torch.randn(shape, generator=g, dtype=torch.float64)).requires_grad_()
        for name, shape in shapes.items()
    }


def two_steps(w: dict[str, Tensor], f: str) -> Tensor:
    hidden = simple_rnn_layer(w["inputs"], w["weight_vh"], w["weight_hh"], w["h0"], w.get("bias"), f)
    outputs = hidden @ w["weight_ho"]
    return outputs + w["bias_o"] if "bias_o" in w else outputs


def inside(w: dict[str, Tensor], f: str, **options: Tensor) -> Tensor:
    return simple_rnn_readout(
        w["inputs"],
        w["weight_vh"],
        w["weight_hh"],
        w["h0"],
        w.get("bias"),
        w["weight_ho"],
        w.get("bias_o"),
        f,
        **options,
    )


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("f", list(NONLINEARITIES))
def test_outputs_gradients_and_second_derivatives_equal_two_steps(f: str, biases: bool) -> None:
    w = weights()
    if not biases:
        w.pop("bias"), w.pop("bias_o")
    leaves = list(w.values())
    g = torch.Generator().manual_seed(1)
    d = [torch.randn(x.shape, generator=g, dtype=x.dtype) for x in leaves]
    results = []
    for function in (inside, two_steps):
        out = function(w, f)
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(first, leaves, d)
        results.append((out, *first, *second))
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-11)


def test_forward_mode_equals_two_steps() -> None:
    w = weights()
    names = list(w)
    values = tuple(w[n].detach() for n in names)
    g = torch.Generator().manual_seed(2)
    d = tuple(torch.randn(x.shape, generator=g, dtype=x.dtype) for x in values)

    def at(function: object) -> object:
        return lambda *x: function(dict(zip(names, x, strict=True)), "tanh")  # type: ignore[operator]

    found, wanted = (torch.func.jvp(at(f), values, d) for f in (inside, two_steps))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("f", ["tanh", "sigmoid", "relu"])
def test_hidden_states_are_marked_as_by_the_layer(f: str) -> None:
    w = weights()
    mask = torch.arange(T).unsqueeze(1) < torch.tensor([4, 2, 3])
    found = []
    for function in (inside, lambda w, f, mask: simple_rnn_layer(
        w["inputs"], w["weight_vh"], w["weight_hh"], w["h0"], w["bias"], f, mask
    )):  # fmt: skip
        with structural.collecting(True) as marks:
            function(w, f, mask=mask)
        (mark,) = marks
        on = torch.autograd.grad(mark.preactivations.sum(), [w["weight_hh"], w["bias"]])
        found.append((mark.preactivations, mark.weight, *on))
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("weight_ho", (H + 1, O)), ("weight_ho", (H,)), ("bias_o", (O + 1,)), ("weight_hh", (H, O)), ("h0", (B + 1, H))],
)
def test_wrong_shapes_are_named(name: str, shape: tuple[int, ...]) -> None:
    w = weights()
    w[name] = torch.zeros(shape, dtype=torch.float64)
    with pytest.raises(ValueError, match=name):
        inside(w, "tanh")


def test_wrong_dtypes_are_named() -> None:
    w = weights()
    w["weight_ho"] = w["weight_ho"].float()
    with pytest.raises(TypeError, match="weight_ho"):
        inside(w, "tanh")
