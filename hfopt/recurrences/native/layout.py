"""Where everything of a traced cell stands in the compiled passes: columns in a row, blocks of weights, buffers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from hfopt.recurrences.definition import Column, Definition, Product, Target
from hfopt.recurrences.expression import Expression


def total(sizes: Iterable[str]) -> str:
    """The sum of sizes as an expression of C."""
    counts: dict[str, int] = {}
    for size in sizes:
        counts[size] = counts.get(size, 0) + 1
    return " + ".join(f"{n} * n_{size}" if n > 1 else f"n_{size}" for size, n in counts.items()) or "0"


@dataclass(frozen=True)
class InputBlock:
    """Columns of the input weights that lie beside each other in a row: from `start` in a row, `first` in K_x."""

    start: str
    first: str
    width: str


class Layout:
    """A row holds the columns of the inputs alone, then those of every product, shared ones first."""

    def __init__(self, definition: Definition) -> None:
        self.definition = d = definition
        names = [*d.states.values(), *d.gates.values(), *d.extra.values(), *d.parameters.values(), *d.masks.values()]
        self.sizes = tuple(dict.fromkeys([*names, *(p.size for p in d.products)]))
        row: list[Column] = [*d.inputs]
        self.starts = []
        for p in d.products:
            self.starts.append(total(c.size for c in row))
            row += p.columns
        self.row = tuple(row)
        self.width = total(c.size for c in row)
        self.places = {c.node: total(x.size for x in row[:i]) for i, c in enumerate(row)}
        self.targets = {t.node: i for i, t in enumerate(d.targets)}
        self.names = {e: name for name, e in d.returned.items()}

    def product_width(self, product: Product) -> str:
        """Of all its columns."""
        return total(c.size for c in product.columns)

    @cached_property
    def blocks(self) -> list[InputBlock | None]:
        """For the first product, with the columns of the inputs alone before, and for every later one."""
        d, before = self.definition, list(self.definition.inputs)
        shared = [[c for c in p.columns if c.kind == "a"] for p in d.products] or [[]]
        found: list[InputBlock | None] = [
            InputBlock("0", "0", total(c.size for c in (*before, *shared[0]))) if before or shared[0] else None
        ]
        before += shared[0]
        for start, own in zip(self.starts[1:], shared[1:], strict=True):
            first = total(c.size for c in before)
            found.append(InputBlock(start, first, total(c.size for c in own)) if own else None)
            before += own
        return found

    def groups(self, section: int) -> Iterator[tuple[str, list[Target]]]:
        """The section's targets by their sizes."""
        found: dict[str, list[Target]] = {}
        for t in self.definition.targets:
            if t.section == section:
                found.setdefault(t.size, []).append(t)
        yield from found.items()

    @property
    def kept(self) -> list[tuple[Expression, str, str]]:
        """(node, size, place in a row of what is kept)."""
        d = self.definition
        sizes = [d.size(e) for e in d.kept]
        return [(e, size, total(sizes[:i])) for i, (e, size) in enumerate(zip(d.kept, sizes, strict=True))]

    @property
    def kept_width(self) -> str:
        """Of a row of what is kept."""
        return total(size for _, size, _ in self.kept)


class Writer:
    """Lines of C, indented by their braces."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._depth = 0

    def __call__(self, *lines: str) -> None:
        for line in lines:
            opens, closes = line.count("{"), line.count("}")
            leading = line.startswith("}")
            self.lines.append("  " * (self._depth - leading) + line)
            self._depth += opens - closes

    def pointers(self, names: Sequence[tuple[str, bool]]) -> None:
        """Declare the pointers of the argument p in this order; (name, whether it is written to)."""
        for i, (name, out) in enumerate(names):
            self(f"{'' if out else 'const '}REAL *const {name} = p[{i}];")

    @property
    def text(self) -> str:
        """All lines."""
        return "\n".join(self.lines) + "\n"
