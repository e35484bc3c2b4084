"""Who carries out the passes of a cell: the fastest that serves the tensors at hand."""

from __future__ import annotations

import importlib
import logging
from functools import cache
from typing import cast

from torch import Tensor

from hfopt.recurrences import loops, triton
from hfopt.recurrences.native import simple as native
from hfopt.recurrences.native.passes import serves
from hfopt.recurrences.nonlinearities import NONLINEARITIES
from hfopt.recurrences.registry import Cell, Passes

Maybe = Tensor | None

_FASTER = {"cpu": "hfopt.recurrences.native", "cuda": "hfopt.recurrences.triton"}

log = logging.getLogger("hfopt")


@cache
def _told_of_loops() -> None:
    log.warning(
        "Triton is not installed: recurrences on a CUDA device run as loops of torch's operators, many times more "
        "slowly; install it with pip install triton"
    )


def kernels_serve(like: Tensor) -> bool:
    """Whether Triton's kernels are to be used: on CUDA devices, where they serve the tensor's dtype."""
    if like.device.type != "cuda":
        return False
    if not triton.installed():
        _told_of_loops()
        return False
    return triton.available(like)


def backend(cell: Cell, like: Tensor) -> Passes:
    """Who runs the passes of `cell` on tensors like this one: compiled kernels where there are some, else the cell."""
    place = _FASTER.get(like.device.type)
    if place is None or (like.device.type == "cuda" and not kernels_serve(like)):
        return cell
    found = importlib.import_module(place).cell(cell.name)
    return cell if found is None else cast(Passes, found)


def forward(P: Maybe, X: Tensor, K: Tensor, h0: Tensor, nonlinearity: str) -> Tensor:
    """H (T, B, h): see `loops.forward`."""
    f = NONLINEARITIES[nonlinearity]
    if kernels_serve(K):
        from hfopt.recurrences.triton import simple as kernels

        return kernels.forward(P, X, K, h0, f)
    if serves(K):
        return native.forward(P, X, K, h0, nonlinearity)
    return loops.forward(P, X, K, h0, f)


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
    f = NONLINEARITIES[nonlinearity]
    if kernels_serve(H):
        from hfopt.recurrences.triton import simple as kernels

        return kernels.tangent(dP, dK, dh0, X, H, h0, K, f, preactivations)
    return loops.tangent(dP, dK, dh0, X, H, h0, K, f, preactivations)


def adjoint(
    U: Maybe, Ua: Maybe, X: Tensor, H: Tensor, h0: Tensor, K: Tensor, nonlinearity: str, inputs: bool
) -> tuple[Maybe, Tensor, Tensor]:
    """(dA or None, dK, dh0): see `loops.adjoint`."""
    if serves(H):
        pulled = native.adjoint(native.Point(X, H, h0, K, nonlinearity), U=U, U_a=Ua, on_P=inputs)
        return pulled.dP, pulled.dK, pulled.dh0
    f = NONLINEARITIES[nonlinearity]
    if kernels_serve(H):
        from hfopt.recurrences.triton import simple as kernels

        return kernels.adjoint(U, Ua, X, H, h0, K, f, inputs)
    return loops.adjoint(U, Ua, X, H, h0, K, f, inputs)
