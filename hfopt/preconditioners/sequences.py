"""Recurrences as they are used in a closure: the gradients of single cases, from one adjoint pass over all of them.

A weight K of a cell multiplies rows z_t at every step, so that with the gradients delta_t of the products

    dL_b/dK = sum_t z_tb' delta_tb        for case b.

The deltas come out of the cell's own adjoint pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hfopt.recurrences.generated import Generated
from hfopt.recurrences.readout import Read
from hfopt.recurrences.recorded import Recorded
from hfopt.recurrences.registry import CELLS

Maybe = Tensor | None
Maybes = Sequence[Maybe]


def outer(rows: Tensor, deltas: Tensor) -> Tensor:
    """Return ``sum_t z_tb' delta_tb`` for every case b, (n, k, m), of rows (T, n, k) and deltas (T, n, m)."""
    return torch.bmm(rows.permute(1, 2, 0), deltas.transpose(0, 1))


def _gradients(name: str, U: Maybes, arguments: Sequence[Tensor], results: Sequence[Tensor]) -> list[Maybe]:
    """For every argument the gradients of single cases; None for inputs and masks."""
    cell = _cell(name)
    assert cell is not None
    base = cell.base if isinstance(cell, Read) else cell
    weights, parameters, starts = cell.rows_and_deltas(U, arguments, results)
    found = [outer(rows, deltas) for rows, deltas in weights]
    read, found = found[base.weights :], found[: base.weights]
    return [None, *found, *parameters, *(None for _ in base.definition.masks), *starts, *read]


def _cell(name: str) -> Generated | Read | None:
    """The cell of this name, if it is one whose rows and deltas are known."""
    found = CELLS.get(name)
    return found if isinstance(found, (Generated, Read)) else None


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
    def _states(self) -> range:
        """The arguments that have a row for each sequence, (B, .): masks and starts."""
        cell = _cell(self.recorded.cell)
        assert cell is not None
        base = cell.base if isinstance(cell, Read) else cell
        return range(min(base.places) - len(base.definition.masks), base.arguments)

    @property
    def roots(self) -> list[Maybe]:
        """For every argument: itself, where it is a weight or a start that all cases share; None otherwise."""
        found: list[Maybe] = []
        for i, t in enumerate(self.recorded.arguments):
            shared = t is not None and t.dim() < 3 and (i not in self._states or t.stride(0) == 0)
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
        states = self._states

        def part(t: Maybe, state: bool = False) -> Maybe:
            if t is None or (t.dim() < 3 and not state):
                return None if t is None else t.detach()
            return t.detach()[block].contiguous() if state else t.detach()[:, block].contiguous()

        arguments = [a for i, t in enumerate(self.recorded.arguments) if (a := part(t, i in states)) is not None]
        results = [r for r in map(part, self.recorded.results) if r is not None]
        grads = _gradients(self.recorded.cell, [part(g) for g in self.g], arguments, results)
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
    return _cell(recorded.cell) is not None and recorded.outputs[0].shape[1] == cases
