"""The preconditioner that chooses itself: K-FAC where it pays, otherwise none."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hfopt.curvature import GaussNewton
from hfopt.fisher import check_cases
from hfopt.notice import logger
from hfopt.operators import Operator
from hfopt.preconditioners.base import Preconditioner
from hfopt.preconditioners.kfac import KFAC
from hfopt.preconditioners.layers import Layer, watched

# Inverting the factors may take as much work as so many passes through the layers, or so many multiplications: a step
# takes longer than these besides its arithmetic.
_PASSES = 10
_LITTLE = 1 << 25


class Automatic(Preconditioner):
    """:class:`KFAC` for networks of linear and convolution layers, otherwise none.

    K-FAC is taken where more than half of the parameters are weights and biases of such layers, each used once, of one
    output; and where the factors' inverses, about ``sum k^3 + o^3`` for weights (o, k), are less work than ten passes
    through the layers, ``10 sum N T k o`` for N cases of T positions, or too little to matter. The first step decides,
    and the state keeps it. Processes that train one model take none: each would draw targets of its own.

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
        """Choose, on the first step; then find K-FAC's factors, if that was chosen."""
        self._taken = False
        if not isinstance(op, GaussNewton) or op.processes is not None or not self._has_cases(op):
            return
        if self.chosen is None:
            self.chosen = pays(op, self.kfac.batch_dim)
            if self.chosen:
                logger.info("conjugate gradients are preconditioned by K-FAC")
        if self.chosen:
            self.kfac.refresh(op, step)
            self._taken = True

    def _has_cases(self, op: GaussNewton) -> bool:
        try:
            check_cases(op.cotangents, self.kfac.batch_dim)
        except ValueError:
            return False
        return True

    def damp(self, damping: float, decay: float | Tensor) -> None:
        """As K-FAC does."""
        self.kfac.damp(damping, decay)

    def apply(self, r: Tensor) -> Tensor:
        """As K-FAC does."""
        return self.kfac.apply(r)

    def apply_into(self, r: Tensor, out: Tensor) -> Tensor:
        """As K-FAC does."""
        return self.kfac.apply_into(r, out)

    def state_dict(self) -> dict[str, Any]:
        """What was chosen."""
        return {} if self.chosen is None else {"chosen": self.chosen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; that of another preconditioner lets the next step choose."""
        chosen = state.get("chosen")
        self.chosen = None if chosen is None else bool(chosen)


def pays(op: GaussNewton, batch_dim: int) -> bool:
    """Whether K-FAC would be taken for this operator; see :class:`Automatic`."""
    seen = watched(op, batch_dim)
    layers = [] if seen is None else [layer for layer in seen.layers if layer.weight is not None]
    uses = [i for layer in layers for i in (layer.weight, layer.bias)]
    own = [layer for layer in layers if uses.count(layer.weight) == 1]
    covered = sum(op.params[i].numel() for layer in own for i in (layer.weight, layer.bias) if i is not None)
    inverses, passes = (sum(work) for work in zip(*map(_work, own), strict=True)) if own else (0, 0)
    return 2 * covered > op.vector.size and inverses <= max(_PASSES * passes, _LITTLE)


def _work(layer: Layer) -> tuple[int, int]:
    """Multiplications of the two inverses, and of a pass through the layer."""
    k = layer.x.shape[-1] if layer.patches is None else layer.patches(layer.x[:1].detach()).shape[1]
    o = layer.y.shape[-1] if layer.patches is None else layer.y.shape[1]
    return k**3 + o**3, layer.cases * layer.positions * k * o
