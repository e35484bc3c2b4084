"""What shows on a terminal while work goes on: how far it is, how long it takes still, what a step is doing.

It is the last line of the terminal, below what is printed; pipes, files and notebooks get the printed lines alone.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hfopt.experiment.report import duration
from hfopt.linalg.watching import watching

_RECENT = 10  # steps that say how long the next ones take
_WIDE = 60  # columns from which there is room for a bar
_BAR = 16


class Bar:
    """How far something is that consists of steps.

    Args:
        what: one of them is called.
        limited: whether it may end before the last step, so that the time left is the most it can take.
    """

    def __init__(self, what: str = "step", *, limited: bool = False) -> None:
        self._what, self._limited = what, limited
        self.done, self.total, self.products = 0, 0, 0
        self._began = time.perf_counter()
        self._times: list[float] = []

    def at(self, done: int, total: int) -> None:
        """So many steps are done of so many."""
        now = time.perf_counter()
        if done == self.done + 1:
            self._times = [*self._times, now - self._began][-_RECENT:]
        self.done, self.total, self.products, self._began = done, total, 0, now

    def product(self) -> None:
        """One more product has begun."""
        self.products += 1

    def words(self) -> str:
        """What there is to say now."""
        said = [f"{self._what} {self.done} of {self.total}"]
        if self.products:
            said.append(f"{self.products} products")
        if self._times:
            pace = sum(self._times) / len(self._times)
            left = max(0.0, pace * (self.total - self.done) - (time.perf_counter() - self._began))
            said.append(f"{'at most ' if self._limited else ''}{duration(left)} left")
        return ", ".join(said)

    def line(self, width: int) -> Any:
        """The line for a terminal of so many columns."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        text = Text(self.words(), style="dim", no_wrap=True, overflow="ellipsis")
        if width < _WIDE:
            return text
        grid = Table.grid(padding=(0, 1))
        grid.add_row(
            ProgressBar(max(1, self.total), self.done, _BAR, complete_style="cyan", finished_style="cyan"), text
        )
        return grid


@contextmanager
def shown(bar: Bar, *, quiet: bool = False) -> Iterator[Bar]:
    """Show a bar below what is printed inside the block, where standard output is a terminal.

    What is printed appears above it. At the end the bar goes, and the printed lines stay.
    """
    if quiet or not is_terminal():
        yield bar
        return
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False, markup=False, emoji=False)
    live = Live(
        console=console,
        get_renderable=lambda: bar.line(console.width),
        refresh_per_second=4,
        transient=True,
        redirect_stderr=False,
    )
    with live, watching(bar.product):
        yield bar


def is_terminal() -> bool:
    """Whether a line of standard output can be written over."""
    stream = sys.stdout
    return bool(getattr(stream, "isatty", bool)()) and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")
