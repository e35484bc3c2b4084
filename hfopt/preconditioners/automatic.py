"""The default preconditioner: K-FAC where it pays off, otherwise none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hfopt.curvature.fisher import check_cases
from hfopt.curvature.gauss_newton import GaussNewton
from hfopt.errors import logger
from hfopt.linalg.operators import Operator
from hfopt.preconditioners.base import Preconditioner
from hfopt.preconditioners.kfac import KFAC, distributions
from hfopt.preconditioners.layers import Layer, visit

# Inverting the factors may take as much work as so many passes through the layers, or so many multiplications: a step
# takes longer than these besides its arithmetic.
_PASSES = 10
_LITTLE = 1 << 25


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
        self.kfac = KFAC(batch_dim=batch_dim)
        self.chosen: bool | None = None
        self._taken = False

    @property
    def active(self) -> bool:
        """Whether K-FAC is there for this step."""
        return self._taken

    def refresh(self, op: Operator, step: int) -> None:
        """Choose, on the first step; then compute K-FAC's factors, if chosen."""
        self._taken, self.runs = False, 0
        if not isinstance(op, GaussNewton) or not self._has_cases(op):
            return
        try:
            self._take(op)
        except RuntimeError as error:  # a closure that cannot be run again, or memory: nothing to fail for
            if op.processes is not None:  # the others would wait
                raise
            logger.warning("K-FAC could not be built, and this step takes no preconditioner: %s", error)

    def _take(self, op: GaussNewton) -> None:
        if self.chosen is None:
            self.runs = 1
            chosen = pays(op, self.kfac.batch_dim)
            self.chosen = chosen if op.processes is None else op.processes.mean(float(chosen)) == 1.0
            if self.chosen:
                logger.debug("conjugate gradients are preconditioned by K-FAC (preconditioner=None takes none)")
        if self.chosen:
            # The same draws in every step: how many steps were made before makes no difference.
            try:
                self.kfac.refresh(op, 0)
            finally:
                self.runs += self.kfac.runs
            self._taken = True

    def _has_cases(self, op: GaussNewton) -> bool:
        try:
            check_cases(op.cotangents, self.kfac.batch_dim)
        except ValueError:
            return False
        return True

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


def pays(op: GaussNewton, batch_dim: int) -> bool:
    """Whether K-FAC would be taken for this operator; see :class:`Automatic`."""
    if any(distributions(part.space) is None for part in op.parts):
        return False
    covered: set[int] = set()
    inverses: dict[int, int] = {}
    passes = [0]

    def use(_: Sequence[int], heads: list[Tensor], layers: list[Layer]) -> None:
        for layer in layers:
            if layer.weight is not None:
                covered.update(i for i in (layer.weight, layer.bias) if i is not None)
                inverses[layer.weight], work = _work(layer)
                passes[0] += work

    visit(op, batch_dim, use)
    share = sum(op.params[i].numel() for i in covered)
    return 2 * share > op.vector.size and sum(inverses.values()) <= max(_PASSES * passes[0], _LITTLE)


def _work(layer: Layer) -> tuple[int, int]:
    """Multiplications of the two inverses, and of a pass through the layer."""
    k = layer.x.shape[-1] if layer.patches is None else layer.patches(layer.x[:1].detach()).shape[1]
    o = layer.y.shape[-1] if layer.patches is None else layer.y.shape[1]
    return k**3 + o**3, layer.cases * layer.positions * k * o
