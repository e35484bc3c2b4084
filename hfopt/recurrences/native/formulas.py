"""Expressions as statements of C."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hfopt.recurrences.expression import Expression, ordered

_SCALAR = {
    "step": "(REAL)({0} > 0)",
    "sign": "((REAL)({0} > 0) - (REAL)({0} < 0))",
    "abs": "({0} < 0 ? -{0} : {0})",
    "relu": "({0} < 0 ? (REAL)0 : {0})",
}
_VECTOR = {
    "sigmoid": "NAME(logistic)({0})",
    "tanh": "NAME(tanh)({0})",
    "relu": "NAME(rectified)({0})",
    "exp": "NAME(exponential_of)({0})",
    "abs": "NAME(magnitude)({0})",
    "sign": "NAME(sign_of)({0})",
    "step": "NAME(step_of)({0})",
}


def statements(
    targets: Sequence[tuple[str, Expression]], leaf: Callable[[Expression], str], vectors: bool = False
) -> list[str]:
    """Statements that work out the expressions, each shared node once.

    A target is what stands around its value, with ``{}`` in its place. `leaf` gives the text of a leaf; of nodes that
    are no leaves it may give one too, or an empty string. `vectors`: of the compiler's vectors, not of numbers.
    """
    kind, functions = ("VEC", _VECTOR) if vectors else ("REAL", _SCALAR)
    given = {e: found for _, root in targets for e in ordered((root,)) if (found := leaf(e))}
    order = ordered([e for _, e in targets], given)
    uses: dict[Expression, int] = {}
    for e in order:
        for a in () if e in given else e.args:
            uses[a] = uses.get(a, 0) + 1
    for _, e in targets:
        uses[e] = uses.get(e, 0) + 1
    lines: list[str] = []
    text: dict[Expression, str] = {}
    for e in order:
        if e in given:
            text[e] = given[e]
            # What is loaded twice is loaded once.
            if vectors and uses.get(e, 0) > 1:
                lines.append(f"const VEC v{e.index} = {given[e]};")
                text[e] = f"v{e.index}"
            continue
        if e.op == "constant":
            text[e] = f"(REAL){e.value!r}" if e.value != int(e.value) else str(int(e.value))
            continue
        inner = [text[a] for a in e.args]
        if e.op == "-" and e.args[0].number == 0:
            value = f"(-{inner[1]})"
        elif e.op in ("+", "-", "*", "/"):
            value = f"({inner[0]} {e.op} {inner[1]})"
        elif e.op == "copy":
            value = inner[0]
        else:
            if not inner[0].isidentifier():
                lines.append(f"const {kind} u{e.index} = {inner[0]};")
                inner = [f"u{e.index}"]
            value = functions[e.op].format(*inner)
        if uses[e] > 1:
            lines.append(f"const {kind} t{e.index} = {value};")
            value = f"t{e.index}"
        text[e] = value
    lines.extend(target.format(text[e]) for target, e in targets)
    return lines
