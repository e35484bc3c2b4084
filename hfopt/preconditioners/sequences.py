"""Recurrences as they are used in a closure: the gradients of single cases, from one adjoint pass over all of them.

A weight K of a cell multiplies rows z_t at every step, so that with the gradients delta_t of the products

    dL_b/dK = sum_t z_tb' delta_tb        for case b.

The deltas come out of the cell's own adjoint pass: they are the gradients of inputs that the cell would add to its
products, which is what it takes for the inputs of a weight matrix that is the identity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hfopt.recurrences.generated import Generated
from hfopt.recurrences.linear import lag, step_inputs
from hfopt.recurrences.linearised import rows_and_deltas
from hfopt.recurrences.operators import rnn_adjoint
from hfopt.recurrences.recorded import Recorded
from hfopt.recurrences.registry import CELLS
from hfopt.recurrences.sequence import sequence_adjoint

Maybe = Tensor | None
Maybes = Sequence[Maybe]


def outer(rows: Tensor, deltas: Tensor) -> Tensor:
    """Return ``sum_t z_tb' delta_tb`` for every case b, (n, k, m), of rows (T, n, k) and deltas (T, n, m)."""
    return torch.bmm(rows.permute(1, 2, 0), deltas.transpose(0, 1))


def _inputs(like: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Inputs (T, n, width), all zero, and the identity as their weights."""
    return like.new_zeros(*like.shape[:2], width), torch.eye(width, dtype=like.dtype, device=like.device)


def _simple(name: str, U: Maybes, arguments: Maybes, results: Sequence[Tensor]) -> list[Maybe]:
    _, X, K, h0 = arguments
    assert X is not None
    assert K is not None
    assert h0 is not None
    H = results[0]
    dP, _, dh0 = rnn_adjoint(U[0], U[1] if len(U) > 1 else None, X, H, h0, K, _nonlinearity(name), True)
    return [None, None, outer(step_inputs(X, H, h0), dP), dh0]


def _readout(name: str, U: Maybes, arguments: Maybes, results: Sequence[Tensor]) -> list[Maybe]:
    X, K, h0, Ko = (t for t in arguments if t is not None)
    H, Uo = results[-1], U[0]
    onward = None if Uo is None else Uo @ Ko[:-1].t()
    dA, _, dh0 = rnn_adjoint(onward, U[1] if len(U) > 1 else None, X, H, h0, K, _nonlinearity(name), True)
    dKo = None if Uo is None else torch.cat([outer(H, Uo), Uo.sum(0).unsqueeze(1)], 1)
    return [None, outer(step_inputs(X, H, h0), dA), dh0, dKo]


def _nonlinearity(name: str) -> str:
    return name.partition("_")[2].partition("+")[0]


def _lstm(name: str, U: Maybes, arguments: Maybes, results: Sequence[Tensor]) -> list[Maybe]:
    X, K, h0, c0 = (t for t in arguments if t is not None)
    hidden = h0.shape[1]
    zeros, eye = _inputs(X, 4 * hidden)
    given = [zeros, torch.cat([K[:hidden], eye]), h0, c0]
    deltas, _, dh0, dc0 = sequence_adjoint(name, U, given, results, [True, False, True, True])
    return [None, outer(step_inputs(X, results[0], h0), deltas), dh0, dc0]


def _gru(name: str, U: Maybes, arguments: Maybes, results: Sequence[Tensor]) -> list[Maybe]:
    X, Kh, _, b, h0 = (t for t in arguments if t is not None)
    H, gates, _ = results
    hidden = h0.shape[1]
    zeros, eye = _inputs(X, 3 * hidden)
    on_x, *_, dh0 = sequence_adjoint(name, U, [zeros, Kh, eye, b, h0], results, [True, False, False, False, True])
    # The candidate's recurrent part is behind the reset gate r.
    on_m = on_x[..., 2 * hidden :] * gates[..., :hidden]
    on_h = torch.cat([on_x[..., : 2 * hidden], on_m], -1)
    return [None, outer(lag(H, h0), on_h), outer(X, on_x), on_m.sum(0), dh0]


def _mrnn(name: str, U: Maybes, arguments: Maybes, results: Sequence[Tensor]) -> list[Maybe]:
    X, Wxf, Whf, K, h0 = (t for t in arguments if t is not None)
    H, E, G = results[0], *results[-2:]
    factors, hidden = Wxf.shape[1], h0.shape[1]
    zeros, eye = _inputs(X, hidden)
    given = [zeros, Wxf.new_zeros(hidden, factors), Whf, torch.cat([K[:factors], eye]), h0]
    on_a, *_, dh0 = sequence_adjoint(name, U, given, results, [True, False, False, False, True])
    on_p = on_a @ K[:factors].t()
    on_K = outer(torch.cat([E * G, X], -1), on_a)
    return [None, outer(X, G * on_p), outer(lag(H, h0), E * on_p), on_K, dh0]


def _defined(name: str, U: Maybes, arguments: Maybes, results: Sequence[Tensor]) -> list[Maybe]:
    cell = CELLS[name]
    assert isinstance(cell, Generated)
    given = [t for t in arguments if t is not None]
    weights, parameters, starts = rows_and_deltas(cell, U, given, results)
    masks = [None] * len(cell.definition.masks)
    return [None, *(outer(rows, deltas) for rows, deltas in weights), *parameters, *masks, *starts]


Rule = Callable[[str, Maybes, Maybes, Sequence[Tensor]], list[Maybe]]
# By the first part of a cell's name: its rule, and which of its arguments are states before the first step, (B, h).
_RULES: dict[str, tuple[Rule, tuple[int, ...]]] = {
    "simple": (_simple, (3,)),
    "readout": (_readout, (2,)),
    "lstm": (_lstm, (2, 3)),
    "gru": (_gru, (4,)),
    "mrnn": (_mrnn, (4,)),
}


def _rule_of(name: str) -> tuple[Rule, tuple[int, ...]] | None:
    """The rule of a cell, and its arguments that have a row for each sequence, (B, .); None if there is none."""
    cell = CELLS.get(name)
    if isinstance(cell, Generated):
        first = min(cell.places)
        return _defined, tuple(range(first - len(cell.definition.masks), cell.arguments))
    return _RULES.get(name.partition("_")[0])


@dataclass
class Sequences:
    """One run of a recurrence over (T, B, .), and the gradients of its outputs.

    ``g``: one for each of its outputs, None for those that the network's outputs do not depend on.
    """

    recorded: Recorded
    g: list[Maybe] = field(default_factory=list)

    @property
    def cases(self) -> int:
        """B."""
        return self.recorded.outputs[0].shape[1]

    @property
    def _rule(self) -> tuple[Rule, tuple[int, ...]]:
        found = _rule_of(self.recorded.cell)
        assert found is not None
        return found

    @property
    def roots(self) -> list[Maybe]:
        """For every argument: itself, where it is a weight or a start that all cases share; None otherwise."""
        found: list[Maybe] = []
        for i, t in enumerate(self.recorded.arguments):
            shared = t is not None and t.dim() < 3 and (i not in self._rule[1] or t.stride(0) == 0)
            found.append(t if shared and t is not None and t.requires_grad else None)
        return found

    def numbers(self) -> int:
        """Return the numbers that a case takes: sequences and their deltas, and the gradients of the roots."""
        sequences = [
            t for t in (*self.recorded.arguments, *self.recorded.results, *self.g) if t is not None and t.dim() == 3
        ]
        roots = sum(t.numel() for t in self.roots if t is not None)
        return 2 * (sum(t.numel() for t in sequences) // self.cases + roots)

    def gradients(self, block: slice, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """Return (root, gradients (n, *root's shape) of the block's n cases) for every root."""
        rule, states = self._rule

        def part(t: Maybe, state: bool = False) -> Maybe:
            if t is None or (t.dim() < 3 and not state):
                return None if t is None else t.detach()
            return t.detach()[block].contiguous() if state else t.detach()[:, block].contiguous()

        arguments = [part(t, i in states) for i, t in enumerate(self.recorded.arguments)]
        results = [r for r in map(part, self.recorded.results) if r is not None]
        grads = rule(self.recorded.cell, [part(g) for g in self.g], arguments, results)
        found = []
        for i, (root, g) in enumerate(zip(self.roots, grads, strict=True)):
            if root is None or g is None:
                continue
            if i in states:  # the rows of the root are one and the same
                g = (g / len(root)).unsqueeze(1).expand(len(g), *root.shape)
            found.append((root, g.to(dtype)))
        return found


def known(recorded: Recorded, cases: int) -> bool:
    """Whether there is a rule for the cell, and its sequences are the cases."""
    return _rule_of(recorded.cell) is not None and recorded.outputs[0].shape[1] == cases
