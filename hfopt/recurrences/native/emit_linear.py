"""The tangent and the adjoint of a traced cell in C."""

from __future__ import annotations

from collections.abc import Sequence

from hfopt.recurrences.definition import Target
from hfopt.recurrences.expression import Expression, ordered, pull, push
from hfopt.recurrences.native.emit import Emitter
from hfopt.recurrences.native.layout import Writer, total


def tangent(c: Emitter) -> str:
    """n: SIZES, sizes, first, last, tile.

    p: tangents of the arguments but the masks (T, N, B, .) or (N, .., .), NULL for zero; arguments, results; then the
    tangents of states, outputs and the readout (T, N, B, .), which are written; a NULL is not wanted.
    """
    d, at, w = c.d, c.at, Writer()
    products = range(len(d.products))
    c.begin(w, "tangent", "")
    names = ["dX", "dKx", *(f"dK{j}" for j in products), *(f"db_{b}" for b in d.parameters)]
    names += [*(f"d0_{s}" for s in d.states), "dKo"]
    w.pointers([*((n, False) for n in names), *c.point(), *((f"R_{s}", True) for s in (*d.returned, "o_"))])
    parts = [("local", "tile * width"), ("nothing", " + ".join(f"n_{s}" for s in at.sizes))]
    parts += [(f"{v}W{j}", f"NAME(packed_size)(n_{p.size}, w{j})") for v in ("", "d") for j, p in enumerate(d.products)]
    blocks = [(j, b) for j, b in enumerate(at.blocks) if b]
    parts += [(f"{v}Wx{j}", f"NAME(packed_size)(rows_x, {b.width})") for v in ("", "d") for j, b in blocks]
    parts += [(f"q{i}_", f"tile * n_{t.size}") for i, t in enumerate(d.targets) if t.node not in at.names]
    parts += [(f"v{j}_", f"tile * n_{p.size}") for j, p in enumerate(d.products) if p.vector not in c.states]
    parts += [(f"spare_{s}", f"2 * tile * n_{d.size(e)}") for s, e in d.returned.items()]
    parts += [(f"{v}Wo", f"NAME(packed_size)({_read_size(c)}, O)") for v in ("", "d")]
    c.pool(w, parts)
    w(f"NAME(zero)(nothing, {' + '.join(f'n_{s}' for s in at.sizes)});")
    c.pack(w)
    _pack_readout(c, w, "R_o_", "Wo", "Ko")
    w("for (long v = 0; v < N; v++) {", f"const REAL *const dKo_v = dKo ? dKo + v * ({_read_size(c)} + 1) * O : NULL;")
    _pack_readout(c, w, "dKo", "dWo", "dKo_v")
    for j, p in enumerate(d.products):
        w(f"if (dK{j}) NAME(pack)(dW{j}, dK{j} + v * n_{p.size} * w{j}, w{j}, 1, n_{p.size}, w{j});")
    for j, b in blocks:
        w(f"if (dKx) NAME(pack)(dWx{j}, dKx + v * rows_x * wx + ({b.first}), wx, 1, rows_x, {b.width});")
    for name, size in d.parameters.items():
        w(f"const REAL *restrict const e_{name} = db_{name} ? db_{name} + v * n_{size} : nothing;")
    w("for (long row = first; row < last; row += tile) {")
    w("const long m = last - row < tile ? last - row : tile, at = v * B + row;")
    for s, size in d.states.items():
        w(f"const REAL *before_{s} = d0_{s} ? d0_{s} + at * n_{size} : NULL;")
    w("for (long t = 0; t < T; t++) {", "const long now = t * N * B + at, here = t * B + row;")
    c.olds(w)
    for s, e in d.returned.items():
        w(f"REAL *const r_{s} = R_{s} ? R_{s} + now * n_{d.size(e)} : spare_{s} + (t % 2) * tile * n_{d.size(e)};")
    if d.inputs or not d.products:
        c.project(w, 0, _x_terms(0), "dX")
    for k in range(len(d.products) + 1):
        if k:
            _multiply(c, w, k - 1)
        for size, targets in at.groups(k):
            _push_group(c, w, k, size, targets)
    w(*(f"before_{s} = r_{s};" for s in d.states))
    _read_out(c, w)
    w("}", "}", "}", "return 0;", "}")
    return w.text


