"""The library of one traced cell: its passes written in C, compiled at its first use into the cache of the others."""

from __future__ import annotations

import ctypes
from functools import cache

from hfopt.errors import logger
from hfopt.recurrences.definition import Definition
from hfopt.recurrences.native import build
from hfopt.recurrences.native.emit import Emitter
from hfopt.recurrences.native.emit_linear import adjoint, tangent

_TYPES = (("float", "float32", 1), ("double", "float64", 0))


def source(definition: Definition) -> str:
    """The whole library in C, for both types."""
    emitter = Emitter(definition)
    passes = "\n".join((emitter.forward(), tangent(emitter), adjoint(emitter)))
    parts = ['#include "common.h"\n']
    for real, suffix, single in _TYPES:
        parts.append(
            f"#define REAL {real}\n#define SINGLE {single}\n#define NAME(x) x##_{suffix}\n"
            "static REAL *NAME(workspace)(long count) { return workspace((count + 64) * sizeof(REAL)); }\n"
            '#include "gemm.h"\n#include "nonlinear.h"\n#include "rows.h"\n'
            f"{passes}\n#undef REAL\n#undef SINGLE\n#undef NAME\n"
        )
    return "\n".join(parts)


@cache
def library(definition: Definition) -> ctypes.CDLL | None:
    """The compiled passes of a cell; None where the package's own are not compiled either, or the compiler fails."""
    if build.library() is None:
        return None
    try:
        compiler = build._compiler()
        assert compiler is not None
        path = build.build(compiler, build._cache(), source(definition))
        logger.info("recurrences of the cell %s run on passes compiled in C", definition.name)
        return ctypes.CDLL(str(path))
    except (OSError, RuntimeError, ValueError) as error:
        logger.warning(
            "recurrences of the cell %s run on torch's operators, more slowly, since its compiled passes failed: %s",
            definition.name,
            error,
        )
        return None
