"""The list of cases: a plain PyTorch model with data and a loss, and the forms of it that use hfopt's recurrences.

To add one, write a function that returns a :class:`Case` and add a line to :func:`all_cases`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from itertools import pairwise

import torch
from torch import Tensor, nn

from benchmarks.networks import Encoder, LoopRNN, TorchLSTM, TorchRNN, autoencoder, cnn
from models import RNN

Tensors = list[Tensor]


@dataclass(frozen=True)
class Work:
    """Floating-point operations of the forward pass's matrix products.

    ``both``: of those whose two operands depend on the parameters; ``data``: of those where one operand is data.
    """

    both: float
    data: float = 0.0

    @property
    def gradient(self) -> float:
        """Forward and backward pass."""
        return 3 * self.both + 2 * self.data

    @property
    def product(self) -> float:
        """Tangent and adjoint on cached activations."""
        return 4 * self.both + 2 * self.data


@dataclass(frozen=True)
class Form:
    """Another module that computes the same function of the same weights.

    ``to_plain`` takes tensors shaped like this module's parameters (a gradient, a product) to those of the plain one;
    ``from_plain`` takes a vector the other way.
    """

    model: nn.Module
    to_plain: Callable[[Sequence[Tensor]], Tensors] = list
    from_plain: Callable[[Sequence[Tensor]], Tensors] = list


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        name: for the command line.
        about: one line for the table.
        plain: the model whose gradient is the unit.
        inputs, targets: one batch.
        criterion: a module of torch.nn, with a mean over the outputs.
        work: of the plain model's forward pass, by the stated count.
        mm: (m, k, n) of the matrix product whose rate is the yardstick.
        ours: the same network on hfopt's recurrence; None: hfopt works on the plain model.
        others: further forms whose gradient, and product by the general path, are of interest.
    """

    name: str
    about: str
    plain: nn.Module
    inputs: Tensor
    targets: Tensor
    criterion: nn.Module
    work: Work
    mm: tuple[int, int, int]
    ours: Form | None = None
    others: dict[str, Form] = field(default_factory=dict)

    def to(self, device: torch.device) -> Case:
        """Move models and data, in place."""
        for model in (self.plain, *([self.ours.model] if self.ours else []), *(f.model for f in self.others.values())):
            model.to(device)
        self.inputs.data, self.targets.data = self.inputs.to(device), self.targets.to(device)
        return self


def autoencoder_case(sizes: tuple[int, ...], batch: int) -> Case:
    layers = [2.0 * batch * n * m for n, m in pairwise(sizes)]
    x = torch.rand(batch, sizes[0])
    return Case(
        "autoencoder",
        f"MLP autoencoder {'-'.join(map(str, sizes))} and back, {batch} cases",
        autoencoder(sizes),
        x,
        x.clone(),
        nn.MSELoss(),
        Work(2 * sum(layers) - layers[0], layers[0]),
        (batch, sizes[0], sizes[1]),
    )


def rnn_case(steps: int, batch: int, hidden: int, inputs: int = 2, outputs: int = 1) -> Case:
    plain = LoopRNN(inputs, hidden, outputs)
    ours = RNN(inputs, hidden, outputs)
    with torch.no_grad():
        for p in (plain.W_vh, plain.W_hh, plain.W_ho, plain.b_h, plain.b_o):
            p.uniform_(-(hidden**-0.5), hidden**-0.5)
    ours.load_state_dict(plain.state_dict())
    names = [name for name, _ in plain.named_parameters()]
    own = [name for name, _ in ours.named_parameters()]
    same = Form(
        ours,
        lambda t: [dict(zip(own, t, strict=True))[name] for name in names],
        lambda t: [dict(zip(names, t, strict=True))[name] for name in own],
    )
    return Case(
        f"rnn-T{steps}-B{batch}",
        f"tanh RNN, h = {hidden}, T = {steps}, B = {batch}",
        plain,
        torch.randn(steps, batch, inputs),
        torch.randn(steps, batch, outputs),
        nn.MSELoss(),
        Work(2.0 * steps * batch * hidden**2),
        (batch, hidden, hidden),
        ours=same,
        others={"torch.nn.RNN": _torch_rnn(ours)},
    )


