"""The recurrences' passes as Triton kernels for CUDA: forward, tangent and adjoint, on plain tensors.

A recurrence is independent across sequences, so that one program takes a tile of sequences through all time steps and
never returns to the host. Only what recurs is in the kernels: z dK, x W_x and z' da are a few large matrix products by
cuBLAS over all steps. N vectors that are carried together, (T, N, B, .), are rows beside the sequences, N B of them,
and meet the same h_t in the second-level cache. There are three forms of every kernel, chosen by size (`tiles.plan`):

    resident   the recurrent matrices stay on the multiprocessor, in shared memory, and the state in registers: units
               padded to a power of two, matrices up to 128 KB together (h <= 128 in float32 for the simple RNN,
               h <= 64 for LSTM and GRU; in bfloat16 256 and 128; in float64 128 and 64; less on a chip with less shared
               memory);
    walked     one program still does all steps, but walks the matrices in blocks, which the second-level cache serves,
               and hands the state on through memory: matrices up to 1 MB (h <= 256 in float32 for all these cells, for
               the simple RNN 512);
    stepwise   beyond that a launch per step, over tiles of sequences and blocks of units: static shapes, no
               synchronisation with the host, so that a CUDA graph takes all of it.

Cells with several products in a step, or vectors of several sizes (MRNN, GRU of 2014, RHN), go section by section: a
product by cuBLAS, and one kernel for all that is pointwise (`sections`).

Arithmetic of the resident form, by the example of h = 100, B = 1000, T = 200 in float32 on an H200 (132
multiprocessors of 128 multiply-adds a cycle, 228 KB of shared memory, 1.98 GHz): eight sequences a tile make 125
programs of four warps, one wave. W is padded to 128 x 128 (64 KB in shared memory). Each thread works out 4 x 2
numbers of a step; a step is 1032 multiply-adds of the 1400 instructions that a warp issues, hence 1400 cycles, and some
1600 cycles of shared-memory reads (each half of the warps reads W once a step), in which the loads of p_t and h_t from
memory hide; barriers between them added, about 2000 cycles or 1 us. A pass of 200 steps then takes 0.2 to 0.3 ms, a
product (tangent, adjoint and two large matrix products of 4 GFLOP each, at about 0.1 ms) 0.6 to 0.9 ms. 16 sequences a
tile read W half as often per sequence, but would leave half of the multiprocessors idle here; they are taken when there
are sequences enough. The products over h are cut into pieces of 32 rows of W, since operands of a whole row would take
more registers than a thread has. These are counts from the machine code that the compiler makes for that chip, not
measurements.

Float32 products are exact float32 (`precision("ieee")`), whatever torch's own setting for its products is; "tf32x3"
(three tf32 products on the tensor cores, close to float32) and "tf32" are there to be chosen. Float64 products use the
tensor cores where the chip has them for it. bfloat16 is accumulated in float32, and so are all pointwise functions.

Kernels compile at their first call for given sizes: call once before capturing a CUDA graph. Triton is imported at the
first use, never with this package.
"""

from __future__ import annotations

import importlib
import os
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hfopt.recurrences.registry import Passes

__all__ = ["available", "cell", "precision"]

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
PRECISIONS = ("ieee", "tf32x3", "tf32")

_precision = "ieee"


@cache
def installed() -> bool:
    """Whether Triton can be imported."""
    try:
        importlib.import_module("triton")
    except ImportError:
        return False
    return True


def available(tensor: Tensor) -> bool:
    """Whether the kernels can serve tensors like this one.

    That is float32, float64 or bfloat16 on a CUDA device, with Triton installed; or on the CPU where Triton interprets
    its kernels, which environment variable TRITON_INTERPRET=1 asks for before Triton is imported (slow, for tests).
    """
    if tensor.dtype not in DTYPES or tensor.device.type not in ("cpu", "cuda"):
        return False
    if tensor.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return False
    return installed()


def cell(name: str) -> Passes | None:
    """The passes of the cell of that name, or None where there are no kernels for it or Triton is not installed."""
    if not installed():
        return None
    passes: Passes | None = importlib.import_module(f"{__name__}.generated").cell(name)
    return passes


def precision(mode: str | None = None) -> str:
    """How the kernels multiply float32 matrices: what is in force, after setting it if `mode` is given.

    "ieee" (the default) is exact float32; "tf32x3" takes each product in three tf32 parts on the tensor cores, with an
    error near float32's; "tf32" keeps ten bits of the mantissa. Products outside the kernels, by torch, follow torch's
    own setting. A CUDA graph keeps the precision that it was captured with.

    Raises:
        ValueError: another mode.
    """
    global _precision  # noqa: PLW0603  (one setting for all kernels, as torch's own is)
    if mode is not None:
        if mode not in PRECISIONS:
            raise ValueError(f"mode is {mode!r}; it is one of {', '.join(map(repr, PRECISIONS))}")
        _precision = mode
    return _precision
