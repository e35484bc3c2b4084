"""Small modules of many kinds, each drawn by a number whose digits choose its parts; all give outputs (N, K)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

INPUTS = 3
TOKENS = 5
SIDE = 4

ACTIVATIONS: list[Callable[[], nn.Module]] = [
    nn.Tanh, nn.ReLU, nn.GELU, nn.SiLU, nn.Softplus, nn.Sigmoid, nn.ELU, nn.LeakyReLU, nn.Mish, nn.Hardswish,
]  # fmt: skip


class Digits:
    """The digits of a number in mixed bases, one for each choice."""

    def __init__(self, number: int) -> None:
        self.number = number

    def choose(self, n: int) -> int:
        """A number below n."""
        self.number, digit = divmod(self.number, n)
        return digit

    def flag(self) -> bool:
        """Yes or no."""
        return bool(self.choose(2))


class Residual(nn.Module):
    """``x + f(x)``."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)  # type: ignore[no-any-return]


def mlp(digits: Digits, width: int, outputs: int) -> nn.Module:
    """Linear layers, one activation, one kind of normalisation or none, residual or not."""
    activation = ACTIVATIONS[digits.choose(len(ACTIVATIONS))]
    norm, bias, residual = digits.choose(4), digits.flag(), digits.flag()
    norms: list[Callable[[], nn.Module]] = [
        nn.Identity,
        lambda: nn.LayerNorm(width),
        lambda: nn.BatchNorm1d(width),
        lambda: nn.GroupNorm(1, width),
    ]
    middle = nn.Sequential(nn.Linear(width, width, bias=bias), norms[norm](), activation())
    last = nn.Linear(width, outputs, bias=bias)
    return nn.Sequential(nn.Linear(INPUTS, width), activation(), Residual(middle) if residual else middle, last)


class Convolution(nn.Module):
    """One convolution of rank 1 or 2 with everything that can be chosen about it, pooling, and a linear layer."""

    def __init__(self, digits: Digits, width: int, outputs: int, rank: int) -> None:
        super().__init__()
        kind = nn.Conv1d if rank == 1 else nn.Conv2d
        groups = 2 if digits.flag() else 1
        padding = digits.choose(2)
        mode = ["zeros", "reflect", "replicate", "circular"][digits.choose(4)]
        self.inner = kind(
            2,
            2 * width,
            1 + digits.choose(3),
            stride=1 + digits.choose(2),
            padding=padding,
            groups=groups,
            bias=digits.flag(),
            padding_mode=mode if padding else "zeros",
        )
        self.activation = ACTIVATIONS[digits.choose(len(ACTIVATIONS))]()
        pools = [nn.MaxPool1d, nn.AvgPool1d] if rank == 1 else [nn.MaxPool2d, nn.AvgPool2d]
        which = digits.choose(3)
        self.pool: nn.Module = nn.Identity() if which == 2 else pools[which](2, ceil_mode=True)
        adaptive = nn.AdaptiveAvgPool1d if rank == 1 else nn.AdaptiveAvgPool2d
        self.norm = [nn.Identity, lambda: nn.GroupNorm(2, 2 * width)][digits.choose(2)]()
        self.down = adaptive(1)
        self.last = nn.Linear(2 * width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        h = self.down(self.norm(self.pool(self.activation(self.inner(x)))))
        z: Tensor = self.last(h.flatten(1))
        return z


class Recurrent(nn.Module):
    """One of torch's recurrent layers, read out at the last step; 9 steps are replaced by hfopt's, 3 are not."""

    def __init__(self, digits: Digits, width: int, outputs: int) -> None:
        super().__init__()
        kind = digits.choose(4)
        options = {
            "num_layers": 1 + digits.choose(2),
            "bidirectional": digits.flag(),
            "bias": digits.flag(),
            "batch_first": digits.flag(),
        }
        self.batch_first = bool(options["batch_first"])
        self.steps = 9 if digits.flag() else 3
        if kind < 2:
            self.inner: nn.Module = nn.RNN(INPUTS, width, nonlinearity="relu" if kind else "tanh", **options)
        else:
            self.inner = (nn.LSTM if kind == 2 else nn.GRU)(INPUTS, width, **options)
        self.last = nn.Linear(width * (2 if options["bidirectional"] else 1), outputs)

    def forward(self, x: Tensor) -> Tensor:
        inputs = x.unsqueeze(0) * torch.linspace(0.2, 1.0, self.steps, dtype=x.dtype).view(-1, 1, 1)
        states, _ = self.inner(inputs.transpose(0, 1) if self.batch_first else inputs)
        z: Tensor = self.last(states[:, -1] if self.batch_first else states[-1])
        return z


class Embedded(nn.Module):
    """The mean of a few embedded tokens, with a bag or one by one."""

    def __init__(self, digits: Digits, width: int, outputs: int) -> None:
        super().__init__()
        padding = 0 if digits.flag() else None
        self.bag = digits.flag()
        kind = nn.EmbeddingBag if self.bag else nn.Embedding
        self.inner = kind(TOKENS, width, padding_idx=padding)
        self.tied = digits.flag() and outputs <= TOKENS
        self.last = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x) if self.bag else self.inner(x).mean(1)
        z: Tensor = self.last(h.tanh())
        # The output layer's weights are some of the embedding's as well.
        return z + F.linear(h, self.inner.weight[: z.shape[1]]) if self.tied else z