def _read_size(c: Emitter) -> str:
    return f"n_{c.d.size(c.d.returned[c.read])}"


def _pack_readout(c: Emitter, w: Writer, given: str, to: str, source: str) -> None:
    size = _read_size(c)
    w(f"if ({given} && O <= FEW) NAME(transpose)({to}, {source}, {size}, O);")
    w(f"if ({given} && O > FEW) NAME(pack)({to}, {source}, O, 1, {size}, O);")


def _read_out(c: Emitter, w: Writer) -> None:
    """The change of the readout: r K_o + [h, 1] dK_o."""
    size, r, h = _read_size(c), f"r_{c.read}", f"seq_{c.read} + here * {_read_size(c)}"
    w("if (R_o_) {", "REAL *const o = R_o_ + now * O;", "if (O <= FEW) {")
    w(f"NAME(few_outputs)(o, {r}, {h}, Wo, dKo ? dWo : NULL, m, {size}, O);", "} else {")
    w(f"const NAME(term) read[2] = {{NAME(packed_term)({r}, {size}, {size}, Wo),")
    w(f"  NAME(packed_term)({h}, {size}, {size}, dWo)}};")
    w("NAME(multiply)(o, O, 0, m, O, read, dKo ? 2 : 1, NOTHING);", "}")
    w(f"if (dKo) for (long i = 0; i < m; i++) NAME(add)(o + i * O, dKo_v + {size} * O, O);", "}")


def _x_terms(j: int) -> list[tuple[str, str]]:
    return [
        ("dKx && rows_x", f"NAME(packed_term)(X + here * V, V, rows_x, dWx{j})"),
        ("dX && rows_x", f"NAME(packed_term)(dX + now * V, V, rows_x, Wx{j})"),
    ]


def _multiply(c: Emitter, w: Writer, j: int) -> None:
    p, fused = c.d.products[j], c.fused(j)
    terms = _x_terms(j) if fused else []
    if fused:
        c.place(w, j, "dX", "dX")
    elif not (j == 0 and c.d.inputs):
        c.project(w, j, _x_terms(j), "dX")
    if p.vector in c.states:
        s = c.states[p.vector]
        terms.append((f"dK{j}", f"NAME(packed_term)(old_{s}, n_{p.size}, n_{p.size}, dW{j})"))
        terms.append((f"before_{s}", f"NAME(packed_term)(before_{s}, n_{p.size}, n_{p.size}, W{j})"))
    else:
        terms.append((f"dK{j}", f"NAME(packed_term)(v{j}_, n_{p.size}, n_{p.size}, dW{j})"))
        terms.append(("1", f"NAME(packed_term)({_change(c, p.vector)}, n_{p.size}, n_{p.size}, W{j})"))
    soon, length = c.ahead
    ahead = f"SPAN({soon} + here * {length}, m * {length})" if j == 0 else "NOTHING"
    c.multiply(w, j, terms, "dX && !rows_x" if fused else "1", ahead)


def _change(c: Emitter, e: Expression) -> str:
    """Where the changes of a target of this step stand."""
    i, name = c.at.targets[e], c.at.names.get(e)
    return f"q{i}_" if name is None else f"r_{name}"


