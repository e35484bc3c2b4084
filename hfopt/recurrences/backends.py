"""Who carries out a recurrence's passes: the fastest that serves the tensors at hand."""

from __future__ import annotations

from torch import Tensor

from hfopt.recurrences import loops
from hfopt.recurrences.native import simple as native
from hfopt.recurrences.native.passes import serves
from hfopt.recurrences.nonlinearities import NONLINEARITIES

Maybe = Tensor | None


def forward(P: Maybe, X: Tensor, K: Tensor, h0: Tensor, nonlinearity: str) -> Tensor:
    """H (T, B, h): see `loops.forward`."""
    return loops.forward(P, X, K, h0, NONLINEARITIES[nonlinearity])


def tangent(
    dP: Maybe, dK: Maybe, dh0: Maybe, X: Tensor, H: Tensor, h0: Tensor, K: Tensor, nonlinearity: str,
    preactivations: bool,
) -> tuple[Tensor, Maybe]:  # fmt: skip
    """(R_h, R_a or None): see `loops.tangent`."""
    if serves(H):
        point = native.Point(X, H, h0, K, nonlinearity)
        moved = native.tangent(point, dP=dP, dK=dK, dh0=dh0, preactivations=preactivations)
        assert moved.R is not None
        return moved.R, moved.R_a
    return loops.tangent(dP, dK, dh0, X, H, h0, K, NONLINEARITIES[nonlinearity], preactivations)


def adjoint(
    U: Maybe, Ua: Maybe, X: Tensor, H: Tensor, h0: Tensor, K: Tensor, nonlinearity: str, inputs: bool
) -> tuple[Maybe, Tensor, Tensor]:
    """(dA or None, dK, dh0): see `loops.adjoint`."""
    if serves(H):
        pulled = native.adjoint(native.Point(X, H, h0, K, nonlinearity), U=U, U_a=Ua, on_P=inputs)
        return pulled.dP, pulled.dK, pulled.dh0
    return loops.adjoint(U, Ua, X, H, h0, K, NONLINEARITIES[nonlinearity], inputs)
