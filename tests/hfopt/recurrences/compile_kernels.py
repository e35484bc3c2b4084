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
from hfopt.recurrences.triton import cell_kernels, gru_kernels, lstm_kernels, mrnn_kernels, pointwise, simple, tiles

UNITS = 20
PHASED = {"PHASE": 0, "FACTORS": 17, "F": "tanh"}
# Every kernel with all that can be given, how many matrices it has, and its switches.
KERNELS: list[tuple[Any, int, dict[str, Any]]] = [
    (simple.kernel, 1, {"F": "tanh", "FORWARD": True, "HAS_Q": True, "HAS_U": False, "KEEP_A": True}),
    (simple.kernel, 1, {"F": "sigmoid", "FORWARD": False, "HAS_Q": True, "HAS_U": True, "KEEP_A": True}),
    (lstm_kernels.forward_kernel, 4, {}),
    (lstm_kernels.tangent_kernel, 4, {"HAS_Q": True}),
    (lstm_kernels.adjoint_kernel, 4, {"HAS_U": True, "HAS_UC": True}),
    (gru_kernels.forward_kernel, 3, {}),
    (gru_kernels.tangent_kernel, 3, {"HAS_Q": True}),
    (gru_kernels.adjoint_kernel, 3, {}),
    (mrnn_kernels.onward_kernel, 2, {"FORWARD": True, "HAS_P": False, "HAS_Q": True, "KEEP_A": True, **PHASED}),
    (mrnn_kernels.onward_kernel, 2, {"FORWARD": False, "HAS_P": True, "HAS_Q": True, "KEEP_A": False, **PHASED}),
    (mrnn_kernels.adjoint_kernel, 2, {"HAS_U": True, "HAS_UA": True, **PHASED}),
]


DEFINED = (cells.gru, cells.intersection)
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


def compile_defined() -> None:
    for d in DEFINED:
        for kernel, switches, many in defined(d):
            for form, resident, kind, dtype in FORMS:
                tiles.RESIDENT_BYTES = resident
                columns = len(d.products[0].columns)
                settings = tiles.plan(torch.empty(1, dtype=dtype), 1000, UNITS, columns).settings()
                options = {name: settings.pop(name) for name in ("num_warps", "num_stages")}
                constants = {**settings, **switches, "UNITS": UNITS, "INTERPRETED": False}
                kinds: dict[str, Any] = {}
                for p in kernel.params:
                    tensor = f"*{kind}" if p.name[0].isupper() else "i32"
                    kinds[p.name] = (
                        "constexpr" if p.is_constexpr else (tensor,) * many[p.name] if p.name in many else tensor
                    )
                source = ASTSource(kernel, kinds, {n: constants[n] for n in kinds if kinds[n] == "constexpr"})
                compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
                print(d.name, kernel.__name__, form, kind, compiled.metadata.shared)


def main() -> None:
    compile_defined()
    for kernel, matrices, switches in KERNELS:
        for form, resident, kind, dtype in FORMS:
            tiles.RESIDENT_BYTES = resident
            settings = tiles.plan(torch.empty(1, dtype=dtype), 1000, UNITS, matrices).settings()
            options = {name: settings.pop(name) for name in ("num_warps", "num_stages")}
            constants = {**settings, **switches, "UNITS": UNITS, "INTERPRETED": False}
            assert constants["FORM"] == form
            # The names of tensors are capitals.
            kinds = {p.name: f"*{kind}" if p.name.isupper() or p.name[0].isupper() else "i32" for p in kernel.params}
            kinds |= {p.name: "constexpr" for p in kernel.params if p.is_constexpr}
            source = ASTSource(kernel, kinds, {name: constants[name] for name in kinds if kinds[name] == "constexpr"})
            compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
            print(kernel.__module__.rpartition(".")[2], kernel.__name__, form, kind, compiled.metadata.shared)


if __name__ == "__main__":
    main()
