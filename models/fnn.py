"""The deep feed-forward network, as classifier, regressor or autoencoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from models.initialisation import generator_of, sparse_

NONLINEARITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "logistic": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "linear": lambda a: a,
    "sigmoid": torch.sigmoid,
    "identity": lambda a: a,
}
"""By name; the last two are other names of "logistic" and "linear"."""


class FNN(nn.Module):
    """Deep feed-forward network: y_{i+1} = f_i(y_i W_i + b_i), y_0 the inputs.

    Args:
        sizes: (D, h_1, ..., h_L, O): numbers of inputs, of units of each hidden layer, of outputs.
        nonlinearity: f of the hidden layers: one name for all, or a sequence of L names. Known are "logistic", "tanh",
            "relu", "linear" ("sigmoid" and "identity" are other names of the first and the last).
        code: which entry of `sizes` is the code of an autoencoder, from 1 to L; None for none.
        code_nonlinearity: f of the code layer, if there is one and `nonlinearity` is one name.
        output: f of the last layer. "linear" is what losses on logits want; with "logistic" take
            `torch.nn.functional.binary_cross_entropy`.
        biases: whether there are b_i.
        device, dtype: of the parameters.

    Weights: `layers[i].weight` (the transpose of W_i) and `layers[i].bias`, those of `torch.nn.Linear` and drawn as
    it does; see `sparse_init`.

    Raises:
        ValueError: fewer than two sizes, a size below 1, an unknown name, a wrong number of names, or a code that is no
            hidden layer.

    Source: Martens, "Deep learning via Hessian-free optimization", ICML 2010, section 5.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        nonlinearity: str | Sequence[str] = "logistic",
        code: int | None = None,
        code_nonlinearity: str = "linear",
        output: str = "linear",
        biases: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = tuple(sizes)
        if len(sizes) < 2 or min(sizes) < 1:
            raise ValueError(f"sizes is {sizes}; it has at least two entries (inputs, outputs), each at least 1")
        hidden = len(sizes) - 2
        if code is not None and not 1 <= code <= hidden:
            raise ValueError(
                f"code is {code}; it is the position in sizes of one of the {hidden} hidden layers, from 1"
            )
        if isinstance(nonlinearity, str):
            names = [nonlinearity] * hidden
            if code is not None:
                names[code - 1] = code_nonlinearity
        else:
            names = list(nonlinearity)
            if len(names) != hidden:
                raise ValueError(f"nonlinearity has {len(names)} names; there are {hidden} hidden layers")
        names.append(output)
        for argument, name in (*(("nonlinearity", name) for name in names[:-1]), ("output", output)):
            if name not in NONLINEARITIES:
                raise ValueError(f"{argument} is {name!r}; it is one of {', '.join(map(repr, NONLINEARITIES))}")
        self.sizes, self.code, self.nonlinearities = sizes, code, tuple(names)
        self.layers = nn.ModuleList(
            nn.Linear(rows, columns, bias=biases, device=device, dtype=dtype) for rows, columns in pairwise(sizes)
        )

    @classmethod
    def autoencoder(
        cls,
        encoder: Sequence[int],
        *,
        nonlinearity: str = "logistic",
        code_nonlinearity: str = "linear",
        output: str = "linear",
        biases: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> FNN:
        """The network whose decoder mirrors its encoder: `[784, 1000, 30]` has sizes 784-1000-30-1000-784.

        Weights are not tied. Outputs are logits unless `output` says otherwise.

        Args:
            encoder: sizes from the inputs to the code, at least two.
            nonlinearity: of all hidden layers but the code.
            code_nonlinearity: of the code.
            output, biases, device, dtype: as in the constructor.

        Raises:
            ValueError: as the constructor.

        Source: Hinton & Salakhutdinov, "Reducing the dimensionality of data with neural networks", Science 2006.
        """
        encoder = tuple(encoder)
        if len(encoder) < 2:
            raise ValueError(f"encoder is {encoder}; it has at least two entries, the inputs and the code")
        return cls(
            (*encoder, *encoder[-2::-1]),
            nonlinearity=nonlinearity,
            code=len(encoder) - 1,
            code_nonlinearity=code_nonlinearity,
            output=output,
            biases=biases,
            device=device,
            dtype=dtype,
        )

    def sparse_init(
        self,
        seed: int | torch.Generator,
        connections: int = 15,
        scale: float = 1.0,
        bias_scale: float = 0.0,
        *,
        tanh_as_logistic: bool = True,
    ) -> FNN:
        """Sparse random weights: every unit has `connections` incoming weights from N(0, scale^2), the others are 0.

        A layer with fewer inputs than `connections` is full. The source draws the positions with replacement, so that
        a unit may have a few less there. Biases: N(0, bias_scale^2).

        A logistic unit is (1 + tanh(a/2))/2, so for tanh units to begin about as logistic ones would, W_i is halved
        for each of the two layers it joins that is tanh, and the biases of tanh layers are raised by 1/2
        (`tanh_as_logistic`).

        Args:
            seed: an int, or a CPU generator that the draws go on from.
            connections: incoming connections of each unit.
            scale: standard deviation of the weights that are there, before the halving.
            bias_scale: standard deviation of the biases.
            tanh_as_logistic: whether tanh layers are adapted so.

        Returns:
            The network itself.

        Raises:
            ValueError: `connections` below 1, a negative or infinite scale, or a generator that is not on the CPU.

        Source: Martens, ICML 2010, section 5; for tanh also Sutskever, Martens, Dahl & Hinton, ICML 2013, section 3.
        """
        generator = generator_of(seed)
        before = "linear"
        with torch.no_grad():
            for layer, name in zip(self._linears(), self.nonlinearities, strict=True):
                tanhs = (before, name).count("tanh") if tanh_as_logistic else 0
                sparse_(layer.weight.t(), connections, scale / 2**tanhs, generator)
                if layer.bias is not None:
                    sparse_(layer.bias.unsqueeze(0), 1, bias_scale, generator)
                    if tanh_as_logistic and name == "tanh":
                        layer.bias.add_(0.5)
                before = name
        return self

    def forward(self, inputs: Tensor) -> Tensor:
        """Outputs (..., O) of inputs (..., D).

        Raises:
            ValueError: the last dimension of `inputs` is not D.
        """
        self._check("inputs", inputs, 0)
        return self._through(inputs, 0, len(self.layers))

    @torch.no_grad()
    def hidden_states(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """y_1 (..., h_1) to y_L (..., h_L) of inputs (..., D), outside autograd, to look at."""
        self._check("inputs", inputs, 0)
        states = []
        for i in range(len(self.layers) - 1):
            inputs = self._through(inputs, i, i + 1)
            states.append(inputs)
        return tuple(states)

    def encode(self, inputs: Tensor) -> Tensor:
        """The codes (..., c) of inputs (..., D).

        Raises:
            ValueError: the network has no code, or a wrong shape.
        """
        self._check("inputs", inputs, 0)
        return self._through(inputs, 0, self._code())

    def decode(self, codes: Tensor) -> Tensor:
        """The outputs (..., O) that codes (..., c) lead to.

        Raises:
            ValueError: the network has no code, or a wrong shape.
        """
        code = self._code()
        self._check("codes", codes, code)
        return self._through(codes, code, len(self.layers))

    def extra_repr(self) -> str:
        """Sizes, nonlinearities and code, for `print`."""
        return f"{'-'.join(map(str, self.sizes))}, nonlinearities={self.nonlinearities}, code={self.code}"

    def _linears(self) -> list[nn.Linear]:
        return [layer for layer in self.layers if isinstance(layer, nn.Linear)]

    def _through(self, y: Tensor, first: int, end: int) -> Tensor:
        """y_end of y_first."""
        for layer, name in zip(self.layers[first:end], self.nonlinearities[first:end], strict=True):
            y = NONLINEARITIES[name](layer(y))
        return y

    def _code(self) -> int:
        if self.code is None:
            raise ValueError("the network has no code; give code= or build it with FNN.autoencoder")
        return self.code

    def _check(self, name: str, y: Tensor, i: int) -> None:
        if y.dim() == 0 or y.shape[-1] != self.sizes[i]:
            raise ValueError(f"{name} has shape {tuple(y.shape)}; its last dimension is {self.sizes[i]}")
