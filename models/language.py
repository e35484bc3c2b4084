"""Language models: a stack of recurrent layers over numbers of symbols, with samples and completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hfopt.recurrences import Definition, cells
from models.sizes import units_for
from models.stacked import Stack

KINDS: dict[str, tuple[Definition, dict[str, float]]] = {
    "rnn": (cells.tanh_rnn, {}),
    "mrnn": (cells.mrnn(), {}),
    "lstm": (cells.lstm, {"f": 1.0}),
    "gru": (cells.gru, {}),
    "ugrnn": (cells.ugrnn, {"g": 1.0}),
}
"""Cells by name, with what the biases of their gates start from: gates that keep the state are open at first."""


class LanguageModel(Stack):
    """Recurrent layers that predict the next symbol: logits (T, B, V) of numbers of symbols (T, B).

    A symbol is a row of the first layer's weights (which is what a one-hot vector would take from them), or with
    `embedding` a row of W_in (V, E).

    Args:
        cell: the name of a cell, one of `models.language.KINDS`, or a cell's definition.
        symbols: V, how many there are.
        hidden: h, number of hidden units of every layer.
        depth: number of layers.
        embedding: E, columns of an embedding; None for none.
        tied: whether the readout's matrix is the embedding's, W_ho = W_in'; then E = h.
        dropout: share of the inputs of every layer and of the readout that is zero in training, the rest scaled up; the
            recurrent connections are left alone. Without an embedding the first layer's inputs are left alone, too.
        options: others of `models.Stack`: factors, learned_start, gate_bias, device, dtype, ...

    Raises:
        ValueError: a cell that is not known, `tied` without an embedding of h columns, or as of `models.Stack`.

    Source: Sutskever, Martens & Hinton, ICML 2011 ("mrnn"); Zaremba, Sutskever & Vinyals, arXiv:1409.2329 (dropout);
    Press & Wolf, arXiv:1608.05859 (tied).
    """

    def __init__(
        self,
        cell: str | Definition,
        symbols: int,
        hidden: int,
        *,
        depth: int = 1,
        embedding: int | None = None,
        tied: bool = False,
        dropout: float = 0.0,
        **options: Any,
    ) -> None:
        bias: dict[str, float] = {}
        if isinstance(cell, str):
            if cell not in KINDS:
                raise ValueError(f"cell is {cell!r}; choose {', '.join(map(repr, KINDS))}, or give a definition")
            cell, bias = KINDS[cell]
        if tied and embedding != hidden:
            raise ValueError(
                f"tied needs an embedding of as many columns as hidden units, {hidden}; it has {embedding}"
            )
        self.tied = tied
        given = {"gate_bias": bias, **options}
        super().__init__(cell, depth, symbols, hidden, symbols, embedding=embedding, dropout=dropout, **given)
        if tied:
            self.W_ho = None

    # -- passes ----------------------------------------------------------------------------------------------------

    def _checked(self, inputs: Tensor) -> Tensor:
        """Numbers of symbols (T, B)."""
        return self._indices(inputs)

    def _input(self, inputs: Tensor) -> Tensor:
        if self.embedding is None:
            return inputs  # the layer takes rows of its weights
        return F.dropout(super()._input(inputs), self.dropout, self.training)

    def _read_out(self, hidden: Tensor) -> Tensor:
        hidden = F.dropout(hidden, self.dropout, self.training)
        return F.linear(hidden, self.W_in, self.b_o) if self.tied else super()._read_out(hidden)

    # -- samples ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        start: Tensor,
        steps: int,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        never: Sequence[int] = (),
    ) -> Tensor:
        """Go on from given symbols, one drawn symbol at a time.

        Args:
            start: numbers of symbols (P, B), at least one of each sequence.
            steps: how many to draw.
            temperature: logits are divided by it; 0 for the most probable symbol at each step (a completion).
            generator: to draw from, on the CPU; by default torch's.
            never: symbols that are not drawn, such as that of all unknown ones.

        Returns:
            The drawn symbols (steps, B).

        Raises:
            ValueError: no symbol to start from, a negative number of steps, or a negative or infinite temperature.
        """
        if start.dim() != 2 or not start.numel():
            raise ValueError(f"start has shape {tuple(start.shape)}; it is (P, B), with at least one symbol each")
        if steps < 0 or not 0 <= temperature < float("inf"):
            raise ValueError(f"steps is {steps} and temperature {temperature}; neither is negative or infinite")
        training = self.training
        self.eval()
        try:
            drawn: list[Tensor] = []
            now, states = start.to(self.h_init.device), None
            for _ in range(steps):
                outputs, states = self.with_states(now, states)
                logits = outputs[-1].double().cpu()
                logits[:, list(never)] = -torch.inf
                if temperature == 0:
                    chosen = logits.argmax(-1)
                else:
                    p = torch.softmax(logits / temperature, -1)
                    chosen = torch.multinomial(p, 1, generator=generator).squeeze(1)
                drawn.append(chosen)
                now = chosen.unsqueeze(0).to(now.device)
        finally:
            self.train(training)
        return torch.stack(drawn) if drawn else start.new_empty(0, start.shape[1]).cpu()


def units_within(budget: int, cell: str, symbols: int, *, depth: int = 1, embedding: int | None = None) -> int:
    """Find the largest number of hidden units for which a language model stays within a budget of parameters.

    Raises:
        ValueError: one unit is too many already.
    """
    return units_for(budget, KINDS[cell][0], depth, symbols, symbols, embedding=embedding)


def beside_symbols(model: nn.Module) -> set[int]:
    """The identities of the parameters next to the symbols: rows of inputs, and the readout's matrix."""
    names = ("W_in", "W_ho") if getattr(model, "embedding", None) is not None else ("W_vh", "W_ho")
    return {id(p) for name, p in model.named_parameters() if name in names}
