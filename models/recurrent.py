"""What the recurrent networks share: a learned start, a linear readout, their options, starts and conversions."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hfopt.recurrences import segments
from hfopt.recurrences.arguments import Ends, ends
from models.initialisation import generator_of, sparse_

Network = TypeVar("Network", bound="Recurrent")


class Recurrent(nn.Module, ABC):
    """A recurrent network with a linear readout: o_t = h_t W_ho + b_o, and h_{-1} = h_init, which is learned.

    A subclass makes its parameters with what `_maker` gives (among them h_init, W_ho and b_o, the last two of which
    may be None), calls `reset_parameters`, and says how the hidden states come about (`_layer`) and which weights
    start sparse (`_weights`).

    Args:
        inputs: V, number of inputs.
        hidden: h, number of hidden units.
        outputs: O, number of outputs; None for no readout (the outputs are the hidden states then, O = h).
        output: "all" for the outputs of all steps, "last" for those of each sequence's last step.
        batch_first: whether inputs and outputs are (B, T, .) instead of (T, B, .).
        sizes: others that are at least 1.

    Raises:
        ValueError: a size below 1, or an unknown `output`.
    """

    h_init: nn.Parameter
    W_ho: nn.Parameter | None
    b_o: nn.Parameter | None

    def __init__(
        self, inputs: int, hidden: int, outputs: int | None, output: str, batch_first: bool, **sizes: int
    ) -> None:
        super().__init__()
        for name, size in {"inputs": inputs, "hidden": hidden, "outputs": outputs, **sizes}.items():
            if size is not None and size < 1:
                raise ValueError(f"{name} is {size}; it is at least 1")
        if output not in ("all", "last"):
            raise ValueError(f"output is {output!r}; it is 'all' or 'last'")
        self.inputs, self.hidden, self.outputs = inputs, hidden, outputs
        self.output, self.batch_first = output, batch_first

    @abstractmethod
    def _layer(
        self, inputs: Tensor, starts: Sequence[Tensor | None], lengths: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Hidden states (T, B, h), and the states after each sequence's last step, each (B, h), h_t first.

        A start that is None is the learned one.
        """

    @abstractmethod
    def _weights(self) -> list[tuple[Tensor, bool]]:
        """The weights that start sparse besides W_ho, each with whether they lead from the inputs."""

    def _starts(self) -> list[Tensor]:
        """The learned states before the first step."""
        return [self.h_init]

    def _biases(self) -> list[Tensor | None]:
        return [getattr(self, name, None) for name in ("b_h", "b_n", "b_o")]

    def reset_parameters(self) -> None:
        """Draw all weights and biases uniformly within +-1/sqrt(h) from torch's global generator; the start is 0."""
        bound = 1 / math.sqrt(self.hidden)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.uniform_(-bound, bound)
            for start in self._starts():
                start.zero_()

    def _start_sparse(self, seed: int | torch.Generator, connections: int, scale: float, input_scale: float) -> None:
        """Starts N(0, 1), `_weights` and W_ho sparse, biases 0: see the subclasses' `sparse_init`."""
        generator = generator_of(seed)
        with torch.no_grad():
            for start in self._starts():
                start.copy_(torch.randn(start.shape, generator=generator, dtype=torch.float64))
            readout = [] if self.W_ho is None else [(self.W_ho, False)]
            for weight, from_inputs in [*self._weights(), *readout]:
                deviation = scale / math.sqrt(max(1, min(connections, weight.shape[0])))
                sparse_(weight, connections, input_scale if from_inputs else deviation, generator)
            for bias in self._biases():
                if bias is not None:
                    bias.zero_()

    def forward(self, inputs: Tensor, h0: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        """Outputs (T, B, O), or (B, O) of the last steps if `output` is "last".

        Args:
            inputs: v (T, B, V), or (B, T, V) if `batch_first`.
            h0: (B, h) or (h,), the state to start from instead of h_init.
            lengths: (B,) integers from 1 to T: how many steps of each sequence count. Outputs of later steps are
                there but mean nothing, and those steps take no part in structural damping.

        Raises:
            ValueError: a wrong shape or length; the message names the argument.
            TypeError: a wrong dtype.
        """
        return self._outputs(inputs, [h0], lengths)

    def _outputs(self, inputs: Tensor, starts: Sequence[Tensor | None], lengths: Tensor | None) -> Tensor:
        inputs = self._checked(inputs)
        if lengths is None and segments.wanted():
            return self._checkpointed(inputs, starts)
        hidden, (last, *_) = self._layer(inputs, starts, lengths)
        return self._readout(last if self.output == "last" else hidden)

    def _checkpointed(self, inputs: Tensor, starts: Sequence[Tensor | None]) -> Tensor:
        """The same in segments, each with its part of the readout: the hidden states are never there all at once."""
        own = self._starts()
        # A weight with a parametrisation is formed once, for all segments.
        formed = self._formed().items()
        names, weights = zip(*((n, p) for n, p in formed if all(p is not s for s in own)), strict=True)
        given = [s if s is not None else first for s, first in zip((*starts, *own)[: len(own)], own, strict=True)]
        states = [s if s.dim() == 2 else s.expand(inputs.shape[1], -1) for s in given]

        def part(xs: segments.Given, states: segments.Given, weights: segments.Given) -> segments.Found:
            # A derivative in the weights needs them as arguments: the same network around these tensors.
            network = self._around(dict(zip(names, weights, strict=True)))
            hidden, after = network._layer(xs[0], states, None)
            return [network._read_out(hidden)] if self.output == "all" else [], after

        outputs, after = segments.over_time(part, (inputs,), states, weights)
        if self.output == "last":
            return self._read_out(after[0])
        return outputs[0].transpose(0, 1) if self.batch_first else outputs[0]

    def _formed(self) -> dict[str, Tensor]:
        """All parameters by name, and the weights that parametrisations form in place of theirs."""
        found: dict[str, Tensor] = {name: p for name, p in self._parameters.items() if p is not None}
        if parametrize.is_parametrized(self):
            found |= {name: getattr(self, name) for name in cast(nn.ModuleDict, self.parametrizations)}
        return found

    def _around(self: Network, tensors: Mapping[str, Tensor]) -> Network:
        """This network with other tensors in place of parameters and of weights with a parametrisation."""
        kind = parametrize.type_before_parametrizations(self)
        network = cast(Network, object.__new__(kind))
        network.__dict__.update(self.__dict__)
        network._parameters = {**self._parameters, **tensors}  # type: ignore[dict-item]
        return network

    @torch.no_grad()
    def hidden_states(self, inputs: Tensor, h0: Tensor | None = None) -> Tensor:
        """Hidden states (T, B, h), or (B, T, h) if `batch_first`, outside autograd, to look at."""
        hidden, _ = self._layer(self._checked(inputs), [h0], None)
        return hidden.transpose(0, 1) if self.batch_first else hidden

    def unrolled(self, inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Outputs as of `forward`, one step after the other, and all states (B, n) after each step.

        All that outputs and later steps have of a step goes through these states, so that a loss can be differentiated
        in them. Much slower than `forward`, for looking at gradients.
        """
        given: list[Tensor | None] = [None] * len(self._starts())
        hidden, nodes = [], []
        for step in torch.split(self._checked(inputs), 1):
            _, found = self._layer(step, given, None)
            nodes.append(torch.cat(found, 1))
            states = torch.split(nodes[-1], [state.shape[1] for state in found], 1)
            given = list(states)
            hidden.append(self._top(states))
        outputs = self._readout(hidden[-1] if self.output == "last" else torch.stack(hidden))
        return outputs, nodes

    def _top(self, states: Sequence[Tensor]) -> Tensor:
        """The hidden states (B, h) that the readout sees, among all states after a step."""
        return states[0]

    def _read_out(self, hidden: Tensor) -> Tensor:
        return hidden if self.W_ho is None else F.linear(hidden, self.W_ho.t(), self.b_o)

    def _readout(self, hidden: Tensor) -> Tensor:
        outputs = self._read_out(hidden)
        return outputs.transpose(0, 1) if self.batch_first and self.output == "all" else outputs

    def _checked(self, inputs: Tensor) -> Tensor:
        """Inputs (T, B, V)."""
        if inputs.dim() != 3 or inputs.shape[2] != self.inputs or inputs.numel() == 0:
            axes = "(B, T, V)" if self.batch_first else "(T, B, V)"
            raise ValueError(
                f"inputs has shape {tuple(inputs.shape)}; it is {axes} with V = {self.inputs}, and neither T nor B is 0"
            )
        mixed = inputs.is_floating_point() and torch.is_autocast_enabled(inputs.device.type)
        if inputs.dtype != self.h_init.dtype and not mixed:
            raise TypeError(
                f"inputs has dtype {inputs.dtype}, the parameters {self.h_init.dtype}; "
                "turn one into the other with .to()"
            )
        return inputs.transpose(0, 1) if self.batch_first else inputs

    def _ends(self, inputs: Tensor, lengths: Tensor | None) -> Ends | None:
        """Where the sequences of inputs (T, B, V) end, if there are lengths."""
        return None if lengths is None else ends(lengths, inputs.shape[0], inputs.shape[1], inputs.device)

    def _take_readout(self, readout: nn.Linear | None) -> None:
        """Copy a readout's weights, or have none of its parts that it does not have."""
        if self.W_ho is not None and readout is not None:
            self.W_ho.copy_(readout.weight.t())
            if self.b_o is not None and readout.bias is not None:
                self.b_o.copy_(readout.bias)
            else:
                self.b_o = None

    def _give_readout(self) -> nn.Linear | None:
        """A copy of the readout as torch's module."""
        if self.W_ho is None:
            return None
        options = {"device": self.W_ho.device, "dtype": self.W_ho.dtype}
        readout = nn.Linear(self.hidden, self.W_ho.shape[1], bias=self.b_o is not None, **options)
        readout.weight.copy_(self.W_ho.t())
        if self.b_o is not None:
            readout.bias.copy_(self.b_o)
        return readout

    def extra_repr(self) -> str:
        """The sizes and options, for `print`."""
        sizes = ", ".join(
            str(getattr(self, name)) for name in ("inputs", "hidden", "factors", "outputs") if hasattr(self, name)
        )
        options = {name: getattr(self, name) for name in ("nonlinearity",) if hasattr(self, name)}
        options |= {"biases": getattr(self, "b_h", None) is not None, "output": self.output}
        options |= {"batch_first": self.batch_first}
        return ", ".join([sizes, *(f"{name}={value!r}" for name, value in options.items())])


def maker(device: torch.device | str | None, dtype: torch.dtype | None) -> Callable[..., nn.Parameter]:
    """What makes parameters of given sizes, not filled yet."""
    return lambda *shape: nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))


