"""The default preconditioner: K-FAC where it pays off, otherwise none."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from hfopt.curvature.gauss_newton import GaussNewton
from hfopt.errors import logger, warn
from hfopt.linalg.operators import Operator
from hfopt.preconditioners.base import Preconditioner
from hfopt.preconditioners.kfac import INSIDE, KFAC, distributions, enough
from hfopt.preconditioners.layers import Layer, visit

# Inverting the factors may take as much work as so many passes through the layers, or so many multiplications: a step
# takes longer than these besides its arithmetic.
_PASSES = 10
_LITTLE = 1 << 25

EITHER = "preconditioner=None, or another one by name, says that this is as it should be"
UNDRAWN = (
    "no targets can be drawn from the loss, whose curvature in the outputs is neither that of a criterion of "
    "torch.nn.functional with a distribution nor diagonal. Use such a criterion, or preconditioner='kfac', which takes "
    "the data's own targets"
)


class Automatic(Preconditioner):
    """:class:`KFAC` for networks of linear and convolution layers, otherwise none.

    K-FAC is taken where targets can be drawn from every criterion, or its curvature is diagonal; where more than half
    of the parameters are weights and biases of such layers; and where the factors' inverses, about ``sum k^3 + o^3``
    for weights (o, k), are less work than ten passes through the layers, ``10 sum N T k o`` for N cases of T positions,
    or too little to matter. The first step decides, and the state keeps it.

    Draws are the same in every step, and belong to a case by its place: one batch, several, and as many processes with
    equal shares of the cases take the same steps. So do a penalty in the closure and ``weight_decay``, as the factors
    are damped by lambda alone.

    Args:
        batch_dim: the outputs' dimension along which cases stand.

    Attributes:
        chosen: whether K-FAC was chosen; None before the first step.
    """

    def __init__(self, batch_dim: int = 0) -> None:
        self.kfac, self.batch_dim = KFAC(batch_dim=batch_dim), batch_dim
        self.chosen: bool | None = None
        self._taken = False

    @property
    def active(self) -> bool:
        """Whether K-FAC is there for this step."""
        return self._taken

    def refresh(self, op: Operator, step: int) -> None:
        """Choose, on the first step; then compute K-FAC's factors, if chosen."""
        self._taken, self.runs = False, 0
        if not isinstance(op, GaussNewton):
            return
        try:
            self._take(op)
        except RuntimeError as error:  # a closure that cannot be run again, or memory: nothing to fail for
            if op.processes is not None:  # the others would wait
                raise
            logger.warning("K-FAC could not be built, and this step takes no preconditioner: %s", error)

    def _take(self, op: GaussNewton) -> None:
        # K-FAC asks for cases only where it cannot draw: a dimension that an output lacks is of no matter.
        fits = all(-t.dim() <= self.batch_dim < t.dim() for t in op.cotangents if t.dim())
        self.kfac.batch_dim = self.batch_dim if fits else 0
        if self.chosen is None:
            self.runs = 1
            chosen, why = pays(op, self.kfac.batch_dim)
            self.chosen = chosen if op.processes is None else op.processes.mean(float(chosen)) == 1.0
            if self.chosen:
                logger.debug("conjugate gradients are preconditioned by K-FAC (preconditioner=None takes none)")
            elif why:
                warn(f"K-FAC, which often helps such networks a lot, is left out: {why}. {EITHER}")
        if self.chosen:
            # The same draws in every step: how many steps were made before makes no difference.
            try:
                self.kfac.refresh(op, 0)
            finally:
                self.runs += self.kfac.runs
            self._taken = True

    def damp(self, damping: float, decay: float | Tensor) -> None:
        """Damp as K-FAC does for lambda alone."""
        self.kfac.damp(damping, 0.0)

    def apply(self, r: Tensor) -> Tensor:
        """Apply K-FAC."""
        return self.kfac.apply(r)

    def apply_into(self, r: Tensor, out: Tensor) -> Tensor:
        """Apply K-FAC, in ``out``."""
        return self.kfac.apply_into(r, out)

    def state_dict(self) -> dict[str, Any]:
        """Return the choice."""
        return {} if self.chosen is None else {"chosen": self.chosen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; after that of another preconditioner, the next step chooses."""
        chosen = state.get("chosen")
        self.chosen = None if chosen is None else bool(chosen)


def pays(op: GaussNewton, batch_dim: int) -> tuple[bool, str]:
    """Whether K-FAC would be taken for this operator (see :class:`Automatic`), and what keeps it from a network that it
    is meant for.
    """
    seen: dict[tuple[int, int | None], int] = {}
    inverses: dict[int, int] = {}
    passes = [0]

    def use(_: Sequence[int], heads: list[Tensor], layers: list[Layer]) -> None:
        for layer in layers:
            if layer.weight is not None and layer.rows_in_all:
                pair = layer.weight, layer.bias
                seen[pair] = seen.get(pair, 0) + layer.rows_in_all
                inverses[layer.weight], work = _work(layer)
                passes[0] += work

    inside = visit(op, batch_dim, use)
    if all(t.dim() == 0 for t in op.cotangents):  # curvature of rank one, which takes no preconditioner
        return False, ""

    def most(pairs: Iterable[tuple[int, int | None]]) -> bool:
        covered = {i for pair in pairs for i in pair if i is not None}
        return 2 * sum(op.params[i].numel() for i in covered) > op.vector.size

    if not most(seen):
        return False, INSIDE if inside else ""
    if not most(pair for pair, rows in seen.items() if enough(rows, op, batch_dim)):
        return False, "most layers have a single row of inputs, which does not tell the covariance of their gradients"
    if sum(inverses.values()) > max(_PASSES * passes[0], _LITTLE):
        return False, ""
    if any(distributions(part.space) is None for part in op.parts):
        return False, UNDRAWN
    return True, ""


def _work(layer: Layer) -> tuple[int, int]:
    """Multiplications of the two inverses, and of a pass through the layer."""
    k = layer.x.shape[-1] if layer.patches is None else layer.patches(layer.x[:1].detach()).shape[1]
    o = layer.y.shape[-1] if layer.patches is None else layer.y.shape[1]
    return k**3 + o**3, layer.cases * layer.positions * k * o