def _push_group(c: Emitter, w: Writer, k: int, size: str, targets: Sequence[Target]) -> None:
    d, at = c.d, c.at
    rows = c.rows()
    seeds: dict[Expression, Expression] = {}
    rows["a"] = "const REAL *restrict a = local + i * width;"
    for e, start in at.places.items():
        seeds[e] = c.literal(f"LOAD(a + {start})")
    for s, own in d.states.items():
        rows[f"d_{s}"] = f"const REAL *restrict d_{s} = before_{s} ? before_{s} + i * n_{own} : nothing;"
        seeds[d.before[s]] = c.literal(f"LOAD(d_{s})")
    for b in d.parameters:
        seeds[d.graph.leaf("parameter", b)] = c.literal(f"LOAD(e_{b})")
    if d.raw is not None:
        rows["dx"] = "const REAL *restrict dx = dX ? dX + (now + i) * V : nothing;"
        seeds[d.raw] = c.literal("LOAD(dx)")
    for t in d.targets:
        if t.section < k:
            i = at.targets[t.node]
            rows[f"of_q{i}"] = f"const REAL *restrict of_q{i} = {_change(c, t.node)} + i * n_{t.size};"
            seeds[t.node] = c.literal(f"LOAD(of_q{i})")
    order = ordered([t.node for t in targets], seeds)
    moved = push(order, seeds, d.slopes)
    goals = []
    for t in targets:
        i = at.targets[t.node]
        rows[f"to_q{i}"] = f"REAL *restrict to_q{i} = {_change(c, t.node)} + i * n_{t.size};"
        goals.append((f"STORE(to_q{i}, {{}});", moved.get(t.node, d.graph.constant(0))))
        j = c.product_of(t)
        if j is not None:
            rows[f"to_v{j}"] = f"REAL *restrict to_v{j} = v{j}_ + i * n_{t.size};"
            goals.append((f"STORE(to_v{j}, {{}});", d.value(t.node)))
    c.pointwise(w, size, rows, goals, [])