def weight_of(module: nn.Module, name: str) -> Tensor:
    """A weight of torch's recurrent layers, whose attributes have no type."""
    return cast(Tensor, getattr(module, name))


def check_conversion(recurrent: nn.Module, kind: type[nn.RNNBase], readout: nn.Linear | None) -> None:
    """Refuse what `from_torch` cannot take over.

    Raises:
        TypeError: `recurrent` is no `kind`, or `readout` no `torch.nn.Linear`.
        ValueError: several layers, two directions, a projection, or a readout that does not fit.
    """
    if not isinstance(recurrent, kind):
        raise TypeError(f"recurrent is a {type(recurrent).__name__}; only torch.nn.{kind.__name__} can be taken over")
    if recurrent.num_layers != 1 or recurrent.bidirectional:
        raise ValueError(
            f"recurrent has {recurrent.num_layers} layer(s), bidirectional={recurrent.bidirectional}; "
            "one layer in one direction can be taken over"
        )
    if recurrent.proj_size:
        raise ValueError(f"recurrent has proj_size {recurrent.proj_size}; one without projection can be taken over")
    if readout is not None and not isinstance(readout, nn.Linear):
        raise TypeError(f"readout is a {type(readout).__name__}; it is a torch.nn.Linear or None")
    if readout is not None and readout.in_features != recurrent.hidden_size:
        raise ValueError(
            f"readout takes {readout.in_features} features, but recurrent has {recurrent.hidden_size} hidden units"
        )
