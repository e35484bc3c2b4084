"""Layers of any recurrent cell on top of each other, with starts that are learned or zero and a linear readout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hfopt.recurrences import Definition, cell_layer
from models.recurrent import Recurrent, maker


class Stack(Recurrent):
    """Layers of one recurrent cell: each takes the outputs of the one below, the last one is read out.

    What a layer hands on is its cell's output: the hidden states h_t, or y_t of a cell that has an output of its own.
    Every layer's parameters follow from the cell's definition. The whole sequence is one operator for each layer
    (`hfopt.recurrences.cell_layer`); an optimizer with structural damping finds the hidden states by itself.

    Args:
        cell: its definition, one of `hfopt.recurrences.cells` or one's own.
        depth: number of layers.
        inputs: V, number of inputs.
        hidden: h, number of hidden units of every layer.
        outputs: O, number of outputs; None for no readout (the outputs are the last layer's then, O = h).
        biases: whether there are biases b_h of the inputs' projections, and b_o.
        embedding: E, if the inputs are indices (T, B) from 0 to V - 1, each of which stands for a row of W_in (V, E);
            None for inputs that are numbers.
        learned_start: whether the states before the first step are learned, or zero.
        dropout: share of the outputs that each layer but the last hands on as zero in training, the rest scaled up.
        hidden_dropout: share of the units whose recurrent products see zero in training, the same at all steps of a
            sequence (variational dropout); for cells with masks.
        gate_bias: number that the bias of a gate starts from, by its name, in place of 0, on top of the random start.
        factors: of cells that have a second size by this name, F; None for h.
        output: "all" for the outputs of all steps, "last" for those of each sequence's last step.
        batch_first: whether inputs and outputs are (B, T, .) instead of (T, B, .).
        device, dtype: of the parameters.

    Weights of layer k, with "_lk" behind the names from the second layer on: W_vh (V or h, .) with the cell's columns
    of the inputs; W_hh (h, .), or W_hh_1, W_hh_2 and so on for a cell with several products in a step; b_h (.,);
    parameters of the cell by their names; a start for each state, as h_init (h,). A cell that adds its inputs to its
    units has W_in (V, h) and b_in (h,) before the first layer unless V = h. The readout is W_ho (h, O), b_o (O,). They
    start uniform within +-1/sqrt(h), the starts at zero; see `sparse_init`.

    Raises:
        ValueError: a size or a depth below 1, a share that is not from 0 to 1, an unknown gate or `output`, or
            `hidden_dropout` for a cell without masks.

    Source: Collins, Sohl-Dickstein & Sussillo, "Capacity and trainability in recurrent neural networks", ICLR 2017.
    """

    def __init__(
        self,
        cell: Definition,
        depth: int,
        inputs: int,
        hidden: int,
        outputs: int | None,
        *,
        biases: bool = True,
        embedding: int | None = None,
        learned_start: bool = True,
        dropout: float = 0.0,
        hidden_dropout: float = 0.0,
        gate_bias: Mapping[str, float] | None = None,
        factors: int | None = None,
        output: str = "all",
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes_given = {"depth": depth} if embedding is None else {"depth": depth, "embedding": embedding}
        super().__init__(inputs, hidden, outputs, output, batch_first, **sizes_given)
        if cell.raw is not None and embedding not in (None, hidden):
            raise ValueError(f"embedding is {embedding}; the cell {cell.name} adds its inputs to its {hidden} units")
        for name, share in {"dropout": dropout, "hidden_dropout": hidden_dropout}.items():
            if not 0 <= share < 1:
                raise ValueError(f"{name} is {share}; it is a share, at least 0 and less than 1")
        if hidden_dropout and not cell.masks:
            raise ValueError(f"hidden_dropout is {hidden_dropout}, but the cell {cell.name} has no masks")
        columns = {c.name for c in cell.input_columns} | {n.removeprefix("b_") for n in cell.parameters}
        unknown = set(gate_bias or {}) - columns
        if unknown:
            raise ValueError(f"gate_bias names {', '.join(sorted(unknown))}; gates are {', '.join(sorted(columns))}")
        self.cell, self.depth, self.dropout, self.hidden_dropout = cell, depth, dropout, hidden_dropout
        self.gate_bias = dict(gate_bias or {})
        self.learned_start = learned_start
        self.masks: list[list[Tensor]] | None = None
        sizes = cell_sizes(cell, hidden, factors)
        self._widths = [sizes[c.size] for c in cell.input_columns]
        parameter = maker(device, dtype)
        width = sum(self._widths)
        self._starting: list[str] = []
        for k in range(depth):
            for s, size in cell.states.items():
                name = self._named("h_init" if s == next(iter(cell.states)) else f"{s}_init", k)
                start = parameter(sizes[size])
                if learned_start:
                    self.register_parameter(name, start)
                else:
                    self.register_buffer(name, torch.zeros_like(start.detach()), persistent=False)
                self._starting.append(name)
        self.embedding = embedding
        self.projects = embedding is None and cell.raw is not None and inputs != hidden
        if embedding is not None:
            self.W_in = parameter(inputs, embedding)
        elif self.projects:
            self.W_in = parameter(inputs, hidden)
            self.b_in = parameter(hidden) if biases else None
        for k in range(depth):
            below = hidden if k or self.projects else embedding or inputs
            self.register_parameter(self._named("W_vh", k), parameter(below, width))
            for j, product in enumerate(cell.products):
                columns_of = sum(sizes[c.size] for c in product.columns)
                self.register_parameter(self._recurrent(j, k), parameter(sizes[product.size], columns_of))
            self.register_parameter(self._named("b_h", k), parameter(width) if biases else None)
            for b, size in cell.parameters.items():
                self.register_parameter(self._named(b, k), parameter(sizes[size]))
        self.W_ho = None if outputs is None else parameter(hidden, outputs)
        self.b_o = parameter(outputs) if biases and outputs is not None else None
        self.reset_parameters()

    # -- names -----------------------------------------------------------------------------------------------------

    @staticmethod
    def _named(name: str, layer: int) -> str:
        return name if layer == 0 else f"{name}_l{layer}"

    def _recurrent(self, product: int, layer: int) -> str:
        return self._named("W_hh" if len(self.cell.products) == 1 else f"W_hh_{product + 1}", layer)

    def _starts(self) -> list[Tensor]:
        return [getattr(self, name) for name in self._starting]

    def _weights(self) -> list[tuple[Tensor, bool]]:
        found: list[tuple[Tensor, bool]] = [(self.W_in, True)] if hasattr(self, "W_in") else []
        for k in range(self.depth):
            found.append((getattr(self, self._named("W_vh", k)), k == 0))
            found += [(getattr(self, self._recurrent(j, k)), False) for j in range(len(self.cell.products))]
        return found

    def _biases(self) -> list[Tensor | None]:
        names = ["b_h", *self.cell.parameters]
        own = [getattr(self, self._named(n, k)) for k in range(self.depth) for n in names]
        return [*own, getattr(self, "b_in", None), self.b_o]

    # -- starts ----------------------------------------------------------------------------------------------------

    def reset_parameters(self) -> None:
        """Draw all weights and biases uniformly within +-1/sqrt(h), add `gate_bias`, and set the starts to 0."""
        super().reset_parameters()
        self._add_gate_bias()

    @torch.no_grad()
    def _add_gate_bias(self) -> None:
        for k in range(self.depth):
            b: Tensor | None = getattr(self, self._named("b_h", k))
            if b is not None:
                for c, part in zip(self.cell.input_columns, torch.split(b, self._widths), strict=True):
                    part += self.gate_bias.get(c.name, 0.0)
            for n in self.cell.parameters:
                own: Tensor = getattr(self, self._named(n, k))
                own += self.gate_bias.get(n.removeprefix("b_"), 0.0) if n.startswith("b_") else 0.0

    def sparse_init(
        self, seed: int | torch.Generator, connections: int = 15, scale: float = 1.0, input_scale: float = 1.0
    ) -> Stack:
        """Sparse random weights: every gate of every unit has `connections` random incoming weights of each kind.

        Recurrent and output weights, and those between layers: N(0, scale^2 / connections). Weights from the inputs:
        N(0, input_scale^2). Starts: N(0, 1) where they are learned. The other weights: 0; biases: 0 and `gate_bias`.

        Returns:
            The network itself.

        Raises:
            ValueError: `connections` below 1, a negative or infinite scale, or a generator that is not on the CPU.

        Source: Martens & Sutskever, ICML 2011, section 4, for simple networks.
        """
        self._start_sparse(seed, connections, scale, input_scale)
        self._add_gate_bias()
        if not self.learned_start:
            for start in self._starts():
                start.zero_()
        return self

    # -- passes ----------------------------------------------------------------------------------------------------

    def forward(
        self, inputs: Tensor, states: Sequence[Tensor | None] | Tensor | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        """Outputs (T, B, O), or (B, O) of the last steps if `output` is "last".

        Args:
            inputs: v (T, B, V), or (B, T, V) if `batch_first`.
            states: (B, h) or (h,) each, to start from instead of the learned ones: those of the first layer, then the
                second's; a None, or what is left out, stays the learned one. A tensor is the first state.
            lengths: (B,) integers from 1 to T: how many steps of each sequence count. Outputs of later steps are
                there but mean nothing, and those steps take no part in structural damping.

        Raises:
            ValueError: a wrong shape or length; the message names the argument.
            TypeError: a wrong dtype.
        """
        return self._bound(inputs)._outputs(inputs, self._given(states), lengths)

    def with_states(
        self, inputs: Tensor, states: Sequence[Tensor | None] | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The outputs as of `forward`, and all layers' states (B, h) after the last step, to go on from."""
        bound = self._bound(inputs)
        hidden, final = bound._layer(bound._checked(inputs), self._given(states), lengths)
        top = final[(self.depth - 1) * len(self.cell.states)] if not self.cell.extra else hidden[-1]
        return bound._readout(top if self.output == "last" else hidden), final

    def unrolled(self, inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Outputs as of `forward`, one step after the other, and all layers' states (B, n) after each step.

        Raises:
            NotImplementedError: a cell whose output is none of its states.
        """
        if self.cell.extra:
            raise NotImplementedError(f"the output of the cell {self.cell.name} is none of its states")
        return super(Stack, self._bound(inputs)).unrolled(inputs)

    def _top(self, states: Sequence[Tensor]) -> Tensor:
        return states[(self.depth - 1) * len(self.cell.states)]

    def _given(self, states: Sequence[Tensor | None] | Tensor | None) -> list[Tensor | None]:
        given: list[Tensor | None] = [states] if isinstance(states, Tensor) else list(states or ())
        if len(given) > len(self._starting):
            raise ValueError(f"states has {len(given)} tensors; there are {len(self._starting)} states")
        return given + [None] * (len(self._starting) - len(given))

    def draw_masks(self, batch: int) -> list[list[Tensor]]:
        """Masks (batch, h) of every layer, drawn from torch's global generator: 0 or 1 / (1 - hidden_dropout)."""
        sizes = cell_sizes(self.cell, self.hidden, None)
        ones = [[self.h_init.detach().new_ones(batch, sizes[s]) for s in self.cell.masks.values()]] * self.depth
        return [[F.dropout(m, self.hidden_dropout) for m in masks] for masks in ones]

    def _bound(self, inputs: Tensor) -> Stack:
        """This network with the masks of this call: those set in `masks`, drawn ones in training, none otherwise."""
        if not self.cell.masks:
            return self
        bound = self._around(self._formed())
        batch = inputs.shape[0 if self.batch_first else 1]
        if self.masks is None:
            drawn = self.draw_masks(batch)
            bound.masks = drawn if self.training else [[torch.ones_like(m) for m in masks] for masks in drawn]
        return bound

    def _checked(self, inputs: Tensor) -> Tensor:
        """Inputs (T, B, V), or indices (T, B)."""
        return super()._checked(inputs) if self.embedding is None else self._indices(inputs)

    def _indices(self, inputs: Tensor) -> Tensor:
        """Indices (T, B)."""
        if inputs.is_floating_point() or inputs.is_complex() or inputs.dtype == torch.bool:
            raise TypeError(f"inputs has dtype {inputs.dtype}; with an embedding they are indices, integers")
        if inputs.dim() != 2 or inputs.numel() == 0:
            axes = "(B, T)" if self.batch_first else "(T, B)"
            raise ValueError(
                f"inputs has shape {tuple(inputs.shape)}; with an embedding it is {axes}, neither of them 0"
            )
        return inputs.transpose(0, 1) if self.batch_first else inputs

    def _input(self, inputs: Tensor) -> Tensor:
        """What the first layer takes (T, B, .)."""
        if self.embedding is not None:
            return F.embedding(inputs, self.W_in)
        return F.linear(inputs, self.W_in.t(), self.b_in) if self.projects else inputs

    def _layer(
        self, inputs: Tensor, starts: Sequence[Tensor | None], lengths: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        own = self._starts()
        given = [start if start is not None else first for start, first in zip(self._given(starts), own, strict=True)]
        x, count = self._input(inputs), len(self.cell.states)
        final: list[Tensor] = []
        for k in range(self.depth):
            found = cell_layer(
                self.cell,
                x,
                getattr(self, self._named("W_vh", k)),
                [getattr(self, self._recurrent(j, k)) for j in range(len(self.cell.products))],
                getattr(self, self._named("b_h", k)),
                parameters=[getattr(self, self._named(b, k)) for b in self.cell.parameters],
                masks=[] if self.masks is None else self.masks[k],
                states=given[k * count : (k + 1) * count],
                lengths=lengths,
            )
            final.extend(found.final)
            x = found.output
            if k < self.depth - 1 and self.dropout:
                x = F.dropout(x, self.dropout, self.training)
        return x, tuple(final)

    def _outputs(self, inputs: Tensor, starts: Sequence[Tensor | None], lengths: Tensor | None) -> Tensor:
        if self.output == "last":
            inputs = self._checked(inputs)
            hidden, _ = self._layer(inputs, starts, lengths)
            reached = self._ends(inputs, lengths)
            return self._read_out(hidden[-1] if reached is None else reached.final(hidden))
        return super()._outputs(inputs, starts, lengths)

    def extra_repr(self) -> str:
        """The cell, sizes and options, for `print`."""
        return f"{self.cell.name}, depth={self.depth}, {super().extra_repr()}"


def cell_sizes(cell: Definition, hidden: int, factors: int | None) -> dict[str, int]:
    """Numbers of units by the names of a cell's sizes: `factors`, if that is one, and h for all others."""
    names = {*cell.states.values(), *cell.gates.values(), *cell.parameters.values(), *cell.masks.values()}
    names |= {p.size for p in cell.products}
    return {name: (factors or hidden) if name == "factors" else hidden for name in names}
