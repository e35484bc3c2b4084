"""The simple recurrent network, in one piece with a learned start and a linear readout."""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hfopt.recurrences import NONLINEARITIES, segments, simple_rnn_layer, simple_rnn_readout
from models.initialisation import generator_of, sparse_


class TorchParts(NamedTuple):
    """A network as torch's own modules: `readout(recurrent(inputs, initial.expand(1, B, h))[0])`."""

    recurrent: nn.RNN
    readout: nn.Linear | None
    initial: Tensor


class RNN(nn.Module):
    """Simple recurrent network: h_t = f(h_{t-1} W_hh + v_t W_vh + b_h), o_t = h_t W_ho + b_o, h_{-1} = h_init.

    The whole sequence is one operator (`hfopt.recurrences.simple_rnn_layer`); an optimizer with structural damping
    finds the hidden units by itself.

    Args:
        inputs: V, number of inputs.
        hidden: h, number of hidden units.
        outputs: O, number of outputs; None for no readout (the outputs are the hidden states then, O = h).
        nonlinearity: f, one of "tanh", "relu", "sigmoid", "identity".
        biases: whether there are b_h and b_o.
        output: "all" for the outputs of all steps, "last" for those of each sequence's last step.
        batch_first: whether inputs and outputs are (B, T, .) instead of (T, B, .).
        device, dtype: of the parameters.

    Parameters: h_init (h,), W_vh (V, h), W_hh (h, h), W_ho (h, O), b_h (h,), b_o (O,). They start as those of
    `torch.nn.RNN` and `torch.nn.Linear` do (uniform within +-1/sqrt(h)), h_init at zero; see `sparse_init`.

    Raises:
        ValueError: a size below 1, or an unknown `nonlinearity` or `output`.

    Source: Martens & Sutskever, "Learning recurrent neural networks with Hessian-free optimization", ICML 2011.
    """

    def __init__(
        self,
        inputs: int,
        hidden: int,
        outputs: int | None,
        *,
        nonlinearity: str = "tanh",
        biases: bool = True,
        output: str = "all",
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in {"inputs": inputs, "hidden": hidden, "outputs": outputs}.items():
            if size is not None and size < 1:
                raise ValueError(f"{name} is {size}; it is at least 1")
        if nonlinearity not in NONLINEARITIES:
            raise ValueError(f"nonlinearity is {nonlinearity!r}; it is one of {', '.join(map(repr, NONLINEARITIES))}")
        if output not in ("all", "last"):
            raise ValueError(f"output is {output!r}; it is 'all' or 'last'")
        self.inputs, self.hidden, self.outputs = inputs, hidden, outputs
        self.nonlinearity, self.output, self.batch_first = nonlinearity, output, batch_first

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self.h_init = parameter(hidden)
        self.W_vh = parameter(inputs, hidden)
        self.W_hh = parameter(hidden, hidden)
        self.W_ho = None if outputs is None else parameter(hidden, outputs)
        self.b_h = parameter(hidden) if biases else None
        self.b_o = parameter(outputs) if biases and outputs is not None else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights and biases uniformly within +-1/sqrt(h) from torch's global generator; h_init = 0."""
        bound = 1 / math.sqrt(self.hidden)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.uniform_(-bound, bound)
            self.h_init.zero_()

    def sparse_init(
        self,
        seed: int | torch.Generator,
        connections: int = 15,
        scale: float = 1.0,
        input_scale: float = 1.0,
    ) -> RNN:
        """Sparse random weights: every unit has `connections` random incoming weights of each kind, the others are 0.

        W_hh, W_ho: N(0, scale^2 / connections). W_vh: N(0, input_scale^2). h_init: N(0, 1), all of it. Biases: 0.
        A matrix with fewer rows than `connections` is full and counts its rows instead. With scale 1 the spectral
        radius of W_hh is about 1.06 at 100 units. This is the convention of the recurrent nets of 2011; the deep nets
        of 2010 have N(0, 1) throughout, which is scale = sqrt(connections).

        Args:
            seed: an int, or a CPU generator that the draws go on from.
            connections: incoming connections of each unit, of each kind.
            scale: of recurrent and output weights.
            input_scale: of input weights; problems with real-valued inputs want it small (0.25), but not too small.

        Returns:
            The network itself.

        Raises:
            ValueError: `connections` below 1, a negative or infinite scale, or a generator that is not on the CPU.

        Source: Martens & Sutskever, ICML 2011, section 4; Sutskever, PhD thesis 2013, chapter 4.
        """
        generator = generator_of(seed)
        recurrent = scale / math.sqrt(max(1, min(connections, self.hidden)))
        with torch.no_grad():
            draw = torch.randn(self.hidden, generator=generator, dtype=torch.float64)
            self.h_init.copy_(draw)
            sparse_(self.W_vh, connections, input_scale, generator)
            sparse_(self.W_hh, connections, recurrent, generator)
            if self.W_ho is not None:
                sparse_(self.W_ho, connections, recurrent, generator)
            for bias in (self.b_h, self.b_o):
                if bias is not None:
                    bias.zero_()
        return self

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
        inputs, start, mask, last = self._checked(inputs, h0, lengths)
        if segments.wanted():
            return self._checkpointed(inputs, start, mask, last)
        # A readout of all steps inside the recurrence costs less than taking its hidden states through memory.
        inside = self.W_ho is not None and (self.output == "all" or self.W_ho.shape[1] <= self.hidden // 2)
        found = self._outputs(inputs, start, mask) if inside else self._hidden(inputs, start, mask)
        if self.output == "last":
            found = found[-1] if last is None else found[last, torch.arange(found.shape[1], device=found.device)]
        if not inside:
            return self._readout(found)
        return found.transpose(0, 1) if self.batch_first and self.output == "all" else found

    def _checkpointed(self, inputs: Tensor, start: Tensor, mask: Tensor | None, last: Tensor | None) -> Tensor:
        """The same in segments, each with its part of the readout: the hidden states are never there all at once."""
        every, batch = self.output == "all", inputs.shape[1]
        final = None
        if last is not None and not every:
            final = torch.arange(len(inputs), device=inputs.device).unsqueeze(1) == last
        weights = (self.W_vh, self.W_hh, self.b_h, self.W_ho, self.b_o)

        def part(xs: segments.Given, states: segments.Given, Ws: segments.Given) -> segments.Found:
            x, valid, now = xs
            W_vh, W_hh, b_h, W_ho, b_o = Ws
            hidden = simple_rnn_layer(x, W_vh, W_hh, states[0], b_h, self.nonlinearity, valid)
            if every:
                return [hidden if W_ho is None else F.linear(hidden, W_ho.t(), b_o)], [hidden[-1]]
            if now is None:
                return [], [hidden[-1]]
            chosen = torch.where(now.unsqueeze(-1), hidden, torch.zeros_like(hidden)).sum(0)
            return [], [hidden[-1], states[1] + chosen]

        states = [start.expand(batch, -1)]
        if final is not None:
            states.append(torch.zeros_like(states[0]))
        outputs, after = segments.over_time(part, (inputs, mask, final), states, weights)
        if every:
            return outputs[0].transpose(0, 1) if self.batch_first else outputs[0]
        return self._readout(after[-1])

    def _readout(self, hidden: Tensor) -> Tensor:
        outputs = hidden if self.W_ho is None else F.linear(hidden, self.W_ho.t(), self.b_o)
        return outputs.transpose(0, 1) if self.batch_first and self.output == "all" else outputs

    @torch.no_grad()
    def hidden_states(self, inputs: Tensor, h0: Tensor | None = None) -> Tensor:
        """Hidden states (T, B, h), or (B, T, h) if `batch_first`, outside autograd, to look at."""
        inputs, start, _, _ = self._checked(inputs, h0, None)
        hidden = self._hidden(inputs, start, None)
        return hidden.transpose(0, 1) if self.batch_first else hidden

    def _hidden(self, inputs: Tensor, start: Tensor, mask: Tensor | None) -> Tensor:
        return simple_rnn_layer(inputs, self.W_vh, self.W_hh, start, self.b_h, self.nonlinearity, mask)

    def _outputs(self, inputs: Tensor, start: Tensor, mask: Tensor | None) -> Tensor:
        assert self.W_ho is not None
        weights = self.W_vh, self.W_hh, start, self.b_h, self.W_ho, self.b_o
        return simple_rnn_readout(inputs, *weights, self.nonlinearity, mask)

    def _checked(
        self, inputs: Tensor, h0: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Inputs (T, B, V), the start, and for given lengths the mask (T, B) and each sequence's last step (B,)."""
        if inputs.dim() != 3 or inputs.shape[2] != self.inputs or inputs.numel() == 0:
            axes = "(B, T, V)" if self.batch_first else "(T, B, V)"
            raise ValueError(
                f"inputs has shape {tuple(inputs.shape)}; it is {axes} with V = {self.inputs}, and neither T nor B is 0"
            )
        mixed = inputs.is_floating_point() and torch.is_autocast_enabled(inputs.device.type)
        if inputs.dtype != self.W_vh.dtype and not mixed:
            raise TypeError(
                f"inputs has dtype {inputs.dtype}, the parameters {self.W_vh.dtype}; turn one into the other with .to()"
            )
        if self.batch_first:
            inputs = inputs.transpose(0, 1)
        steps, batch, _ = inputs.shape
        mask = last = None
        if lengths is not None:
            last = _checked_lengths(lengths, steps, batch).to(inputs.device) - 1
            mask = torch.arange(steps, device=inputs.device).unsqueeze(1) <= last
        return inputs, self.h_init if h0 is None else h0, mask, last

    @classmethod
    def from_torch(cls, recurrent: nn.RNN, readout: nn.Linear | None = None, *, output: str = "all") -> RNN:
        """The network that computes what `readout(recurrent(inputs)[0])` does, with copies of their weights.

        The two biases of `torch.nn.RNN` become one, their sum. h_init starts at zero, as torch's state does.

        Args:
            recurrent: one layer, one direction, tanh or relu; `batch_first` is taken over.
            readout: linear layer from the hidden states; None for no readout.
            output: as in the constructor.

        Raises:
            TypeError: `recurrent` is no `torch.nn.RNN` or `readout` no `torch.nn.Linear`.
            ValueError: several layers, two directions, or a readout that does not fit.
        """
        if not isinstance(recurrent, nn.RNN):
            raise TypeError(f"recurrent is a {type(recurrent).__name__}; only torch.nn.RNN can be taken over")
        if recurrent.num_layers != 1 or recurrent.bidirectional:
            raise ValueError(
                f"recurrent has {recurrent.num_layers} layer(s), bidirectional={recurrent.bidirectional}; "
                "one layer in one direction can be taken over"
            )
        if readout is not None and not isinstance(readout, nn.Linear):
            raise TypeError(f"readout is a {type(readout).__name__}; it is a torch.nn.Linear or None")
        if readout is not None and readout.in_features != recurrent.hidden_size:
            raise ValueError(
                f"readout takes {readout.in_features} features, but recurrent has {recurrent.hidden_size} hidden units"
            )
        weight = _weight(recurrent, "weight_hh_l0")
        model = cls(
            recurrent.input_size,
            recurrent.hidden_size,
            None if readout is None else readout.out_features,
            nonlinearity=recurrent.nonlinearity,
            output=output,
            batch_first=recurrent.batch_first,
            device=weight.device,
            dtype=weight.dtype,
        )
        with torch.no_grad():
            model.W_hh.copy_(weight.t())
            model.W_vh.copy_(_weight(recurrent, "weight_ih_l0").t())
            if model.b_h is not None and recurrent.bias:
                model.b_h.copy_(_weight(recurrent, "bias_ih_l0") + _weight(recurrent, "bias_hh_l0"))
            else:
                model.b_h = None
            if model.W_ho is not None and readout is not None:
                model.W_ho.copy_(readout.weight.t())
                if model.b_o is not None and readout.bias is not None:
                    model.b_o.copy_(readout.bias)
                else:
                    model.b_o = None
        return model

    def to_torch(self) -> TorchParts:
        """This network as `torch.nn.RNN`, `torch.nn.Linear` (None without readout) and initial state (1, 1, h), copied.

        Raises:
            ValueError: `nonlinearity` is neither "tanh" nor "relu": `torch.nn.RNN` has no other.
        """
        if self.nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"nonlinearity is {self.nonlinearity!r}; torch.nn.RNN has 'tanh' and 'relu' alone")
        options = {"device": self.W_hh.device, "dtype": self.W_hh.dtype}
        recurrent = nn.RNN(
            self.inputs,
            self.hidden,
            nonlinearity=self.nonlinearity,
            bias=self.b_h is not None,
            batch_first=self.batch_first,
            **options,
        )
        readout = None
        with torch.no_grad():
            _weight(recurrent, "weight_hh_l0").copy_(self.W_hh.t())
            _weight(recurrent, "weight_ih_l0").copy_(self.W_vh.t())
            if self.b_h is not None:
                _weight(recurrent, "bias_ih_l0").copy_(self.b_h)
                _weight(recurrent, "bias_hh_l0").zero_()
            if self.W_ho is not None:
                readout = nn.Linear(self.hidden, self.W_ho.shape[1], bias=self.b_o is not None, **options)
                readout.weight.copy_(self.W_ho.t())
                if self.b_o is not None:
                    readout.bias.copy_(self.b_o)
        return TorchParts(recurrent, readout, self.h_init.detach().clone().view(1, 1, -1))

    def extra_repr(self) -> str:
        """The sizes and options, for `print`."""
        return (
            f"{self.inputs}, {self.hidden}, {self.outputs}, nonlinearity={self.nonlinearity!r}, "
            f"biases={self.b_h is not None}, output={self.output!r}, batch_first={self.batch_first}"
        )


def _weight(module: nn.Module, name: str) -> Tensor:
    """A weight of torch's recurrent layers, whose attributes have no type."""
    return cast(Tensor, getattr(module, name))


def _checked_lengths(lengths: Tensor, steps: int, batch: int) -> Tensor:
    if lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise TypeError("lengths is a tensor of integers, one per sequence")
    if lengths.shape != (batch,):
        raise ValueError(f"lengths has shape {tuple(lengths.shape)}; there are {batch} sequences")
    if int(lengths.min()) < 1 or int(lengths.max()) > steps:
        raise ValueError(
            f"lengths runs from {int(lengths.min())} to {int(lengths.max())}; inputs has {steps} steps, so 1 to {steps}"
        )
    return lengths
