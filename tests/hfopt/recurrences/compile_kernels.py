"""Compile all Triton kernels for CUDA devices of capability 9.0, which takes no GPU, and print what each needs.

Run as a program without TRITON_INTERPRET: one line a kernel, with its form and bytes of shared memory.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hfopt.recurrences import Definition, cells
from hfopt.recurrences.generated import generated
from hfopt.recurrences.triton import cell_kernels, pointwise, tiles
from hfopt.recurrences.triton.sections import Sections

UNITS = 20
DEFINED = (cells.tanh_rnn.marked, cells.lstm, cells.gru, cells.intersection)
SEVERAL = (cells.mrnn(), cells.gru2014)
FORMS = (
    ("resident", 1 << 17, "fp32", torch.float32),
    ("resident", 1 << 17, "fp64", torch.float64),
    ("walked", 0, "bf16", torch.bfloat16),
)


def defined(d: Definition) -> list[tuple[Any, dict[str, Any], dict[str, int]]]:
    """The kernels of a defined cell, their switches, and how many tensors each tuple has."""
    states, outputs, columns = len(d.states), len(d.returned), len(d.products[0].columns)
    found = []
    for made, kernel in (
        (pointwise.forward(d), cell_kernels.onward_kernel),
        (pointwise.tangent(d, True), cell_kernels.onward_kernel),
        (pointwise.adjoint(d), cell_kernels.adjoint_kernel),
    ):
        values = len(made.values)
        switches = {"POINTWISE": made.function, "OWN": 0, "STATES": states, "OUTPUTS": outputs, "NM": columns}
        switches |= {"VALUES": values, "WIDTHS": (UNITS,) * values, "STEPS": (UNITS,) * values}
        switches |= {"GIVEN": (True,) * outputs, "NO": len(pointwise.outside(d))}
        many = {"S": states, "U": outputs, "CARRY": states, "V": values}
        if kernel is cell_kernels.onward_kernel:
            count = outputs + len(d.kept) if not found else outputs
            switches |= {"OUTPUTS": count, "LENGTHS": (UNITS,) * count}
            switches |= {"NQ": len(d.input_columns) if not found else len(pointwise.outside(d)) + columns}
            many["OUT"] = count
        found.append((kernel, switches, many))
    return found


def compiled(kernel: Any, kinds: dict[str, Any], constants: dict[str, Any], options: dict[str, Any]) -> int:
    """Bytes of shared memory that the kernel takes."""
    source = ASTSource(kernel, kinds, {n: constants[n] for n in kinds if kinds[n] == "constexpr"})
    shared: int = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).metadata.shared
    return shared


def kinds_of(kernel: Any, kind: str, many: dict[str, int]) -> dict[str, Any]:
    """The types of the arguments; the names of tensors are capitals."""
    found: dict[str, Any] = {}
    for p in kernel.params:
        tensor = f"*{kind}" if p.name[0].isupper() else "i32"
        found[p.name] = "constexpr" if p.is_constexpr else (tensor,) * many[p.name] if p.name in many else tensor
    return found


def settings_of(dtype: torch.dtype, resident: int, matrices: int) -> tuple[dict[str, Any], dict[str, Any]]:
    tiles.RESIDENT_BYTES = resident
    settings = tiles.plan(torch.empty(1, dtype=dtype), 1000, UNITS, matrices).settings()
    return settings, {name: settings.pop(name) for name in ("num_warps", "num_stages")}


def main() -> None:
    for d in DEFINED:
        for kernel, switches, many in defined(d):
            for form, resident, kind, dtype in FORMS:
                settings, options = settings_of(dtype, resident, len(d.products[0].columns))
                constants = {**settings, **switches, "UNITS": UNITS, "INTERPRETED": False}
                shared = compiled(kernel, kinds_of(kernel, kind, many), constants, options)
                print(d.name, kernel.__name__, form, kind, shared)
    for d in SEVERAL:
        cell = Sections(generated(d))
        groups = [g for found in (cell._forward, cell._tangent, cell._adjoint) for section in found for g in section]
        for made, outputs in ((g.made, len(g.goals)) for g in groups):
            if made is None:
                continue
            inputs = len(made.values)
            constants = {"FUNCTION": made.function, "INPUTS": inputs, "OUTPUTS": outputs, "UNITS": UNITS, "TILE": 16}
            constants |= {"COLUMNS": 64, "WIDTHS": (UNITS,) * inputs, "VECTORS": (True,) * inputs, "INTERPRETED": False}
            constants |= {"LENGTHS": (UNITS,) * outputs}
            kernel = cell_kernels.section_kernel
            kinds = kinds_of(kernel, "fp32", {"X": inputs, "OUT": outputs})
            print(d.name, kernel.__name__, "section", "fp32", compiled(kernel, kinds, constants, {"num_warps": 4}))


if __name__ == "__main__":
    main()