def _torch_rnn(model: RNN) -> Form:
    """`torch.nn.RNN` with the weights of `model`; of its two biases, one stands for b_h, the other one stays."""
    parts = model.to_torch()
    assert parts.readout is not None
    form = TorchRNN(parts.recurrent, parts.readout, parts.initial)
    names = [name for name, _ in form.named_parameters()]
    hidden = model.hidden
    # By the plain model's order: h_init, W_vh, W_hh, W_ho, b_h, b_o.
    twins = (
        "initial",
        "recurrent.weight_ih_l0",
        "recurrent.weight_hh_l0",
        "readout.weight",
        "recurrent.bias_ih_l0",
        "readout.bias",
    )

    def turned(name: str, t: Tensor) -> Tensor:
        return t.t() if "weight" in name else t.reshape(hidden) if t.dim() == 3 else t

    def to_plain(tensors: Sequence[Tensor]) -> Tensors:
        named = dict(zip(names, tensors, strict=True))
        return [turned(name, named[name]) for name in twins]

    def from_plain(tensors: Sequence[Tensor]) -> Tensors:
        named = dict(zip(twins, tensors, strict=True))
        named["initial"] = named["initial"].reshape(1, 1, hidden)
        named["recurrent.bias_hh_l0"] = torch.zeros_like(named["recurrent.bias_ih_l0"])
        return [named[n].t().contiguous() if "weight" in n else named[n] for n in names]

    return Form(form, to_plain, from_plain)


def lstm_case(steps: int, batch: int, hidden: int, symbols: int) -> Case:
    return Case(
        "lstm",
        f"LSTM 1 x {hidden}, T = {steps}, B = {batch}",
        TorchLSTM(symbols, hidden, symbols),
        torch.randn(steps, batch, symbols),
        torch.randint(symbols, (steps * batch,)),
        nn.CrossEntropyLoss(),
        Work(2.0 * steps * batch * 4 * hidden**2),
        (batch, hidden, 4 * hidden),
    )


def cnn_case(batch: int, channels: int, side: int) -> Case:
    c, pixels = channels, batch * side**2
    first, second = 2.0 * pixels * 27 * c, 2.0 * pixels * 18 * c**2
    third = 2.0 * pixels / 4 * 36 * c**2
    last = 2.0 * batch * 2 * c * (side // 4) ** 2 * 10
    return Case(
        "cnn",
        f"CNN of three 3 x 3 convolutions ({c}, {2 * c}, {2 * c}), {batch} images of {side} x {side}",
        cnn(c, 10, side),
        torch.randn(batch, 3, side, side),
        torch.randint(10, (batch,)),
        nn.CrossEntropyLoss(),
        Work(second + third + last, first),
        (pixels, 9 * c, 2 * c),
    )


def transformer_case(batch: int, length: int, width: int, layers: int, symbols: int) -> Case:
    places = batch * length
    per_layer = 2.0 * places * (12 * width**2 + 2 * length * width)
    return Case(
        "transformer",
        f"Transformer encoder, {layers} layers of {width}, {batch} sequences of {length}",
        Encoder(symbols, width, max(1, width // 16), layers, length),
        torch.randint(symbols, (batch, length)),
        torch.randint(symbols, (places,)),
        nn.CrossEntropyLoss(),
        Work(layers * per_layer + 2.0 * places * width * symbols),
        (places, width, 4 * width),
    )


def all_cases(toy: bool = False) -> dict[str, Callable[[], Case]]:
    """Every case by name, built when it is called; `toy`: at sizes that only show that it runs."""
    if toy:
        return {
            "autoencoder": lambda: autoencoder_case((12, 8, 6, 4, 3), 10),
            "rnn-T4-B5": lambda: rnn_case(4, 5, 6),
            "lstm": lambda: lstm_case(3, 4, 5, 6),
            "cnn": lambda: cnn_case(3, 2, 8),
            "transformer": lambda: transformer_case(2, 4, 16, 1, 7),
        }
    recurrent = {f"rnn-T{T}-B{B}": lambda T=T, B=B: rnn_case(T, B, 100) for T in (30, 100, 200) for B in (100, 1000)}
    return {
        "autoencoder": lambda: autoencoder_case((784, 1000, 500, 250, 30), 500),
        **recurrent,
        "lstm": lambda: lstm_case(50, 64, 256, 64),
        "cnn": lambda: cnn_case(100, 16, 32),
        "transformer": lambda: transformer_case(32, 64, 128, 2, 100),
    }


def chosen(patterns: Sequence[str], toy: bool = False) -> dict[str, Callable[[], Case]]:
    """The cases whose names match one of the patterns, or all.

    Raises:
        ValueError: a pattern matches no case.
    """
    known = all_cases(toy)
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in known):
            raise ValueError(f"no case is called {pattern!r}; there are {', '.join(known)}")
    return {n: b for n, b in known.items() if not patterns or any(fnmatch(n, p) for p in patterns)}