class _Adjoint:
    """The adjoint of one cell, with what has been written to in a step, and where."""

    def __init__(self, c: Emitter) -> None:
        self.c, self.w = c, Writer()
        self.written: set[Expression] = set()
        self.later: set[Expression] = {p.vector for p in c.d.products if p.vector not in c.states}
        for t in c.d.targets:
            self.later |= {e for e in t.terms if e in c.at.targets and c.d.section(e) < t.section}

    def text(self) -> str:
        c, d, at, w = self.c, self.c.d, self.c.at, self.w
        products = range(len(d.products))
        c.begin(w, "adjoint", "ld slots ld_o")
        names = [(f"U_{s}", False) for s in (*d.returned, "o_")] + c.point()
        names += [("dX", True), *((f"d0_{s}", True) for s in d.states), ("dKx", True)]
        names += [*((f"dK{j}", True) for j in products), *((f"sum_{b}", True) for b in d.parameters), ("dKo", True)]
        w.pointers(names)
        size = _read_size(c)
        w(f"const long slot = tile * ld, few = O <= FEW, sums_o = few ? O * {size} : tile * ld_o;")
        blocks = [(j, b) for j, b in enumerate(at.blocks) if b]
        outside = [(j, p) for j, p in enumerate(d.products) if p.vector not in c.states]
        parts = [("ring", "slots * slot + 64"), ("nothing", " + ".join(f"n_{s}" for s in at.sizes))]
        parts += [(f"W{j}", f"NAME(packed_size)(w{j}, n_{p.size})") for j, p in enumerate(d.products)]
        parts += [(f"Wx{j}", f"NAME(packed_size)({b.width}, rows_x)") for j, b in blocks]
        parts += [(f"g{at.targets[e]}_", f"tile * n_{d.size(e)}") for e in sorted(self.later, key=lambda e: e.index)]
        parts += [(f"v{j}_", f"slots * tile * n_{p.size}") for j, p in outside]
        if d.raw is not None:
            parts.append(("graw", f"tile * n_{next(iter(d.states.values()))}"))
        parts += [("Wo", f"NAME(packed_size)(O, {size})"), ("spare", "sums_o")]
        if c.read not in d.states:
            parts.append(("g_read", f"tile * {size}"))
        c.pool(w, parts)
        w(f"if (U_o_) NAME(pack)(Wo, Ko, 1, O, O, {size});", "NAME(zero)(spare, sums_o);")
        for j, p in enumerate(d.products):
            w(f"NAME(pack)(W{j}, K{j}, 1, w{j}, w{j}, n_{p.size});")
        w(f"const long wx = {total(x.size for x in d.input_columns)};")
        for j, b in blocks:
            w(f"if (dX) NAME(pack)(Wx{j}, Kx + ({b.first}), 1, wx, {b.width}, rows_x);")
        w(f"NAME(zero)(nothing, {' + '.join(f'n_{s}' for s in at.sizes)});", "NAME(zero)(ring, slots * slot + 64);")
        w("for (long v = 0; v < N; v++) {", f"REAL *const read = dKo ? dKo + v * ({size} + 1) * O : NULL;")
        w("for (long row = first; row < last; row += tile) {")
        w("const long m = last - row < tile ? last - row : tile, at = v * B + row;")
        for s, own in d.states.items():
            w(f"REAL *const acc_{s} = d0_{s} + at * n_{own};", f"NAME(zero)(acc_{s}, m * n_{own});")
        if self.joined:
            w("if (U_o_) {", f"const NAME(term) last_o = {self._of_readout('T - 1')};")
            w(f"NAME(multiply)(acc_{c.read}, {size}, 0, m, {size}, &last_o, 1, NOTHING);", "}")
        w("long held = 0;", "for (long t = T - 1; t >= 0; t--) {")
        w("const long now = t * N * B + at, here = t * B + row;")
        c.olds(w)
        w("REAL *const da_ = ring + held * slot;")
        for j, p in outside:
            w(f"REAL *const u{j}_ = v{j}_ + held * tile * n_{p.size};")
        w("held++;")
        for s, own in d.states.items():
            w(f"if (U_{s}) NAME(add)(acc_{s}, U_{s} + now * n_{own}, m * n_{own});")
        if not self.joined:
            to = f"acc_{c.read}" if c.read in d.states else "g_read"
            w("if (U_o_) {", f"const NAME(term) now_o = {self._of_readout('t')};")
            if c.read not in d.states:
                w(f"if (U_{c.read}) NAME(copy)(g_read, U_{c.read} + now * {size}, m * {size});")
                w(f"else NAME(zero)(g_read, m * {size});")
            w(f"NAME(multiply)({to}, {size}, 1, m, {size}, &now_o, 1, NOTHING);", "}")
        for k in range(len(d.products), -1, -1):
            for own, targets in at.groups(k):
                self._pull_group(k, own, targets)
            if k:
                self._back(k - 1)
        for s, e in d.before.items():
            if e not in self.written:
                w(f"NAME(zero)(acc_{s}, m * n_{d.states[s]});")
        self._on_inputs(blocks)
        self._sum(blocks)
        self._sum_readout()
        w("}", "}")
        w("if (U_o_ && few) {", f"for (long k = 0; k < O; k++) for (long j = 0; j < {size}; j++)")
        w(f"  read[j * O + k] += spare[k * {size} + j];", "NAME(zero)(spare, sums_o);", "}")
        w("}", "return 0;", "}")
        return w.text

    @property
    def joined(self) -> bool:
        """Whether the readout's cotangents join the product that carries those of its state back in time."""
        d = self.c.d
        return bool(d.products) and d.products[0].vector is d.before.get(self.c.read)

    def _of_readout(self, t: str) -> str:
        return f"NAME(packed_term)(U_o_ + (({t}) * N * B + at) * O, O, O, Wo)"

    def _sum_readout(self) -> None:
        w, h = self.w, f"seq_{self.c.read} + here * {_read_size(self.c)}"
        size = _read_size(self.c)
        w("if (U_o_) {", "const REAL *const u_o = U_o_ + now * O;", "if (few) {")
        w(f"NAME(few_sums)(spare, u_o, {h}, m, {size}, O);", "} else {")
        w("for (long i = 0; i < m; i++) NAME(copy)(spare + i * ld_o, u_o + i * O, O);")
        w(f"NAME(correlate)(read, O, {size}, O, 1, m, {h}, {size}, 0, spare, ld_o, 0);", "}")
        w(f"for (long i = 0; i < m; i++) NAME(add)(read + {size} * O, u_o + i * O, O);", "}")

    def _assign(self, e: Expression, place: str) -> str:
        """Set what is written for the first time in a step, add to it later."""
        before = f"LOAD({place}) + " if e in self.written else ""
        self.written.add(e)
        return f"STORE({place}, {before}{{}});"

    def _pull_group(self, k: int, size: str, targets: Sequence[Target]) -> None:
        c, d, at = self.c, self.c.d, self.c.at
        rows = c.rows()
        rows["da"] = "REAL *restrict da = da_ + i * ld;"
        seeds: dict[Expression, Expression] = {}
        reads = []
        for t in targets:
            i, name = at.targets[t.node], at.names.get(t.node)
            g: list[str] = []
            if name in d.states:
                rows[f"g_{name}"] = f"REAL *restrict g_{name} = acc_{name} + i * n_{t.size};"
                g.append(f"LOAD(g_{name})")
            elif name is not None:
                given = f"U_{name} ? U_{name} + (now + i) * n_{t.size} : nothing"
                given = f"U_o_ ? g_read + i * n_{t.size} : {given}" if name == c.read else given
                rows[f"u_{name}"] = f"const REAL *restrict u_{name} = {given};"
                g.append(f"LOAD(u_{name})")
            if t.node in self.later and t.node in self.written:
                rows[f"g{i}"] = f"REAL *restrict g{i} = g{i}_ + i * n_{t.size};"
                g.append(f"LOAD(g{i})")
            if g:
                reads.append(f"const VEC G{i} = {' + '.join(g)};")
                seeds[t.node] = c.literal(f"G{i}")
        inside = {t.node for t in targets}
        others = set(at.targets) - inside
        ends = frozenset((*at.places, *others))
        order = ordered(inside, ends)
        pulled = pull(order, seeds, ends, d.slopes)
        goals: list[tuple[str, Expression]] = []
        for e, start in at.places.items():
            if e in pulled:
                goals.append((self._assign(e, f"da + {start}"), pulled[e]))
        for e in others:
            if e in pulled:
                i = at.targets[e]
                rows[f"g{i}"] = f"REAL *restrict g{i} = g{i}_ + i * n_{d.size(e)};"
                goals.append((self._assign(e, f"g{i}"), pulled[e]))
        for s, e in d.before.items():
            if e in pulled:
                rows[f"g_{s}"] = f"REAL *restrict g_{s} = acc_{s} + i * n_{d.states[s]};"
                goals.append((self._assign(e, f"g_{s}"), pulled[e]))
        for b, own in d.parameters.items():
            leaf = d.graph.leaf("parameter", b)
            if leaf in pulled:
                rows[f"add_{b}"] = f"REAL *restrict add_{b} = sum_{b} + v * n_{own};"
                goals.append((f"STORE(add_{b}, LOAD(add_{b}) + {{}});", pulled[leaf]))
        if d.raw is not None and d.raw in pulled:
            rows["gx"] = f"REAL *restrict gx = graw + i * n_{size};"
            goals.append((self._assign(d.raw, "gx"), pulled[d.raw]))
        for t in targets:
            j = c.product_of(t)
            if j is not None:
                rows[f"to_v{j}"] = f"REAL *restrict to_v{j} = u{j}_ + i * n_{t.size};"
                goals.append((f"STORE(to_v{j}, {{}});", d.value(t.node)))
        if goals:
            c.pointwise(self.w, size, rows, goals, reads)

    def _back(self, j: int) -> None:
        """Cotangents of the vector of product j."""
        c, p, w = self.c, self.c.d.products[j], self.w
        add = int(p.vector in self.written)
        self.written.add(p.vector)
        to = f"acc_{c.states[p.vector]}" if p.vector in c.states else f"g{c.at.targets[p.vector]}_"
        w("{", "NAME(term) back[2];", "int count = 1;")
        w(f"back[0] = NAME(packed_term)(da_ + ({c.at.starts[j]}), ld, w{j}, W{j});")
        soon, length = c.ahead
        ahead = f"t ? SPAN({soon} + (here - B) * {length}, m * {length}) : NOTHING" if j == 0 else "NOTHING"
        if j == 0 and self.joined:
            w(f"if (U_o_ && t) back[count++] = {self._of_readout('t - 1')};")
        w(f"NAME(multiply)({to}, n_{p.size}, {add}, m, n_{p.size}, back, count, {ahead});", "}")

    def _on_inputs(self, blocks: Sequence[tuple[int, object]]) -> None:
        c, w = self.c, self.w
        if not blocks and c.d.raw is None:
            w("if (dX) NAME(zero)(dX + now * V, m * V);")
            return
        w("if (dX && !rows_x) {")
        for block in filter(None, c.at.blocks):
            row = f"dX + (now + i) * V + ({block.first}), da_ + i * ld + ({block.start})"
            w(f"for (long i = 0; i < m; i++) NAME(copy)({row}, {block.width});")
        w("} else if (dX) {", f"NAME(term) on_X[{max(1, len(blocks))}];", "int count = 0;")
        for j, _ in blocks:
            b = c.at.blocks[j]
            assert b is not None
            w(f"on_X[count++] = NAME(packed_term)(da_ + ({b.start}), ld, {b.width}, Wx{j});")
        w("NAME(multiply)(dX + now * V, V, 0, m, rows_x, on_X, count, NOTHING);")
        if c.d.raw is not None and c.d.raw in self.written:
            size = next(iter(c.d.states.values()))
            w(f"for (long i = 0; i < m; i++) NAME(add)(dX + (now + i) * V, graw + i * n_{size}, n_{size});")
        w("}")

    def _sum(self, blocks: Sequence[tuple[int, object]]) -> None:
        """Sums over steps and sequences, put off until the ring is full."""
        c, d, w = self.c, self.c.d, self.w
        w("if (held == slots || t <= 1) {", "const long newest = t + held - 1;")
        for j, p in enumerate(d.products):
            if p.vector in c.states:
                s = c.states[p.vector]
                rows = f"t ? seq_{s} + ((newest - 1) * B + row) * n_{p.size} : first_{s} + row * n_{p.size}"
                step = f"-B * n_{p.size}"
            else:
                rows, step = f"v{j}_", f"tile * n_{p.size}"
            w(f"NAME(correlate)(dK{j} + v * n_{p.size} * w{j}, w{j}, n_{p.size}, w{j}, held, m,")
            w(f"  {rows}, n_{p.size}, {step}, ring + ({c.at.starts[j]}), ld, slot);")
        for j, _ in blocks:
            b = c.at.blocks[j]
            assert b is not None
            w(f"NAME(correlate)(dKx + v * rows_x * wx + ({b.first}), wx, rows_x, {b.width}, held, m,")
            w(f"  X + (newest * B + row) * V, V, -B * V, ring + ({b.start}), ld, slot);")
        w("held = 0;", "}")


def adjoint(c: Emitter) -> str:
    """n: SIZES, sizes, first, last, tile, ld (numbers in a row of the ring), slots (steps that it holds), ld_o (>= O).

    p: cotangents of states, outputs and the readout (T, N, B, .), NULL for zero; arguments, results; dX (T, N, B, V) or
    NULL, those of first states (N, B, .); and dK_x, dK_j, those of parameters, dK_o, which are added to.
    """
    return _Adjoint(c).text()
