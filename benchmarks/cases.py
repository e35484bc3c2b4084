"""The list of cases; to add one, write a function that returns a `Case` and add a line to :func:`all_cases`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from itertools import pairwise

import torch
from torch import nn

from benchmarks.case import Case, Work
from benchmarks.networks import Encoder, autoencoder, cnn
from benchmarks.recurrent import gru_case, lstm_case, mrnn_case, rnn_case


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
            "mrnn": lambda: mrnn_case(4, 5, 6, 4, 3),
            "lstm": lambda: lstm_case(3, 4, 5, 6),
            "gru": lambda: gru_case(3, 4, 5, 6),
            "cnn": lambda: cnn_case(3, 2, 8),
            "transformer": lambda: transformer_case(2, 4, 16, 1, 7),
        }
    recurrent = {f"rnn-T{T}-B{B}": lambda T=T, B=B: rnn_case(T, B, 100) for T in (30, 100, 200) for B in (100, 1000)}
    return {
        "autoencoder": lambda: autoencoder_case((784, 1000, 500, 250, 30), 500),
        **recurrent,
        "mrnn": lambda: mrnn_case(100, 500, 100, 100, 30),
        "lstm": lambda: lstm_case(50, 64, 256, 64),
        "gru": lambda: gru_case(50, 64, 256, 64),
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
