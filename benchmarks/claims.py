"""What the measurements are held against: limits on times, and whether they were kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

from benchmarks import products, scaling
from benchmarks.methods import CURVLINOPS

OURS = "hfopt, auto"


@dataclass(frozen=True)
class Claim:
    """A measured number and its limit, an upper one if ``at_most``."""

    what: str
    measured: float
    limit: float
    at_most: bool = True

    @property
    def holds(self) -> bool:
        """Whether the number keeps the limit."""
        return self.measured <= self.limit if self.at_most else self.measured >= self.limit


def of_products(name: str, rows: Sequence[products.Row]) -> Iterator[Claim]:
    """Limits on the product of one case on a CPU; none for what was not measured."""
    ours = next((r for r in rows if r.method == OURS and r.skipped is None), None)
    if ours is None:
        return
    if fnmatch(name, "rnn-T[12]00-B1000") and ours.gradients is not None and ours.of_mm is not None:
        yield Claim(f"{name}: product, in gradients of torch.nn.RNN", ours.gradients.median, 0.6)
        yield Claim(f"{name}: share of torch.mm's rate, by 8 T B h^2", ours.of_mm, 0.7, at_most=False)
    if name in ("mrnn", "lstm", "gru") and ours.of_floor is not None and ours.ms is not None:
        yield Claim(f"{name}: product, in units of its floor", ours.of_floor, 1.5)
        theirs = [r.ms for r in rows if r.method.startswith(CURVLINOPS) and r.ms is not None]
        if theirs:
            yield Claim(f"{name}: times faster than curvlinops at its best", min(theirs) / ours.ms, 2.5, at_most=False)


def of_scaling(along: str, rows: Sequence[scaling.Row]) -> Iterator[Claim]:
    """Proportional growth of time with T and B over a factor of eight, and memory as the formula has it."""
    if along in ("T", "B"):
        first, last = rows[0], rows[-1]
        growth = (last.relative / first.relative - 1.0) * 100
        factor = getattr(last, along) / getattr(first, along)
        yield Claim(f"time per {along}, over a factor of {factor:g}: change in %", abs(growth), 10.0)
    worst = max(abs(r.kept / r.formula - 1.0) for r in rows) * 100
    yield Claim(f"memory kept along {along}: deviation from the formula in %", worst, 10.0)
