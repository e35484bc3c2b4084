"""The passes over time of a traced cell in C: forward, tangent and adjoint of some of the sequences.

A tile of sequences goes through all steps before the next one starts, so that what a step works on stays in the cache.
A step is, section by section, one product with packed matrices for each recurrent matrix (with everything that is
added to it, the inputs' projections too), and one loop over units for each size of vectors. In the adjoint pass the
sums over steps and sequences are put off for some steps, whose cotangents stand in a ring.
"""

from __future__ import annotations

import re

from hfopt.recurrences.definition import Definition, Target
from hfopt.recurrences.expression import Expression
from hfopt.recurrences.native.formulas import statements
from hfopt.recurrences.native.layout import Layout, Writer, total

# V: numbers in a row of X; rows_x: rows of K_x, none where X are the projections themselves; O: outputs of a readout.
SIZES = ("T", "B", "V", "N", "rows_x", "O")


class Emitter:
    """The three functions of one cell."""

    def __init__(self, definition: Definition) -> None:
        self.d, self.at = definition, Layout(definition)
        self.graph = definition.graph
        self.vectors = [p.vector for p in definition.products]
        self.states = {e: s for s, e in definition.before.items()}

    # -- shared ----------------------------------------------------------------------------------------------------

    def begin(self, w: Writer, name: str, settings: str) -> None:
        sizes = self.at.sizes
        w(f"EXPORT long NAME({name})(const long *n, void *const *p) {{")
        names = [*SIZES, *(f"n_{s}" for s in sizes), *f"first last tile {settings}".split()]
        w("const long " + ", ".join(f"{x} = n[{i}]" for i, x in enumerate(names)) + ";")
        w(f"const long width = {self.at.width}, k_width = {self.at.kept_width};")
        for j, p in enumerate(self.d.products):
            w(f"const long w{j} = {self.at.product_width(p)};")

    def point(self) -> list[tuple[str, bool]]:
        """Pointers to the point: arguments, the readout's weights last, then results."""
        d = self.d
        names = ["X", "Kx", *(f"K{j}" for j in range(len(d.products))), *(f"b_{b}" for b in d.parameters)]
        names += [*(f"mask_{m}" for m in d.masks), *(f"first_{s}" for s in d.states), "Ko"]
        names += [*(f"seq_{s}" for s in d.returned), "kept"]
        return [(n, False) for n in names]

    def pool(self, w: Writer, parts: list[tuple[str, str]]) -> None:
        """Cut the workspace into parts (name, length)."""
        lengths = " + ".join(f"ROUNDED({n})" for _, n in parts)
        w(f"REAL *pool = NAME(workspace)({lengths});", "if (!pool) return 1;")
        for name, length in parts:
            w(f"REAL *const {name} = pool;", f"pool += ROUNDED({length});")

    @property
    def read(self) -> str:
        """The name of the state or output that is read out."""
        return list(self.d.returned)[self.d.output]

    @property
    def ahead(self) -> tuple[str, str]:
        """What of the point a step reads: where its rows are, and how long they are."""
        if self.d.kept:
            return "kept", "k_width"
        name, e = next(iter(self.d.returned.items()))
        return f"seq_{name}", f"n_{self.d.size(e)}"

    def olds(self, w: Writer) -> None:
        for s, size in self.d.states.items():
            w(f"const REAL *old_{s} = t ? seq_{s} + (here - B) * n_{size} : first_{s} + row * n_{size};")

    def loop(self, w: Writer, size: str, rows: dict[str, str], body: list[str], rest: list[str] | None = None) -> None:
        """A loop over the rows of the tile and the units; of `rows` (name -> its declaration) those that are used.

        `body` is on vectors. The last numbers of a row, fewer than a vector has, go through `rest`, one by one, or
        where there is none through the same on vectors that are partly filled.
        """
        text = " ".join(body)
        used = [declared for name, declared in rows.items() if re.search(rf"\b{name}\b", text)]
        w("for (long i = 0; i < m; i++) {", *used)
        w("long j = 0;", f"for (; j + LANES <= n_{size}; j += LANES) {{", *map(_whole, body), "}")
        if rest is None:
            w(f"if (j < n_{size}) {{", f"const long left = n_{size} - j;", *map(_some, body), "}")
        else:
            w(f"for (; j < n_{size}; j++) {{", *map(_one, rest), "}")
        w("}")

    def rows(self) -> dict[str, str]:
        """Declarations of the rows of the point at step t, sequence row + i."""
        d, found = self.d, {}
        for i, (_, _, start) in enumerate(self.at.kept):
            found[f"k{i}"] = f"const REAL *restrict k{i} = kept + (here + i) * k_width + ({start});"
        for s, size in d.states.items():
            found[f"s_{s}"] = f"const REAL *restrict s_{s} = old_{s} + i * n_{size};"
        for name, e in d.returned.items():
            found[f"n_{name}_"] = f"const REAL *restrict n_{name}_ = seq_{name} + (here + i) * n_{d.size(e)};"
        for m, size in d.masks.items():
            found[f"m_{m}"] = f"const REAL *restrict m_{m} = mask_{m} + (row + i) * n_{size};"
        found["x"] = "const REAL *restrict x = X + (here + i) * V;"
        return found

    def _leaf(self, e: Expression) -> str:
        """A leaf of a derivative as C; texts stand for themselves."""
        if e.op != "leaf" or e.name is None:
            return ""
        kind, which = e.name
        known = {
            "kept": f"LOAD(k{which})", "state": f"LOAD(s_{which})", "result": f"LOAD(n_{which}_)", "text": str(which),
            "parameter": f"LOAD(b_{which})", "mask": f"LOAD(m_{which})", "raw": "LOAD(x)",
        }  # fmt: skip
        return known.get(kind, "")

    def literal(self, text: str) -> Expression:
        return self.graph.leaf("text", text)

    def product_of(self, t: Target) -> int | None:
        """The product that takes the target, if one does."""
        return self.vectors.index(t.node) if t.node in self.vectors else None

    def pointwise(
        self, w: Writer, size: str, rows: dict[str, str], goals: list[tuple[str, Expression]], reads: list[str]
    ) -> None:
        """A loop of a derivative pass, which takes no function that numbers alone have not; `reads` come first."""
        body, rest = (statements(goals, self._leaf, vectors) for vectors in (True, False))
        self.loop(w, size, rows, [*reads, *body], [*(r.replace("VEC", "REAL") for r in reads), *rest])

    # -- forward ---------------------------------------------------------------------------------------------------

    def forward(self) -> str:
        """n: SIZES, sizes, first, last, tile. p: arguments, then results, which are written."""
        d, at, w = self.d, self.at, Writer()
        self.begin(w, "forward", "")
        point = self.point()
        out = {f"seq_{s}" for s in d.returned} | {"kept"}
        w.pointers([(name, name in out) for name, _ in point])
        parts = [("local", "tile * width")]
        parts += [(f"W{j}", f"NAME(packed_size)(n_{p.size}, w{j})") for j, p in enumerate(d.products)]
        parts += [(f"Wx{j}", f"NAME(packed_size)(rows_x, {b.width})") for j, b in enumerate(at.blocks) if b]
        buffers = [i for i, t in enumerate(d.targets) if t.node not in at.names]
        parts += [(f"q{i}_", f"tile * n_{d.targets[i].size}") for i in buffers]
        self.pool(w, parts)
        self.pack(w)
        w("for (long row = first; row < last; row += tile) {", "const long m = last - row < tile ? last - row : tile;")
        w("for (long t = 0; t < T; t++) {", "const long here = t * B + row;")
        self.olds(w)
        for k in range(len(d.products) + 1):
            j = k - 1
            if k == 0 and (d.inputs or not d.products):
                self.project(w, 0, [("1", _term(0))], "X")
            if k:
                fused = self.fused(j)
                terms = []
                if fused:
                    self.place(w, j, "X", "X")
                    terms.append(("rows_x", _term(j)))
                elif at.blocks[j] and not (j == 0 and d.inputs):
                    self.project(w, j, [("1", _term(j))], "X")
                vector, size = self.vectors[j], d.products[j].size
                source = f"old_{self.states[vector]}" if vector in self.states else self._stored(vector)
                terms.append(("1", f"NAME(packed_term)({source}, n_{size}, n_{size}, W{j})"))
                self.multiply(w, j, terms, "!rows_x" if fused else "1", "NOTHING")
            for size, targets in at.groups(k):
                self._forward_group(w, k, size, targets)
            orphans = self._kept_without_target(k)
            for size, nodes in orphans.items():
                self._forward_group(w, k, size, [], nodes)
        w("}", "}", "return 0;", "}")
        return w.text

    def _kept_without_target(self, k: int) -> dict[str, list[Expression]]:
        """Kept nodes of a section, by their sizes, of which no target has the size there."""
        sizes = {size for size, _ in self.at.groups(k)}
        found: dict[str, list[Expression]] = {}
        for e, size, _ in self.at.kept:
            if self.d.section(e) == k and size not in sizes:
                found.setdefault(size, []).append(e)
        return found

    def _forward_group(
        self, w: Writer, k: int, size: str, targets: list[Target], kept: list[Expression] | None = None
    ) -> None:
        d, at = self.d, self.at
        rows = {name: declared for name, declared in self.rows().items() if not re.match(r"k\d|n_", name)}
        index = {e: i for i, (e, _, _) in enumerate(at.kept)}
        mine = kept if kept is not None else [e for e, s, _ in at.kept if s == size and d.section(e) == k]
        goals: list[tuple[str, Expression]] = []
        for e in mine:
            i = index[e]
            rows[f"to_k{i}"] = f"REAL *restrict to_k{i} = kept + (here + i) * k_width + ({at.kept[i][2]});"
            goals.append((f"STORE(to_k{i}, {{}});", e))
        for t in targets:
            i, name = at.targets[t.node], at.names.get(t.node)
            place = f"q{i}_ + i * n_{size}" if name is None else f"seq_{name} + (here + i) * n_{size}"
            rows[f"to_q{i}"] = f"REAL *restrict to_q{i} = {place};"
            goals.append((f"STORE(to_q{i}, {{}});", t.node))
        earlier = {t.node for t in d.targets if t.section < k}
        for e, start in at.places.items():
            rows[f"a{e.index}"] = f"const REAL *restrict a{e.index} = local + i * width + ({start});"
        for i in index.values():
            rows[f"of_k{i}"] = f"const REAL *restrict of_k{i} = kept + (here + i) * k_width + ({at.kept[i][2]});"
        for e in earlier:
            i, name, own = at.targets[e], at.names.get(e), d.size(e)
            place = f"q{i}_ + i * n_{own}" if name is None else f"seq_{name} + (here + i) * n_{own}"
            rows[f"of_q{i}"] = f"const REAL *restrict of_q{i} = {place};"

        def leaf(e: Expression) -> str:
            if e in at.places:
                return f"LOAD(a{e.index})"
            if e in index and (d.section(e) < k or e not in mine):
                return f"LOAD(of_k{index[e]})"
            if e in earlier:
                return f"LOAD(of_q{at.targets[e]})"
            return self._leaf(e) if e.name is None or e.name[0] in ("state", "parameter", "mask", "raw") else ""

        if goals:
            self.loop(w, size, rows, statements(goals, leaf, vectors=True))

    # -- products --------------------------------------------------------------------------------------------------

    def fused(self, j: int) -> bool:
        """Whether the inputs' projections have the very columns of product j, so that one product gives both."""
        return all(c.kind == "a" for c in self.d.products[j].columns) and not (j == 0 and self.d.inputs)

    def pack(self, w: Writer) -> None:
        for j, p in enumerate(self.d.products):
            w(f"NAME(pack)(W{j}, K{j}, w{j}, 1, n_{p.size}, w{j});")
        w(f"const long wx = {total(c.size for c in self.d.input_columns)};")
        for j, b in enumerate(self.at.blocks):
            if b:
                w(f"NAME(pack)(Wx{j}, Kx + ({b.first}), wx, 1, rows_x, {b.width});")

    def place(self, w: Writer, j: int, source: str, given: str) -> None:
        """Rows of projections, where these are the inputs and are `given`, to where product j adds to them."""
        block = self.at.blocks[j]
        assert block is not None
        w(f"if (!rows_x && {given}) for (long i = 0; i < m; i++)")
        at = "here" if source == "X" else "now"
        row = f"{source} + ({at} + i) * V + ({block.first})"
        w(f"  NAME(copy)(local + i * width + ({block.start}), {row}, {block.width});")

    def project(self, w: Writer, j: int, terms: list[tuple[str, str]], source: str) -> None:
        """The inputs' projections alone, from `source` if they are there; what the product has besides becomes zero."""
        block = self.at.blocks[j]
        if block is None:
            return
        self.place(w, j, source, source)
        w(f"if (rows_x || !{source}) {{", f"NAME(term) of_x[{len(terms)}];", "int count = 0;")
        w(*(f"if ({condition}) of_x[count++] = {term};" for condition, term in terms))
        w(f"NAME(multiply)(local + ({block.start}), width, 0, m, {block.width}, of_x, count, NOTHING);", "}")
        self.clear(w, j)

    def clear(self, w: Writer, j: int) -> None:
        """Set the columns of product j that no projection has set to zero, if it has others."""
        if j < len(self.d.products):
            p = self.d.products[j]
            own = [c for c in p.columns if c.kind == "m"]
            if own and p.shared:
                to = f"local + i * width + ({self.at.places[own[0].node]})"
                w(f"for (long i = 0; i < m; i++) NAME(zero)({to}, {total(c.size for c in own)});")

    def multiply(self, w: Writer, j: int, terms: list[tuple[str, str]], add: str, ahead: str) -> None:
        """Product j into its columns, added to what is there if `add`; terms (condition, term)."""
        w("{", f"NAME(term) terms[{len(terms)}];", "int count = 0;")
        for condition, term in terms:
            w(("" if condition == "1" else f"if ({condition}) ") + f"terms[count++] = {term};")
        add = add if self.d.products[j].shared else "0"
        w(f"NAME(multiply)(local + ({self.at.starts[j]}), width, {add}, m, w{j}, terms, count, {ahead});", "}")

    def _stored(self, e: Expression) -> str:
        """Where the values (or changes) of a target of this step stand."""
        i, name = self.at.targets[e], self.at.names.get(e)
        return f"q{i}_" if name is None else f"seq_{name} + here * n_{self.d.size(e)}"


def _term(j: int) -> str:
    return f"NAME(packed_term)(X + here * V, V, rows_x, Wx{j})"


def _whole(line: str) -> str:
    """A line of a loop on whole vectors."""
    return re.sub(
        r"STORE\(([^,]+), ", r"NAME(store)(\1 + j, ", re.sub(r"LOAD\(([^()]+)\)", r"NAME(load)(\1 + j)", line)
    )


def _some(line: str) -> str:
    """A line for the last numbers of a row, fewer than a vector has."""
    line = re.sub(r"STORE\(([^,]+), (.*)\);", r"NAME(store_some)(\1 + j, \2, left);", line)
    return re.sub(r"LOAD\(([^()]+)\)", r"NAME(load_some)(\1 + j, left)", line)


def _one(line: str) -> str:
    """A line for one number."""
    line = re.sub(r"STORE\(([^,]+), (.*)\);", r"(\1)[j] = \2;", line)
    return re.sub(r"LOAD\(([^()]+)\)", r"(\1)[j]", line)
