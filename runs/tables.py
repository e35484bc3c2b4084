"""The tables that `python -m runs.reproduce` runs: which runs they hold, and what was published about them."""

from __future__ import annotations

from dataclasses import dataclass

from pathological import PROBLEMS
from runs.cells import Cell
from runs.presets import PATHOLOGICAL


@dataclass(frozen=True)
class Row:
    """Runs that differ in their seeds alone.

    Attributes:
        title: what the row is called.
        words: what is typed after the run file's name, but for the seed.
        claim: what was published, or what is to be found out.
        against: the title of the row of the same table whose time this one is measured in, if any.
        module: the run file.
        seeds: how many seeds the row has by default; None: as many as its table says.
    """

    title: str
    words: tuple[str, ...]
    claim: str
    against: str | None = None
    module: str = "pathological"
    seeds: int | None = None

    def cells(self, seeds: int) -> list[Cell]:
        """The runs of the first so many seeds."""
        return [Cell(self.module, self.words, seed) for seed in range(seeds)]


@dataclass(frozen=True)
class Table:
    """Rows, with what a reader has to know about them.

    Attributes:
        title, text: what the rows have in common.
        rows: the rows.
        seeds: how many seeds each row has by default.
        shown: the title of the row whose first solved run is shown from inside: its curves and its hidden units.
    """

    title: str
    text: str
    rows: tuple[Row, ...]
    seeds: int = 3
    shown: str | None = None


# Martens & Sutskever (ICML 2011) and Sutskever's thesis (2013), nets of 100 tanh units.
PUBLISHED = dict.fromkeys(PROBLEMS, "up to T = 200") | {
    "xor": "T = 100 in rare cases",
    "memorization_5bit": "up to T = 200 with structural damping",
    "memorization_20bit": "up to T = 200 with structural damping",
}


def _problems(*lengths: int, xor: int) -> tuple[Row, ...]:
    """All problems at the given lengths; XOR up to its own."""
    return tuple(
        Row(f"{name}, T = {T}", (name, "--T", str(T)), PUBLISHED[name])
        for T in lengths
        for name in PROBLEMS
        if name != "xor" or T in range(xor + 1)
    )


def _damping(T: int) -> tuple[Row, ...]:
    with_, without = "solved", "not solved at lags above 50"
    return tuple(
        Row(f"{name}, T = {T}, mu = {mu:g}", (name, "--T", str(T), *words), claim)
        for name in ("memorization_5bit", "memorization_20bit")
        for mu, words, claim in ((PATHOLOGICAL[name].structural, (), with_), (0, ("--structural", "0"), without))
    )


def _times(*lengths: int) -> tuple[Row, ...]:
    rows = []
    for T in lengths:
        old = f"multiplication, T = {T}, settings of 2011"
        rows.append(Row(f"multiplication, T = {T}", ("multiplication", "--T", str(T)), "", against=old))
        rows.append(Row(old, ("multiplication-2011", "--T", str(T)), "up to T = 200"))
    return tuple(rows)


TABLES = {
    "pathological": Table(
        "The pathological problems at T = 30 and T = 50",
        "The networks have 100 tanh units, and the problems are those of the paper. A problem counts as solved when "
        "fewer than 1% of 10,000 test sequences are answered wrongly: numbers are off by more than 0.04, bits have the "
        "wrong sign, classes the wrong maximum. The random permutation is scored at its last step, memorization at all "
        "steps. Weight decay is 1e-6 for multiplication, XOR and 20-bit memorization, and 2e-5 otherwise.",
        _problems(30, 50, xor=30),
    ),
    "pathological-long": Table(
        "The pathological problems at T = 100 and T = 200",
        "Networks, settings and the measure of success are the same as above, with one seed unless more are listed.",
        _problems(100, 200, xor=100),
        seeds=1,
        shown="multiplication, T = 100",
    ),
    "memorization-damping": Table(
        "Memorization at T = 100 with and without structural damping",
        "The paper claims that structural damping is essential at long lags (above about 50). The two rows of each "
        "problem differ only in mu.",
        _damping(100),
    ),
    "time-to-solution": Table(
        "Time to solution",
        "The table compares the settings of this project with those of 2011 (gradient of 10,000 sequences, "
        "curvature of 1,000, at most 300 CG iterations, lambda 0.1 at the start, mu = 1/30, weight decay 2e-5). "
        "Both run in the same program, so differences are due to the settings and not to faster products. This "
        "project uses batches of 4,000 and 500, at most 30 iterations, a lambda found at the first step, and weight "
        "decay 1e-6. The published weight decay shrinks the recurrent weights before anything is learned.",
        _times(30, 100),
    ),
}
