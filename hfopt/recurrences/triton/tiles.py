"""Which form a kernel takes and how large its tiles are, by sizes, precision and device; and its launch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import JITFunction

import hfopt.recurrences.triton as package

# Bytes of recurrent matrices, padded, that one program may keep; chips with less shared memory keep less.
RESIDENT_BYTES = 128 * 1024
# What a program needs of shared memory besides: states on their way from one layout to another.
_SCRATCH_BYTES = 32 * 1024
# Bytes of recurrent matrices, padded, up to which one program walks through what it cannot keep.
WALKED_BYTES = 1024 * 1024
# An H200's, where there is no device to ask (the interpreter).
_MULTIPROCESSORS, _SHARED_BYTES = 132, 227 * 1024

Grid = tuple[int, int]


@dataclass(frozen=True)
class Plan:
    """How one pass runs.

    Attributes:
        form: "resident", "walked" or "stepwise".
        tile: sequences (times vectors) per program.
        columns: units that a program works out at once; in the resident form all, padded.
        depth: rows of the matrix that are multiplied at once, in the other forms.
        pieces: into how many pieces of rows the resident matrix is cut.
        warps: per program.
        precision: of float32 products.
    """

    form: str
    tile: int
    columns: int
    depth: int
    pieces: int
    warps: int
    precision: str

    def grid(self, rows: int, units: int) -> Grid:
        """Programs: tiles of rows, and in the stepwise form blocks of units."""
        return triton.cdiv(rows, self.tile), triton.cdiv(units, self.columns) if self.form == "stepwise" else 1

    def settings(self) -> dict[str, Any]:
        """What all kernels take as compile-time constants, and the compiler's options."""
        return {
            "FORM": self.form,
            "TILE": self.tile,
            "COLUMNS": self.columns,
            "DEPTH": self.depth,
            "PIECES": self.pieces,
            "PRECISION": self.precision,
            "num_warps": self.warps,
            # Time steps must not be overlapped: a step's loads may depend on the last one's stores.
            "num_stages": 1,
        }


@cache
def _device(index: int | None) -> tuple[int, int]:
    """(multiprocessors, bytes of shared memory that one program may take) of a CUDA device; None: of an H200."""
    if index is None:
        return _MULTIPROCESSORS, _SHARED_BYTES
    properties = torch.cuda.get_device_properties(index)
    return properties.multi_processor_count, getattr(properties, "shared_memory_per_block_optin", 48 * 1024)


def plan(like: Tensor, rows: int, units: int, matrices: int) -> Plan:
    """The plan for `rows` sequences (times vectors) and `matrices` matrices (units, units) in like's dtype."""
    multiprocessors, shared = _device(like.device.index if like.is_cuda else None)
    precision = package.precision() if like.dtype == torch.float32 else "ieee"
    padded = max(16, triton.next_power_of_2(units))
    # Three tf32 products keep a second matrix, of what the first leaves.
    copies = 2 if precision == "tf32x3" else 1
    size = matrices * copies * padded * padded * like.element_size()
    # Tensor cores work on 16 rows at least; plain float32 may use eight, where that gives more multiprocessors work.
    scalar = like.dtype == torch.float32 and precision == "ieee"
    tile = 8 if scalar and rows <= 8 * multiprocessors else 16
    if size <= min(RESIDENT_BYTES, shared - _SCRATCH_BYTES):
        warps = min(4 if scalar else 8, max(1, tile * padded // 128))
        # A thread's operands of one product are in registers: whole rows of the matrix would not fit.
        pieces = max(1, padded // 32) if like.dtype != torch.bfloat16 and precision == "ieee" else 1
        return Plan("resident", tile, padded, padded, pieces, warps, precision)
    columns = 64 if matrices == 1 else 32
    if size <= copies * WALKED_BYTES:
        # A step reads the whole matrix once per tile.
        return Plan("walked", 16, columns, 32, 1, 4, precision)
    return Plan("stepwise", 32, columns, 32, 1, 4, precision)


def interpreted(kernel: object) -> bool:
    """Whether Triton interprets this kernel on the CPU."""
    return not isinstance(kernel, JITFunction)


def launch(kernel: Any, grid: Grid, like: Tensor, *arguments: object, **settings: Any) -> None:
    """Run a kernel on the device of `like`."""
    settings["INTERPRETED"] = interpreted(kernel)
    if like.is_cuda:
        with torch.cuda.device(like.device):
            kernel[grid](*arguments, **settings)
    else:
        kernel[grid](*arguments, **settings)


def run(steps: int, form: str, call: Callable[[int, int], None]) -> None:
    """call(k, n): do n steps, k having been done; all at once, or one by one in the stepwise form."""
    if form == "stepwise":
        for k in range(steps):
            call(k, 1)
    else:
        call(0, steps)


def check(**named: Tensor | None) -> None:
    """Raise TypeError if the kernels cannot serve a tensor, naming it, or if dtypes or devices differ."""
    given = {name: tensor for name, tensor in named.items() if tensor is not None}
    first, like = next(iter(given.items()))
    for name, tensor in given.items():
        if not package.available(tensor):
            raise TypeError(
                f"{name} is {tensor.dtype} on {tensor.device}; the Triton kernels take float32, float64 and bfloat16 "
                "on CUDA devices"
            )
        if tensor.dtype != like.dtype or tensor.device != like.device:
            raise TypeError(
                f"{name} is {tensor.dtype} on {tensor.device}, but {first} is {like.dtype} on {like.device}; "
                "bring them together with .to()"
            )
