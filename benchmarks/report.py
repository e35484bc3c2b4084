"""Tables (Markdown) and plots of what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import products, scaling, steps
from benchmarks.claims import Claim
from benchmarks.clock import Quartiles


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with its columns aligned, the first to the left and the others to the right."""
    widths = [max(3, *(len(r[i]) for r in (head, *rows))) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths))
    return "\n".join([line(head), f"|{rule}|", *map(line, rows)])


def _number(x: float | None, form: str = ".2f") -> str:
    return "" if x is None else format(x, form)


def _with_quartiles(q: Quartiles | None) -> str:
    return "" if q is None else f"{q.median:.2f} ({q.low:.2f}-{q.high:.2f})"


def _mib(x: int | None) -> str:
    return "" if x is None else f"{x / 2**20:.1f}"


def product_table(about: str, rows: Sequence[products.Row]) -> str:
    """The table of one case, with the skipped methods and their reasons below it."""
    head = ("method", "ms", "gradients", "set-up", "GFLOP/s", "of mm", "of floor", "peak MiB", "kept MiB", "difference")
    body = [
        (
            r.method,
            _number(r.ms, ".3g" if (r.ms or 0) < 1 else ".1f"),
            _with_quartiles(r.gradients),
            _number(r.set_up),
            _number(r.gflops, ".1f"),
            _number(r.of_mm),
            _number(r.of_floor),
            _mib(r.peak),
            _mib(r.kept),
            _number(r.difference, ".0e"),
        )
        for r in rows
        if r.skipped is None
    ]
    missing = [f"- {r.method}: {r.skipped}" for r in rows if r.skipped is not None]
    notes = "\n\nNot measured:\n\n" + "\n".join(missing) if missing else ""
    return f"### {about}\n\n{_table(head, body)}{notes}\n"


def step_table(rows: Sequence[steps.Row]) -> str:
    """Whole steps against the sum of their parts."""
    head = ("case", "step ms", "step / sum", "gradients", "products", "evaluations", "linearisation")
    body = [
        (
            r.case,
            f"{r.step_ms:.1f}",
            _with_quartiles(r.ratio),
            f"{r.gradients} x {r.gradient_ms:.1f} ms",
            f"{r.products} x {r.product_ms:.1f} ms",
            f"{r.evaluations} x {r.evaluation_ms:.1f} ms",
            r.linearisation,
        )
        for r in rows
    ]
    return f"### Whole steps against the sum of their parts\n\n{_table(head, body)}\n"


def scaling_table(rows: Sequence[scaling.Row]) -> str:
    """Growth along one size."""
    head = ("T", "B", "h", "ms", "ps / (T B h^2)", "relative", "kept MiB", "formula MiB", "peak MiB")
    body = [
        (
            str(r.T),
            str(r.B),
            str(r.h),
            _with_quartiles(r.ms),
            f"{r.ps_per_tbh2:.1f}",
            _number(r.relative),
            _mib(r.kept),
            _mib(r.formula),
            _mib(r.peak),
        )
        for r in rows
    ]
    return f"### Product of the tanh RNN along {rows[0].along}\n\n{_table(head, body)}\n"


def claim_table(claims: Sequence[Claim]) -> str:
    """Measured numbers and their limits; empty if there are none."""
    if not claims:
        return ""
    body = [
        (
            c.what,
            f"{c.measured:.3g}",
            f"{'at most' if c.at_most else 'at least'} {c.limit:g}",
            "yes" if c.holds else "NO",
        )
        for c in claims
    ]
    return f"### Limits\n\n{_table(('claim', 'measured', 'limit', 'kept'), body)}\n"


def plot_products(found: Mapping[str, Sequence[products.Row]], path: Path) -> None:
    """Bars: gradients per product, one panel a case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = min(2, len(found))
    lines = -(-len(found) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(7 * columns, 2.9 * lines), squeeze=False, layout="constrained")
    for axis in axes.flat[len(found) :]:
        axis.axis("off")
    for axis, (name, rows) in zip(axes.flat, found.items(), strict=False):
        shown = [(r.method, r.gradients) for r in rows if r.gradients and not r.method.startswith(products.YARDSTICK)]
        middles = [q.median for _, q in shown]
        spread = [[q.median - q.low for _, q in shown], [q.high - q.median for _, q in shown]]
        colours = ["C0" if m.startswith("hfopt") else "0.55" if "gradient" in m else "C1" for m, _ in shown]
        bars = axis.barh([m for m, _ in shown], middles, xerr=spread, color=colours, error_kw={"lw": 0.8})
        axis.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
        axis.axvline(1.0, color="0.3", lw=0.8, ls=":")
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.set_title(name)
        axis.set_xlabel("gradients of the plain model")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_scaling(found: Mapping[str, Sequence[scaling.Row]], path: Path) -> None:
    """Time per T B h^2 along each size; a level line is proportional growth."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(found), figsize=(4 * len(found), 3), squeeze=False, layout="constrained")
    for axis, (along, rows) in zip(axes.flat, found.items(), strict=True):
        sizes = [getattr(r, along) for r in rows]
        axis.plot(sizes, [r.ps_per_tbh2 for r in rows], "o-")
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes, [str(s) for s in sizes])
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
        axis.set_xlabel(along)
        axis.set_ylabel("ps / (T B h$^2$)")
    figure.savefig(path, dpi=110)
    plt.close(figure)
