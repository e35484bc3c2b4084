"""Who carries out the passes of a cell: the fastest that serves the tensors at hand."""

from __future__ import annotations

import importlib
import logging
from functools import cache
from typing import cast

from torch import Tensor

from hfopt.recurrences import triton
from hfopt.recurrences.registry import Cell, Passes

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