class Scalars(nn.Module):
    """Parameters without dimensions, an empty one, one that is not used, and a product of two that are tied."""

    def __init__(self, digits: Digits, width: int, outputs: int) -> None:
        super().__init__()
        self.scale, self.offset = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.tensor(-0.2))
        self.first = nn.Linear(INPUTS, width)
        self.second = nn.Linear(width, INPUTS)
        self.last = nn.Linear(INPUTS, outputs)
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.unused = nn.Parameter(torch.ones(2)) if digits.flag() else None
        self.tied = digits.flag()
        if self.tied:
            self.second.weight = nn.Parameter(torch.randn(INPUTS, width))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x) * self.scale)
        back = F.linear(h, self.first.weight.t(), self.second.bias) if self.tied else self.second(h)
        z: Tensor = self.last(back) + self.offset + self.empty.sum()
        return z


class Attention(nn.Module):
    """A Transformer layer over three tokens made of one input."""

    def __init__(self, digits: Digits, width: int, outputs: int) -> None:
        super().__init__()
        heads = 1 + digits.choose(2)
        self.first = nn.Linear(INPUTS, 2 * width)
        if digits.flag():
            self.inner: nn.Module = nn.TransformerEncoderLayer(
                2 * width, heads, 4, dropout=0.0, batch_first=True, norm_first=digits.flag(), activation="gelu"
            )
        else:
            self.inner = nn.MultiheadAttention(2 * width, heads, batch_first=True)
        self.last = nn.Linear(2 * width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.stack([self.first(x * s) for s in (0.5, 1.0, -1.0)], 1)
        h = self.inner(h, h, h)[0] if isinstance(self.inner, nn.MultiheadAttention) else self.inner(h)
        z: Tensor = self.last(h.mean(1))
        return z


BUILDERS: dict[str, Callable[[Digits, int, int], nn.Module]] = {
    "mlp": mlp,
    "conv1d": lambda d, w, o: Convolution(d, w, o, 1),
    "conv2d": lambda d, w, o: Convolution(d, w, o, 2),
    "recurrent": Recurrent,
    "embedded": Embedded,
    "scalars": Scalars,
    "attention": Attention,
}
FAMILIES = tuple(BUILDERS)


def model_of(family: str, variant: int, width: int, outputs: int) -> nn.Module:
    """A module of a family; its weights come from torch's generator."""
    return BUILDERS[family](Digits(variant), width, outputs)


def input_of(family: str, cases: int, draws: torch.Generator) -> Tensor:
    """Inputs for a family, (N, ...)."""
    if family == "embedded":
        return torch.randint(0, TOKENS, (cases, 3), generator=draws)
    shapes = {"conv1d": (2, SIDE), "conv2d": (2, SIDE, SIDE)}
    return torch.randn(cases, *shapes.get(family, (INPUTS,)), generator=draws, dtype=torch.float64)
